"""What happens to a tile of pixels between its load and the product.

A prologue is a function ``PROLOGUE(pixels, channels, inside, *prologue_args) -> pixels``:

* ``pixels [M, C]``: the loaded tile, zero wherever the tap falls into the padding or past the last channel;
* ``channels [C]``: which channel each column is;
* ``inside [M, 1]`` or ``[M, C]``: whether the tap falls into the image, or None where that need not be asked. A prologue that
  does not map 0 to 0 must put the zeros of the padding back, since a convolution pads what it reads *after* the
  normalisation, not before.

To add one: a function here, a row in :data:`PROLOGUES`, its twin in the reference executor. Of an activation it is a function
of two lines, which stands for the one behind a BatchNorm and, without the BatchNorm's vectors, for the activation alone.
"""

import triton
import triton.language as tl

from . import activations as act
from .numerics import rounded


@triton.jit
def identity(pixels, channels, inside):
    return pixels


@triton.jit
def per_channel(vector, channels, exists):
    """Operand [C] in any float type, as fp32 [1, C]."""
    return tl.load(vector + channels, mask=exists, other=0.0).to(tl.float32)[None, :]


@triton.jit
def deviation(channels, exists, invstd, var, eps):
    """``invstd``, or of given statistics ``1 / sqrt(var + eps)``; fp32 [1, C]. Past the last channel it is finite."""
    if invstd is not None:
        return per_channel(invstd, channels, exists)
    else:
        spread = tl.load(var + channels, mask=exists, other=1.0).to(tl.float32)[None, :]
        return tl.math.div_rn(1.0, tl.math.sqrt_rn(spread + eps))


@triton.jit
def batch_norm(x, channels, exists, inside, mean, invstd, gamma, beta, var, eps):
    """BatchNorm, fp32 [M, C], zero where ``inside`` is false. The one place it is computed.

    fp32 ``x``: ``(x - mean) * (invstd * gamma) + beta``. The mean is taken off first: ``scale * x + shift`` would cancel where
    it is large against the deviation.

    16-bit ``x``: one multiply-add, ``x * scale + shift``. What that cancels is fp32's rounding of ``mean * scale``, 2^-24 of
    it; x's own rounding is 2^-9 or 2^-12 of it already. What lies outside was loaded as zero and stays so without a shift: a
    selection of fp32 in front of the addition. Behind it, of 16-bit halves, it took two more instructions an element
    (compiled, sm_90).

    Args:
        x: [M, C], of the type it has in memory.
        channels, exists: [C], which channel each column is, and whether there is one.
        inside: [M, 1] or [M, C], or None where nobody asks.
        mean, invstd, gamma, beta, var: pointers to [C]; gamma and beta may be None, and either invstd (with the batch's
            statistics) or var (with given ones).
        eps: added to var; None without.
    """
    scale = deviation(channels, exists, invstd, var, eps)
    if gamma is not None:
        scale = scale * per_channel(gamma, channels, exists)
    if x.dtype.primitive_bitwidth == 32:
        z = (x - per_channel(mean, channels, exists)) * scale
        if beta is not None:
            z = z + per_channel(beta, channels, exists)
        if inside is not None:
            z = tl.where(inside, z, 0.0)
        return z
    else:
        shift = -per_channel(mean, channels, exists) * scale
        if beta is not None:
            shift = shift + per_channel(beta, channels, exists)
        if inside is not None:
            shift = tl.where(inside, shift, 0.0)
        return x.to(tl.float32) * scale + shift


@triton.jit
def activated(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps, ACTIVATION: tl.constexpr, slope):
    if x_mean is None:
        z = pixels.to(tl.float32)
    else:
        z = batch_norm(pixels, channels, channels < C, inside, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps)
    return rounded(ACTIVATION(z, slope), pixels.dtype)


@triton.jit
def bn(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps):
    return activated(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps, act.identity, None)


@triton.jit
def bn_relu(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps):
    return activated(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps, act.relu, None)


@triton.jit
def bn_relu6(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps):
    return activated(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps, act.relu6, None)


@triton.jit
def bn_leaky_relu(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps, x_slope):
    return activated(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps, act.leaky_relu, x_slope)


@triton.jit
def bn_silu(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps):
    return activated(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps, act.silu, None)


@triton.jit
def bn_gelu(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps):
    return activated(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps, act.gelu, None)


@triton.jit
def bn_gelu_tanh(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps):
    return activated(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps, act.gelu_tanh, None)


@triton.jit
def bn_hardswish(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps):
    return activated(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta, x_var, x_eps, act.hardswish, None)


_VECTORS = ("C", "x_mean", "x_invstd", "x_gamma", "x_beta", "x_var", "x_eps")
_ACTIVATED = {
    "relu": (bn_relu, _VECTORS),
    "relu6": (bn_relu6, _VECTORS),
    "leaky_relu": (bn_leaky_relu, (*_VECTORS, "x_slope")),
    "silu": (bn_silu, _VECTORS),
    "gelu": (bn_gelu, _VECTORS),
    "gelu_tanh": (bn_gelu_tanh, _VECTORS),
    "hardswish": (bn_hardswish, _VECTORS),
}

#: Name in a launch -> (function, names of its arguments: ``C``, ``x_slope``, ``x_eps`` or roles of operands).
PROLOGUES = {
    "identity": (identity, ()),
    "bn": (bn, _VECTORS),
    **{f"bn_{name}": row for name, row in _ACTIVATED.items()},
    **_ACTIVATED,
}
