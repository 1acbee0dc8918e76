"""The end of a highway block: a gate mixes the branch with the shortcut, and the backward of that.

``out = T * ACTIVATION(bn(y)) + (1 - T) * bn_or_identity(shortcut)`` with ``T = sigmoid(t)``. Programs own strips of pixels by
channels as in elementwise.py; the sigmoid, both products and the sum happen between one load and one store of each tensor::

    y         --bn--ACTIVATION--> h --+
    t         --sigmoid---------> T --+--> T * h + (1 - T) * s --> out
    shortcut  --bn--------------> s --+

    dout * T, masked by h         --> dz     --> sum of dz, of dz * xhat(y)
    dout * (h - s) * T * (1 - T)  --> dt     --> sum of dt
    dout * (1 - T)                --> dside  --> sum of dside, of dside * xhat(shortcut)
"""

import triton
import triton.language as tl

from .activations import logistic
from .elementwise import standardised, strip_index
from .finish import Column, finish_sums
from .numerics import column_sums, rounded
from .prologues import batch_norm


@triton.jit
def normalised_or_not(value, channels, exists, vectors):
    """fp32, behind its BatchNorm where ``vectors`` are there."""
    if vectors[0] is not None:
        return batch_norm(value, channels, exists, None, *vectors)
    return value.to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["pixels"])
def gate(
    y,
    y_bn,
    shortcut,
    shortcut_bn,
    t,
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
        y, shortcut, t: pointers to [pixels, K] fp32, fp16 or bf16.
        y_bn, shortcut_bn: the last arguments of :func:`.prologues.batch_norm`; None, in a tuple, where there is no BatchNorm.
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
    z = normalised_or_not(tl.load(y + offsets, mask=mask, other=0.0), channels, exists, y_bn)
    side = normalised_or_not(tl.load(shortcut + offsets, mask=mask, other=0.0), channels, exists, shortcut_bn)
    opened = logistic(tl.load(t + offsets, mask=mask, other=0.0).to(tl.float32))
    mixed = opened * ACTIVATION(z, slope) + (1.0 - opened) * side
    tl.store(out + offsets, rounded(mixed, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["pixels", "group"])
def gate_backward(
    dout,
    y,
    y_bn,
    shortcut,
    shortcut_bn,
    t,
    dz,
    dt,
    dside,
    sums,
    pixels,
    K,
    group,
    partials,
    counters,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    slope,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Backward, up to the sums that BatchNorm's backward and the gate's bias need.

    Args:
        dout, y, shortcut, t: pointers to [pixels, K].
        y_bn, shortcut_bn: as in :func:`gate`.
        dz, dt, dside: pointers like dout. The sums are of what is stored.
        sums: pointers to fp32 [K]: of dz, of dz * xhat(y), of dt, of dside, of dside * xhat(shortcut); None if not asked for.
        group, partials, counters: see :class:`.finish.Column`; counters for each tile of channels.
        ACTIVATION, BACKWARD, slope: functions of activations.py and what they take last. ACTIVATION is None where y is what the
            activation gave, BACKWARD where there is none.
    """
    strip, channel_tile, channel_tiles = strip_index(K, CHANNELS)
    channels = channel_tile * CHANNELS + tl.arange(0, CHANNELS)
    exists = channels < K
    start = strip
    if WIDE:
        start = start.to(tl.int64)
    total = tl.zeros((CHANNELS,), dtype=tl.float32)
    dot = tl.zeros((CHANNELS,), dtype=tl.float32)
    total_t = tl.zeros((CHANNELS,), dtype=tl.float32)
    total_side = tl.zeros((CHANNELS,), dtype=tl.float32)
    dot_side = tl.zeros((CHANNELS,), dtype=tl.float32)
    for step in range(0, STEPS):
        pixel = (start * STEPS + step) * PIXELS + tl.arange(0, PIXELS)
        mask = (pixel < pixels)[:, None] & exists[None, :]
        offsets = (pixel * K)[:, None] + channels[None, :]
        gradient = tl.load(dout + offsets, mask=mask, other=0.0).to(tl.float32)
        opened = logistic(tl.load(t + offsets, mask=mask, other=0.0).to(tl.float32))
        y_value = tl.load(y + offsets, mask=mask, other=0.0)
        side_value = tl.load(shortcut + offsets, mask=mask, other=0.0)
        z = normalised_or_not(y_value, channels, exists, y_bn)
        side = normalised_or_not(side_value, channels, exists, shortcut_bn)
        made = gradient * opened
        h = z
        if ACTIVATION is not None:
            h = ACTIVATION(z, slope)
        if BACKWARD is not None:
            made = BACKWARD(made, z, slope)
        stored = rounded(made, dz.dtype.element_ty)
        tl.store(dz + offsets, stored, mask=mask)
        stored = tl.where(mask, stored.to(tl.float32), 0.0)
        total += column_sums(stored)
        if y_bn[0] is not None:
            xhat = standardised(y_value, channels, exists, y_bn[0], y_bn[1])
            dot += column_sums(tl.where(mask, stored * xhat, 0.0))
        stored = rounded(gradient * (h - side) * (opened * (1.0 - opened)), dt.dtype.element_ty)
        tl.store(dt + offsets, stored, mask=mask)
        total_t += column_sums(tl.where(mask, stored.to(tl.float32), 0.0))
        stored = rounded(gradient * (1.0 - opened), dside.dtype.element_ty)
        tl.store(dside + offsets, stored, mask=mask)
        stored = tl.where(mask, stored.to(tl.float32), 0.0)
        total_side += column_sums(stored)
        if shortcut_bn[0] is not None:
            xhat = standardised(side_value, channels, exists, shortcut_bn[0], shortcut_bn[1])
            dot_side += column_sums(tl.where(mask, stored * xhat, 0.0))
    strips = tl.num_programs(0) // channel_tiles
    own = counters + channel_tile * (tl.cdiv(strips, group) + 1)
    column = Column(partials, own, strip, strips, group, channels, exists, K)
    finish_sums(column, (total, dot, total_t, total_side, dot_side), sums)
