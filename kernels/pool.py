"""Max-pooling: ``y[n, p, q, c] = max over r, s of x[n, p * stride + r * dilation - padding, ..., c]``.

A program owns ``PIXELS`` output pixels x ``CHANNELS`` channels and walks the window; neighbouring windows meet in the cache::

    x[N, H, W, C]  --tap (r, s)-->  [PIXELS, CHANNELS]  --running maximum, in registers-->  y[N, P, Q, C]

The padding is -inf. A NaN anywhere in a window is the window's maximum, as in PyTorch.
"""

import triton
import triton.language as tl

from .boxes import Lanes, locate


@triton.jit
def max_pool(x, y, sizes, TAPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    """Max-pooling, floor mode.

    Args:
        x: pointer to [N, H, W, C] fp32, fp16 or bf16.
        y: pointer to [N, P, Q, C] of the same type.
        sizes: :class:`.boxes.Sizes` with K = C.
        TAPS: :class:`.boxes.Taps`.
        PIXELS, CHANNELS: a program's tile, powers of two.
        WIDE: 64-bit offsets.
    """
    channel_tiles = tl.cdiv(sizes.C, CHANNELS)
    channels = tl.program_id(0) % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(0) // channel_tiles
    if WIDE:
        first = first.to(tl.int64)
    pixels = first * PIXELS + tl.arange(0, PIXELS)
    n = pixels // (sizes.P * sizes.Q)
    lanes = Lanes(n, pixels // sizes.Q % sizes.P, pixels % sizes.Q, n < sizes.N)
    exists = (channels < sizes.C)[None, :]

    largest = tl.full((PIXELS, CHANNELS), float("-inf"), dtype=tl.float32)
    for tap in tl.static_range(TAPS.R * TAPS.S):
        pixel, inside = locate(lanes, tap // TAPS.S, tap % TAPS.S, sizes, TAPS)
        offsets = (pixel * sizes.C)[:, None] + channels[None, :]
        value = tl.load(x + offsets, mask=inside[:, None] & exists, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, value, propagate_nan=tl.PropagateNan.ALL)
    offsets = (pixels * sizes.C)[:, None] + channels[None, :]
    tl.store(y + offsets, largest.to(y.dtype.element_ty), mask=lanes.inside[:, None] & exists)
