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
def bn_relu(pixels, channels, inside, C, scale, shift):
    """``relu(scale * x + shift)`` channel by channel; ``scale``, ``shift``: pointers to fp32 [C]."""
    a = tl.load(scale + channels, mask=channels < C, other=0.0)[None, :]
    b = tl.load(shift + channels, mask=channels < C, other=0.0)[None, :]
    normalised = relu(pixels.to(tl.float32) * a + b)
    return rounded(tl.where(inside, normalised, 0.0), pixels.dtype)


#: Name in a launch -> (function, names of its arguments: ``C`` or roles of operands).
PROLOGUES = {
    "identity": (identity, ()),
    "bn_relu": (bn_relu, ("C", "scale", "shift")),
}
