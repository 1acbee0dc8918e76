"""What happens to a tile of pixels between its load and the product.

A prologue is a function ``PROLOGUE(pixels, channels, inside, *prologue_args) -> pixels``:

* ``pixels [M, C]``: the loaded tile, zero wherever the tap falls into the padding or past the last channel;
* ``channels [C]``: which channel each column is;
* ``inside [M, 1]`` or ``[M, C]``: whether the tap falls into the image. A prologue that does not map 0 to 0 must put the zeros
  of the padding back, since a convolution pads what it reads *after* the normalisation, not before.

To add one: a function here, a row in :data:`PROLOGUES`, its twin in the reference executor.
"""

import triton
import triton.language as tl

from .epilogues import relu
from .numerics import rounded


@triton.jit
def identity(pixels, channels, inside):
    return pixels


@triton.jit
def per_channel(vector, channels, exists):
    """Operand [C] in any float type, as fp32 [1, C]."""
    return tl.load(vector + channels, mask=exists, other=0.0).to(tl.float32)[None, :]


@triton.jit
def batch_norm(x, channels, exists, mean, invstd, gamma, beta):
    """BatchNorm with the batch's statistics, ``(x - mean) * (invstd * gamma) + beta``, fp32 [M, C].

    The mean is taken off first: ``scale * x + shift`` would cancel where it is large against the deviation. mean, invstd, gamma
    and beta are pointers [C]; gamma and beta may be None.
    """
    scale = per_channel(invstd, channels, exists)
    if gamma is not None:
        scale = scale * per_channel(gamma, channels, exists)
    z = (x.to(tl.float32) - per_channel(mean, channels, exists)) * scale
    if beta is not None:
        z = z + per_channel(beta, channels, exists)
    return z


@triton.jit
def bn(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta):
    normalised = batch_norm(pixels, channels, channels < C, x_mean, x_invstd, x_gamma, x_beta)
    return rounded(tl.where(inside, normalised, 0.0), pixels.dtype)


@triton.jit
def bn_relu(pixels, channels, inside, C, x_mean, x_invstd, x_gamma, x_beta):
    normalised = relu(batch_norm(pixels, channels, channels < C, x_mean, x_invstd, x_gamma, x_beta))
    return rounded(tl.where(inside, normalised, 0.0), pixels.dtype)


_VECTORS = ("C", "x_mean", "x_invstd", "x_gamma", "x_beta")

#: Name in a launch -> (function, names of its arguments: ``C`` or roles of operands).
PROLOGUES = {
    "identity": (identity, ()),
    "bn": (bn, _VECTORS),
    "bn_relu": (bn_relu, _VECTORS),
}
