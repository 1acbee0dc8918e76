"""The activations and their gradients: twins of fused_resnet/activations.py, named as there.

``ACTIVATION(z, slope) -> a`` and ``BACKWARD(gradient, z, slope) -> gradient * a'(z)``, everything fp32. ``slope`` is
LeakyReLU's, and None for all others. ReLU, ReLU6 and a LeakyReLU whose slope is not negative may be given a for z, see there.

All map 0 to 0: behind one the padding of a convolution is what it was. A NaN travels as in PyTorch; where that differs between
its own kernels (ReLU6's gradient) as on its GPUs.
"""

import triton
import triton.language as tl

# Constants stand behind what they multiply: in front of a tensor Triton's interpreter makes a constant of it (3.8).
_HALF_ROOT: tl.constexpr = tl.constexpr(0.7071067811865476)  # 1 / sqrt(2)
_DENSITY: tl.constexpr = tl.constexpr(0.3989422804014327)  # of the normal distribution at 0, 1 / sqrt(2 * pi)
_TANH: tl.constexpr = tl.constexpr(1.5957691216057308)  # 2 * sqrt(2 / pi)
_CUBE: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def identity(z, slope):
    return z


@triton.jit
def relu(z, slope):
    """As PyTorch's, a NaN stays one (the hardware's maximum would drop it)."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_backward(gradient, z, slope):
    """A NaN is not below zero: it lets the gradient pass."""
    return tl.where(z <= 0, 0.0, gradient)


@triton.jit
def relu6(z, slope):
    return tl.minimum(relu(z, None), 6.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu6_backward(gradient, z, slope):
    return tl.where((z <= 0) | (z >= 6), 0.0, gradient)


@triton.jit
def leaky_relu(z, slope):
    return tl.where(z > 0, z, z * slope)


@triton.jit
def leaky_relu_backward(gradient, z, slope):
    return tl.where(z > 0, gradient, gradient * slope)


@triton.jit
def logistic(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def silu(z, slope):
    return z * logistic(z)


@triton.jit
def silu_backward(gradient, z, slope):
    part = logistic(z)
    return gradient * (part * (1 + z * (1 - part)))


@triton.jit
def gelu(z, slope):
    """Hendrycks and Gimpel 2016: z times the distribution function of a normal variable."""
    return z * (0.5 + 0.5 * tl.erf(z * _HALF_ROOT))


@triton.jit
def gelu_backward(gradient, z, slope):
    part = 0.5 + 0.5 * tl.erf(z * _HALF_ROOT)
    return gradient * (part + z * (tl.exp(-0.5 * z * z) * _DENSITY))


@triton.jit
def gelu_tanh(z, slope):
    """``z / 2 * (1 + tanh(u))``, ``u = sqrt(2 / pi) * (z + 0.044715 * z^3)``: z times the logistic function of 2 u."""
    return z * logistic((z + z * z * z * _CUBE) * _TANH)


@triton.jit
def gelu_tanh_backward(gradient, z, slope):
    part = logistic((z + z * z * z * _CUBE) * _TANH)
    return gradient * (part + z * (part * (1 - part)) * ((1 + z * z * _CUBE * 3) * _TANH))


@triton.jit
def hardswish(z, slope):
    return z * (relu6(z + 3, None) * (1 / 6))


@triton.jit
def hardswish_backward(gradient, z, slope):
    return tl.where(z <= -3, 0.0, tl.where(z >= 3, gradient, gradient * (z * (1 / 3) + 0.5)))


#: Name in a launch -> (ACTIVATION, BACKWARD). The identity's gradient is nothing to do.
ACTIVATIONS = {
    "identity": (identity, None),
    "relu": (relu, relu_backward),
    "relu6": (relu6, relu6_backward),
    "leaky_relu": (leaky_relu, leaky_relu_backward),
    "silu": (silu, silu_backward),
    "gelu": (gelu, gelu_backward),
    "gelu_tanh": (gelu_tanh, gelu_tanh_backward),
    "hardswish": (hardswish, hardswish_backward),
}
