"""Gradient of a convolution's filters as one implicit-GEMM main loop, split over the pixels, in one launch.

``dw[k, r, s, c] = sum over output pixels of dy[n, p, q, k] * PROLOGUE(x)[n, h, w, c]``

A program owns one tile of dw (filters by channels of a tap, or by elements of the flattened filter) and a share of the pixels::

                      channels, tap (r, s)
                    +-------------------+
                    |                   |     step = a box of M output pixels
      K filters     |     acc fp32      |       dy [M, K]        by LOAD, through GRADIENT
                    |                   |       pixels [M, C]    by PIXELS, moved by the tap, through PROLOGUE
                    +-------------------+       acc += dy^T . pixels
                              |
        one share:   the epilogue, one store
        several:     partials in fp32; the last share of each tile adds them in their order (finish.py), then the same

dw has few tiles and the reduction is long (3136 pixels an image against 64 filters in ResNet's first stage), hence the shares.
Programs that run together have the same pixels and different tiles, so dy and x come from memory once.

With given statistics G is made from dz, and the factor ``gamma * invstd`` is applied to the result, in fp32. ``dgamma`` then
needs ``<w_k, G_k>`` over all tiles of a filter: each tile leaves its part, the last one of a row of tiles adds them in order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import EXTENTS, Place, Sizes, Step, lanes_of, loaded, locate
from .finish import MEETING, arrive, ordered_sum, part_offsets
from .numerics import column_sums, dot
from .wgrad_end import write_rest, write_tile

#: Elements of a tile that are added together: a tile's parts are joined piece by piece, so that the registers which the main
#: loop's accumulators had hold several parts on their way. (128 by 128, sm_90: 130 registers instead of 184 in one piece.)
PIECE = tl.constexpr(4096)


class Memory(NamedTuple):
    """Where programs meet that share the pixels.

    Attributes:
        partials: pointer to fp32 [tiles, shares, a tile's accumulators].
        counters: pointer to ``counters_of`` zeros, int32, a tile of dw; then one a tile of filters.
        products: pointer to fp32 [tiles of a filter, K]: parts of ``<w_k, G_k>``.
    """

    partials: Any
    counters: Any
    products: Any


@triton.jit
def direct(
    dz,
    y,
    x,
    first,
    end,
    rows,
    columns,
    column,
    filters,
    coefficients,
    sizes,
    GRADIENT: tl.constexpr,
    PROLOGUE: tl.constexpr,
    prologue_args,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``acc [K, 1]`` without tensor cores: one tap and channel of each filter's own group. For depthwise convolutions."""
    M: tl.constexpr = TILE.images * TILE.rows * TILE.columns
    K: tl.constexpr = TILE.filters
    acc = tl.zeros((M, K), dtype=tl.float32)
    exists = (filters < sizes.K)[None, :]
    tap = column // TAPS.group_channels
    channels = filters // TAPS.group_filters * TAPS.group_channels + column % TAPS.group_channels
    for tile in range(first, end):
        place = box_of(tile, rows, columns, 0, 0, 0, TILE)
        lanes = lanes_of(place, sizes, TILE, WIDE)
        output = (lanes.n * sizes.P + lanes.p) * sizes.Q + lanes.q
        offsets = (output * sizes.K)[:, None] + filters[None, :]
        dy = tl.load(dz + offsets, mask=lanes.inside[:, None] & exists, other=0.0)
        made = None
        if y is not None:
            made = tl.load(y + offsets, mask=lanes.inside[:, None] & exists, other=0.0)
        dy = GRADIENT(dy, made, lanes.inside[:, None], coefficients)
        pixel, inside = locate(lanes, tap // TAPS.S, tap % TAPS.S, sizes, TAPS)
        inside = inside[:, None]
        pixels = tl.load(x + (pixel * sizes.C)[:, None] + channels[None, :], mask=inside & exists, other=0.0)
        pixels = PROLOGUE(pixels, channels, inside, *prologue_args)
        acc += dy.to(tl.float32) * pixels.to(tl.float32)
    return column_sums(acc)[:, None]


@triton.jit
def box_of(tile, rows, columns, k, c, c_end, TILE: tl.constexpr):
    """Place of a tile of output pixels, of which an image has ``rows * columns``."""
    n = tile // (rows * columns) * TILE.images
    p = tile // columns % rows * TILE.rows
    q = tile % columns * TILE.columns
    return Place(n, p, q, k, c, c_end)


@triton.jit
def own_channels(k, sizes, TAPS: tl.constexpr, TILE: tl.constexpr, SPANS: tl.constexpr):
    """First channel of the groups that a tile of filters belongs to, and one past the last."""
    if TAPS.group_channels == 0:
        return 0, sizes.C
    else:
        last = tl.minimum(k + TILE.filters, sizes.K) - 1
        c = k // TAPS.group_filters * TAPS.group_channels
        if SPANS:
            c = c // TILE.channels * TILE.channels  # as in conv.py: alignment of boxes
        return c, (last // TAPS.group_filters + 1) * TAPS.group_channels


@triton.jit
def main_loop(
    dz,
    y,
    x,
    first,
    end,
    rows,
    columns,
    column,
    k,
    coefficients,
    sizes,
    GRADIENT: tl.constexpr,
    PROLOGUE: tl.constexpr,
    prologue_args,
    LOAD: tl.constexpr,
    PIXELS: tl.constexpr,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
    FLAT: tl.constexpr,
    SPANS: tl.constexpr,
    RIM: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The accumulator [K, C] of one tile over the pixel tiles from ``first`` to ``end``."""
    c, c_end = own_channels(k, sizes, TAPS, TILE, SPANS)
    K: tl.constexpr = TILE.filters
    C: tl.constexpr = TILE.channels
    acc = tl.zeros((K, C), dtype=tl.float32)
    tap = column % (TAPS.R * TAPS.S)
    step = Step(tap // TAPS.S, tap % TAPS.S, column // (TAPS.R * TAPS.S) * TILE.channels, column)
    n, p, q, _, _, _ = box_of(first, rows, columns, k, c, c_end, TILE)
    for _ in range(first, end):
        place = Place(n, p, q, k, c, c_end)
        lanes = lanes_of(place, sizes, TILE, WIDE)
        dy = LOAD(dz, place, lanes, 0, 0, k, sizes, TILE)
        made = None
        if y is not None:
            made = LOAD(y, place, lanes, 0, 0, k, sizes, TILE)
        pixels = PIXELS(x, place, lanes, step, sizes, TAPS, TILE)
        channels, inside = loaded(place, lanes, step, sizes, TAPS, TILE, FLAT)
        if RIM:
            # A box past the output's border makes a dy and may see pixels of x: zeros on both sides, since there may be a NaN,
            # which only a selection behind the prologue keeps out.
            dy = GRADIENT(dy, made, lanes.inside[:, None], coefficients)
            pixels = tl.where(inside, PROLOGUE(pixels, channels, None, *prologue_args), 0.0)
        else:
            dy = GRADIENT(dy, made, None, coefficients)
            if FLAT or TAPS.padding_h != 0 or TAPS.padding_w != 0:
                pixels = PROLOGUE(pixels, channels, inside, *prologue_args)
            else:
                pixels = PROLOGUE(pixels, channels, None, *prologue_args)
        acc = dot(dy.trans(), pixels, acc, PRECISION)
        n, p, q = next_box(n, p, q, sizes, TILE)
    return acc


@triton.jit
def next_box(n, p, q, sizes, TILE: tl.constexpr):
    """The box behind the one at (n, p, q), in the order of :func:`box_of`, without its divisions."""
    q += TILE.columns
    end_of_row = q >= sizes.Q
    p += tl.where(end_of_row, TILE.rows, 0)
    q = tl.where(end_of_row, 0, q)
    end_of_image = p >= sizes.P
    n += tl.where(end_of_image, TILE.images, 0)
    p = tl.where(end_of_image, 0, p)
    return n, p, q


@triton.jit
def elements(
    k,
    filters,
    column,
    first,
    sizes,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
    FLAT: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Offsets [K, WIDTH] into dw of a tile's elements, from its column ``first`` on, and which exist."""
    exists = (filters < sizes.K)[:, None]
    if FLAT:
        length = TAPS.R * TAPS.S * sizes.C
        element = column * TILE.channels + first + tl.arange(0, WIDTH)
        return (filters * length)[:, None] + element[None, :], exists & (element < length)[None, :]
    else:
        taps: tl.constexpr = TAPS.R * TAPS.S
        c, c_end = own_channels(k, sizes, TAPS, TILE, SPANS)
        channels = c + column // taps * TILE.channels + first + tl.arange(0, WIDTH)
        exists = exists & (channels < c_end)[None, :]
        start = (filters * taps + column % taps)[:, None]
        if TAPS.group_channels == 0:
            return start * sizes.C + channels[None, :], exists
        else:
            within = channels[None, :] - (filters // TAPS.group_filters * TAPS.group_channels)[:, None]
            exists = exists & (within >= 0) & (within < TAPS.group_channels)
            return start * TAPS.group_channels + within, exists


@triton.jit
def where(
    k,
    filters,
    exists,
    column,
    first,
    sizes,
    WIDTH: tl.constexpr,
    LOAD: tl.constexpr,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
    FLAT: tl.constexpr,
    SPANS: tl.constexpr,
):
    """As :func:`elements`, also of what :func:`direct` makes."""
    if LOAD is None:
        return (filters * (TAPS.R * TAPS.S * TAPS.group_channels) + column)[:, None], exists[:, None]
    else:
        return elements(k, filters, column, first, sizes, WIDTH, TAPS, TILE, FLAT, SPANS)


@triton.jit(do_not_specialize_on_alignment=(*EXTENTS, *MEETING))
def wgrad(
    dz,
    y,
    x,
    N,
    H,
    W,
    P,
    Q,
    depths,
    columns,
    results,
    given,
    shares,
    group,
    counters_of,
    memory,
    COEFFICIENTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    gradient_args,
    PROLOGUE: tl.constexpr,
    prologue_args,
    LOAD: tl.constexpr,
    PIXELS: tl.constexpr,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
    FLAT: tl.constexpr,
    SPANS: tl.constexpr,
    RIM: tl.constexpr,
    SHARED: tl.constexpr,
    SCALED: tl.constexpr,
    BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradients of a convolution's parameters, one launch.

    Args:
        dz: [N, P, Q, K] fp32, fp16 or bf16: descriptor or pointer, whichever ``LOAD`` wants.
        y: likewise, for a ``GRADIENT`` that reads it, else None.
        x: [N, H, W, C] of the same type, as ``PIXELS`` wants it.
        N, H, W, P, Q, depths: :class:`.boxes.Sizes` of the forward convolution.
        columns: tiles of dw in a row, taps by chunks of channels (of the groups of a tile of filters).
        results, given: of wgrad_end.py.
        shares: programs of a tile of dw. group: how many of them the first level of the sum takes, see finish.py.
        counters_of: ``cdiv(shares, group) + 1``. memory: :class:`Memory`.
        COEFFICIENTS, GRADIENT: functions of gradients.py. PROLOGUE: of prologues.py.
        LOAD: loader of gradients.py. PIXELS: of boxes.py; ``None`` for both means :func:`direct`.
        TAPS: :class:`.boxes.Taps`. TILE: extents, powers of two: ``images, rows, columns`` a step's box of output pixels.
        FLAT: the columns of a tile are elements of the flattened filter, not channels of one tap.
        SPANS: a tile's filters may belong to several groups.
        RIM: a box may lie over the output's border.
        SHARED: several programs share the pixels.
        SCALED: the result is multiplied by ``gamma / sqrt(var + eps)``. BATCH: the statistics are the batch's.
        PRECISION: ``ieee`` or ``tf32`` for fp32 operands.
        WIDE: 64-bit offsets.
    """
    sizes = Sizes(N, H, W, depths.C, depths.K, P, Q)
    tiles = tl.cdiv(sizes.K, TILE.filters) * columns
    tile = tl.program_id(0) % tiles
    share = tl.program_id(0) // tiles
    column = tile % columns
    row = tile // columns
    k = row * TILE.filters
    filters = k + tl.arange(0, TILE.filters)
    if WIDE:
        filters = filters.to(tl.int64)
    exists = filters < sizes.K
    coefficients = COEFFICIENTS(filters, exists, *gradient_args)

    q_tiles = tl.cdiv(sizes.Q, TILE.columns)
    p_tiles = tl.cdiv(sizes.P, TILE.rows)
    pixel_tiles = tl.cdiv(sizes.N, TILE.images) * p_tiles * q_tiles
    per_share = tl.cdiv(pixel_tiles, shares)
    first = share * per_share
    end = tl.minimum(first + per_share, pixel_tiles)

    if LOAD is None:
        acc = direct(
            dz, y, x, first, end, p_tiles, q_tiles, column, filters, coefficients, sizes, GRADIENT, PROLOGUE, prologue_args,
            TAPS, TILE, WIDE,
        )  # fmt: skip
    else:
        acc = main_loop(
            dz, y, x, first, end, p_tiles, q_tiles, column, k, coefficients, sizes, GRADIENT, PROLOGUE, prologue_args,
            LOAD, PIXELS, TAPS, TILE, FLAT, SPANS, RIM, PRECISION, WIDE,
        )  # fmt: skip
    if SHARED:
        groups = tl.cdiv(shares, group)
        own = share // group
        start = own * group
        of_group = tl.minimum(shares - start, group)
        counters = memory.counters + tile * counters_of
        C: tl.constexpr = acc.shape[1]
        K: tl.constexpr = TILE.filters
        SIZE: tl.constexpr = K * C
        WIDTH: tl.constexpr = min(C, max(16, PIECE // TILE.filters))
        parts = memory.partials + tile.to(tl.int64) * (shares * SIZE)
        tl.store(parts + share * SIZE + part_offsets(TILE.filters, C, C), acc)
        if arrive(counters + own, of_group):
            of_first = parts + start * SIZE
            for piece in range(0, C, WIDTH):
                total = ordered_sum(of_first + piece, of_group, SIZE, TILE.filters, WIDTH, C)
                tl.debug_barrier()  # no thread still reads the partials that are written over
                tl.store(of_first + piece + part_offsets(TILE.filters, WIDTH, C), total)
            if arrive(counters + groups, groups):
                inner = tl.zeros((K,), dtype=tl.float32)
                for piece in range(0, C, WIDTH):
                    total = ordered_sum(parts + piece, groups, group * SIZE, TILE.filters, WIDTH, C)
                    offsets, mask = where(k, filters, exists, column, piece, sizes, WIDTH, LOAD, TAPS, TILE, FLAT, SPANS)
                    of_piece = write_tile(total, offsets, mask, filters, exists, results, given, SCALED)
                    if results.dgamma is not None:
                        inner += of_piece
                write_rest(
                    inner, filters, exists, column, columns, row, tiles, sizes.K, counters_of, memory, results, given,
                    SCALED, BATCH,
                )  # fmt: skip
    else:
        offsets, mask = where(k, filters, exists, column, 0, sizes, acc.shape[1], LOAD, TAPS, TILE, FLAT, SPANS)
        inner = write_tile(acc, offsets, mask, filters, exists, results, given, SCALED)
        write_rest(
            inner, filters, exists, column, columns, row, tiles, sizes.K, counters_of, memory, results, given, SCALED, BATCH
        )  # fmt: skip
