"""Which modules are regions: their forwards traced, chains found in them, and written out again.

A module's forward is the traced one (:mod:`.tracing`), written out again with a call for each chain (:mod:`.patterns`). A child
that no chain looks out of stays one call, with its hooks and its own chains.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, fx, nn

from ..blocks import FusedResidual, FusedStage, FusedStem
from ..chain import shape_behind
from ..describe import convolutions, dimensions_of, identity_of
from ..fused import Fused
from ..whole import Chain, Network
from .arguments import Structure
from .guards import Guard, Tie, descend, original, signature
from .harmless import CannotTrace
from .layout import is_view, to_reshape
from .patterns import EntryPlace, LayerPlace, Match, Matcher
from .region import Block, FusedRegion, Later, Path, Place, Places, Region, Site, runs_chains, usable, waits
from .tracing import Frame, TakesApart, Traced, arguments_of, trace
from .trusted import all_known, of_a_zoo, written_classes

#: Fused modules that are one chain each.
_BLOCKS = FusedResidual, FusedStem


def _path(place: str | None) -> Path | None:
    return None if place is None else tuple(place.split("."))


class Analysis:
    """What is known of a model's modules while it is being looked at: each module is traced once.

    Args:
        known: what else is fused in a module: ``(class, reason)`` as :func:`fused_resnet.swap.recognise.fused_forward`.
    """

    def __init__(self, known: Callable[[nn.Module], tuple[type[Fused] | None, str | None]]) -> None:
        self.known = known
        self.found: dict[int, Region | Later | str | None] = {}
        self.like: dict[Any, Region | Later | str | None] = {}
        self.keep: list[nn.Module] = []
        self.hopeless: dict[type[Any], str] = {}  # see :func:`.tracing.trace`

    def region(self, module: nn.Module) -> Region | Later | str | None:
        """The region that a module is for tensors; a reason why its forward cannot be looked into, or not yet; None where it
        holds no chain.
        """
        if id(module) not in self.found:
            self.keep.append(module)  # its id is its own while it lives
            self.found[id(module)] = None
            like = None if _has_shared(module) else signature(module)
            if like is None or like not in self.like:
                self.like[like] = self.look(module)
            self.found[id(module)] = self.like[like]
        return self.found[id(module)]

    def _opaque(self, module: nn.Module) -> str | None:
        """Known blocks stay calls."""
        if runs_chains(module) and not isinstance(module, (FusedRegion, nn.Sequential)):
            return ""
        kind = None if isinstance(module, nn.Sequential) else self.known(module)[0]
        return None if kind is None else ""

    def _own(self, module: nn.Module) -> bool:
        """Whether a child runs its chains itself."""
        if runs_chains(module):
            return not waits(module)
        return self.known(module)[0] is not None or isinstance(self.region(module), Region)

    def _as_traced(self, module: nn.Module, frame: Frame) -> bool:
        """Whether a child is called as it was traced: tensors for the arguments it must have, and nothing else."""
        found = self.found.get(id(module))
        tensors = all(isinstance(argument, fx.Node) for argument in frame.args) and not frame.kwargs
        return tensors and (not isinstance(found, Region) or len(frame.args) == found.required)

    def look(self, module: nn.Module, structure: Structure | None = None) -> Region | Later | str | None:
        """As :meth:`region`, for arguments of a structure; None: tensors."""
        try:
            traced = trace(module, self._opaque, structure, hopeless=self.hopeless)
        except TakesApart as error:
            return Later(str(error))
        except CannotTrace as error:
            return str(error)
        matcher = Matcher(module, traced.graph)
        matches = matcher.find(_together(module, traced))
        spanning = [match for match in matches if self._owner(module, match, traced).path == ""]
        reshaped = to_reshape(traced.graph, matcher)
        if not spanning and not (
            self._fused_inside(module, matches) and any(traced.frames[node].parent is None for node in reshaped)
        ):
            return None
        return _Writer(module, traced, matcher, matches, spanning, reshaped).region(structure)

    def network(self, module: nn.Module) -> Network | None:
        """The forward of a module as a whole, if it is nothing but chains, and layers and functions that are known
        (:mod:`.trusted`); of a region of somebody's own what was traced for its chains.
        """
        if not all_known(module):
            region = usable(module)[0] if isinstance(module, FusedRegion) else None
            return None if region is None else region.network
        if any(getattr(inner, "gives_contiguous", False) for inner in module.modules() if inner is not module):
            return None  # what views its result is not seen here, see :mod:`.layout`
        try:
            traced = trace(module, lambda inner: "" if isinstance(inner, _BLOCKS) else None, known=True)
        except CannotTrace:
            return None
        matcher = Matcher(module, traced.graph)
        matches = matcher.find(_together(module, traced))
        runners: dict[fx.Node, Path] = {}
        for match in matches:
            runner = self._runner(module, match, matcher, traced)
            if runner is None:  # what was unfused runs as it was written
                return None
            runners[match.out] = runner
        return _Writer(module, traced, matcher, matches, None, to_reshape(traced.graph, matcher)).network(runners)

    def _runner(self, root: nn.Module, match: Match, matcher: Matcher, traced: Traced) -> Path | None:
        """The place of the fused module that runs a chain outside of a network; None where its modules run one by one."""
        layers = [*match.layers, *(() if match.projection is None else (match.projection,))]
        convolutions = {identity_of(matcher.modules[layer.conv]) for layer in layers}
        for frame in reversed(self._around(match, traced)):
            inner = root.get_submodule(frame.path)
            if not runs_chains(inner):
                continue
            if convolutions <= {identity_of(layer.conv) for _, parts in inner.chains() for layer in parts.weight_layers}:
                return _path(frame.path) if frame.path else ()
        return None

    @staticmethod
    def _around(match: Match, traced: Traced) -> list[Frame]:
        """The frames that all of a chain is in, the root's first."""
        lineages = [traced.frames[node].lineage() for node in match.nodes]
        return [frames[0] for frames in zip(*lineages) if all(frame is frames[0] for frame in frames)]

    def _fused_inside(self, module: nn.Module, matches: list[Match]) -> bool:
        """Whether some child gives a tensor that a chain has made."""
        return bool(matches) or any(self.known(child)[0] is not None for child in module.modules() if child is not module)

    def _owner(self, root: nn.Module, match: Match, traced: Traced) -> Frame:
        """The innermost frame around a chain whose module runs its chains itself."""
        common = self._around(match, traced)
        for frame in reversed(common[1:]):
            inner = descend(root, tuple(frame.path.split(".")))
            if inner is not None and self._own(inner) and self._as_traced(inner, frame):
                return frame
        return common[0]


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by all their names."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _has_shared(module: nn.Module) -> bool:
    """Whether there are modules or tensors in it that have several names."""
    modules = [inner for _, inner in module.named_modules(remove_duplicate=False)]
    tensors = [id(tensor) for _, tensor in _tensors(module)]
    return len({*modules}) < len(modules) or len({*tensors}) < len(tensors)


def _together(root: nn.Module, traced: Traced) -> Callable[[fx.Node, fx.Node], bool]:
    """Whether two layers were called in the same frame; what a module without children calls as functions is its caller's."""

    def caller(node: fx.Node) -> Frame:
        frame = traced.frames[node]
        alone = frame.parent is not None and not list(root.get_submodule(frame.path).children())
        return frame.parent if alone and frame.parent is not None else frame

    return lambda a, b: caller(a) is caller(b)


class _Writer:
    """Writes a traced forward out again, with the chains."""

    def __init__(
        self,
        module: nn.Module,
        traced: Traced,
        matcher: Matcher,
        matches: list[Match],
        spanning: list[Match] | None,
        reshaped: set[fx.Node],
    ) -> None:
        """``spanning``: the chains that look out of modules, which are written out; None: all are."""
        self.module, self.traced, self.matcher, self.reshaped = module, traced, matcher, reshaped
        self.open = set(traced.results) if spanning is None else self._opened(spanning)
        self.matches = [match for match in matches if all(self._folded(node) is None for node in match.nodes)]
        self.graph = fx.Graph()
        self.map: dict[fx.Node, fx.Node] = {}

    def _opened(self, spanning: list[Match]) -> set[Frame]:
        """The frames that must be written out, since a chain looks out of them; and those that cannot be one call."""
        opened = {frame for match in spanning for node in match.nodes for frame in self.traced.frames[node].lineage()}
        for frame in self.traced.results:
            if not self._callable(frame):
                opened.update(frame.lineage())
        for node, around in self._uses():
            for frame in self.traced.frames[node].lineage()[1:]:
                if frame not in around and all(node is not part for part in self._gives(frame)):
                    opened.update(frame.lineage())
        return opened

    def _uses(self) -> Iterator[tuple[fx.Node, list[Frame]]]:
        """Each node that is used, with the frames around where it is."""
        for node in self.traced.graph.nodes:
            for used in node.all_input_nodes:
                yield used, self.traced.frames[node].lineage()
        for frame in self.traced.results:
            found: list[fx.Node] = []
            fx.node.map_arg((frame.args, frame.kwargs), found.append)
            for used in found:
                yield used, frame.lineage()[:-1]

    def _gives(self, frame: Frame) -> list[Any]:
        """What the call of a frame gives back."""
        result = self.traced.results[frame]
        return [result, *(part for _, part in _parts(result))]

    def _callable(self, frame: Frame) -> bool:
        """Whether a frame's result can be taken apart again: a tensor, or tensors in a tuple, list or dict."""
        result = self.traced.results[frame]
        parts = [part for _, part in _parts(result) or [(None, result)]]
        return all(isinstance(part, fx.Node) for part in parts) and not any(part in self._marks() for part in parts)

    def _marks(self) -> set[Any]:
        return {frame.mark for frame in self.traced.results}

    def _folded(self, node: fx.Node) -> Frame | None:
        """The outermost frame around a node that stays one call."""
        return next((frame for frame in self.traced.frames[node].lineage() if frame.parent and frame not in self.open), None)

    def region(self, structure: Structure | None) -> Region:
        """The forward with its chains, for arguments of a structure."""
        sites: list[Site] = []
        calls: list[fx.Node] = []

        def chain(match: Match, itself: fx.Node, inputs: list[fx.Node]) -> fx.Node:
            sites.append(self._site(match))
            calls.append(self.graph.call_function(_call_of(sites[-1]), (itself, *inputs)))
            return calls[-1]

        run, source = self._written(chain, lambda node, _: self.graph.node_copy(node, self.map.__getitem__))
        required, _ = arguments_of(self.module)
        reasons = {**self.matcher.reasons, **self.traced.leaves}
        inlined = tuple(tuple(frame.path.split(".")) for frame in self.open if frame.parent is not None)
        guards = self._guards()
        network = None
        others = [node for node in self.graph.nodes if node not in calls]
        if structure is None and calls and all(node.op != "get_attr" and _is_harmless(node, zoos=False) for node in others):
            for index, call in enumerate(calls):
                itself, *inputs = call.args
                call.op, call.target, call.args = "call_method", "chain", (itself, index, False, *inputs)
            network = Network(_compiled(self.graph)[0], tuple(sites), (), (), guards, (), required)
        return Region(run, tuple(sites), guards, required, reasons, source, inlined, structure, network)

    def network(self, runners: dict[fx.Node, Path]) -> Network | None:
        """The forward as a whole, a method of :class:`.whole.Call`'s for each chain and each layer.

        ``runners``: who runs a chain otherwise, by what the chain gives.
        """
        chains: list[Chain] = []
        leaves: list[Path] = []
        tensors: list[Path] = []
        if any(is_view(node) and node not in self.reshaped for node in self.traced.graph.nodes):
            return None  # a module that does so is given contiguous tensors, see :mod:`.layout`
        if any(match.sized is not None for match in self.matches):
            return None

        def call(chain: Chain, itself: fx.Node, donate: bool, inputs: list[Any]) -> fx.Node:
            chains.append(chain)
            return self.graph.call_method("chain", (itself, len(chains) - 1, donate, *inputs))

        def chain(match: Match, itself: fx.Node, inputs: list[fx.Node]) -> fx.Node:
            return call(replace(self._site(match), runner=runners[match.out]), itself, False, inputs)

        def other(node: fx.Node, itself: fx.Node) -> fx.Node:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.map.__getitem__)
            block = self._block(node)
            if block is not None:
                return call(Block(block), itself, self._handed_on(node), [*args])
            if node.op == "call_module":
                leaves.append(cast(Path, _path(str(node.target))))
                return self.graph.call_method("leaf", (itself, len(leaves) - 1, *args), kwargs)
            if node.op == "get_attr":
                tensors.append(cast(Path, _path(str(node.target))))
                return self.graph.call_method("tensor", (itself, len(tensors) - 1))
            return self.graph.node_copy(node, self.map.__getitem__)

        known = {part for match in self.matches for part in match.nodes} | self._marks() | self._idle()
        if not all(self._harmless(node) for node in self.traced.graph.nodes if node not in known):
            return None
        run, _ = self._written(chain, other)
        if not chains:
            return None
        called = {frame.path for frame in self.open if frame.parent is not None}
        guards = tuple(Guard.of(path, module, path in called) for path, module in self.module.named_modules())
        required = arguments_of(self.module)[0]
        kinds = dict.fromkeys(kind for part in self.module.modules() for kind in written_classes(part))
        classes = tuple((kind, tuple(vars(kind).values())) for kind in kinds)
        return Network(run, tuple(chains), tuple(leaves), tuple(tensors), guards, classes, required)

    def _block(self, node: fx.Node) -> Path | None:
        """The place of a block that is one chain, where a node is its call with a tensor."""
        module = self.matcher.module(node)
        called = isinstance(module, _BLOCKS) and len(node.args) == 1 and not node.kwargs
        return _path(str(node.target)) if called else None

    def _handed_on(self, node: fx.Node) -> bool:
        """Whether a block's input is what the block in front of it in a stage has made, and nobody else's: as in
        :class:`.blocks.FusedStage`, whose sums have the same bits.
        """
        path, before = self._block(node), cast(fx.Node, node.args[0])
        first = self._block(before)
        if path is None or first is None or path[:-1] != first[:-1] or len(before.users) > 1:
            return False
        return isinstance(descend(self.module, path[:-1]), FusedStage)

    def _harmless(self, node: fx.Node) -> bool:
        """Whether a node runs nobody's code who could change a module."""
        module = self.matcher.module(node)
        if not isinstance(module, nn.Module):
            return _is_harmless(node)
        kinds = [original(type(part)).__module__ for part in module.modules()]
        return all(kind.startswith("torch.nn.modules.") or of_a_zoo(kind) for kind in kinds)

    def _written(
        self,
        chain: Callable[[Match, fx.Node, list[fx.Node]], fx.Node],
        other: Callable[[fx.Node, fx.Node], fx.Node],
    ) -> tuple[Callable[..., Any], str]:
        """The forward as a function, and its code.

        ``chain(match, self, inputs)`` makes the node of a chain, ``other(node, self)`` that of what is in none.
        """
        itself = self.graph.create_node("placeholder", "self", name="fused_module")
        starts = {match.out if match.skip is not None else match.nodes[0]: match for match in self.matches}
        inside = {node for match in self.matches for node in match.nodes} | self._idle()
        sized = {match.sized: match for match in self.matches if match.sized is not None}
        marks = {frame.mark: frame for frame in self.traced.results}
        for node in self.traced.graph.nodes:
            frame = marks.get(node)
            if frame is not None:
                if frame not in self.open and self._folded_parent(frame) is None:
                    self._call(frame)
            elif self._folded(node) is not None:
                continue
            elif node in starts:
                match = starts[node]
                inputs = [match.x, *(() if match.skip is None else (match.skip,))]
                self.map[match.out] = chain(match, itself, [self.map[tensor] for tensor in inputs])
            elif node in sized:
                call = self.graph.call_function(_size_of(self._site(sized[node])), (itself, self.map[sized[node].x]))
                self.map[node] = call
            elif node not in inside:
                self.map[node] = other(node, itself)
                if node in self.reshaped:
                    self.map[node].target = "reshape"
        return _compiled(self.graph)

    def _idle(self) -> set[fx.Node]:
        """Tensors of the module that chains alone read, which look for them by their places."""
        inside = {node for match in self.matches for node in match.nodes}
        given = {tensor for match in self.matches for tensor in (match.x, match.skip)}
        tensors = [node for node in self.traced.graph.nodes if node.op == "get_attr" and node not in given]
        return {node for node in tensors if inside.issuperset(node.users)}

    def _folded_parent(self, frame: Frame) -> Frame | None:
        return next((outer for outer in frame.lineage()[1:-1] if outer not in self.open), None)

    def _call(self, frame: Frame) -> None:
        """A call of the whole module of a frame."""
        args, kwargs = fx.node.map_arg((frame.args, frame.kwargs), self.map.__getitem__)
        call = self.graph.call_module(frame.path, tuple(args), dict(kwargs))
        result = self.traced.results[frame]
        if isinstance(result, fx.Node):
            self.map[result] = call
        for key, part in _parts(result):
            self.map[part] = self.graph.call_function(operator.getitem, (call, key))

    def _site(self, match: Match) -> Site:
        """A match as data, with the code that runs its modules one by one."""
        alone = fx.Graph()
        alone.create_node("placeholder", "self", name="fused_module")
        inner = {match.x: alone.placeholder("x")}
        if match.skip is not None:
            inner[match.skip] = alone.placeholder("skip")
        for node in match.nodes:
            for own in node.all_input_nodes:  # a tensor of the module
                if own.op == "get_attr" and own not in inner:
                    inner[own] = alone.node_copy(own, inner.__getitem__)
            inner[node] = alone.node_copy(node, inner.__getitem__)
        alone.output(inner[match.out])
        unfused, _ = _compiled(alone)

        def activation(layer: LayerPlace | EntryPlace) -> Path | nn.Module | None:
            return _path(layer.activation) if isinstance(layer.activation, str) else layer.activation

        def at(name: str | None) -> Place | None:
            return self.matcher.functions.get(name) or _path(name) if name is not None else None

        def place(layer: LayerPlace) -> Places:
            name = f"_{layer.conv}" if layer.conv.startswith("d.") else layer.conv  # as plans call gradients
            return name, cast(Place, at(layer.conv)), at(layer.norm), activation(layer)

        passed = tuple(cast(Path, _path(str(node.target))) for node in match.nodes if self.matcher.is_identity(node))
        side = place(match.projection) if match.projection is not None else None
        layers = tuple(place(layer) for layer in match.layers)
        entry = None
        if match.entry is not None:
            entry = match.entry.norm, cast(Place, at(match.entry.norm)), activation(match.entry)
        ends = (match.residual, side, at(match.pool), passed, unfused, match.skip is not None, entry)
        return Site(match.layers[0].conv, layers, *ends)

    def _guards(self) -> tuple[Guard | Tie, ...]:
        """Of the root, the modules written out, and those on the way to what is called."""
        paths = {frame.path for frame in self.open}
        for node in self.traced.graph.nodes:
            if self._folded(node) is None and node.op in ("call_module", "get_attr"):
                names = str(node.target).split(".")
                paths.update(".".join(names[:depth]) for depth in range(len(names)))
        for frame in self.traced.results:
            names = frame.path.split(".")
            if self._folded_parent(frame) is None:
                paths.update(".".join(names[:depth]) for depth in range(len(names)))
        ties = self._ties()
        paths.update(place.rpartition(".")[0] for tie in ties for place in (tie.first, tie.second))
        found = ((path, descend(self.module, tuple(path.split(".")) if path else ())) for path in sorted(paths))
        called = {frame.path for frame in self.open if frame.parent is not None}
        return (*(Guard.of(path, module, path in called) for path, module in found if module is not None), *ties)

    def _ties(self) -> list[Tie]:
        """The other names of tensors that are read, of which the trace knows the first."""
        read = {str(node.target) for node in self.traced.graph.nodes if node.op == "get_attr" and self._folded(node) is None}
        named = _tensors(self.module) if read else []
        first = {id(tensor): name for name, tensor in reversed(named) if name in read}
        return [Tie(first[id(tensor)], name) for name, tensor in named if first.get(id(tensor), name) != name]


def _parts(result: Any) -> list[tuple[Any, Any]]:
    """What a frame's result holds by key, if it is a tuple, list or dict; an OrderedDict is a node that makes one."""
    if isinstance(result, fx.Node):
        made = result.op == "call_function" and result.target is OrderedDict
        return [(key, part) for key, part in cast(Any, result.args[0])] if made else []
    if not isinstance(result, (dict, list, tuple)):
        return []
    return list(result.items() if isinstance(result, dict) else enumerate(result))


def _call_of(site: Site) -> Callable[..., Tensor]:
    """The call of a chain, as a function that torch.fx can name."""

    def fused_chain(module: Any, x: Tensor, *skip: Tensor) -> Tensor:
        return site.run(module, x, *skip)

    return fused_chain


#: Modules whose functions are PyTorch's or Python's own.
_OF_TORCH = {None, "torch", "torch.functional", "torch.nn.functional", "torch._C._nn", "_operator", "builtins", "math"}


def _is_harmless(node: fx.Node, zoos: bool = True) -> bool:
    """Whether a node is an argument, the result, a parameter, or a call that runs nobody's code who could change a module.
    (Operators by name, ``torch.ops``, may be anybody's.)
    """
    if node.op != "call_function" or node.target is OrderedDict:
        return node.op != "call_module"
    where = getattr(node.target, "__module__", "")
    return where in _OF_TORCH or (zoos and of_a_zoo(where))


def _size_of(site: Site) -> Callable[..., Tensor]:
    """What has the size of a chain's sum, and no elements, for those who ask in front of it."""

    def fused_size(module: Any, x: Tensor) -> Tensor:
        parts = site.parts(module)
        layers, dimensions = convolutions(parts), dimensions_of(parts.layers[0].conv)
        if dimensions == 2:  # a Linear takes any number
            return x.new_empty(()).expand(*x.shape[:-1], layers[-1].filters)
        batch = x.shape[0] if x.dim() == dimensions else 1
        n, k, *sizes = shape_behind(layers, batch, *(1,) * (4 - dimensions), *x.shape[2 - dimensions :])
        return x.new_empty(()).expand((n, k, *sizes[4 - dimensions :])[-x.dim() :])

    return fused_size


def _compiled(graph: fx.Graph) -> tuple[Callable[..., Any], str]:
    """The function that a graph is; its first argument is the module that the graph's places are in."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<fused_resnet region>", "exec"), names)
    return names["forward"], code.src
