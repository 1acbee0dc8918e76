"""Layers that a forward calls as functions with tensors of its own: ``F.conv2d(x, self.weight, padding=1)``.

The arguments of such calls in a graph; and what stands for one in a chain, by the places of its tensors, so that parameters may
be replaced, moved and copied like those of modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..describe import LAYERS, NORMS, POOLS, Called
from .guards import original

Node = fx.Node

#: Functions that are max-pooling -> dimensions of the input that they take.
MAX_POOLS: dict[Any, int] = {F.max_pool2d: 4, torch.max_pool2d: 4, F.max_pool1d: 3, torch.max_pool1d: 3}
#: Functions that are convolutions, or a Linear -> dimensions of the input that they take.
CONVOLUTIONS: dict[Any, int] = {torch.conv2d: 4, F.conv2d: 4, torch.conv1d: 3, F.conv1d: 3, F.linear: 2}


def _arguments(node: Node, names: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**defaults, **dict(zip(names, node.args)), **node.kwargs}


def convolution_arguments(node: Node) -> dict[str, Any]:
    """The arguments of one of :data:`CONVOLUTIONS`."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return _arguments(node, names, {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1})


def norm_arguments(node: Node) -> dict[str, Any]:
    """The arguments of ``F.batch_norm``."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    return _arguments(node, names, {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5})


def pooling_arguments(node: Node) -> dict[str, Any] | None:
    """The arguments of one of :data:`MAX_POOLS`; None where there are others than it has."""
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    none = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
    found = _arguments(node, names, none)
    if found["stride"] in (None, ()):
        found["stride"] = found.get("kernel_size")
    return found if set(found) == {*names} else None


def _codes(forward: Any, kind: type, depth: int) -> list[CodeType]:
    """The code of a function, and of those by name that it calls."""
    if not isinstance(forward, FunctionType):
        return []
    code = forward.__code__
    called = [forward.__globals__.get(name) or getattr(kind, name, None) for name in code.co_names] if depth else []
    return [code, *(inner for function in called for inner in _codes(function, kind, depth - 1))]


#: Names of the functions that are layers, and of the method of PyTorch's convolutions that calls them.
_CALLS = frozenset(("conv2d", "conv1d", "linear", "batch_norm", "_conv_forward"))


def calls_layers(module: nn.Module) -> bool:
    """Whether a module with tensors of its own seems to call layers as functions with them, in code that is not PyTorch's."""
    kind = original(type(module))
    lists = any(isinstance(child, (nn.ParameterList, nn.ParameterDict)) for child in module.children())
    if not (module._parameters or module._buffers or lists) or kind.__module__.startswith("torch."):
        return False
    if kind.forward.__module__ == "torch.nn.modules.batchnorm":  # which asks for the input's dimensions
        return False
    return any(not _CALLS.isdisjoint(code.co_names) for code in _codes(kind.forward, kind, 2))


def tensor_at(root: nn.Module, place: str) -> Tensor:
    """The parameter or buffer at a place."""
    owner, _, name = place.rpartition(".")
    found: Any = getattr(root.get_submodule(owner), name)
    return found


def _numbers(value: Any, count: int, least: int) -> bool:
    """Whether a window's sizes are known: a number, or as many as there are dimensions, not less than PyTorch takes."""
    values = value if isinstance(value, (tuple, list)) else (value,) * count
    return len(values) in (1, count) and all(type(part) is int and part >= least for part in values)


#: The least that there may be of a window's sizes.
_LEAST = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}


@dataclass(frozen=True)
class Function:
    """A layer that is called as a function.

    Attributes:
        kind: the module that computes the same.
        tensors: its parameters and buffers -> their places, dotted, from the root.
        options: its other attributes.
    """

    kind: type[nn.Module]
    tensors: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """The place of the tensor that it is known by."""
        return self.tensors[0][1] if self.tensors else ""

    def values(self, root: nn.Module) -> dict[str, Tensor]:
        """The tensors that are there now."""
        return {name: tensor_at(root, at) for name, at in self.tensors}

    def layer(self, root: nn.Module) -> Called:
        """What stands for it, with the tensors that are there now."""
        tensors = self.values(root)
        sizes = {"kernel_size": tuple(tensors["weight"].shape[2:])} if self.kind in (nn.Conv2d, nn.Conv1d) else {}
        return Called(self.kind, self.name, {**dict(self.options), **sizes, **tensors})


def function_of(node: Node, dimensions: int = 0) -> Function | None:
    """The layer that a node calls with tensors of the module that was traced; None where it calls none.

    Args:
        dimensions: of the input of a BatchNorm, which the call does not tell; else not looked at.
    """
    if node.op != "call_function":
        return None
    if node.target in CONVOLUTIONS:
        return _convolution(node)
    if node.target is F.batch_norm:
        return _norm(node, dimensions)
    return _pooling(node) if node.target in MAX_POOLS else None


def _owned(found: dict[str, Any], names: Sequence[str]) -> tuple[tuple[str, str], ...] | None:
    """The places of those tensors that are not None; None where one is not the traced module's own."""
    values = {name: found[name] for name in names if found[name] is not None}
    if any(not isinstance(value, Node) or value.op != "get_attr" for value in values.values()):
        return None
    return tuple((name, str(value.target)) for name, value in values.items())


def _given(found: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether a call has an input that is computed, and no arguments but these."""
    return isinstance(found.get("input"), Node) and set(found) == {"input", *names}


def _convolution(node: Node) -> Function | None:
    found, dimensions = convolution_arguments(node), CONVOLUTIONS[node.target]
    windows = ("stride", "padding", "dilation")
    tensors = _owned(found, ("weight", "bias")) if _given(found, ("weight", "bias", *windows, "groups")) else None
    if tensors is None or found["weight"] is None or type(found["groups"]) is not int:
        return None
    named = found["padding"] == "valid" or (found["padding"] == "same" and found["stride"] in (1, (1,), (1, 1)))
    sizes = [name for name in windows if not (named and name == "padding")]
    if dimensions > 2 and any(not _numbers(found[name], dimensions - 2, _LEAST[name]) for name in sizes):
        return None
    options = {name: found[name] for name in (*windows, "groups")} | {"bias": None, "padding_mode": "zeros"}
    return Function(LAYERS[dimensions], tensors, tuple(options.items()))


def _norm(node: Node, dimensions: int) -> Function | None:
    found = norm_arguments(node)
    statistics, affine, numbers = ("running_mean", "running_var"), ("weight", "bias"), ("training", "momentum", "eps")
    tensors = _owned(found, (*statistics, *affine)) if _given(found, (*statistics, *affine, *numbers)) else None
    if tensors is None or [type(found[name]) for name in numbers] != [bool, float, float]:
        return None
    tracked = [found[name] is not None for name in statistics]
    if tracked[0] != tracked[1] or not (tracked[0] or found["training"]):
        return None
    none = dict.fromkeys((*statistics, *affine, "num_batches_tracked"))
    options = {**none, **{name: found[name] for name in numbers}, "track_running_stats": True}
    return Function(NORMS[dimensions], tensors, tuple(options.items()))


def _fits(padding: Any, kernel: Any) -> bool:
    """Whether a pooling's padding is at most half of its windows, as PyTorch wants it."""
    sides = [size if isinstance(size, (tuple, list)) else (size,) for size in (padding, kernel)]
    return 2 * max(sides[0]) <= min(sides[1])


def _pooling(node: Node) -> Function | None:
    found, dimensions = pooling_arguments(node), MAX_POOLS[node.target]
    windows = ("kernel_size", "stride", "padding", "dilation")
    if found is None or not isinstance(found["input"], Node):
        return None
    numbers = all(_numbers(found[name], dimensions - 2, _LEAST[name]) for name in windows)
    if numbers and not _fits(found["padding"], found["kernel_size"]):
        return None
    if not numbers or found["ceil_mode"] is not False or found["return_indices"] is not False:
        return None
    options = {name: found[name] for name in (*windows, "ceil_mode", "return_indices")}
    return Function(POOLS[dimensions], (), tuple(options.items()))
