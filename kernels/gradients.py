"""What the two gradient kernels share: how ``dz`` becomes the convolution's ``dy`` on load; and the ends of dgrad.

A gradient is two functions. ``COEFFICIENTS(filters, exists, *gradient_args) -> tuple of [1, K]`` is what is computed once for
each filter, ``GRADIENT(dz, y, inside, coefficients) -> dy`` what is computed for each element:

* ``dz, y [M, K]``: the loaded tiles, zero where ``inside`` is false and past the last filter; ``y`` is None unless it is read;
* ``inside [M, 1]``: whether the output pixel exists, or None where nobody asks. ``dy`` must be zero where it does not;
* ``filters [K]``, ``exists [K]``: which filter each column is, and whether there is one. Coefficients of none are 0, and so
  is its ``dy``.

=============  =============================================================================================================
identity       ``dy = dz``
scale          ``dy = gamma / sqrt(var + eps) * dz``: BatchNorm with given statistics
bn_backward    ``dy = gamma * invstd * (dz - sum / m - (y - mean) * invstd * dot / m)``: BatchNorm with the batch's
=============  =============================================================================================================

Loaders of a tile of dz or y, ``LOAD(tensor, place, lanes, dp, dq, k, sizes, TILE) -> [M, K]``: the box of output pixels that
starts at row ``place.p + dp`` and column ``place.q + dq``, filters from ``k`` on. ``box`` by a descriptor of ``[N, P, Q, K]``,
``gather`` by pointers and masks. There is no stride in them: dgrad's pixels of one parity walk dy step by step.

An epilogue of dgrad, ``EPILOGUE(acc, at, BACKWARD, *epilogue_args) -> (dx, factor)``, gets the accumulator ``[M, C]`` and where
it lies (:class:`.epilogues.At`, whose ``filters`` are channels here), and the gradient of the activation in front of which it
ends (a function of activations.py, or None). ``factor`` is what the stored dx is multiplied by for the
second sum over the pixels, or None.
"""

import triton
import triton.language as tl

from .epilogues import per_filter, per_pixel
from .numerics import rounded
from .prologues import batch_norm, deviation


@triton.jit
def shifted(lanes, dp, dq, sizes):
    """Output pixel ``(n * P + p) * Q + q``, a shift away from the tile's own, and whether it exists; both [M]."""
    p = lanes.p + dp
    q = lanes.q + dq
    inside = lanes.inside & (p >= 0) & (p < sizes.P) & (q >= 0) & (q < sizes.Q)
    return (lanes.n * sizes.P + p) * sizes.Q + q, inside


@triton.jit
def box(tensor, place, lanes, dp, dq, k, sizes, TILE: tl.constexpr):
    return tensor.load([place.n, place.p + dp, place.q + dq, k]).reshape(TILE.images * TILE.rows * TILE.columns, TILE.filters)


@triton.jit
def gather(tensor, place, lanes, dp, dq, k, sizes, TILE: tl.constexpr):
    filters = k + tl.arange(0, TILE.filters)
    pixel, inside = shifted(lanes, dp, dq, sizes)
    mask = inside[:, None] & (filters < sizes.K)[None, :]
    return tl.load(tensor + (pixel * sizes.K)[:, None] + filters[None, :], mask=mask, other=0.0)


@triton.jit
def vector(pointer, filters, exists):
    """Operand [K] in any float type, as fp32 [1, K], zero past the last filter."""
    return tl.load(pointer + filters, mask=exists, other=0.0).to(tl.float32)[None, :]


@triton.jit
def no_coefficients(filters, exists):
    return (0.0,)


@triton.jit
def identity(dz, y, inside, coefficients):
    return dz


@triton.jit
def inverse_deviation(var, eps, filters, exists):
    """``1 / sqrt(var + eps)``, fp32 [1, K], zero past the last filter."""
    invstd = tl.math.div_rn(1.0, tl.math.sqrt_rn(vector(var, filters, exists) + eps))
    return tl.where(exists[None, :], invstd, 0.0)


@triton.jit
def scale_coefficients(filters, exists, eps, gamma, var):
    scale = inverse_deviation(var, eps, filters, exists)
    if gamma is not None:
        scale = scale * vector(gamma, filters, exists)
    return (scale,)


@triton.jit
def scale(dz, y, inside, coefficients):
    return rounded(dz.to(tl.float32) * coefficients[0], dz.dtype)


@triton.jit
def bn_backward_coefficients(filters, exists, m, mean, invstd, gamma, sum, dot, count):
    """``(factor, mean of dz, mean of y, slope)``; ``m``: values a channel, or where ranks share them ``count``, a pointer."""
    if count is not None:
        m = tl.load(count).to(tl.float32)
    share = 1.0 / m  # once: dgrad computes these again for every chunk of filters
    deviation = vector(invstd, filters, exists)
    factor = deviation
    if gamma is not None:
        factor = factor * vector(gamma, filters, exists)
    slope = vector(dot, filters, exists) * (deviation * share)
    return factor, vector(sum, filters, exists) * share, vector(mean, filters, exists), slope


@triton.jit
def bn_backward(dz, y, inside, coefficients):
    """16-bit types: two multiply-adds, ``a * dz + (b * y + c)``; see :func:`.prologues.batch_norm` for what that cancels."""
    factor, dz_mean, mean, slope = coefficients
    if dz.dtype.primitive_bitwidth == 32:
        dy = factor * (dz - dz_mean - (y - mean) * slope)
        if inside is not None:
            dy = tl.where(inside, dy, 0.0)
    else:
        b = -factor * slope
        c = factor * (mean * slope - dz_mean)
        if inside is not None:
            c = tl.where(inside, c, 0.0)
        dy = factor * dz.to(tl.float32) + (b * y.to(tl.float32) + c)
    return rounded(dy, dz.dtype)


LOADS = {"box": box, "gather": gather}

#: Name in a launch -> (COEFFICIENTS, GRADIENT, names of the former's arguments: ``eps``, ``m`` or roles of operands).
GRADIENTS = {
    "identity": (no_coefficients, identity, ()),
    "scale": (scale_coefficients, scale, ("eps", "gamma", "var")),
    "bn_backward": (bn_backward_coefficients, bn_backward, ("m", "mean", "invstd", "gamma", "sum", "dot", "count")),
}


@triton.jit
def store(acc, at, BACKWARD: tl.constexpr, dshortcut):
    if dshortcut is not None:
        acc = acc + per_pixel(dshortcut, at)
    return acc, 0.0


@triton.jit
def mask(acc, at, BACKWARD: tl.constexpr, slope, a_previous, z_previous):
    """In front of the previous activation, from its output or, where that does not tell, its input."""
    if BACKWARD is not None:
        if z_previous is not None:
            acc = BACKWARD(acc, per_pixel(z_previous, at), slope)
        else:
            acc = BACKWARD(acc, per_pixel(a_previous, at), slope)
    return acc, 0.0


@triton.jit
def bn_mask(acc, at, BACKWARD: tl.constexpr, slope, x, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps, dshortcut):
    """The same, the input computed again from what its BatchNorm read; the factor is ``(x - mean) * invstd``.

    ``dshortcut``: what else has read the activation gives its gradient, or None.
    """
    value = tl.load(x + at.offsets, mask=at.mask, other=0.0, eviction_policy="evict_first")
    if dshortcut is not None:
        acc = acc + per_pixel(dshortcut, at)
    if BACKWARD is not None:
        z = batch_norm(value, at.filters, at.filters_inside, None, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps)
        acc = BACKWARD(acc, z, slope)
    centred = value.to(tl.float32) - per_filter(x_mean, at)
    return acc, centred * deviation(at.filters, at.filters_inside, x_invstd, x_var, x_eps)


#: Name in a launch -> (function, names of its arguments: ``slope``, ``x_eps`` or roles of operands).
EPILOGUES = {
    "store": (store, ("dshortcut",)),
    "mask": (mask, ("slope", "a_previous", "z_previous")),
    "bn_mask": (bn_mask, ("slope", "x", "x_mean", "x_invstd", "x_gamma", "x_beta", "x_var", "x_eps", "dshortcut")),
}
