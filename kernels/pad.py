"""The shortcut of option A (He et al. 2016, section 3.3): every second pixel, and channels of zeros; and its gradient.

A program owns a strip of ``PIXELS`` pixels by ``CHANNELS`` channels of what it writes, each of which it writes once::

    x   [N, H, W, C] --pixels at the strides--> y  [N, P, Q, K], zero from channel C on
    dz  [N, P, Q, K] --channels below C-------> dx [N, H, W, C], zero at the pixels between
"""

import triton
import triton.language as tl

from .boxes import EXTENTS, Sizes
from .elementwise import strip_index


@triton.jit
def written(pixels, K, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    """The pixels and channels of this program's strip of [pixels, K], and which of its elements exist."""
    strip, channel_tile, _ = strip_index(K, CHANNELS)
    if WIDE:
        strip = strip.to(tl.int64)
    channels = channel_tile * CHANNELS + tl.arange(0, CHANNELS)
    pixel = strip * PIXELS + tl.arange(0, PIXELS)
    return pixel, channels, (pixel < pixels)[:, None] & (channels < K)[None, :]


@triton.jit(do_not_specialize_on_alignment=EXTENTS)
def zero_pad(
    x,
    y,
    N,
    H,
    W,
    P,
    Q,
    depths,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Forward.

    Args:
        x: pointer to [N, H, W, C] fp32, fp16 or bf16.
        y: pointer to [N, P, Q, K] of the same type.
        N, H, W, P, Q, depths: :class:`.boxes.Sizes`.
        WIDE: 64-bit offsets.
    """
    sizes = Sizes(N, H, W, depths.C, depths.K, P, Q)
    pixel, channels, inside = written(sizes.N * sizes.P * sizes.Q, sizes.K, PIXELS, CHANNELS, WIDE)
    row, column = pixel // sizes.Q, pixel % sizes.Q
    source = ((row // sizes.P) * sizes.H + (row % sizes.P) * STRIDE_H) * sizes.W + column * STRIDE_W
    there = inside & (channels < sizes.C)[None, :]
    value = tl.load(x + (source * sizes.C)[:, None] + channels[None, :], mask=there, other=0.0)
    tl.store(y + (pixel * sizes.K)[:, None] + channels[None, :], value, mask=inside)


@triton.jit(do_not_specialize_on_alignment=EXTENTS)
def zero_pad_backward(
    dz,
    dx,
    N,
    H,
    W,
    P,
    Q,
    depths,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Backward: the arguments of :func:`zero_pad`, with the gradients of y and x."""
    sizes = Sizes(N, H, W, depths.C, depths.K, P, Q)
    pixel, channels, inside = written(sizes.N * sizes.H * sizes.W, sizes.C, PIXELS, CHANNELS, WIDE)
    row, column = pixel // sizes.W, pixel % sizes.W
    image, h = row // sizes.H, row % sizes.H
    taken = (h % STRIDE_H == 0) & (column % STRIDE_W == 0)
    source = (image * sizes.P + h // STRIDE_H) * sizes.Q + column // STRIDE_W
    there = inside & taken[:, None]
    value = tl.load(dz + (source * sizes.K)[:, None] + channels[None, :], mask=there, other=0.0)
    tl.store(dx + (pixel * sizes.C)[:, None] + channels[None, :], value, mask=inside)
