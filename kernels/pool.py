"""Max-pooling and its backward.

``y[n, p, q, c] = max over r, s of PROLOGUE(x)[n, p * stride + r * dilation - padding, ..., c]``

A program owns ``PIXELS`` output pixels x ``CHANNELS`` channels and walks the window; neighbouring windows meet in the cache::

    x[N, H, W, C]  --tap (r, s), PROLOGUE-->  [PIXELS, CHANNELS]  --running maximum, in registers-->  y[N, P, Q, C], indices

The padding is -inf. A NaN anywhere in a window is the window's maximum, as in PyTorch. An index is ``r * S + s``, one byte.

Backward, a program owns *input* pixels and looks at the windows they are in: nobody adds to what another one wrote, so there
are no atomics and the order of the sum is that of the taps::

    dy[N, P, Q, C]  --each window over the pixel, where the pixel was its maximum-->  sum in registers  -->  dx[N, H, W, C]
"""

import triton
import triton.language as tl

from .boxes import EXTENTS, Lanes, Sizes, locate
from .elementwise import standardised, strip_index
from .finish import MEETING, Column, finish_sums
from .numerics import column_sums, rounded
from .prologues import batch_norm


@triton.jit
def lanes_at(pixels, rows, columns, N):
    """Coordinates of pixels ``(n * rows + p) * columns + q``."""
    n = pixels // (rows * columns)
    return Lanes(n, pixels // columns % rows, pixels % columns, n < N)


@triton.jit
def window_maximum(x, lanes, channels, sizes, PROLOGUE: tl.constexpr, prologue_args, TAPS: tl.constexpr, INDEX: tl.constexpr):
    """Maximum of each lane's window, fp32 [M, C], and its index, int32 [M, C] (-1 unless ``INDEX``).

    As PyTorch chooses: the first of the largest, but a NaN replaces what was there. Taps in the padding do not exist.
    """
    exists = (channels < sizes.C)[None, :]
    largest = tl.full((lanes.n.shape[0], channels.shape[0]), float("-inf"), dtype=tl.float32)
    index = tl.full((lanes.n.shape[0], channels.shape[0]), -1, dtype=tl.int32)
    for tap in tl.static_range(TAPS.R * TAPS.S):
        pixel, inside = locate(lanes, tap // TAPS.S, tap % TAPS.S, sizes, TAPS)
        inside = inside[:, None]
        value = tl.load(x + (pixel * sizes.C)[:, None] + channels[None, :], mask=inside & exists, other=0.0)
        value = PROLOGUE(value, channels, inside, *prologue_args).to(tl.float32)
        if INDEX:
            better = inside & ((value > largest) | (value != value) | (index < 0))
            largest = tl.where(better, value, largest)
            index = tl.where(better, tap, index)
        else:
            largest = tl.maximum(largest, tl.where(inside, value, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    return largest, index


@triton.jit(do_not_specialize_on_alignment=EXTENTS)
def max_pool(
    x,
    y,
    indices,
    N,
    H,
    W,
    P,
    Q,
    depths,
    PROLOGUE: tl.constexpr,
    prologue_args,
    TAPS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Max-pooling, floor mode.

    Args:
        x: pointer to [N, H, W, C] fp32, fp16 or bf16.
        y: pointer to [N, P, Q, C] of the same type.
        indices: pointer to uint8 [N, P, Q, C], or None.
        N, H, W, P, Q, depths: :class:`.boxes.Sizes`, K = C.
        PROLOGUE: function of prologues.py.
        TAPS: :class:`.boxes.Taps`.
        PIXELS, CHANNELS: a program's tile, powers of two.
        WIDE: 64-bit offsets.
    """
    sizes = Sizes(N, H, W, depths.C, depths.K, P, Q)
    first, channel_tile, _ = strip_index(sizes.C, CHANNELS)
    channels = channel_tile * CHANNELS + tl.arange(0, CHANNELS)
    if WIDE:
        first = first.to(tl.int64)
    pixels = first * PIXELS + tl.arange(0, PIXELS)
    lanes = lanes_at(pixels, sizes.P, sizes.Q, sizes.N)
    largest, index = window_maximum(x, lanes, channels, sizes, PROLOGUE, prologue_args, TAPS, indices is not None)
    offsets = (pixels * sizes.C)[:, None] + channels[None, :]
    mask = lanes.inside[:, None] & (channels < sizes.C)[None, :]
    tl.store(y + offsets, rounded(largest, y.dtype.element_ty), mask=mask)
    if indices is not None:
        tl.store(indices + offsets, index.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize_on_alignment=(*EXTENTS, *MEETING))
def max_pool_backward(
    dy,
    x,
    indices,
    x_bn,
    dx,
    sums,
    N,
    H,
    W,
    P,
    Q,
    depths,
    group,
    partials,
    counters,
    PROLOGUE: tl.constexpr,
    BACKWARD: tl.constexpr,
    slope,
    TAPS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradient of max-pooling; behind a BatchNorm and its activation up to in front of that activation.

    Args:
        dy: pointer to [N, P, Q, C].
        x: pointer to [N, H, W, C]: what was pooled, or what ``x_bn`` and the activation made into what was pooled.
        indices: pointer to uint8 [N, P, Q, C]; None: the maxima are found again in x.
        x_bn: the last arguments of :func:`.prologues.batch_norm`; None where x was pooled as it is.
        dx: pointer like x.
        sums: pointers to fp32 [C]: of dx, and of dx * xhat(x), which is None without x_bn; None where none is asked for.
        group, partials, counters: see :class:`.finish.Column`; counters for each tile of channels.
        PROLOGUE: the identity.
        BACKWARD, slope: function of activations.py, None without an activation, and its third argument.
    """
    sizes = Sizes(N, H, W, depths.C, depths.K, P, Q)
    strip, channel_tile, channel_tiles = strip_index(sizes.C, CHANNELS)
    channels = channel_tile * CHANNELS + tl.arange(0, CHANNELS)
    exists = channels < sizes.C
    start = strip
    if WIDE:
        start = start.to(tl.int64)
    total = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
    dot = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
    for step in range(0, STEPS):
        pixels = (start * STEPS + step) * PIXELS + tl.arange(0, PIXELS)
        own = lanes_at(pixels, sizes.H, sizes.W, sizes.N)
        mask = own.inside[:, None] & exists[None, :]
        offsets = (pixels * sizes.C)[:, None] + channels[None, :]
        gradient = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
        for tap in range(0, TAPS.R * TAPS.S):
            # The window in which this pixel is tap (r, s), if there is one.
            row = own.p + TAPS.padding_h - tap // TAPS.S * TAPS.dilation_h
            column = own.q + TAPS.padding_w - tap % TAPS.S * TAPS.dilation_w
            p, q = row // TAPS.stride_h, column // TAPS.stride_w
            inside = own.inside & (row >= 0) & (column >= 0) & (p < sizes.P) & (q < sizes.Q)
            inside &= (row % TAPS.stride_h == 0) & (column % TAPS.stride_w == 0)
            there = inside[:, None] & exists[None, :]
            window = (((own.n * sizes.P + p) * sizes.Q + q) * sizes.C)[:, None] + channels[None, :]
            if indices is not None:
                index = tl.load(indices + window, mask=there, other=0).to(tl.int32)
            else:
                _, index = window_maximum(x, Lanes(own.n, p, q, inside), channels, sizes, PROLOGUE, (), TAPS, True)
            value = tl.load(dy + window, mask=there & (index == tap), other=0.0)
            gradient += value.to(tl.float32)
        if group is not None:
            value = tl.load(x + offsets, mask=mask, other=0.0)
            if BACKWARD is not None:
                z = value.to(tl.float32)
                if x_bn[0] is not None:
                    # In fp32: the form for 16 bits spills here (sm_90).
                    z = batch_norm(z, channels, exists, None, *x_bn)
                gradient = BACKWARD(gradient, z, slope)
        gradient = rounded(gradient, dx.dtype.element_ty)
        tl.store(dx + offsets, gradient, mask=mask)
        if group is not None:
            gradient = gradient.to(tl.float32)
            total += gradient
            if x_bn[0] is not None:
                dot += tl.where(mask, gradient * standardised(value, channels, exists, x_bn[0], x_bn[1]), 0.0)
    if group is not None:
        strips = tl.num_programs(0) // channel_tiles
        counter = counters + channel_tile * (tl.cdiv(strips, group) + 1)
        column = Column(partials, counter, strip, strips, group, channels, exists, sizes.C)
        finish_sums(column, (column_sums(total), column_sums(dot)), sums)
