"""What happens to the accumulator between the last product and the store.

An epilogue is a function ``EPILOGUE(acc, at, *epilogue_args) -> acc``:

* ``acc [M, K]``: fp32, M pixels of the output by K filters;
* ``at``: where these elements are, see :class:`At`;
* the arguments are those of :data:`EPILOGUES`: pointers named as the launch names its operands, ``None`` for an absent one.

Everything is fp32; the only rounding to the output's type is at the store, after the activation. Below, ``per_filter`` and
``per_pixel`` are the two ways to read an operand. To add one: a function here, a row in :data:`EPILOGUES`, its twin in the
reference executor, a row in ``fused_resnet.launch.EPILOGUES``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


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
}


@triton.jit
def identity(z):
    return z


@triton.jit
def relu(z):
    """As PyTorch's, a NaN stays one (the hardware's maximum would drop it)."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


ACTIVATIONS = {"identity": identity, "relu": relu}
