"""Convolution as one implicit-GEMM main loop, with a function at either end.

``y[N, P, Q, K] = ACTIVATION(EPILOGUE(sum over r, s, c of PROLOGUE(x)[n, h, w, c] * w[k, r, s, c]))``

A program owns one tile of the output, in registers (tensor memory on Blackwell), and walks the reduction once::

                      M pixels = images x rows x columns
                    +-------------------+
                    |                   |     step = (chunk of channels, tap r, s), the taps innermost
      K filters     |     acc fp32      |       pixels [M, channels]  shared memory, by PIXELS, through PROLOGUE
                    |                   |       filters [K, channels] shared memory, by FILTERS
                    +-------------------+       acc += filters . pixels^T
                              |
                      EPILOGUE, ACTIVATION: fp32, [M, K];  one rounding;  one store
                              |
                      AFTER: what is reduced over the stored tiles, if anything

Where there are fewer tiles than multiprocessors (7x7 layers at batch 1) several programs share the steps of a tile (split-K).
Each leaves its accumulator in fp32; the last of a tile adds them in the order of the shares and goes on from there (finish.py).

Programs that run at the same time share tiles in the L2, see :func:`.boxes.in_bands`.

The product is ``filters . pixels^T``, not the other way round: for the latter Triton carries the pixels through registers to
Hopper's tensor cores, while this form reads both operands from shared memory (checked in the SASS: two descriptors, no LDSM).
With a prologue the pixels are in registers anyway and come first.
"""

import triton
import triton.language as tl

from .boxes import EXTENTS, Place, Sizes, Step, in_bands, lanes_of, loaded, locate, next_tap
from .epilogues import At, Index
from .finish import MEETING, Shares, joined_shares, leave_share, own_program, own_share
from .numerics import dot, rounded


@triton.jit
def tile_index(sizes, shares, TILE: tl.constexpr):
    """Which tile of the output this program makes: the first four of :class:`.epilogues.Index`."""
    pixel_tiles = tl.cdiv(sizes.N, TILE.images) * tl.cdiv(sizes.P, TILE.rows) * tl.cdiv(sizes.Q, TILE.columns)
    filter_tiles = tl.cdiv(sizes.K, TILE.filters)
    pixel_tile, filter_tile = in_bands(own_program(shares), pixel_tiles, filter_tiles, TILE.group)
    return pixel_tile, pixel_tiles, filter_tile, filter_tiles


@triton.jit
def own_tile(index, sizes, TAPS: tl.constexpr, TILE: tl.constexpr, SPANS: tl.constexpr):
    """Where this program's tile of the output starts, and the channels it reduces over."""
    columns = tl.cdiv(sizes.Q, TILE.columns)
    rows = tl.cdiv(sizes.P, TILE.rows)
    pixel_tile = index.pixel_tile
    k = index.filter_tile * TILE.filters

    n = pixel_tile // (rows * columns) * TILE.images
    p = pixel_tile // columns % rows * TILE.rows
    q = pixel_tile % columns * TILE.columns

    if TAPS.group_channels == 0:
        return Place(n, p, q, k, 0, sizes.C)
    else:
        last = tl.minimum(k + TILE.filters, sizes.K) - 1
        c = k // TAPS.group_filters * TAPS.group_channels
        c_end = (last // TAPS.group_filters + 1) * TAPS.group_channels
        if SPANS:
            # A descriptor's last coordinate wants 16-byte alignment, and a box must not run into the other parity's channels.
            c = c // TILE.channels * TILE.channels
        return Place(n, p, q, k, c, c_end)


@triton.jit
def direct(
    x, w, lanes, filters, sizes, PROLOGUE: tl.constexpr, prologue_args, TAPS: tl.constexpr, M: tl.constexpr, K: tl.constexpr
):
    """``acc [M, K]`` of a grouped convolution without tensor cores: each filter reads the channels of its own group only.

    For depthwise convolutions, and for the rare tile of which :func:`conv_forward` cannot trust a NaN. ``x``, ``w``: pointers.
    """
    acc = tl.zeros((M, K), dtype=tl.float32)
    exists = (filters < sizes.K)[None, :]
    first = filters // TAPS.group_filters * TAPS.group_channels
    for step in range(0, TAPS.R * TAPS.S * TAPS.group_channels):
        tap = step // TAPS.group_channels
        c = step % TAPS.group_channels
        pixel, inside = locate(lanes, tap // TAPS.S, tap % TAPS.S, sizes, TAPS)
        inside = inside[:, None]
        pixels = tl.load(x + (pixel * sizes.C)[:, None] + (first + c)[None, :], mask=inside & exists, other=0.0)
        pixels = PROLOGUE(pixels, first + c, inside, *prologue_args)
        taps = tl.load(w + (filters * (TAPS.R * TAPS.S) + tap) * TAPS.group_channels + c, mask=filters < sizes.K, other=0.0)
        acc += pixels.to(tl.float32) * taps.to(tl.float32)[None, :]
    return acc


@triton.jit
def main_loop(
    x,
    w,
    place,
    lanes,
    filters,
    sizes,
    shares,
    PROLOGUE: tl.constexpr,
    prologue_args,
    PIXELS: tl.constexpr,
    FILTERS: tl.constexpr,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
    PIXELS_FIRST: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The accumulator [M, K] of one tile, or of this program's share of it."""
    M: tl.constexpr = TILE.images * TILE.rows * TILE.columns
    K: tl.constexpr = TILE.filters
    if FLAT:
        steps = tl.cdiv(sizes.C * (TAPS.R * TAPS.S), TILE.channels)
    else:
        steps = tl.cdiv(place.c_end - place.c, TILE.channels) * (TAPS.R * TAPS.S)
    if PIXELS_FIRST:
        acc = tl.zeros((M, K), dtype=tl.float32)
    else:
        acc = tl.zeros((K, M), dtype=tl.float32)
    first, end = own_share(shares, steps)
    r = 0
    s = 0
    c = 0
    if shares is not None:
        c = first // (TAPS.R * TAPS.S) * TILE.channels
        r = first % (TAPS.R * TAPS.S) // TAPS.S
        s = first % TAPS.S
    for index in range(first, end):
        step = Step(r, s, c, index)
        pixels = PIXELS(x, place, lanes, step, sizes, TAPS, TILE)
        taps = FILTERS(w, place, filters, step, sizes, TAPS, TILE)
        if PIXELS_FIRST:
            channels, inside = loaded(place, lanes, step, sizes, TAPS, TILE, FLAT)
            if FLAT or TAPS.padding_h != 0 or TAPS.padding_w != 0:
                pixels = PROLOGUE(pixels, channels, inside, *prologue_args)
            else:
                pixels = PROLOGUE(pixels, channels, None, *prologue_args)
            acc = dot(pixels, taps.trans(), acc, PRECISION)
        else:
            acc = dot(taps, pixels.trans(), acc, PRECISION)
        r, s, c = next_tap(r, s, c, TAPS.R, TAPS.S, TILE.channels, TAPS.R * TAPS.S == 1)
    if PIXELS_FIRST:
        return acc
    else:
        return acc.trans()


@triton.jit
def write(
    acc,
    y,
    at,
    index,
    EPILOGUE: tl.constexpr,
    epilogue_args,
    ACTIVATION: tl.constexpr,
    slope,
    AFTER: tl.constexpr,
    after_args,
):
    """The end of a tile."""
    z = rounded(ACTIVATION(EPILOGUE(acc, at, *epilogue_args), slope), y.dtype.element_ty)
    tl.store(y + at.offsets, z, mask=at.mask)
    if AFTER is not None:
        AFTER(z.to(tl.float32), at, index, *after_args)


@triton.jit(do_not_specialize_on_alignment=(*EXTENTS, *MEETING))
def conv_forward(
    x,
    w,
    y,
    N,
    H,
    W,
    P,
    Q,
    depths,
    exact,
    shares,
    tiles,
    group,
    memory,
    PROLOGUE: tl.constexpr,
    prologue_args,
    EPILOGUE: tl.constexpr,
    epilogue_args,
    ACTIVATION: tl.constexpr,
    slope,
    AFTER: tl.constexpr,
    after_args,
    PIXELS: tl.constexpr,
    FILTERS: tl.constexpr,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
    PIXELS_FIRST: tl.constexpr,
    FLAT: tl.constexpr,
    SPANS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One convolution, one launch.

    Args:
        x: [N, H, W, C] fp32, fp16 or bf16: descriptor or pointer, whichever ``PIXELS`` wants.
        w: [K, R, S, C / groups] of the same type, as ``FILTERS`` wants it.
        y: pointer to [N, P, Q, K].
        N, H, W, P, Q, depths: :class:`.boxes.Sizes`.
        exact: pointers (x, w) where a tile may have to be (re)computed by :func:`direct`, else None.
        ACTIVATION, slope: function of activations.py and its second argument.
        shares, tiles, memory: :class:`.finish.Shares`; no memory where a program makes a whole tile. Not beside an ``exact``.
        group: see :class:`.epilogues.Index`.
        AFTER: function of epilogues.py that goes on behind the store, or None.
        PIXELS, FILTERS: loaders of boxes.py; ``None`` for both means :func:`direct` alone.
        TAPS: :class:`Taps`.
        TILE: extents ``images, rows, columns, filters, channels`` (powers of two) and ``group``.
        PIXELS_FIRST: there is a prologue; order of the product, see above.
        FLAT: the loaders walk the flattened reduction, not taps and chunks of channels.
        SPANS: a tile's filters may belong to several groups.
        PRECISION: ``ieee`` or ``tf32`` for fp32 operands.
        WIDE: 64-bit offsets.
    """
    M: tl.constexpr = TILE.images * TILE.rows * TILE.columns
    K: tl.constexpr = TILE.filters
    sizes = Sizes(N, H, W, depths.C, depths.K, P, Q)
    shared = None
    if memory is not None:
        shared = Shares(shares, tiles, memory.partials, memory.counters)
    index = Index(*tile_index(sizes, shared, TILE), group)
    place = own_tile(index, sizes, TAPS, TILE, SPANS)
    lanes = lanes_of(place, sizes, TILE, WIDE)
    filters = place.k + tl.arange(0, K)
    if WIDE:
        filters = filters.to(tl.int64)

    if PIXELS is None:
        acc = direct(exact[0], exact[1], lanes, filters, sizes, PROLOGUE, prologue_args, TAPS, M, K)
    else:
        acc = main_loop(
            x,
            w,
            place,
            lanes,
            filters,
            sizes,
            shared,
            PROLOGUE,
            prologue_args,
            PIXELS,
            FILTERS,
            TAPS,
            TILE,
            PIXELS_FIRST,
            FLAT,
            PRECISION,
        )
        if SPANS:
            # Zero weights do not silence the other groups' NaN and inf. Eager does not see those at all; neither must we.
            suspect = tl.max(tl.where(tl.abs(acc) < float("inf"), 0, 1))
            if suspect != 0:
                acc = direct(exact[0], exact[1], lanes, filters, sizes, PROLOGUE, prologue_args, TAPS, M, K)

    pixels = (lanes.n * sizes.P + lanes.p) * sizes.Q + lanes.q
    offsets = (pixels * sizes.K)[:, None] + filters[None, :]
    mask = lanes.inside[:, None] & (filters < sizes.K)[None, :]
    at = At(pixels, filters, lanes.inside, filters < sizes.K, offsets, mask)
    if shared is None:
        write(acc, y, at, index, EPILOGUE, epilogue_args, ACTIVATION, slope, AFTER, after_args)
    elif leave_share(acc, shared):
        acc = joined_shares(shared, M, K)
        write(acc, y, at, index, EPILOGUE, epilogue_args, ACTIVATION, slope, AFTER, after_args)
