"""A module's forward as a graph: torch.fx, made safe for modules that nobody wrote for it.

torch.fx runs a forward once on stand-ins for tensors and writes down what is called. What the forward decided on the way is
then fixed, so this tracer

* stops at modules whose inside is nobody's business: those of torch.nn, with hooks, or of tensors without a convolution, and
  those that cannot be traced, which stay calls (``leaves``);
* notes in a :class:`Guard` all that a decision can have hung on, attributes and the classes of children, so that at each
  call it can be told whether the graph still holds;
* keeps what is written in place;
* refuses a forward that does more than compute from its arguments: draws random numbers, sets attributes, makes tensors, asks
  for the gradient mode, returns a container that a graph cannot make;
* lets stand-ins pass ``isinstance(x, torch.Tensor)``, as the tensors do that they stand for.
"""

from __future__ import annotations

import inspect
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..describe import hooked, hooks_everywhere, is_convolution, is_norm
from .arguments import Given, Structure, hands_on, may_change, put_together
from .functions import calls_layers
from .guards import original
from .harmless import CannotTrace, listened, watched
from .others import in_other_words
from .quantised import quantised
from .stand_ins import Attribute, StandIn, TensorStandIn

LOCK = threading.RLock()  # torch.fx replaces nn.Module's methods while it traces


class TakesApart(CannotTrace):
    """An argument is counted or looped over. It may be a container: it can be traced once it is known what is in it."""


@dataclass(frozen=True, eq=False)
class Frame:
    """A call of a module that was traced through.

    Attributes:
        path: of the module, dotted, from the root.
        parent: the frame around it; None for the root's own.
        mark: the node that marks where the call begins.
    """

    path: str
    parent: Frame | None
    mark: fx.Node | None
    args: Any = ()
    kwargs: Any = None

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else 1 + self.parent.depth

    def lineage(self) -> list[Frame]:
        """The root's frame first, this one last."""
        return [self] if self.parent is None else [*self.parent.lineage(), self]


@dataclass
class Traced:
    """A graph with the frames of its nodes.

    Attributes:
        graph: calls of leaves (``call_module``) and functions.
        frames: node -> the innermost frame that it was called in.
        results: frame -> what the call gave back, nodes in containers.
        leaves: path -> why a module was not traced through, for those with convolutions in them.
    """

    graph: fx.Graph
    frames: dict[fx.Node, Frame]
    results: dict[Frame, Any]
    leaves: dict[str, str] = field(default_factory=dict)


def _mark() -> None:
    """Where a frame begins. Never runs: marks are left out of the code."""


def has_layers(module: nn.Module) -> bool:
    """Whether there are convolutions or normalisations in it."""
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)
    parts = list(module.modules())
    return any(isinstance(part, kinds) or "BatchNorm" in type(part).__name__ for part in parts) or any(map(calls_layers, parts))


def code_of(module: nn.Module) -> FunctionType:
    """The forward of a module's original class.

    Raises:
        CannotTrace: it is no plain function of tensors.
    """
    forward = original(type(module)).forward
    if not isinstance(forward, FunctionType):
        raise CannotTrace("its forward is no Python function")
    if hasattr(forward, "__wrapped__"):
        raise CannotTrace("its forward is wrapped by a decorator")
    return forward


def arguments_of(module: nn.Module) -> tuple[int, int]:
    """How many arguments its forward must be given, and how many it can be given.

    Raises:
        CannotTrace: it takes any number of them.
    """
    kinds = inspect.Parameter
    parameters = list(inspect.signature(code_of(module)).parameters.values())[1:]
    if any(p.kind not in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD) for p in parameters):
        raise CannotTrace("its forward takes any number of arguments, or keywords only")
    return sum(p.default is kinds.empty for p in parameters), len(parameters)


#: What makes a tensor of a tensor.
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor")
_ARITHMETIC = {
    getattr(operator, name)
    for name in ("matmul", "neg", "invert", "getitem", *_BINARY, *(f"i{name.removesuffix('_')}" for name in _BINARY))
}

#: Methods and attributes of tensors that tell what they are, whatever is in them.
_SIZES = frozenset(("size", "dim", "numel", "shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"))


def _of_sizes(node: fx.Node) -> bool:
    """Whether a value hangs on sizes and types of tensors alone."""
    waiting, seen = [node], {node}
    while waiting:
        part = waiting.pop()
        about = part.args[1] if part.target is getattr else part.target if part.op == "call_method" else None
        if about in _SIZES:
            continue
        if not part.all_input_nodes:
            return False
        waiting += [given for given in part.all_input_nodes if given not in seen]
        seen.update(part.all_input_nodes)
    return True


#: Methods of a dict that give what is looped over.
_OPENED = ("keys", "values", "items")


class _Tracer(fx.Tracer):
    """See the module. One for each trace."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        opaque: Callable[[nn.Module], str | None],
        untraceable: dict[nn.Module, str],
        hopeless: dict[type[Any], str],
        structure: Structure | None = None,
    ) -> None:
        super().__init__()
        self.thread: int | None = threading.get_ident()  # none: it is over
        self.opaque = opaque
        self.untraceable, self.hopeless = untraceable, hopeless
        self.structure = structure
        self.given = Given([])
        self.frame = Frame("", None, None)
        self.running: list[nn.Module] = []
        self.looking = False  # at a module's parameters, not on the way through its forward
        #: Why the trace does not hold, and in which modules, where the forward catches what was raised to end it.
        self.caught: tuple[str, list[nn.Module]] | None = None
        self.attributes: list[Attribute] = []
        self.tensors: set[fx.Node] = set()  # nodes that are
        self.traced = Traced(fx.Graph(), {}, {})

    def runs_here(self) -> bool:
        """Whether a forward runs on its stand-ins in this thread."""
        return threading.get_ident() == self.thread

    # ---- what torch.fx calls

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Stand-ins for the arguments without a default, or for those of a structure; the others keep theirs."""
        root_fn = in_other_words(type(self.root)) or root_fn
        if self.structure is not None:
            parts = (self.create_proxy("placeholder", f"given_{index}", (), {}) for index in count())
            arguments = put_together(self.structure, parts)
            self.given = Given(arguments)
            return self._reading(root_fn), [self.root, *arguments]
        required = list(inspect.signature(root_fn).parameters.values())[1:]
        names = [p.name for p in required if p.default is inspect.Parameter.empty]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def _reading(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that may only read the containers that it is given."""

        def reading(*args: Any) -> Any:
            result = forward(*args)
            if self.given.changed():
                raise CannotTrace("its forward changes a list or dict that it is given")
            if self.given.holds(result):
                raise CannotTrace("its forward gives back a list or dict that it is given")
            return result

        return reading

    def take_apart(self, obj: fx.Proxy) -> None:
        """Raise if what is counted or looped over is an argument, or a part of one that is a container."""
        node = obj.node
        while node.op != "placeholder":
            opened = node.op == "call_method" and node.target in _OPENED
            if not (opened or node.target is operator.getitem) or not isinstance(node.args[0], fx.Node):
                return
            node = node.args[0]
        if self.structure is None:
            raise TakesApart("its forward takes apart an argument")

    def check_attributes(self) -> None:
        """Raise if the forward read an attribute of a tensor, of which no node was made: it has decided by it.

        The module that read it is to blame. A method, or the shape, is read to be written into a log.
        """
        for attribute in self.attributes:
            method = callable(getattr(Tensor, attribute.attr, None))
            if attribute._node is None and not attribute.called and not method and attribute.attr != "shape":
                self.running = attribute.running
                raise CannotTrace(f"its forward decides by {attribute.attr} of a tensor, or reads it for nothing")

    def check_caught(self) -> None:
        """Raise if the forward went on behind what should have ended the trace."""
        if self.caught is not None:
            reason, self.running = self.caught
            raise CannotTrace(reason)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        self.take_apart(obj)
        return super().iter(obj)

    def to_bool(self, obj: fx.Proxy) -> bool:
        by = "sizes or types of tensors" if _of_sizes(obj.node) else "data"
        self.caught = f"the control flow of its forward depends on {by}", self.running.copy()
        raise CannotTrace(self.caught[0])

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.traced.frames[node] = self.frame
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        plain = node.op == "call_function" and not str(getattr(node.target, "__module__", "")).startswith("torch")
        if plain and node.target in _ARITHMETIC:
            plain = not self._gives_a_tensor(node)
        if plain or node.target in ("size", "dim", "numel"):
            return StandIn(node, self)
        if node.op != "placeholder":  # which may be a container
            self.tensors.add(node)
        return TensorStandIn(node, self)

    def _gives_a_tensor(self, node: fx.Node) -> bool:
        """Whether arithmetic surely does. An argument may be a list, which can be indexed, lengthened and repeated."""
        if any(part in self.tensors for part in node.all_input_nodes):
            return True
        if all(part.op != "placeholder" for part in node.all_input_nodes):
            return False
        if node.target is operator.getitem:
            return isinstance(node.args[1], tuple)
        lists = node.target in (operator.add, operator.iadd, operator.mul, operator.imul)
        return not lists or any(isinstance(argument, float) for argument in node.args)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if not self.runs_here() or self.looking:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def get_fresh_qualname(self, prefix: str) -> str:
        raise CannotTrace("its forward makes or reads a tensor that is no parameter or buffer of its")

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):  # it says that it is a tensor
            return a.node
        if isinstance(a, str) and "Proxy(" in a:  # torch._assert(h == 224, f"... {h}")
            raise CannotTrace("its forward passes on a text that tells a tensor or its size")
        if isinstance(a, np.generic):  # torch.fx would write np.float64(0.5) into the code
            return self.create_arg(a.item())
        if isinstance(a, OrderedDict) and type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (self.create_arg([*a.items()]),), {})
        if isinstance(a, dict) and type(a) not in (dict, fx.immutable_collections.immutable_dict):
            raise CannotTrace(f"its forward makes a {type(a).__name__}")
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if not self.runs_here():  # torch.fx catches the calls of all threads
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        reason = self._leaf(m, any(isinstance(argument, (list, tuple, dict)) for argument in (*args, *kwargs.values())))
        if reason is not None:
            self._hand_on(m, [*args, *kwargs.values()])
            if reason and has_layers(m):
                self.traced.leaves[path] = reason
            return self.create_proxy("call_module", path, args, kwargs)
        outer = self.frame
        mark = self.create_node("call_function", _mark, (), {})
        self.frame = Frame(path, outer, mark, self.create_arg(args), self.create_arg(kwargs))
        self.running.append(m)
        try:
            result = (in_other_words(type(m)) or original(type(m)).forward)(m, *args, **kwargs)
        except Exception:
            self.caught = self.caught or ("its forward catches an error of a module inside", self.running[:-1])
            raise
        self.running.pop()
        self.traced.results[self.frame] = self.create_arg(result)
        self.frame = outer
        return result

    def _hand_on(self, m: nn.Module, args: list[Any]) -> None:
        """Raise if a module that stays a call could change a list or dict, of which the graph makes it one of its own."""
        name = type(m).__name__
        if original(type(m)).__module__.startswith("torch."):
            return
        if self.given.holds(args):
            raise CannotTrace(f"its forward hands on a list or dict that it is given, to a {name} that stays a call")
        if any(hands_on(argument) for argument in args) and may_change(m):
            raise CannotTrace(f"its forward hands a list or dict to a {name}, which stays a call and may change it")

    def _leaf(self, m: nn.Module, contained: bool) -> str | None:
        """Why a module is not traced through; empty where nobody asks.

        ``contained``: it is given tensors in a container, and may give such back, which no stand-in can be taken apart as.
        """
        if m in self.untraceable:
            return self.untraceable[m]
        kind = original(type(m))
        if kind in self.hopeless and not list(m.children()):
            return self.hopeless[kind]
        if kind.__module__.startswith(("torch.nn", "torch.ao", "torch.jit")) and kind is not nn.Sequential:
            return ""
        if isinstance(m, torch.jit.ScriptModule) or is_convolution(m) or is_norm(m):
            return ""
        if not calls_layers(m):
            if not contained and (not list(m.children()) or not has_layers(m)):
                return ""
            if isinstance(m, nn.modules.batchnorm._NormBase):
                return ""
        if "forward" in m.__dict__:
            return f"forward was replaced on this {type(m).__name__}"
        if hooked(m) or m._compiled_call_impl is not None:
            return f"a hook looks into this {type(m).__name__}"
        if (prepared := quantised(m)) is not None:
            return prepared
        self.looking = True
        try:
            reason = self.opaque(m)
        finally:
            self.looking = False
        if reason is not None:
            return reason
        try:
            code_of(m)
        except CannotTrace as error:
            return str(error)
        return None


def _message(error: BaseException) -> str:
    if isinstance(error, CannotTrace):
        return str(error)
    text = str(error).strip().split("\n")[0]
    if "iterat" in text or "len" in text:
        return "its forward takes apart a tensor, or counts with sizes"
    return f"its forward cannot be traced ({type(error).__name__}: {text[:100]})"


def trace(
    module: nn.Module,
    opaque: Callable[[nn.Module], str | None],
    structure: Structure | None = None,
    known: bool = False,
    hopeless: dict[type[Any], str] | None = None,
) -> Traced:
    """The graph of a module's forward, its children traced through where that can be done.

    Args:
        module: fused or not; the forward of its original class is traced.
        opaque: why a child must stay a call, or None; empty where that needs no reason.
        structure: of the arguments that the graph is for; it then takes the tensors in them, in their order. None: a tensor for
            each argument that must be given.
        known: the forward is known to do no more than compute: nothing is put back, which other threads may have changed.
        hopeless: classes of modules without children, with layers as functions, one of which could not be traced, and why: the
            others are not tried, since each would end a trace of all that is around it. Added to.

    Raises:
        TakesApart: it could be, if the structure of its arguments were known.
        CannotTrace: the forward of the module itself cannot be traced.
    """
    if hooks_everywhere():
        raise CannotTrace("a hook looks into all modules (torch.nn.modules.module.register_module_..._hook)")
    if "forward" in module.__dict__:
        raise CannotTrace(f"forward was replaced on this {type(module).__name__}")
    required, most = arguments_of(module)
    if structure is not None and not required <= len(structure) <= most:
        raise CannotTrace(f"it was called with {len(structure)} arguments by position, its forward must be given {required}")
    untraceable: dict[nn.Module, str] = {}
    hopeless = {} if hopeless is None else hopeless
    with LOCK:
        while True:
            tracer = _Tracer(opaque, untraceable, hopeless, structure)
            tracer.traced_func_name = "forward" if not hasattr(type(module), "unfused_class") else "unfused_forward"
            try:
                with listened(tracer) if known else watched(module, tracer):
                    graph = tracer.trace(module)
                tracer.check_caught()
                tracer.check_attributes()
            except Exception as error:  # the code of others, run on stand-ins: whatever it raises
                if not tracer.running:
                    if isinstance(error, CannotTrace):
                        raise
                    raise CannotTrace(_message(error)) from error
                blamed = tracer.running[-1]  # try again with a call of it in its place
                untraceable[blamed] = _message(error)
                if calls_layers(blamed) and not list(blamed.children()):
                    hopeless[original(type(blamed))] = untraceable[blamed]
                continue
            finally:
                tracer.thread = None
                made = tracer.traced
                # Stand-ins refer to their tracer: the model would live until cycles are collected.
                tracer.root, tracer.attributes, tracer.running = nn.Module(), [], []
            made.graph = graph
            return made
