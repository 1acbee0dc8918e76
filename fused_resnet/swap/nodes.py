"""What a node of a graph is: a convolution, a BatchNorm, an activation, a sum, and whether it writes in place."""

from __future__ import annotations

import operator
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.parameter import is_lazy

from ..describe import SHARING, Module, class_of, dimensions_of, follows, is_activation, is_convolution, is_norm
from .functions import CONVOLUTIONS, MAX_POOLS, Function, function_of, tensor_at

Node = fx.Node

#: Functions that are activations -> the module that stands for them among a chain's, and its options by argument.
_ACTIVATION_FUNCTIONS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.relu: (nn.ReLU, ()), F.relu_: (nn.ReLU, ()), torch.relu: (nn.ReLU, ()), torch.relu_: (nn.ReLU, ()),
    F.relu6: (nn.ReLU6, ()), F.silu: (nn.SiLU, ()), F.hardswish: (nn.Hardswish, ()), F.gelu: (nn.GELU, ("approximate",)),
    F.leaky_relu: (nn.LeakyReLU, ("negative_slope",)), F.hardtanh: (nn.Hardtanh, ("min_val", "max_val")),
}  # fmt: skip
_RELU_METHODS = ("relu", "relu_")
#: Functions and methods that add two tensors; True: into the first.
_ADD_FUNCTIONS = {operator.add: False, torch.add: False, operator.iadd: True}
_ADD_METHODS = {"add": False, "add_": True}


@cache
def _stand_in(kind: Any, *options: Any) -> nn.Module:
    if kind is nn.Hardtanh:
        return nn.ReLU6()
    module: nn.Module = kind(**dict(options))
    return module


def function_activation(node: Node) -> nn.Module | None:
    """The module that computes what a call of a function or method does, if that is an activation that is known."""
    if node.op == "call_method" and node.target in _RELU_METHODS and len(node.args) == 1:
        return _stand_in(cast(Any, nn.ReLU))
    if node.op != "call_function" or node.target not in _ACTIVATION_FUNCTIONS or not node.args:
        return None
    kind, names = _ACTIVATION_FUNCTIONS[node.target]
    options = {**dict(zip((*names, "inplace"), node.args[1:])), **node.kwargs}
    options.pop("inplace", None)
    plain = set(options) <= set(names) and all(type(value) in (int, float, str) for value in options.values())
    if not plain or (kind is nn.Hardtanh and (options.get("min_val"), options.get("max_val")) != (0.0, 6.0)):
        return None
    return _stand_in(cast(Any, kind), *options.items())


class Nodes:
    """The nodes of one graph.

    Args:
        root: the module that was traced.
        graph: its graph.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.nodes = list(graph.nodes)
        self.modules: dict[str, Module] = dict(root.named_modules(remove_duplicate=False))
        self.functions: dict[str, Function] = {}  # layers that are called as functions, by place
        self.places: dict[Node, str] = {}  # their nodes
        self.reasons: dict[str, str] = {}
        self._note_functions()

    # ---- layers that are called as functions

    def _note_functions(self) -> None:
        """Find them, the convolutions first, which tell of the others' dimensions."""
        layers = [node for node in self.nodes if node.op == "call_function"]
        for node in (node for node in layers if node.target in CONVOLUTIONS):
            self._note(node, function_of(node))
        for node in (node for node in layers if node.target is F.batch_norm or node.target in MAX_POOLS):
            self._note(node, function_of(node, self._dimensions(node)))

    def _note(self, node: Node, function: Function | None) -> None:
        """Give a layer that is called as a function a place: that of the module that has its filters, if that is no other's."""
        if function is None or any(map(is_lazy, function.values(self.root).values())):
            return
        layer: Any = function.layer(self.root)
        if is_convolution(layer) and layer.weight.dim() != dimensions_of(layer):
            return
        owner, _, name = function.name.rpartition(".")
        called = any(part.op == "call_module" and part.target == owner for part in self.nodes)
        place = owner if owner and name in ("weight", "running_mean") and not called else function.name or f"{node.name}()"
        place = place if place not in self.functions else f"{place} ({node.name})"
        self.functions[place], self.places[node], self.modules[place] = function, place, layer

    def _dimensions(self, node: Node) -> int:
        """Of the input of a BatchNorm: those of the convolution in front of it, or of one behind."""
        around = [node.args[0] if node.args else None, *node.users, *(after for user in node.users for after in user.users)]
        for part in around:
            if isinstance(part, Node) and self.is_conv(part):
                return dimensions_of(cast(Module, self.module(part)))
        return 4

    # ---- what a node is

    def module(self, node: Node) -> Module | None:
        """The module that is called, or what stands for a function."""
        if node.op == "call_module":
            return self.modules.get(str(node.target))
        return self.modules[self.places[node]] if node in self.places else None

    def _one(self, node: Node) -> Node | None:
        """The only tensor that a node reads, but for those that are its own."""
        if node in self.places:
            return cast(Node, node.args[0]) if node.args else None
        return node.args[0] if len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], Node) else None

    def is_conv(self, node: Node) -> bool:
        """A convolution of images or sequences, or a Linear."""
        module = self.module(node)
        return module is not None and is_convolution(module) and self._one(node) is not None

    def is_norm(self, node: Node) -> bool:
        module = self.module(node)
        return module is not None and is_norm(module) and self._one(node) is not None

    def fits(self, conv: Node, node: Node) -> bool:
        """Whether a BatchNorm or a max-pooling is of inputs with as many dimensions as a convolution's."""
        first, second = self.module(conv), self.module(node)
        return first is not None and second is not None and follows(first, second)

    def is_activation(self, node: Node) -> bool:
        """As a module or a function that is known."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return isinstance(module, nn.Module) and is_activation(module) and self._one(node) is not None
        return function_activation(node) is not None

    def activation(self, node: Node) -> str | nn.Module | None:
        """The place of an activation, or what stands for it."""
        return str(node.target) if node.op == "call_module" else function_activation(node)

    def is_identity(self, node: Node) -> bool:
        module = self.module(node)
        empty = type(module) is nn.Sequential and not module._modules
        return (type(module) is nn.Identity or empty) and self._one(node) is not None

    def is_pool(self, node: Node) -> bool:
        """A max-pooling that can be launched."""
        pool: Any = self.module(node)
        known = class_of(pool) in (nn.MaxPool2d, nn.MaxPool1d) and self._one(node) is not None
        return known and not (pool.ceil_mode or pool.return_indices)

    def added(self, node: Node) -> tuple[Node, Node, bool] | None:
        """The two tensors that a node adds, and whether into the first."""
        table: Any = _ADD_FUNCTIONS if node.op == "call_function" else _ADD_METHODS if node.op == "call_method" else {}
        if node.target not in table or len(node.args) != 2 or node.kwargs:
            return None
        first, second = node.args
        if not (isinstance(first, Node) and isinstance(second, Node)) or first is second:
            return None
        return first, second, table[node.target]

    def is_pure(self, node: Node) -> bool:
        """Whether a node surely writes to nothing that it is given."""
        if node.op == "call_module":
            parts: list[Any] = list(cast(nn.Module, self.module(node)).modules())
            ours = all(type(part).__module__.startswith("torch.nn") for part in parts)
            return ours and not any(getattr(part, "inplace", False) for part in parts)
        if node.op == "call_method":
            return not str(node.target).endswith("_") or self._counts(node)
        if node.op == "call_function":
            name = getattr(node.target, "__name__", "_")
            inside = str(getattr(node.target, "__module__", "")).startswith(("torch", "_operator", "builtins", "fused_resnet"))
            written = name.endswith("_") or node.target in _IN_PLACE or node.kwargs.get("inplace") or "out" in node.kwargs
            moves = name in _MOVING and not self.is_norm(node)  # statistics, perhaps
            return inside and not (written or moves)
        return True

    def _counts(self, node: Node) -> bool:
        """Whether a number of the module's own is counted up: by somebody's BatchNorm, the batches."""
        counter = node.args[0] if node.args and node.target == "add_" else None
        if not isinstance(counter, Node) or counter.op != "get_attr":
            return False
        return tensor_at(self.root, str(counter.target)).dim() == 0

    def may_be_written(self, node: Node) -> bool:
        """Whether something in the graph may write into the memory of a node's result."""
        for user in node.users:
            if not self.is_pure(user) and not self._writes_elsewhere(user, node):
                return True
            name = user.target if user.op == "call_method" else getattr(user.target, "__name__", "")
            shares = class_of(self.module(user)) in SHARING if user.op == "call_module" else name in _ALIASES
            if shares and self.may_be_written(user):
                return True
        return False

    @staticmethod
    def _writes_elsewhere(user: Node, node: Node) -> bool:
        """Whether what writes in place writes into its first argument, and that is another than ``node``."""
        kept = user.target is operator.setitem  # in a list or dict, perhaps
        first = user.target in _IN_PLACE and not kept if user.op == "call_function" else user.op == "call_method"
        return first and bool(user.args) and user.args[0] is not node and "out" not in user.kwargs

    @staticmethod
    def readers(node: Node) -> list[Node]:
        """Who reads a node's elements, not only its size."""

        def asks(user: Node) -> Any:
            if user.op == "call_method":
                return user.target in ("size", "dim")
            return user.op == "call_function" and user.target is getattr and user.args[1] == "shape"

        return [user for user in node.users if not asks(user)]

    def is_pooled(self, node: Node) -> bool:
        """Whether a tensor is one pixel an image: what a squeeze-and-excitation computes on."""
        for _ in range(8):
            module = self.module(node)
            name = getattr(node.target, "__name__", str(node.target)) if module is None else class_of(module).__name__
            if "AdaptiveAvgPool" in name or "GlobalPool" in name or "AdaptivePool" in name or name in _POOLING:
                return True
            sources = node.all_input_nodes
            if len(sources) != 1:
                return False
            node = sources[0]
        return False


#: Methods whose results share memory with what they are called on.
_ALIASES = frozenset(
    {"view", "reshape", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "expand", "chunk", "split",
     "__getitem__", "getitem", "detach", "view_as", "contiguous", "unbind", "narrow", "select", "to"}
)  # fmt: skip
_IN_PLACE = (
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.delitem,
)  # fmt: skip
#: Functions that may move statistics which they are given.
_MOVING = ("batch_norm", "native_batch_norm", "instance_norm")
_POOLING = ("mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d")
