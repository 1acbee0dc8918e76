"""What happens to the accumulator between the last product and the store.

An epilogue is a function ``EPILOGUE(acc, at, *epilogue_args) -> acc``:

* ``acc [M, K]``: fp32, M pixels of the output by K filters;
* ``at``: where these elements are, see :class:`At`;
* the arguments are those of :data:`EPILOGUES`: pointers named as the launch names its operands, ``None`` for an absent one.

Everything is fp32; the only rounding to the output's type is at the store, after the activation. Below, ``per_filter`` and
``per_pixel`` are the two ways to read an operand. To add one: a function here, a row in :data:`EPILOGUES`, its twin in the
reference executor, a row in ``fused_resnet.launch.EPILOGUES``.

What needs the stored values, as statistics of them do, comes behind the store, when the accumulator's registers are free again:
``AFTER(y, at, index, *after_args)``, see :data:`AFTERS`. ``y [M, K]``: what was stored, in fp32; ``index``: :class:`Index`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .finish import Column, arrive, finish_moments, moments
from .numerics import rounded


class At(NamedTuple):
    """Where an accumulator's elements lie in the output ``y[N, P, Q, K]``.

    Attributes:
        pixels: [M] index ``(n * P + p) * Q + q``, int32, or int64 for outputs of 2^31 elements and more.
        filters: [K] index k, of the same type.
        pixels_inside: [M] false past the image's border or the last image.
        filters_inside: [K] false past the last filter.
        offsets: [M, K] element offset ``pixel * K + k``.
        mask: [M, K] which elements exist.
    """

    pixels: Any
    filters: Any
    pixels_inside: Any
    filters_inside: Any
    offsets: Any
    mask: Any


class Index(NamedTuple):
    """Which of the tiles of pixels and of filters a program makes, and how many there are.

    ``group``: tiles of pixels that the first level of :mod:`.finish` merges, or None.
    """

    pixel_tile: Any
    pixel_tiles: Any
    filter_tile: Any
    filter_tiles: Any
    group: Any


@triton.jit
def per_filter(vector, at):
    """Operand [K] in any float type, as fp32 [1, K]."""
    return tl.load(vector + at.filters, mask=at.filters_inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def per_pixel(tensor, at):
    """Operand [N, P, Q, K] like the output, as fp32 [M, K]. Read once, so it need not stay in the L2."""
    return tl.load(tensor + at.offsets, mask=at.mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def scale_and_shift(at, eps, gamma, beta, mean, var, bias):
    """BatchNorm with given statistics as ``scale * y + shift``, the convolution's bias included; both fp32 [1, K].

    ``scale = gamma / sqrt(var + eps)``, ``shift = beta + (bias - mean) * scale``. Folded here, filter by filter, in every
    launch: it costs nothing beside the product and can never be stale. What the lanes past the last filter make of their zeros
    is not stored.
    """
    scale = tl.math.div_rn(1.0, tl.math.sqrt_rn(per_filter(var, at) + eps))
    if gamma is not None:
        scale = scale * per_filter(gamma, at)
    shift = -per_filter(mean, at)
    if bias is not None:
        shift = shift + per_filter(bias, at)
    shift = shift * scale
    if beta is not None:
        shift = shift + per_filter(beta, at)
    return scale, shift


@triton.jit
def store(acc, at):
    return acc


@triton.jit
def bias(acc, at, bias):
    return acc + per_filter(bias, at)


@triton.jit
def maybe_bias(acc, at, bias):
    if bias is not None:
        acc = acc + per_filter(bias, at)
    return acc


@triton.jit
def affine(acc, at, eps, gamma, beta, mean, var, bias):
    scale, shift = scale_and_shift(at, eps, gamma, beta, mean, var, bias)
    return acc * scale + shift


@triton.jit
def add(acc, at, shortcut):
    return acc + per_pixel(shortcut, at)


@triton.jit
def bias_add(acc, at, bias, shortcut):
    return acc + per_filter(bias, at) + per_pixel(shortcut, at)


@triton.jit
def affine_add(acc, at, eps, gamma, beta, mean, var, bias, shortcut):
    scale, shift = scale_and_shift(at, eps, gamma, beta, mean, var, bias)
    return acc * scale + shift + per_pixel(shortcut, at)


#: Name in a launch -> (function, names of its arguments: ``eps`` or roles of operands).
EPILOGUES = {
    "store": (store, ()),
    "bias": (bias, ("bias",)),
    "affine": (affine, ("eps", "gamma", "beta", "mean", "var", "bias")),
    "add": (add, ("shortcut",)),
    "bias_add": (bias_add, ("bias", "shortcut")),
    "affine_add": (affine_add, ("eps", "gamma", "beta", "mean", "var", "bias", "shortcut")),
    "stats": (maybe_bias, ("bias",)),
}


@triton.jit
def statistics(
    y,
    at,
    index,
    K,
    partials,
    counters,
    mean,
    invstd,
    var,
    eps,
    running_mean,
    running_var,
    before,
    batches,
    momentum,
):
    """Mean and spread of every filter over all pixels; the last program of a column of tiles merges them and keeps the books.

    Args:
        K: filters.
        partials: fp32: means [pixel_tiles, K], M2 [pixel_tiles, K], and pixels counted [filter_tiles, pixel_tiles].
        counters: ``cdiv(pixel_tiles, index.group) + 1`` a column of tiles, and one for the columns.
        mean, invstd: outputs, fp32 [K]; ``var``, biased, is written instead of ``invstd`` where that is None.
        running_mean, running_var: updated in place, or None. The variance is the unbiased one there.
        before: output, fp32 [2, K]: what these two were, for a block of which a later launch fails.
        batches: int64 [1], counted up, or None.
        momentum: None for the cumulative average, 1 / batches.
    """
    groups = tl.cdiv(index.pixel_tiles, index.group)
    own = counters + index.filter_tile * (groups + 1)
    column = Column(partials, own, index.pixel_tile, index.pixel_tiles, index.group, at.filters, at.filters_inside, K)
    counts = partials + 2 * index.pixel_tiles * K + index.filter_tile * index.pixel_tiles
    count, mean_k, m2_k = moments(y, at.pixels_inside)
    last, count, mean_k, m2_k = finish_moments(column, counts, count, mean_k, m2_k)
    if last:
        var_k = m2_k / count
        tl.store(mean + at.filters, mean_k, mask=at.filters_inside)
        if invstd is not None:
            tl.store(invstd + at.filters, tl.math.div_rn(1.0, tl.math.sqrt_rn(var_k + eps)), mask=at.filters_inside)
        else:
            tl.store(var + at.filters, var_k, mask=at.filters_inside)
        if batches is not None:
            seen = tl.load(batches) + 1
        if running_mean is not None:
            if momentum is not None:
                part = momentum
            else:
                part = 1.0 / seen.to(tl.float32)
            blend(running_mean, before, at, mean_k, part)
            blend(running_var, before + K, at, m2_k / (count - 1), part)
        if batches is not None:
            # Every column has read the old count by the time the last column writes the new one.
            if arrive(counters + index.filter_tiles * (groups + 1), index.filter_tiles):
                tl.store(batches, seen)


@triton.jit
def blend(vector, before, at, new, part):
    """``vector = (1 - part) * vector + part * new``, in place; ``before``, fp32, gets what it was."""
    old = tl.load(vector + at.filters, mask=at.filters_inside, other=0.0).to(tl.float32)
    tl.store(before + at.filters, old, mask=at.filters_inside)
    value = (1 - part) * old + part * new
    tl.store(vector + at.filters, rounded(value, vector.dtype.element_ty), mask=at.filters_inside)


#: Name of an epilogue in a launch -> (function called behind the store, names of its arguments).
AFTERS = {
    "stats": (
        statistics,
        (
            "K",
            "partials",
            "counters",
            "mean",
            "invstd",
            "var",
            "eps",
            "running_mean",
            "running_var",
            "before",
            "batches",
            "momentum",
        ),
    ),
}


#: Operands that a kernel updates in place.
IN_PLACE = ("running_mean", "running_var", "batches")
