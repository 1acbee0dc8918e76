"""``torch.compile(model, backend="fused_resnet")``: chains in the graph that Dynamo hands over, the rest to Inductor.

Dynamo's graph calls functions on tensors, parameters among its inputs. The patterns are those of
:mod:`fused_resnet.swap.patterns`; a chain becomes the operator ``fused_resnet::chain``, forward and backward, which AOTAutograd
and Inductor take as it is. Nothing in the model is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .chain import Chain, Layer, Pool
from .describe import activation_name
from .frozen_arithmetic import as_calls, example, frozen_norms
from .inputs import as_image
from .operators import traced
from .swap.functions import CONVOLUTIONS, MAX_POOLS, convolution_arguments, norm_arguments, pooling_arguments
from .swap.nodes import function_activation
from .swap.patterns import EntryPlace, Joined, LayerPlace, Match, Matcher

Node = fx.Node

_POOLS = ("adaptive_avg_pool2d", "max_pool2d", "avg_pool2d", "interpolate")
#: What reads a tensor in any layout and hands the layout on; and what does not. In front of others a chain's output gets the
#: layout that eager PyTorch would give it.
_HANDS_ON = frozenset((*_POOLS, "conv2d", "batch_norm", "relu", "relu_", "add", "iadd", "mul"))
_ENDS = frozenset(("flatten", "mean", "run_chain"))


def _alike(first: Node, second: Node) -> bool:
    """Whether two tensors are surely of one shape and type."""
    a, b = example(first), example(second)
    return a is not None and b is not None and a.dtype == b.dtype and str(a.shape) == str(b.shape)


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _any_layout(node: Node, known: dict[Node, bool]) -> bool:
    """Whether nobody counts on the layout of a tensor of images, nor of what is made of it in the same layout.

    One pixel an image has all layouts at once.
    """
    for user in node.users:
        if user in known or _name(user) in _ENDS:
            free = known.get(user, True)
        else:
            value = example(user)
            pixel = value is not None and value.dim() == 4 and tuple(value.shape[2:]) == (1, 1)
            free = _name(user) in _HANDS_ON and (pixel or _any_layout(user, known))
            known[user] = free
        if not free:
            return False
    return True


def _windows(node: Node) -> dict[str, Any]:
    """Stride, padding and dilation of a convolution as one of images has them; None where they are no numbers."""
    found, along = convolution_arguments(node), CONVOLUTIONS[node.target] - 2
    none = {"stride": 1, "padding": 0, "dilation": 1}
    return {name: _pair(found[name] if along else across, along, across) for name, across in none.items()}


def _pair(value: Any, along: int, across: int) -> tuple[int, int] | None:
    """Numbers for rows and columns, of a function with ``along`` of them; ``across``: of dimensions that it does not have."""
    values = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    values = values * along if len(values) == 1 and along else values
    if len(values) != max(along, 1) or any(type(part) is not int for part in values):
        return None
    return values if along == 2 else (across, values[0])


def _pooling(node: Node) -> Pool | None:
    """A max-pooling's windows; None where it is none that can be launched."""
    found, along = pooling_arguments(node), MAX_POOLS[node.target] - 2
    if found is None:
        return None
    sizes = [found[name] for name in ("kernel_size", "stride", "padding", "dilation")]
    pairs = [_pair(size, along, across) for size, across in zip(sizes, (1, 1, 0, 1), strict=True)]
    windows = [pair for pair in pairs if pair is not None]
    exact = found["ceil_mode"] is False and found["return_indices"] is False
    return Pool(*windows) if exact and len(windows) == len(pairs) else None


def _optional(value: Any) -> bool:
    return value is None or example(value) is not None


def _activated(place: LayerPlace | EntryPlace) -> dict[str, Any]:
    """What a layer says of its activation, which is a module that stands for the function."""
    name, slope = activation_name(place.activation)
    return {"activation": name, "slope": slope}


class _Functions(Matcher):
    """The patterns in a graph of functions. A place is the name of a node."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(torch.nn.Module(), graph)
        self.by_name = {node.name: node for node in self.nodes}

    def _note_functions(self) -> None:
        """All layers are functions here."""

    def is_conv(self, node: Node) -> bool:
        if node.op != "call_function" or node.target not in CONVOLUTIONS:
            return False
        found = convolution_arguments(node)
        numbers = None not in _windows(node).values()
        x, weight = example(found["input"]), example(found["weight"])
        if x is None or weight is None or not numbers or type(found["groups"]) is not int or not _optional(found["bias"]):
            return False
        fits = x.dim() == CONVOLUTIONS[node.target] and weight.dim() == x.dim()
        return fits and x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)

    def fits(self, conv: Node, node: Node) -> bool:
        return node.target not in MAX_POOLS or MAX_POOLS[node.target] == CONVOLUTIONS[conv.target]

    def dimensions(self, place: LayerPlace) -> int:
        return CONVOLUTIONS[self.by_name[place.conv].target]

    def is_norm(self, node: Node) -> bool:
        if node.op != "call_function" or node.target is not F.batch_norm:
            return False
        found = norm_arguments(node)
        tensors = [found[name] for name in ("running_mean", "running_var", "weight", "bias")]
        pairs = [(tensors[0] is None) == (tensors[1] is None), (tensors[2] is None) == (tensors[3] is None)]
        numbers = type(found["training"]) is bool and type(found["momentum"]) is float and type(found["eps"]) is float
        return all(map(_optional, tensors)) and all(pairs) and numbers and (found["training"] or tensors[0] is not None)

    def is_activation(self, node: Node) -> bool:
        return node.op != "call_module" and super().is_activation(node)

    def is_identity(self, node: Node) -> bool:
        return False

    def is_pool(self, node: Node) -> bool:
        return node.op == "call_function" and node.target in MAX_POOLS and _pooling(node) is not None

    def is_pure(self, node: Node) -> bool:
        value = example(node)
        if node.op == "call_method" and node.target == "add_" and value is not None and value.dim() == 0:
            return True  # a BatchNorm counts its batches
        if (
            node.op == "call_function"
            and node.target not in (*CONVOLUTIONS, F.batch_norm)
            and any(argument is True for argument in node.args)
        ):
            return False  # inplace, perhaps
        return super().is_pure(node)

    def layer(self, conv: Node) -> tuple[LayerPlace, list[Node]]:
        nodes, norm, activation = [conv], None, None
        following = self.follow(conv, [])
        if following is not None and self.is_norm(following):
            nodes.append(following)
            norm = following.name
            following = self.follow(following, [])
        if following is not None and self.is_activation(following):
            nodes.append(following)
            activation = function_activation(following)
        return LayerPlace(conv.name, norm, activation), nodes

    def refused(self, place: LayerPlace) -> str | None:
        return None

    def has_bias(self, place: LayerPlace) -> bool:
        return False  # a convolution with a bias alone is left to the compiler, which fuses what is behind it

    @staticmethod
    def readers(node: Node) -> list[Node]:
        return list(node.users)

    def _beside(self, match: Match, projection: Match | None, shortcut: Node, by_out: dict[Node, Match]) -> Joined | None:
        return super()._beside(match, projection, shortcut, by_out) if _alike(match.out, shortcut) else None

    def names(self, place: LayerPlace) -> set[str]:
        found = {str(convolution_arguments(self.by_name[place.conv])["weight"])}
        return found if place.norm is None else {*found, self.norm_name(place.norm)}

    def place(self, node: Node) -> str:
        return node.name

    def norm_name(self, norm: str) -> str:
        running = norm_arguments(self.by_name[norm])["running_mean"]
        return norm if running is None else str(running)

    def _tell(self, chains: list[Match]) -> None:
        """Nobody asks for reasons here."""

    # ---- chains as data

    def described(self, place: LayerPlace) -> tuple[Layer, list[Node]]:
        """A layer, and the nodes of its tensors."""
        found = convolution_arguments(self.by_name[place.conv])
        weight: Any = example(found["weight"])
        tensors = [found["weight"], *([found["bias"]] if found["bias"] is not None else [])]
        windows = _windows(self.by_name[place.conv])
        norm: dict[str, Any] = {}
        if place.norm is not None:
            norm, vectors = self.described_norm(place.norm)
            tensors += vectors
        K, C, R, S = (int(size) for size in as_image(weight).shape)
        ends: dict[str, Any] = {"bias": found["bias"] is not None, **_activated(place), **norm}
        return Layer(place.conv, K, C * found["groups"], (R, S), groups=found["groups"], **windows, **ends), tensors

    def described_norm(self, norm: str) -> tuple[dict[str, Any], list[Node]]:
        """What a layer says of its BatchNorm, and the nodes of its tensors."""
        given = norm_arguments(self.by_name[norm])
        running = [given["running_mean"], given["running_var"]] if given["running_mean"] is not None else []
        vectors = [given["weight"], given["bias"]] if given["weight"] is not None else []
        said = {"norm": True, "affine": bool(vectors), "eps": given["eps"]}
        if given["training"]:
            said |= {"batch": True, "tracked": bool(running), "momentum": given["momentum"]}
        return said, [*vectors, *running]

    def described_entry(self, match: Match) -> tuple[Layer | None, list[Node]]:
        """The same of a chain's entry, if it has one."""
        if match.entry is None:
            return None, []
        said, vectors = self.described_norm(match.entry.norm)
        x: Any = example(match.x)
        channels = int(x.shape[1])
        ends: dict[str, Any] = {**_activated(match.entry), **said, "weights": False}
        return Layer(match.entry.norm, channels, channels, (1, 1), **ends), vectors

    def one_type(self, match: Match) -> bool:
        """Whether all that a chain makes has its input's type, and the shortcut its output's shape."""
        x, values = example(match.x), [example(node) for node in match.nodes]
        same = x is not None and all(value is not None and value.dtype == x.dtype for value in values)
        joined = [node for node in match.nodes if self.added(node) is not None]
        start = [] if match.skip is None else [example(match.skip)]
        same = same and all(value is not None and value.dtype == x.dtype for value in start if x is not None)
        return same and all(_alike(node, part) for node in joined for part in node.all_input_nodes)


def run_chain(x: Tensor, operands: Sequence[Tensor], chain: str, contiguous: bool) -> Tensor:
    """A chain of the graph; ``contiguous`` is the layout that what follows counts on."""
    out = traced(x, operands, Chain.parse(chain))
    return out.contiguous() if contiguous else out


def _no_images(x: Tensor) -> bool:
    """Whether it is known that there are none: torch.compile makes a graph of its own for 0."""
    return isinstance(x.shape[0], int) and x.shape[0] == 0


def _call_frozen_norms(graph: fx.Graph) -> None:
    """Frozen BatchNorms that are arithmetic as calls, behind convolutions, if nothing writes while they are computed."""
    matcher = _Functions(graph)
    for found in frozen_norms(graph):
        alone = len(found.x.users) == 1 and matcher.is_conv(found.x)
        between = matcher.nodes[matcher.order[found.first] : matcher.order[found.out]]
        if alone and all(map(matcher.is_pure, between)):
            as_calls(found)


def fuse_graph(gm: fx.GraphModule) -> int:
    """Put chains into a graph of Dynamo's, in place; returns how many."""
    _call_frozen_norms(gm.graph)
    matcher = _Functions(gm.graph)
    matches = [match for match in matcher.find(lambda a, b: True) if matcher.one_type(match)]
    made: dict[Node, Node] = {}
    for match in matches:
        layers = [matcher.described(place) for place in match.layers]
        side = matcher.described(match.projection) if match.projection is not None else None
        projection = side[0] if side is not None else None
        entry, vectors = matcher.described_entry(match)
        pool = _pooling(matcher.by_name[match.pool]) if match.pool is not None else None
        how: dict[str, Any] = {"skip": match.skip is not None, "entry": entry}
        spec = Chain(tuple(layer for layer, _ in layers), match.residual, projection, pool, **how)
        x = example(match.x)
        if spec.batch and x is not None and _no_images(x):  # PyTorch makes no statistics of them, nor an error
            continue
        tensors = [] if match.skip is None else [made.get(match.skip, match.skip)]
        tensors += vectors
        tensors += [tensor for _, found in (*layers, *([side] if side is not None else [])) for tensor in found]
        with gm.graph.inserting_before(match.nodes[0] if match.skip is None else match.out):
            call = gm.graph.call_function(run_chain, (made.get(match.x, match.x), tensors, spec.token, True))
        call.meta = dict(match.out.meta)
        match.out.replace_all_uses_with(call)
        made[match.out] = call
        for node in reversed(match.nodes):
            gm.graph.erase_node(node)
    for call in made.values():
        value = example(call)
        free = (
            _any_layout(call, {})
            if value is not None and value.dim() == 4
            else all(_name(user) == "run_chain" for user in call.users)
        )
        call.update_arg(3, not free and value is not None and value.is_contiguous())
    gm.graph.lint()
    gm.recompile()
    return len(made)


def fused_resnet(
    gm: fx.GraphModule, example_inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend: what ``torch.compile(model, backend="fused_resnet")`` calls with each graph.

    Args:
        gm: Dynamo's graph; changed.
        example_inputs: what it is called with.
        mode: not taken by custom backends; None.
        options: ``{"inner": name}`` hands the rest to that backend of torch.compile instead of Inductor; other keys are
            Inductor's.

    Raises:
        ValueError: a mode, which only Inductor itself takes.
    """
    if mode is not None and mode != "default":
        raise ValueError(f"mode must be None with backend='fused_resnet', got {mode!r}: give Inductor's options instead")
    given = dict(options or {})
    inner = given.pop("inner", "inductor")
    fuse_graph(gm)
    if inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        compiled: Any = compile_fx(gm, example_inputs, config_patches=given or None)
        return compiled
    return torch._dynamo.lookup_backend(inner)(gm, example_inputs)
