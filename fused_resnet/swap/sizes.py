"""What a forward decides by the sizes of tensors, while it is traced: an ``if`` on ``x.shape[1]``, an assertion on ``x.dim()``.

A trace has no values, but the sizes of all that a forward computes follow from those of its arguments: the graph so far is run
on tensors without memory (the ``meta`` device). A decision holds for all arguments of the same sizes, as far as it hangs on
them, and so does the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..describe import hooked
from .guards import original

#: Methods and attributes of tensors that tell sizes; and those that tell types.
SIZES = frozenset(("size", "dim", "numel", "shape", "ndim"))
TYPES = frozenset(("dtype", "device", "is_cuda", "requires_grad"))

#: Functions and methods in place that leave sizes as they are.
_KEEP_SIZES = frozenset(("relu_", "add_", "sub_", "mul_", "div_", "clamp_", "sigmoid_", "tanh_", "copy_", "fill_", "zero_"))

#: Which sizes of an argument a decision hangs on: places of dimensions, or all. (How many there are counts in any case.)
Consulted = set[int] | None


class _Unknown:
    """What could not be run on the meta device."""


_UNKNOWN = _Unknown()


def asked_of(node: fx.Node) -> Any:
    """The method or attribute that a node reads of what it is given, or None."""
    return node.args[1] if node.target is getattr else node.target if node.op == "call_method" else None


def follows_from(node: fx.Node, names: frozenset[str]) -> bool:
    """Whether a value hangs on such methods and attributes of tensors alone."""
    if asked_of(node) in names:
        return True
    return bool(node.all_input_nodes) and all([follows_from(part, names) for part in node.all_input_nodes])


def forget_decisions(graph: fx.Graph, kept: set[fx.Node]) -> None:
    """Leave out what was computed of sizes for decisions alone: a chain must not seem to be read there. ``kept``: results."""
    for node in reversed(graph.nodes):
        if not node.users and node not in kept and node.op != "output" and follows_from(node, SIZES):
            graph.erase_node(node)


class Deciding:
    """The values of a graph on the meta device, for arguments of known sizes.

    Args:
        root: the module that the graph's places are in; it is not changed.
        graph: of its forward, as far as it has been traced.
        given: for each placeholder its sizes, or None where they are not known.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, given: Sequence[tuple[int, ...] | None]) -> None:
        self.root, self.graph = root, graph
        self.given = list(given)
        self.places: dict[fx.Node, int] = {}
        self.values: dict[fx.Node, Any] = {}
        self.run: set[str] = set()  # places of modules whose own sizes may count

    def decide(self, condition: fx.Node) -> bool | None:
        """What a condition comes to; None where that cannot be told.

        In the order of the forward: what is written in place may change a tensor's sizes for those who ask afterwards.
        """
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for node in self.graph.nodes:
                self.values[node] = self._value(node)
                if node is condition:
                    break
        value = self.values.get(condition, _UNKNOWN)
        if isinstance(value, (_Unknown, Tensor)):
            return None
        return bool(value)

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            place = self.places[node] = len(self.places)
            sizes = self.given[place] if place < len(self.given) else None
            return _UNKNOWN if sizes is None or None in sizes else torch.empty(sizes, device="meta")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        try:
            if any(self.values[part] is _UNKNOWN for part in node.all_input_nodes):
                raise NotImplementedError
            return self._run(node, args, kwargs)
        except Exception:  # whatever it raises on tensors without memory, or of another type
            for part in node.all_input_nodes:  # it may have done anything to them
                self.values[part] = _UNKNOWN
            return _UNKNOWN

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "get_attr":
            self.run.add(str(node.target).rpartition(".")[0])
            return _without_memory(_at(self.root, str(node.target)))
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            function: Any = node.target
            if not str(getattr(function, "__module__", "")).startswith(("torch", "_operator", "builtins")):
                if node.all_input_nodes or args or kwargs:
                    raise NotImplementedError
                return None  # a mark
            return function(*args, **kwargs)
        module = _at(self.root, str(node.target))
        kind: Any = original(type(module))
        if not kind.__module__.startswith("torch.nn.") or module._modules or hooked(module):  # a hook may change its result
            raise NotImplementedError
        self.run.add(str(node.target))
        stand_in = copy.copy(module)
        for held in ("_parameters", "_buffers"):
            stand_in.__dict__[held] = {name: _without_memory(tensor) for name, tensor in getattr(module, held).items()}
        return kind.forward(stand_in, *args, **kwargs)

    def consulted(self, condition: fx.Node) -> dict[int, Consulted]:
        """Which sizes of which placeholders a condition hangs on."""
        before = list(self.graph.nodes)
        before = before[: before.index(condition) + 1]
        if any(_changes_sizes(node) for node in before):
            return {place: None for node, place in self.places.items() if node in before}
        found: dict[int, Consulted] = {}

        def of_all(node: fx.Node) -> None:
            """Of a tensor that is computed, all sizes of all that it is computed from."""
            if node.op == "placeholder":
                found[self.places[node]] = None
            for part in node.all_input_nodes:
                of_all(part)

        def visit(node: fx.Node, place: int | None) -> None:
            """``place``: of the one dimension that is read of what the node gives."""
            name = asked_of(node)
            if name in SIZES and isinstance(node.args[0], fx.Node):
                source = node.args[0]
                if name == "size" and len(node.args) == 2 and type(node.args[1]) is int:
                    place = node.args[1]
                if source.op != "placeholder" or (name == "numel" or (name in ("size", "shape") and place is None)):
                    of_all(source)
                    return
                seen = found.setdefault(self.places[source], set())
                if seen is not None and name in ("size", "shape") and place is not None:
                    sizes = self.given[self.places[source]]
                    seen.add(place % len(sizes) if sizes else place)
                return
            one = node.args[1] if getattr(node.target, "__name__", "") == "getitem" else None
            for part in node.all_input_nodes:
                visit(part, one if type(one) is int else None)

        visit(condition, None)
        return found


def _changes_sizes(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function"):
        return False
    return "out" in node.kwargs or (str(name).endswith("_") and not str(name).endswith("__") and name not in _KEEP_SIZES)


def _at(root: nn.Module, place: str) -> Any:
    found: Any = root
    for name in place.split("."):
        found = getattr(found, name)
    return found


def _without_memory(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta")
