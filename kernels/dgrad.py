"""Gradient of a convolution's input as one implicit-GEMM main loop, for every stride in one launch.

``dx[n, h, w, c] = sum over r, s, k of dy[n, p, q, k] * w[k, r, s, c]`` where ``p * stride = h + padding - r * dilation``, and
likewise q: of all (h, r) only those count for which that is divisible. So the input's pixels fall into ``stride_h * stride_w``
classes, by ``h % stride_h`` and ``w % stride_w``. Within a class every pixel takes the same taps, and pixel ``i + 1`` of the
class reads dy one further than pixel ``i``: each class is a convolution of stride 1 over dy::

    stride 2, 3x3, padding 1         h:  0   1   2   3   4       class 0 (h even): tap r = 1, p = i
                                         |  / \\  |  / \\  |       class 1 (h odd):  tap r = 2, p = i, and tap r = 0, p = i + 1
                                     p:  0       1       2

A program owns a box of pixels of one class by a tile of channels and walks (chunk of filters, tap of the class), the taps
innermost; several programs share the steps of a tile where there are few tiles, as in conv.py. Nothing is computed for a tap
that does not count. A class without taps (1x1 with stride 2 has three) writes what
the epilogue makes of zero. Extents of ``TILE`` here: ``images, rows, columns`` a box of pixels of one class, ``channels`` the
tile's, ``filters`` the chunk of a step.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import EXTENTS, Lanes, Place, Sizes, Step, in_bands, next_tap
from .epilogues import At
from .finish import MEETING, Column, Shares, finish_sums, joined_shares, leave_share, own_program, own_share
from .gradients import shifted
from .numerics import column_sums, dot, rounded


class Class(NamedTuple):
    """The pixels ``h % stride_h == h``, ``w % stride_w == w``, and their taps: first one, and how many rows and columns."""

    h: Any
    w: Any
    r: Any
    s: Any
    rows: Any
    columns: Any


class Sums(NamedTuple):
    """Memory of the sums over the pixels, see :class:`.finish.Column`."""

    partials: Any
    counters: Any


@triton.jit
def taps_of(
    start, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, PERIOD: tl.constexpr, KERNEL: tl.constexpr
):
    """First tap of a class and how many it has, along one axis. They lie ``PERIOD = stride / gcd(stride, dilation)`` apart."""
    if STRIDE == 1:
        return 0, KERNEL
    else:
        first = start * 0 + KERNEL
        for r in tl.static_range(PERIOD):
            if r < KERNEL:
                first = tl.where((start + PADDING - r * DILATION) % STRIDE == 0, r, first)
        return first, (KERNEL - first + PERIOD - 1) // PERIOD


@triton.jit
def own_tile(sizes, shares, TAPS: tl.constexpr, TILE: tl.constexpr, SPANS: tl.constexpr, PERIODS: tl.constexpr):
    """Where this program's tile is: its class, its place among the pixels of the class, indices of the tiles.

    ``place``: start of the box (``p``, ``q`` count the class's pixels), first filter ``k``; the channels are those of the
    tile's group, as the loaders of filters count them. Returned beside it: one past the last filter to reduce over.
    """
    classes: tl.constexpr = TAPS.stride_h * TAPS.stride_w
    columns = tl.cdiv(tl.cdiv(sizes.W, TAPS.stride_w), TILE.columns)
    rows = tl.cdiv(tl.cdiv(sizes.H, TAPS.stride_h), TILE.rows)
    pixel_tiles = tl.cdiv(sizes.N, TILE.images) * rows * columns * classes
    channel_tiles = tl.cdiv(sizes.C, TILE.channels)

    pixel_tile, channel_tile = in_bands(own_program(shares), pixel_tiles, channel_tiles, TILE.group)

    # The classes of a box are neighbours: they read the same dy.
    h = pixel_tile % classes // TAPS.stride_w
    w = pixel_tile % TAPS.stride_w
    r, tap_rows = taps_of(h, TAPS.stride_h, TAPS.padding_h, TAPS.dilation_h, PERIODS[0], TAPS.R)
    s, tap_columns = taps_of(w, TAPS.stride_w, TAPS.padding_w, TAPS.dilation_w, PERIODS[1], TAPS.S)

    tile = pixel_tile // classes
    n = tile // (rows * columns) * TILE.images
    i = tile // columns % rows * TILE.rows
    j = tile % columns * TILE.columns
    k = 0
    k_end = sizes.K
    c = 0
    c_end = sizes.C
    if TAPS.group_channels > 0:
        first = channel_tile * TILE.channels // TAPS.group_channels
        last = (tl.minimum((channel_tile + 1) * TILE.channels, sizes.C) - 1) // TAPS.group_channels
        k = first * TAPS.group_filters
        k_end = (last + 1) * TAPS.group_filters
        if SPANS:
            k = k // TILE.filters * TILE.filters  # a descriptor's last coordinate wants 16-byte alignment
        else:
            c = first * TAPS.group_channels
            c_end = c + TAPS.group_channels
    place = Place(n, i, j, k, c, c_end)
    return place, k_end, Class(h, w, r, s, tap_rows, tap_columns), pixel_tile, pixel_tiles, channel_tile


@triton.jit
def direct(
    dz,
    y,
    w,
    lanes,
    own,
    channels,
    sizes,
    COEFFICIENTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    gradient_args,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
    PERIODS: tl.constexpr,
):
    """``acc [M, C]`` of a grouped convolution without tensor cores: each channel reads the filters of its own group only.

    For depthwise convolutions, and for the rare tile of which :func:`dgrad` cannot trust a NaN. Pointers.
    """
    M: tl.constexpr = TILE.images * TILE.rows * TILE.columns
    C: tl.constexpr = TILE.channels
    acc = tl.zeros((M, C), dtype=tl.float32)
    exists = channels < sizes.C
    first = channels // TAPS.group_channels * TAPS.group_filters
    for step in range(0, own.rows * own.columns * TAPS.group_filters):
        tap = step // TAPS.group_filters
        filters = first + step % TAPS.group_filters
        r = own.r + tap // own.columns * PERIODS[0]
        s = own.s + tap % own.columns * PERIODS[1]
        dp = (own.h + (TAPS.padding_h - r * TAPS.dilation_h)) // TAPS.stride_h
        dq = (own.w + (TAPS.padding_w - s * TAPS.dilation_w)) // TAPS.stride_w
        pixel, inside = shifted(lanes, dp, dq, sizes)
        inside = inside[:, None]
        offsets = (pixel * sizes.K)[:, None] + filters[None, :]
        gradient = tl.load(dz + offsets, mask=inside & exists[None, :], other=0.0)
        made = None
        if y is not None:
            made = tl.load(y + offsets, mask=inside & exists[None, :], other=0.0)
        gradient = GRADIENT(gradient, made, inside, COEFFICIENTS(filters, exists, *gradient_args))
        start = (filters * (TAPS.R * TAPS.S) + (r * TAPS.S + s)) * TAPS.group_channels
        taps = tl.load(w + start + channels % TAPS.group_channels, mask=exists, other=0.0)
        acc += gradient.to(tl.float32) * taps.to(tl.float32)[None, :]
    return acc


@triton.jit
def main_loop(
    dz,
    y,
    w,
    place,
    k_end,
    lanes,
    own,
    chunk,
    sizes,
    shares,
    COEFFICIENTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    gradient_args,
    LOAD: tl.constexpr,
    FILTERS: tl.constexpr,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
    PERIODS: tl.constexpr,
    PIXELS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The accumulator [M, C] of one tile, or of this program's share of it.

    ``chunk``: which tile of channels it is, counted within its group.
    """
    M: tl.constexpr = TILE.images * TILE.rows * TILE.columns
    C: tl.constexpr = TILE.channels
    if PIXELS_FIRST:
        acc = tl.zeros((M, C), dtype=tl.float32)
    else:
        acc = tl.zeros((C, M), dtype=tl.float32)
    ALONE: tl.constexpr = TAPS.R * TAPS.S == 1
    first, end = own_share(shares, tl.cdiv(k_end - place.k, TILE.filters) * (own.rows * own.columns))
    tap_row = 0
    tap_column = 0
    k = place.k
    if shares is not None:
        taps = tl.maximum(own.rows * own.columns, 1)
        k += first // taps * TILE.filters
        tap_row = first % taps // tl.maximum(own.columns, 1)
        tap_column = first % taps % tl.maximum(own.columns, 1)
    for _ in range(first, end):
        r = own.r + tap_row * PERIODS[0]
        s = own.s + tap_column * PERIODS[1]
        # Exact divisions: that is what makes a tap one of the class.
        dp = (own.h + (TAPS.padding_h - r * TAPS.dilation_h)) // TAPS.stride_h
        dq = (own.w + (TAPS.padding_w - s * TAPS.dilation_w)) // TAPS.stride_w

        filters = k + tl.arange(0, TILE.filters)
        if WIDE:
            filters = filters.to(tl.int64)
        at = Place(place.n, place.p, place.q, k, place.c, place.c_end)
        gradient = LOAD(dz, place, lanes, dp, dq, k, sizes, TILE)
        taken = FILTERS(w, at, filters, Step(r, s, chunk * TILE.channels, 0), sizes, TAPS, TILE)
        if PIXELS_FIRST:
            made = None
            if y is not None:
                made = LOAD(y, place, lanes, dp, dq, k, sizes, TILE)
            coefficients = COEFFICIENTS(filters, filters < sizes.K, *gradient_args)
            if ALONE and TAPS.padding_h == 0 and TAPS.padding_w == 0:
                gradient = GRADIENT(gradient, made, None, coefficients)  # pixels that do not exist are not stored
            else:
                _, inside = shifted(lanes, dp, dq, sizes)
                gradient = GRADIENT(gradient, made, inside[:, None], coefficients)
            acc = dot(gradient, taken, acc, PRECISION)
        else:
            acc = dot(taken.trans(), gradient.trans(), acc, PRECISION)
        tap_row, tap_column, k = next_tap(tap_row, tap_column, k, own.rows, own.columns, TILE.filters, ALONE)
    if PIXELS_FIRST:
        return acc
    else:
        return acc.trans()


@triton.jit
def write(acc, dx, at, column, outputs, EPILOGUE: tl.constexpr, epilogue_args, BACKWARD: tl.constexpr):
    """The end of a tile. ``column``: of the sums over the pixels, or None without outputs."""
    acc, factor = EPILOGUE(acc, at, BACKWARD, *epilogue_args)
    stored = rounded(acc, dx.dtype.element_ty)
    tl.store(dx + at.offsets, stored, mask=at.mask)
    if column is not None:
        # Of what is stored, and of pixels that exist: past the border there may be taps and so a gradient.
        stored = tl.where(at.mask, stored.to(tl.float32), 0.0)
        total = column_sums(stored)
        if len(outputs) == 1:
            finish_sums(column, (total,), outputs)
        else:
            finish_sums(column, (total, column_sums(tl.where(at.mask, stored * factor, 0.0))), outputs)


@triton.jit(do_not_specialize_on_alignment=(*EXTENTS, *MEETING))
def dgrad(
    dz,
    y,
    w,
    dx,
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
    counters_of,
    memory,
    outputs,
    sums,
    COEFFICIENTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    gradient_args,
    EPILOGUE: tl.constexpr,
    epilogue_args,
    BACKWARD: tl.constexpr,
    LOAD: tl.constexpr,
    FILTERS: tl.constexpr,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
    PERIODS: tl.constexpr,
    PIXELS_FIRST: tl.constexpr,
    SPANS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradient of a convolution's input, one launch.

    Args:
        dz: [N, P, Q, K] fp32, fp16 or bf16: descriptor or pointer, whichever ``LOAD`` wants.
        y: likewise, for a ``GRADIENT`` that reads it, else None.
        w: [K, R, S, C / groups] of the same type, as ``FILTERS`` wants it.
        dx: pointer to [N, H, W, C].
        N, H, W, P, Q, depths: :class:`.boxes.Sizes` of the forward convolution.
        exact: pointers (dz, y, w) where a tile may have to be (re)computed by :func:`direct`, else None.
        shares, tiles, memory: :class:`.finish.Shares`; no memory where a program makes a whole tile. Not beside an ``exact``.
        group, counters_of: of :class:`.finish.Column`, and counters of a tile of channels; None without outputs.
        outputs: pointers to fp32 [C]: nothing, or the sum of dx over the pixels, and of dx times the epilogue's factor.
        sums: :class:`Sums`, or None without outputs.
        COEFFICIENTS, GRADIENT, EPILOGUE: functions of gradients.py.
        BACKWARD: of activations.py, for the previous layer's activation; None for none.
        LOAD: loader of gradients.py, ``FILTERS``: of boxes.py; ``None`` for both means :func:`direct` alone.
        TAPS: :class:`.boxes.Taps`. PERIODS: distance of a class's taps along each axis.
        TILE: extents, powers of two.
        PIXELS_FIRST: dy is computed on load; order of the product, as in conv.py.
        SPANS: a tile's channels may belong to several groups.
        PRECISION: ``ieee`` or ``tf32`` for fp32 operands.
        WIDE: 64-bit offsets.
    """
    M: tl.constexpr = TILE.images * TILE.rows * TILE.columns
    sizes = Sizes(N, H, W, depths.C, depths.K, P, Q)
    shared = None
    if memory is not None:
        shared = Shares(shares, tiles, memory.partials, memory.counters)
    place, k_end, own, pixel_tile, pixel_tiles, channel_tile = own_tile(sizes, shared, TAPS, TILE, SPANS, PERIODS)
    m = tl.arange(0, M)
    n = place.n + m // (TILE.rows * TILE.columns)
    if WIDE:
        n = n.to(tl.int64)
    i = place.p + m // TILE.columns % TILE.rows
    j = place.q + m % TILE.columns
    h = own.h + i * TAPS.stride_h
    column = own.w + j * TAPS.stride_w
    lanes = Lanes(n, i, j, (n < sizes.N) & (h < sizes.H) & (column < sizes.W))
    channels = channel_tile * TILE.channels + tl.arange(0, TILE.channels)
    if WIDE:
        channels = channels.to(tl.int64)

    if LOAD is None:
        acc = direct(
            exact[0],
            exact[1],
            exact[2],
            lanes,
            own,
            channels,
            sizes,
            COEFFICIENTS,
            GRADIENT,
            gradient_args,
            TAPS,
            TILE,
            PERIODS,
        )
    else:
        acc = main_loop(
            dz,
            y,
            w,
            place,
            k_end,
            lanes,
            own,
            channel_tile - place.c // TILE.channels,
            sizes,
            shared,
            COEFFICIENTS,
            GRADIENT,
            gradient_args,
            LOAD,
            FILTERS,
            TAPS,
            TILE,
            PERIODS,
            PIXELS_FIRST,
            PRECISION,
            WIDE,
        )
        if SPANS:
            # Zero weights do not silence the other groups' NaN and inf. Eager does not see those at all; neither must we.
            suspect = tl.max(tl.where(tl.abs(acc) < float("inf"), 0, 1))
            if suspect != 0:
                acc = direct(
                    exact[0],
                    exact[1],
                    exact[2],
                    lanes,
                    own,
                    channels,
                    sizes,
                    COEFFICIENTS,
                    GRADIENT,
                    gradient_args,
                    TAPS,
                    TILE,
                    PERIODS,
                )

    pixels = (lanes.n * sizes.H + h) * sizes.W + column
    offsets = (pixels * sizes.C)[:, None] + channels[None, :]
    exists = channels < sizes.C
    mask = lanes.inside[:, None] & exists[None, :]
    at = At(pixels, channels, lanes.inside, exists, offsets, mask)
    reduced = None
    if sums is not None:
        counters = sums.counters + channel_tile * counters_of
        reduced = Column(sums.partials, counters, pixel_tile, pixel_tiles, group, channels, exists, sizes.C)
    if shared is None:
        write(acc, dx, at, reduced, outputs, EPILOGUE, epilogue_args, BACKWARD)
    elif leave_share(acc, shared):
        acc = joined_shares(shared, M, TILE.channels)
        write(acc, dx, at, reduced, outputs, EPILOGUE, epilogue_args, BACKWARD)
