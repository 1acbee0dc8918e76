"""Every launch in plain PyTorch: the twin that the other executors are held against, and the fallback on any device and dtype.

Each prologue, epilogue and activation is a function of a few lines named as in the kernels. Arithmetic is in fp32 for fp16 and
bf16 (one rounding, at the store), else in the tensors' own precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import Geometry, Launch, PoolGeometry, accumulation_dtype

Operands = dict[str, Tensor]


def check_available(device: torch.device) -> None:
    """Plain PyTorch runs everywhere."""


def supports(launch: Launch) -> str | None:
    """Everything."""
    return None


def per_filter(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """A per-filter vector, to be broadcast over a [N, K, P, Q] tensor."""
    return vector.to(dtype).view(1, -1, 1, 1)


def scale_and_shift(operands: Operands, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """BatchNorm with given statistics as ``scale * y + shift``, the convolution's bias included.

    ``scale = gamma / sqrt(var + eps)``, ``shift = beta + (bias - mean) * scale`` (Ioffe and Szegedy 2015, algorithm 2).
    """
    scale = (operands["var"].to(dtype) + eps).rsqrt()
    if "gamma" in operands:
        scale = scale * operands["gamma"].to(dtype)
    shift = -operands["mean"].to(dtype)
    if "bias" in operands:
        shift = shift + operands["bias"].to(dtype)
    shift = shift * scale
    if "beta" in operands:
        shift = shift + operands["beta"].to(dtype)
    return scale, shift


def store(acc: Tensor, operands: Operands, eps: float) -> Tensor:
    return acc


def bias(acc: Tensor, operands: Operands, eps: float) -> Tensor:
    return acc + per_filter(operands["bias"], acc.dtype)


def affine(acc: Tensor, operands: Operands, eps: float) -> Tensor:
    scale, shift = scale_and_shift(operands, eps, acc.dtype)
    return acc * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def add(acc: Tensor, operands: Operands, eps: float) -> Tensor:
    return acc + operands["shortcut"].to(acc.dtype)


def bias_add(acc: Tensor, operands: Operands, eps: float) -> Tensor:
    return add(bias(acc, operands, eps), operands, eps)


def affine_add(acc: Tensor, operands: Operands, eps: float) -> Tensor:
    return add(affine(acc, operands, eps), operands, eps)


def identity(z: Tensor) -> Tensor:
    return z


def relu(z: Tensor) -> Tensor:
    return torch.relu(z)


def bn_relu(x: Tensor, operands: Operands) -> Tensor:
    return torch.relu(x * operands["scale"].to(x.dtype).view(1, -1, 1, 1) + operands["shift"].to(x.dtype).view(1, -1, 1, 1))


PROLOGUES: dict[str, Callable[[Tensor, Operands], Tensor]] = {"identity": lambda x, operands: x, "bn_relu": bn_relu}
EPILOGUES: dict[str, Callable[[Tensor, Operands, float], Tensor]] = {
    function.__name__: function for function in (store, bias, affine, add, bias_add, affine_add)
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {function.__name__: function for function in (identity, relu)}


def activation_backward(gradient: Tensor, output: Tensor, activation: str) -> Tensor:
    """Gradient in front of an activation, from its output. A NaN output lets the gradient pass, as in PyTorch."""
    if activation == "identity":
        return gradient
    if activation != "relu":
        raise ValueError(f"activation {activation!r} has no backward here; known: 'identity', 'relu'")
    return torch.where(output <= 0, torch.zeros((), dtype=gradient.dtype, device=gradient.device), gradient)


def conv(launch: Launch, operands: Operands) -> Tensor:
    """``activation(epilogue(prologue(x) * w))``. The padding is of what the prologue gives."""
    g = launch.geometry
    assert isinstance(g, Geometry)
    dtype = accumulation_dtype(launch.dtype)
    x = PROLOGUES[launch.prologue](operands["x"].to(dtype), operands).to(launch.dtype).to(dtype)
    acc = F.conv2d(x, operands["w"].to(dtype), None, g.stride, g.padding, g.dilation, g.groups)
    z = EPILOGUES[launch.epilogue](acc, operands, launch.eps)
    return ACTIVATIONS[launch.activation](z).to(launch.dtype)


def max_pool(launch: Launch, operands: Operands) -> Tensor:
    """Max-pooling, floor mode."""
    g = launch.geometry
    assert isinstance(g, PoolGeometry)
    return F.max_pool2d(operands["x"], g.kernel, g.stride, g.padding, g.dilation)


def max_pool_backward(launch: Launch, operands: Operands) -> Tensor:
    """Gradient of max-pooling: to the first maximum of each window, as in PyTorch."""
    g = launch.geometry
    assert isinstance(g, PoolGeometry)
    x, dy = operands["x"], operands["dy"]
    _, indices = F.max_pool2d(x, g.kernel, g.stride, g.padding, g.dilation, return_indices=True)
    return torch.ops.aten.max_pool2d_with_indices_backward(
        dy.contiguous(memory_format=torch.channels_last), x, g.kernel, g.stride, g.padding, g.dilation, False, indices
    )


def act_backward(launch: Launch, operands: Operands) -> tuple[Tensor, Tensor]:
    """``dz = dout * act'`` and its sum over the pixels of each filter."""
    dz = operands["dout"]
    if "out" in operands:
        dz = activation_backward(dz, operands["out"], launch.activation)
    return dz, dz.to(accumulation_dtype(launch.dtype)).sum((0, 2, 3))


def _convolution_gradients(
    launch: Launch, dz: Tensor, x: Tensor | None, w: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    g = launch.geometry
    assert isinstance(g, Geometry)
    if x is None:  # its values are not needed for dx, only its shape
        x = w.new_empty(1).expand(g.x_shape)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dz, x, w, None, g.stride, g.padding, g.dilation, False, [0, 0], g.groups, [*wanted, False]
    )
    return dx, dw


def dgrad(launch: Launch, operands: Operands) -> tuple[Tensor, ...]:
    """Gradient of a layer's input: ``dgrad(scale * dz, w)``, plus the shortcut's, behind the previous activation's mask."""
    dtype = accumulation_dtype(launch.dtype)
    dz, w = operands["dz"].to(dtype), operands["w"].to(dtype)
    if "var" in operands:
        scale = (operands["var"].to(dtype) + launch.eps).rsqrt()
        if "gamma" in operands:
            scale = scale * operands["gamma"].to(dtype)
        w = w * scale.view(-1, 1, 1, 1)
    dx, _ = _convolution_gradients(launch, dz, None, w, (True, False))
    assert dx is not None
    if "dshortcut" in operands:
        dx = dx + operands["dshortcut"].to(dtype)
    if "a_previous" not in operands:
        return (dx.to(launch.dtype),)
    dx = activation_backward(dx, operands["a_previous"], launch.activation)
    return dx.to(launch.dtype), dx.sum((0, 2, 3))


def wgrad(launch: Launch, operands: Operands) -> tuple[Tensor, ...]:
    """Gradients of a layer's parameters, those the launch lists.

    With ``G = wgrad(dz, x)`` and ``invstd = 1 / sqrt(var + eps)``: ``dw = gamma * invstd * G``, ``dbeta = sum(dz)``,
    ``dbias = gamma * invstd * sum(dz)``, and ``dgamma_k = invstd * (<w_k, G_k> + (bias - mean) * sum(dz))``, since the sum over
    the pixels of ``dz * conv(x, w)`` is ``<w_k, G_k>``: no convolution output is needed.
    """
    dtype = accumulation_dtype(launch.dtype)
    total = operands["sum"].to(dtype)
    gradients: dict[str, Tensor] = {"dbeta": total}
    invstd = scale = None
    if "var" in operands:
        invstd = (operands["var"].to(dtype) + launch.eps).rsqrt()
        scale = invstd * operands["gamma"].to(dtype) if "gamma" in operands else invstd
    gradients["dbias"] = total if scale is None else total * scale
    if "x" in operands:
        w = operands["w"].to(dtype)
        _, raw = _convolution_gradients(launch, operands["dz"].to(dtype), operands["x"].to(dtype), w, (False, True))
        assert raw is not None
        gradients["dw"] = raw if scale is None else raw * scale.view(-1, 1, 1, 1)
        if invstd is not None:
            offset = -operands["mean"].to(dtype)
            if "bias" in operands:
                offset = offset + operands["bias"].to(dtype)
            gradients["dgamma"] = invstd * ((w * raw).sum((1, 2, 3)) + offset * total)
        gradients["dw"] = gradients["dw"].to(launch.dtype)
    return tuple(gradients[role] for role, _ in launch.outputs)


_KINDS: dict[str, Callable[[Launch, Operands], Tensor | tuple[Tensor, ...]]] = {
    function.__name__: function for function in (conv, max_pool, max_pool_backward, act_backward, dgrad, wgrad)
}


def run(launch: Launch, operands: Operands, donated: frozenset[str] = frozenset()) -> Tensor | tuple[Tensor, ...]:
    """Run one launch. Autocast is off inside: the plan has chosen the types."""
    device = next(iter(operands.values())).device
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return _KINDS[launch.kind](launch, operands)
    with torch.autocast(device.type, enabled=False):
        return _KINDS[launch.kind](launch, operands)
