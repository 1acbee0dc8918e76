"""Regions: modules of any class whose forward holds chains.

A region is the innermost module whose forward calls all of a chain, itself or through children. Its class is swapped
as that of every fused module; its forward is the traced one (:mod:`.tracing`), written out again with a call for each chain
(:mod:`.patterns`). A child that no chain looks out of stays one call, with its hooks and its own chains. Where a guard no
longer holds, the forward of the original class runs.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx, nn

from ..blocks import Fused
from ..chain import shape_behind
from ..describe import Entry, Parts, WeightLayer, convolutions, dimensions_of
from .layout import to_reshape
from .patterns import EntryPlace, LayerPlace, Match, Matcher
from .tracing import CannotTrace, Frame, Guard, Traced, arguments_of, descend, signature, trace

Path = tuple[str, ...]
Places = tuple[str, Path, Path | None, Path | nn.Module | None]


def _path(place: str | None) -> Path | None:
    return None if place is None else tuple(place.split("."))


@dataclass(frozen=True, eq=False)
class Site:
    """A chain in a region, by the places of its modules; ``unfused(region, x)`` calls them one by one, with a second input
    where the chain has one, ``skip``.

    Layers are ``(name, convolution, norm, activation)``, an entry is ``(name, norm, activation)``; where a function is called,
    the activation is a module of its own.
    """

    name: str
    layers: tuple[Places, ...]
    residual: bool
    projection: Places | None
    pool: Path | None
    passed: tuple[Path, ...]
    unfused: Callable[..., Tensor]
    skip: bool = False
    entry: tuple[str, Path, Path | nn.Module | None] | None = None

    def parts(self, region: nn.Module) -> Parts:
        """The modules, as they are now."""

        def at(path: Path | nn.Module | None) -> Any:
            return _at(region, path) if isinstance(path, tuple) else path

        def layer(places: Any) -> WeightLayer:
            return WeightLayer(places[0], at(places[1]), at(places[2]), at(places[3]))

        projection = None if self.projection is None else layer(self.projection)
        containers = tuple(at(path) for path in self.passed)
        layers = [layer(places) for places in self.layers]
        entry = None if self.entry is None else Entry(self.entry[0], at(self.entry[1]), at(self.entry[2]))
        return Parts(layers, self.residual, projection, at(self.pool), containers, skip=self.skip, entry=entry)


def _at(region: nn.Module, path: Path) -> Any:
    module: Any = region
    for name in path:
        module = module._modules[name]
        if module is None:
            return nn.Identity()
    return module


@dataclass(frozen=True, eq=False)
class Region:
    """A forward with chains, for one mode or for both.

    Attributes:
        run: ``run(module, *tensors)``.
        sites: the chains, in the order in which they run.
        guards: what must still hold.
        required: how many tensors it is given.
        reasons: place -> why a convolution is in no chain.
        source: the code of ``run``, for people.
        inlined: modules that are not called as such, since a chain looks out of them.
    """

    run: Callable[..., Any]
    sites: tuple[Site, ...]
    guards: tuple[Guard, ...]
    required: int
    reasons: dict[str, str]
    source: str
    inlined: tuple[Path, ...] = ()

    def broken(self, module: nn.Module) -> str | None:
        """Why it holds no longer, or None."""
        for guard in self.guards:
            reason = guard.broken(module)
            if reason is not None:
                return reason
        return None


class Analysis:
    """What is known of a model's modules while it is being looked at: each module is traced once.

    Args:
        known: what else is fused in a module: ``(class, reason)`` as :func:`fused_resnet.swap.recognise.fused_forward`.
    """

    def __init__(self, known: Callable[[nn.Module], tuple[type[Fused] | None, str | None]]) -> None:
        self.known = known
        self.found: dict[int, Region | str | None] = {}
        self.like: dict[Any, Region | str | None] = {}
        self.keep: list[nn.Module] = []

    def region(self, module: nn.Module) -> Region | str | None:
        """The region that a module is; a reason why its forward cannot be looked into; None where it holds no chain."""
        if id(module) not in self.found:
            self.keep.append(module)  # its id is its own while it lives
            self.found[id(module)] = None
            like = (
                signature(module)
                if len({*module.modules()}) == sum(1 for _ in module.named_modules(remove_duplicate=False))
                else None
            )
            if like is None or like not in self.like:
                self.like[like] = self._look(module)
            self.found[id(module)] = self.like[like]
        return self.found[id(module)]

    def _opaque(self, module: nn.Module) -> str | None:
        """Known blocks stay calls."""
        if isinstance(module, Fused) and not isinstance(module, FusedRegion) and not isinstance(module, nn.Sequential):
            return ""
        kind = None if isinstance(module, nn.Sequential) else self.known(module)[0]
        return None if kind is None else ""

    def _own(self, module: nn.Module) -> bool:
        """Whether a child runs its chains itself."""
        if isinstance(module, Fused):
            return True
        return self.known(module)[0] is not None or isinstance(self.region(module), Region)

    def _as_traced(self, module: nn.Module, frame: Frame) -> bool:
        """Whether a child is called as it was traced: tensors for the arguments it must have, and nothing else."""
        found = self.found.get(id(module))
        tensors = all(isinstance(argument, fx.Node) for argument in frame.args) and not frame.kwargs
        return tensors and (not isinstance(found, Region) or len(frame.args) == found.required)

    def _look(self, module: nn.Module) -> Region | str | None:
        try:
            traced = trace(module, self._opaque)
        except CannotTrace as error:
            return str(error)
        matcher = Matcher(module, traced.graph)
        frames = traced.frames
        matches = matcher.find(lambda a, b: frames[a] is frames[b])
        spanning = [match for match in matches if self._owner(module, match, traced).path == ""]
        reshaped = to_reshape(traced.graph, matcher)
        if not spanning and not (self._fused_inside(module, matches) and any(frames[node].parent is None for node in reshaped)):
            return None
        return _Writer(module, traced, matcher, matches, spanning, reshaped).region()

    def _fused_inside(self, module: nn.Module, matches: list[Match]) -> bool:
        """Whether some child gives a tensor that a chain has made."""
        return bool(matches) or any(self.known(child)[0] is not None for child in module.modules() if child is not module)

    def _owner(self, root: nn.Module, match: Match, traced: Traced) -> Frame:
        """The innermost frame around a chain whose module runs its chains itself."""
        lineages = [traced.frames[node].lineage() for node in match.nodes]
        common = [frames[0] for frames in zip(*lineages) if all(frame is frames[0] for frame in frames)]
        for frame in reversed(common[1:]):
            inner = descend(root, tuple(frame.path.split(".")))
            if inner is not None and self._own(inner) and self._as_traced(inner, frame):
                return frame
        return common[0]


class _Writer:
    """Writes a traced forward out again, with the chains."""

    def __init__(
        self,
        module: nn.Module,
        traced: Traced,
        matcher: Matcher,
        matches: list[Match],
        spanning: list[Match],
        reshaped: set[fx.Node],
    ) -> None:
        self.module, self.traced, self.matcher, self.reshaped = module, traced, matcher, reshaped
        self.open = self._opened(spanning)
        self.matches = [match for match in matches if all(self._folded(node) is None for node in match.nodes)]
        self.graph = fx.Graph()
        self.map: dict[fx.Node, fx.Node] = {}

    def _opened(self, spanning: list[Match]) -> set[Frame]:
        """The frames that must be written out, since a chain looks out of them; and those that cannot be one call."""
        opened = {frame for match in spanning for node in match.nodes for frame in self.traced.frames[node].lineage()}
        for frame in self.traced.results:
            if not self._callable(frame):
                opened.update(frame.lineage())
        return opened

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

    def region(self) -> Region:
        """The forward with its chains."""
        itself = self.graph.create_node("placeholder", "self", name="fused_module")
        starts = {match.out if match.skip is not None else match.nodes[0]: match for match in self.matches}
        inside = {node for match in self.matches for node in match.nodes}
        sized = {match.sized: match for match in self.matches if match.sized is not None}
        marks = {frame.mark: frame for frame in self.traced.results}
        sites: list[Site] = []
        for node in self.traced.graph.nodes:
            frame = marks.get(node)
            if frame is not None:
                if frame not in self.open and self._folded_parent(frame) is None:
                    self._call(frame)
            elif self._folded(node) is not None:
                continue
            elif node in starts:
                match = starts[node]
                site = self._site(match)
                inputs = [match.x, *(() if match.skip is None else (match.skip,))]
                call = self.graph.call_function(_call_of(site), (itself, *(self.map[tensor] for tensor in inputs)))
                self.map[match.out] = call
                sites.append(site)
            elif node in sized:
                call = self.graph.call_function(_size_of(self._site(sized[node])), (itself, self.map[sized[node].x]))
                self.map[node] = call
            elif node not in inside:
                self.map[node] = self.graph.node_copy(node, self.map.__getitem__)
                if node in self.reshaped:
                    self.map[node].target = "reshape"
        run, source = _compiled(self.graph)
        required, _ = arguments_of(self.module)
        reasons = {**self.matcher.reasons, **self.traced.leaves}
        inlined = tuple(tuple(frame.path.split(".")) for frame in self.open if frame.parent is not None)
        return Region(run, tuple(sites), self._guards(), required, reasons, source, inlined)

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
            inner[node] = alone.node_copy(node, inner.__getitem__)
        alone.output(inner[match.out])
        unfused, _ = _compiled(alone)

        def activation(layer: LayerPlace | EntryPlace) -> Path | nn.Module | None:
            return _path(layer.activation) if isinstance(layer.activation, str) else layer.activation

        def place(layer: LayerPlace) -> Places:
            return layer.conv, cast(Path, _path(layer.conv)), _path(layer.norm), activation(layer)

        passed = tuple(cast(Path, _path(str(node.target))) for node in match.nodes if self.matcher.is_identity(node))
        side = place(match.projection) if match.projection is not None else None
        layers = tuple(place(layer) for layer in match.layers)
        entry = None
        if match.entry is not None:
            entry = match.entry.norm, cast(Path, _path(match.entry.norm)), activation(match.entry)
        ends = (match.residual, side, _path(match.pool), passed, unfused, match.skip is not None, entry)
        return Site(match.layers[0].conv, layers, *ends)

    def _guards(self) -> tuple[Guard, ...]:
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
        found = ((path, descend(self.module, tuple(path.split(".")) if path else ())) for path in sorted(paths))
        called = {frame.path for frame in self.open if frame.parent is not None}
        return tuple(Guard.of(path, module, path in called) for path, module in found if module is not None)


def _parts(result: Any) -> list[tuple[Any, Any]]:
    """What a frame's result holds by key, if it is a tuple, list or dict; an OrderedDict is a node that makes one."""
    if isinstance(result, fx.Node):
        made = result.op == "call_function" and result.target is OrderedDict
        return [(key, part) for key, part in cast(Any, result.args[0])] if made else []
    return list(result.items() if isinstance(result, dict) else enumerate(result))


def _call_of(site: Site) -> Callable[..., Tensor]:
    """The call of a chain, as a function that torch.fx can name."""

    def fused_chain(module: Any, x: Tensor, *skip: Tensor) -> Tensor:
        return module.run(site.parts, x, partial(site.unfused, module), *skip)

    return fused_chain


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


class Regions:
    """The forwards of one module that were traced, by mode. Copies of the module share them, pickles leave them out."""

    #: How often a module is traced in a mode before it runs unfused for good.
    LIMIT: ClassVar[int] = 4

    def __init__(self) -> None:
        self.traced: dict[bool, list[Region]] = {True: [], False: []}
        self.tries: dict[bool, int] = {True: 0, False: 0}
        self.reason: dict[bool, str | None] = {True: None, False: None}

    def add(self, mode: bool, found: Region | str | None) -> tuple[Region | None, str | None]:
        """Keep what a module was found to be in a mode."""
        self.tries[mode] += 1
        if isinstance(found, Region):
            self.traced[mode].append(found)
            return found, None
        self.reason[mode] = found or "its forward holds no chain in this mode"
        return None, self.reason[mode]

    def __deepcopy__(self, memo: Any) -> Regions:
        copy = Regions()
        copy.traced = {mode: list(regions) for mode, regions in self.traced.items()}
        copy.reason = dict(self.reason)
        return copy

    def __reduce__(self) -> Any:
        return Regions, ()


def usable(module: Any) -> tuple[Region | None, str | None]:
    """The forward of a region that holds now, or why there is none. Traced here if need be, but not under torch.compile."""
    regions: Regions | None = module.__dict__.get("fused_region")
    mode = module.training
    reason = None
    if regions is not None:
        for region in regions.traced[mode]:
            reason = region.broken(module)
            if reason is None:
                return region, None
    if reason is not None and ("hook" in reason or "forward was replaced" in reason):  # gone again some day
        return None, reason
    if torch.compiler.is_compiling():
        return None, reason or "not traced yet in this mode: call it once before torch.compile"
    if regions is None:
        regions = module.fused_region = Regions()
    if regions.tries[mode] >= Regions.LIMIT:
        return None, regions.reason[mode] or reason
    from .recognise import analysis

    return regions.add(mode, analysis().region(module))


def _region(module: Any) -> tuple[Region | None, list[nn.Module] | None]:
    """The forward that holds now, and the modules inside that it depends on."""
    region, _ = usable(module)
    if region is None or torch.compiler.is_compiling():
        return region, None
    inside = [descend(module, guard.path) for guard in region.guards if guard.path]
    return region, [inner for inner in inside if inner is not None]


class FusedRegion(Fused):
    """A module of any class whose forward holds chains. ``fused_region`` keeps what was traced, one forward a mode."""

    @staticmethod
    def chains_of(module: Any) -> list[tuple[str, Parts]]:
        region, _ = usable(module)
        return [] if region is None else [(site.name, site.parts(module)) for site in region.sites]

    def inlined(self) -> list[nn.Module]:
        region, _ = usable(self)
        found = [descend(self, path) for path in region.inlined] if region is not None else []
        return [module for module in found if module is not None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        region = self.recall("region", _region)
        if region is None or kwargs or len(args) != region.required or not all(isinstance(x, Tensor) for x in args):
            return super().forward(*args, **kwargs)
        return region.run(self, *args)
