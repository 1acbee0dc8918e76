"""The activations that chains know, in plain PyTorch: one row each, with its gradient. Their twins: kernels/activations.py.

A gradient is had from the activation's output where that tells the derivative (ReLU passes where its output is above zero),
else from its input, the *pre-activation*. What the backward keeps follows from that: :meth:`.Chain.pre_activation`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """One activation. ``slope`` is LeakyReLU's, and 0 for all others; a NaN travels as in eager PyTorch.

    Attributes:
        function: ``(z, slope) -> a``.
        in_place: the same, written over z.
        backward: ``(gradient, z, slope, out) -> gradient * a'(z)``, into ``out`` unless that is None. Where ``from_output``, a
            may be given for z.
        from_output: the derivative is told by a alone (LeakyReLU's by a slope that is not negative: :func:`from_output`).
    """

    function: Callable[[Tensor, float], Tensor]
    in_place: Callable[[Tensor, float], Tensor]
    backward: Callable[[Tensor, Tensor, float, Tensor | None], Tensor]
    from_output: bool


def _gradient(operator: Any, *constants: Any, into: str = "grad_input", **options: Any) -> Any:
    """PyTorch's own backward of an activation with constants. Its overloads by name: to find one takes as long as to run it."""
    new, written = operator.default, getattr(operator, into)

    def backward(gradient: Tensor, z: Tensor, slope: float, out: Tensor | None) -> Tensor:
        if out is None:
            return new(gradient, z, *constants, **options)
        return written(gradient, z, *constants, **options, **{into: out})

    return backward


def _leaky_relu_backward(gradient: Tensor, z: Tensor, slope: float, out: Tensor | None) -> Tensor:
    return _aten.leaky_relu_backward(gradient, z, slope, False, **({} if out is None else {"grad_input": out}))


def _identity_backward(gradient: Tensor, z: Tensor, slope: float, out: Tensor | None) -> Tensor:
    return gradient if out is None or out is gradient else out.copy_(gradient)


def _plain(operator: Any, *constants: Any, **options: Any) -> Any:
    return lambda z, slope: operator(z, *constants, **options)


def _gelu(approximate: str) -> Activation:
    """Hendrycks and Gimpel 2016: ``z`` times the normal distribution function of z, or the tanh that is close to it."""
    function, in_place = (_plain(operator, approximate=approximate) for operator in (_aten.gelu, _aten.gelu_))
    return Activation(function, in_place, _gradient(_aten.gelu_backward, approximate=approximate), False)


#: Name -> activation. ``gelu`` is the exact one, ``gelu_tanh`` nn.GELU(approximate="tanh").
ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda z, slope: z, lambda z, slope: z, _identity_backward, True),
    "relu": Activation(_plain(torch.relu), _plain(torch.relu_), _gradient(_aten.threshold_backward, 0), True),
    "relu6": Activation(
        _plain(_aten.hardtanh, 0.0, 6.0), _plain(F.relu6, inplace=True), _gradient(_aten.hardtanh_backward, 0.0, 6.0), True
    ),
    "leaky_relu": Activation(_aten.leaky_relu, _aten.leaky_relu_, _leaky_relu_backward, True),
    "silu": Activation(_plain(_aten.silu), _plain(F.silu, inplace=True), _gradient(_aten.silu_backward), False),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "hardswish": Activation(
        _plain(_aten.hardswish), _plain(F.hardswish, inplace=True), _gradient(_aten.hardswish_backward, into="out"), False
    ),
}


def from_output(name: str, slope: float) -> bool:
    """Whether an activation's derivative follows from its output.

    Not of a LeakyReLU with a negative slope, which gives a positive output for inputs on both sides of zero.
    """
    return ACTIVATIONS[name].from_output and slope >= 0
