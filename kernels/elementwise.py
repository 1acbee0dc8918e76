"""The end of a residual block, where no convolution follows in whose prologue it could happen.

``out = ACTIVATION(bn(y) + bn_or_identity(shortcut))`` and its backward. A program owns a strip of ``STEPS`` times ``PIXELS``
pixels by ``CHANNELS`` channels; all tensors are read once, whole sectors at a time::

    y         [N * P * Q, K] --bn--+
                                   +--> ACTIVATION --> out
    shortcut  [N * P * Q, K] --bn--+

    dout --BACKWARD(out)--> dz --+--> sum of dz, of dz * xhat(y), of dz * xhat(shortcut), over the pixels of each channel
"""

import triton
import triton.language as tl

from .finish import Column, finish_sums
from .numerics import column_sums, rounded
from .prologues import batch_norm, per_channel


@triton.jit
def strip_index(K, CHANNELS: tl.constexpr):
    """Which strip of pixels this program owns, which tile of channels, and how many of those there are."""
    channel_tiles = tl.cdiv(K, CHANNELS)
    return tl.program_id(0) // channel_tiles, tl.program_id(0) % channel_tiles, channel_tiles


@triton.jit
def added_up(y, y_bn, shortcut, shortcut_bn, channels, exists):
    """``bn(y) + bn(shortcut)``, fp32, of tiles [M, C]; the shortcut may be None, and the vectors of either BatchNorm."""
    if y_bn[0] is not None:
        z = batch_norm(y, channels, exists, None, *y_bn)
    else:
        z = y.to(tl.float32)
    if shortcut is not None:
        if shortcut_bn[0] is not None:
            z = z + batch_norm(shortcut, channels, exists, None, *shortcut_bn)
        else:
            z = z + shortcut.to(tl.float32)
    return z


@triton.jit(do_not_specialize_on_alignment=["pixels"])
def bn_add_relu(
    y,
    y_bn,
    shortcut,
    shortcut_bn,
    out,
    pixels,
    K,
    ACTIVATION: tl.constexpr,
    slope,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Forward.

    Args:
        y: pointer to [pixels, K] fp32, fp16 or bf16.
        y_bn: the last arguments of :func:`.prologues.batch_norm`; None, in a tuple, where y is taken as it is.
        shortcut: pointer like y, or None.
        shortcut_bn: as y_bn, for the shortcut.
        out: pointer like y.
        ACTIVATION, slope: function of activations.py and its second argument.
        WIDE: 64-bit offsets.
    """
    strip, channel_tile, _ = strip_index(K, CHANNELS)
    channels = channel_tile * CHANNELS + tl.arange(0, CHANNELS)
    if WIDE:
        strip = strip.to(tl.int64)
    pixel = strip * PIXELS + tl.arange(0, PIXELS)
    exists = channels < K
    mask = (pixel < pixels)[:, None] & exists[None, :]
    offsets = (pixel * K)[:, None] + channels[None, :]
    side = None
    if shortcut is not None:
        side = tl.load(shortcut + offsets, mask=mask, other=0.0)
    z = added_up(tl.load(y + offsets, mask=mask, other=0.0), y_bn, side, shortcut_bn, channels, exists)
    tl.store(out + offsets, rounded(ACTIVATION(z, slope), out.dtype.element_ty), mask=mask)


@triton.jit
def standardised(x, channels, exists, mean, invstd):
    """``xhat = (x - mean) * invstd``, fp32 [M, C]."""
    return (x.to(tl.float32) - per_channel(mean, channels, exists)) * per_channel(invstd, channels, exists)


@triton.jit(do_not_specialize_on_alignment=["pixels", "group"])
def bn_add_relu_backward(
    dout,
    out,
    y,
    y_bn,
    shortcut,
    shortcut_bn,
    dz,
    sums,
    pixels,
    K,
    group,
    partials,
    counters,
    BACKWARD: tl.constexpr,
    slope,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Backward, up to the sums that BatchNorm's backward needs.

    Args:
        dout: pointer to [pixels, K].
        out: pointer like dout: what the activation gave, or None where there is none or its output does not tell.
        y, y_bn: pointer like dout, and as for :func:`bn_add_relu`, gamma and beta only needed without ``out``. y is
            None where neither its sum nor the activation's input is asked for.
        shortcut, shortcut_bn: likewise.
        dz: pointer like dout, or None. The sums are of what is stored.
        sums: pointers to fp32 [K]: of dz, of dz * xhat(y), of dz * xhat(shortcut); None for those not asked for.
        group, partials, counters: see :class:`.finish.Column`; counters for each tile of channels. No group without sums.
        BACKWARD, slope: function of activations.py, None without an activation, and its third argument.
    """
    strip, channel_tile, channel_tiles = strip_index(K, CHANNELS)
    channels = channel_tile * CHANNELS + tl.arange(0, CHANNELS)
    exists = channels < K
    start = strip
    if WIDE:
        start = start.to(tl.int64)
    total = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
    dot = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
    shortcut_dot = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
    for step in range(0, STEPS):
        pixel = (start * STEPS + step) * PIXELS + tl.arange(0, PIXELS)
        mask = (pixel < pixels)[:, None] & exists[None, :]
        offsets = (pixel * K)[:, None] + channels[None, :]
        gradient = tl.load(dout + offsets, mask=mask, other=0.0)
        value = None
        side = None
        if y is not None:
            value = tl.load(y + offsets, mask=mask, other=0.0)
        if shortcut is not None:
            side = tl.load(shortcut + offsets, mask=mask, other=0.0)
        if BACKWARD is not None:
            if out is not None:
                seen = tl.load(out + offsets, mask=mask, other=0.0).to(tl.float32)
            else:
                seen = added_up(value, y_bn, side, shortcut_bn, channels, exists)
            made = BACKWARD(gradient.to(tl.float32), seen, slope)
            gradient = rounded(tl.where(mask, made, 0.0), dout.dtype.element_ty)
        if dz is not None:
            tl.store(dz + offsets, gradient, mask=mask)
        gradient = gradient.to(tl.float32)
        total += gradient
        if y_bn[0] is not None:
            dot += tl.where(mask, gradient * standardised(value, channels, exists, y_bn[0], y_bn[1]), 0.0)
        if shortcut_bn[0] is not None:
            xhat = standardised(side, channels, exists, shortcut_bn[0], shortcut_bn[1])
            shortcut_dot += tl.where(mask, gradient * xhat, 0.0)
    if group is not None:
        strips = tl.num_programs(0) // channel_tiles
        own = counters + channel_tile * (tl.cdiv(strips, group) + 1)
        column = Column(partials, own, strip, strips, group, channels, exists, K)
        finish_sums(column, (column_sums(total), column_sums(dot), column_sums(shortcut_dot)), sums)
