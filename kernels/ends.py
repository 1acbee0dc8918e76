"""The two ends of a convolution as launches of their own, around a convolution that has none.

For layers where the work on load costs more than writing its result once, and for PyTorch's own convolution. The functions are
those the fused kernels call (prologues.py, gradients.py, epilogues.py); only who loads and stores differs. A program owns a
strip of ``PIXELS`` pixels by ``CHANNELS`` channels, as in elementwise.py. Around a chain's entry, a BatchNorm without a
convolution, two of them stand alone: the statistics, and the gradient in front of it::

    dz, y --GRADIENT--> dy      convolution      raw --EPILOGUE, ACTIVATION--> y      --AFTER--> statistics
                                                 raw --EPILOGUE of dgrad--> dx        --> sums over the pixels
"""

import triton
import triton.language as tl

from .elementwise import strip_index
from .epilogues import At, Index, per_pixel
from .finish import Column, finish_sums
from .numerics import column_sums, rounded


@triton.jit
def strip_of(pixels, K, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    """Where a program's strip lies (:class:`.epilogues.At`), and the first four of :class:`.epilogues.Index`."""
    strip, channel_tile, channel_tiles = strip_index(K, CHANNELS)
    channels = channel_tile * CHANNELS + tl.arange(0, CHANNELS)
    start = strip
    if WIDE:
        start = start.to(tl.int64)
    pixel = start * PIXELS + tl.arange(0, PIXELS)
    exists = channels < K
    inside = pixel < pixels
    offsets = (pixel * K)[:, None] + channels[None, :]
    at = At(pixel, channels, inside, exists, offsets, inside[:, None] & exists[None, :])
    return at, (strip, tl.num_programs(0) // channel_tiles, channel_tile, channel_tiles)


@triton.jit(do_not_specialize_on_alignment=["pixels"])
def output_gradient(
    dz,
    y,
    dshortcut,
    dy,
    pixels,
    K,
    COEFFICIENTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    gradient_args,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``dy = GRADIENT(dz, y) + dshortcut``; pointers to [pixels, K].

    ``y`` is None where the gradient does not read it, ``dshortcut`` where there is no shortcut.
    """
    at, _ = strip_of(pixels, K, PIXELS, CHANNELS, WIDE)
    gradient = tl.load(dz + at.offsets, mask=at.mask, other=0.0).to(tl.float32)
    made = None
    if y is not None:
        made = tl.load(y + at.offsets, mask=at.mask, other=0.0).to(tl.float32)
    coefficients = COEFFICIENTS(at.filters, at.filters_inside, *gradient_args)
    gradient = GRADIENT(gradient, made, None, coefficients)
    if dshortcut is not None:
        gradient += per_pixel(dshortcut, at)
    tl.store(dy + at.offsets, rounded(gradient, dy.dtype.element_ty), mask=at.mask)


@triton.jit(do_not_specialize_on_alignment=["pixels", "group"])
def conv_end(
    raw,
    y,
    pixels,
    K,
    group,
    EPILOGUE: tl.constexpr,
    epilogue_args,
    ACTIVATION: tl.constexpr,
    slope,
    AFTER: tl.constexpr,
    after_args,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What :func:`.conv.conv_forward` does behind its main loop.

    ``y``: pointer like raw, or None where raw stays as it is; ``group``: None where nothing is reduced.
    """
    at, strip = strip_of(pixels, K, PIXELS, CHANNELS, WIDE)
    index = Index(*strip, group)
    acc = tl.load(raw + at.offsets, mask=at.mask, other=0.0)
    z = rounded(ACTIVATION(EPILOGUE(acc.to(tl.float32), at, *epilogue_args), slope), acc.dtype)
    if y is not None:
        tl.store(y + at.offsets, z, mask=at.mask)
    if AFTER is not None:
        AFTER(z.to(tl.float32), at, index, *after_args)


@triton.jit(do_not_specialize_on_alignment=["pixels", "group"])
def dgrad_end(
    raw,
    dx,
    pixels,
    K,
    outputs,
    group,
    partials,
    counters,
    EPILOGUE: tl.constexpr,
    epilogue_args,
    BACKWARD: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What :func:`.dgrad.dgrad` does behind its main loop. ``K``: channels; ``group``: None where nothing is summed."""
    at, strip = strip_of(pixels, K, PIXELS, CHANNELS, WIDE)
    index = Index(*strip, group)
    acc = tl.load(raw + at.offsets, mask=at.mask, other=0.0)
    made, factor = EPILOGUE(acc.to(tl.float32), at, BACKWARD, *epilogue_args)
    stored = rounded(made, acc.dtype)
    tl.store(dx + at.offsets, stored, mask=at.mask)
    if group is not None:
        stored = tl.where(at.mask, stored.to(tl.float32), 0.0)
        own = counters + index.filter_tile * (tl.cdiv(index.pixel_tiles, group) + 1)
        tiles = Column(partials, own, index.pixel_tile, index.pixel_tiles, group, at.filters, at.filters_inside, K)
        if len(outputs) == 1:
            finish_sums(tiles, (column_sums(stored),), outputs)
        else:
            total = column_sums(tl.where(at.mask, stored * factor, 0.0))
            finish_sums(tiles, (column_sums(stored), total), outputs)
