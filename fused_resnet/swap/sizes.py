"""What a forward decides by the sizes of tensors, while it is traced: an ``if`` on ``x.shape[1]``, an assertion on ``x.dim()``.

A trace has no values, but sizes follow from those of the arguments: what the forward has done so far is run on tensors without
memory (the ``meta`` device). A decision holds for all arguments of the same sizes, as far as it hangs on them, and so does the
graph. Only what is known to compute, and to do nothing else, is run so: layers of torch.nn, activations, sums, indexing, and
arithmetic with sizes. A decision behind anything else is not made.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..describe import hooked

#: Methods and attributes of tensors that tell sizes; and those that tell types.
SIZES = frozenset(("size", "dim", "numel", "shape", "ndim"))
TYPES = frozenset(("dtype", "device", "is_cuda", "requires_grad"))

_NUMBERS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "and_", "or_", "getitem")
#: What is done with sizes.
_ARITHMETIC = frozenset(getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", *_NUMBERS))
#: What is done with tensors: nothing here draws on the CPU, changes a tensor's sizes in place, or reads what is in a tensor.
_FUNCTIONS = _ARITHMETIC | {
    *(operator.iadd, operator.isub, operator.imul, torch.add, torch.sub, torch.mul, torch.cat, torch.flatten),
    *(torch.relu, torch.sigmoid, torch.tanh, F.relu, F.relu6, F.leaky_relu, F.elu, F.silu, F.gelu, F.hardswish, F.dropout),
    *(F.pad, F.interpolate, F.avg_pool2d, F.adaptive_avg_pool2d),
}
_METHODS = SIZES | {
    *("relu", "relu_", "sigmoid", "tanh", "add", "add_", "sub", "mul", "mul_", "contiguous"),
    *("flatten", "unsqueeze", "squeeze", "transpose", "permute"),
}
_LAYERS = frozenset(
    (
        *(nn.Conv1d, nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.Identity, nn.Dropout, nn.Dropout2d),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Tanh),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    )
)


class _Unknown(Exception):
    """What is not run on the meta device."""


def _asked_of(node: fx.Node) -> Any:
    """The method or attribute that a node reads of what it is given, or None."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1]
    return node.target if node.op == "call_method" else None


def _reads(node: fx.Node, names: frozenset[str]) -> list[fx.Node] | None:
    """The nodes that read such methods and attributes of tensors, if a value hangs on these alone, by arithmetic; else None."""
    found: dict[fx.Node, None] = {}
    waiting, seen = [node], {node}
    while waiting:
        part = waiting.pop()
        if _asked_of(part) in names and isinstance(part.args[0], fx.Node):
            found[part] = None
        elif part.op == "call_function" and part.target in _ARITHMETIC and part.all_input_nodes:
            waiting += [given for given in part.all_input_nodes if given not in seen]
            seen.update(part.all_input_nodes)
        else:
            return None
    return [*found]


def follows_from(node: fx.Node, names: frozenset[str]) -> bool:
    """Whether a value hangs on such methods and attributes of tensors alone."""
    return _reads(node, names) is not None


def forget_decisions(graph: fx.Graph, conditions: Sequence[fx.Node], kept: set[fx.Node]) -> None:
    """Leave out what was computed for decisions alone: a chain must not seem to be read there. ``kept``: results."""
    fed, waiting = set(conditions), [*conditions]
    while waiting:  # down to the reads of sizes, not through them
        node = waiting.pop()
        if _asked_of(node) not in SIZES:
            waiting += [part for part in node.all_input_nodes if part not in fed]
            fed.update(node.all_input_nodes)
    for node in reversed(graph.nodes):
        if node in fed and not node.users and node not in kept:
            graph.erase_node(node)


def known(sizes: Sequence[Any]) -> bool:
    """Whether they are numbers: not symbols of a compiler, nor tensors, as ``torch.jit.trace`` has them."""
    return all([type(size) is int for size in sizes])


class Deciding:
    """The values of a graph on the meta device, for arguments of known sizes.

    Args:
        root: the module that the graph's places are in; it is not changed.
        graph: of its forward, as far as it has been traced.
        given: the sizes of each placeholder.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, given: Sequence[tuple[int, ...]]) -> None:
        self.root, self.graph = root, graph
        self.given = list(given)
        self.places: dict[fx.Node, int] = {}

    def decide(self, condition: fx.Node) -> bool | None:
        """What a condition comes to; None where that cannot be told."""
        values: dict[fx.Node, Any] = {}
        try:
            for node in self.graph.nodes:
                values[node] = self._value(node, values)
                if node is condition:
                    break
        except Exception:  # whatever a layer raises for such sizes, which it will for real
            return None
        value = values[condition]
        return None if isinstance(value, Tensor) else bool(value)

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            place = self.places[node] = len(self.places)
            return torch.empty(self.given[place], device="meta")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        target: Any = node.target
        if "out" in kwargs:
            raise _Unknown
        if node.op == "call_method" and target in _METHODS:
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "call_function":
            if getattr(target, "__name__", "") == "_mark":
                return None
            if target in _FUNCTIONS or _asked_of(node) in SIZES:
                return target(*args, **kwargs)
        if node.op == "call_module":
            return self._layer(target)(*args, **kwargs)
        raise _Unknown

    def _layer(self, place: str) -> Any:
        """The forward of a layer on a copy without memory."""
        module: Any = self.root
        for name in place.split("."):
            module = module._modules[name]
        replaced = "forward" in module.__dict__ or module._compiled_call_impl is not None
        if type(module) not in _LAYERS or replaced or hooked(module) or module._modules:
            raise _Unknown
        stand_in = copy.copy(module)
        for held in ("_parameters", "_buffers"):
            stand_in.__dict__[held] = {name: _without_memory(tensor) for name, tensor in getattr(module, held).items()}
        return stand_in.forward

    def consulted(self, condition: fx.Node) -> dict[int, set[int]]:
        """Which sizes of which placeholders a decided condition hangs on, by the places of both."""
        everything = {place: set(range(len(sizes))) for place, sizes in enumerate(self.given)}
        found: dict[int, set[int]] = {}
        for read in _reads(condition, SIZES) or ():
            source: Any = read.args[0]
            if source not in self.places:  # of what was computed: of anything that it may have been computed from
                return everything
            place = self.places[source]
            found[place] = found.get(place, set()) | _dimensions(read, len(self.given[place]))
        return found


def _dimensions(read: fx.Node, count: int) -> set[int]:
    """The dimensions whose sizes are read, of so many."""
    name, places = _asked_of(read), [*read.args[1:], *read.kwargs.values()]
    if name in ("dim", "ndim"):
        return set()
    if name != "size" or not places:  # all of them, of which some may be looked at
        places = [user.args[1] if user.target is operator.getitem else None for user in read.users]
    found = {place % count for place in places if type(place) is int}
    return found if name != "numel" and all(type(place) is int for place in places) else set(range(count))


def _without_memory(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta")
