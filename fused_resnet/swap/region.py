"""Regions: modules of any class whose forward holds chains.

A region is the innermost module whose forward calls all of a chain, itself or through children. Its class is swapped
as that of every fused module; its forward is the traced one, with a call for each chain (:mod:`.analysis`). Where a guard no
longer holds, the forward of the original class runs. A forward that takes apart its arguments is traced when it is called, for
their structure (:mod:`.arguments`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from inspect import signature
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import functional
from ..blocks import Fused, read_off
from ..describe import Entry, Parts, Reading, WeightLayer, hooks_everywhere
from ..watch import ATTRIBUTE, Memory
from .arguments import Structure, structure_of, tensors_of, told
from .guards import Guard, descend
from .tracing import LOCK

Path = tuple[str, ...]
Places = tuple[str, Path, Path | None, Path | nn.Module | None]

#: Why a forward that takes apart its arguments holds no chain yet.
WAITING = "traced at its first call in this mode, for the structure of its arguments"


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

    def run(self, region: Any, x: Tensor, *skip: Tensor) -> Tensor:
        """The chain, or its modules one by one."""
        return cast(Tensor, region.run(self.parts, x, partial(self.unfused, region), *skip))

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
        way = tuple(at(path) for path in self._way())
        return Parts(layers, self.residual, projection, at(self.pool), containers, skip=self.skip, entry=entry, way=way)

    def _way(self) -> list[Path]:
        """The places between the region and its chain's modules."""
        layers = [*self.layers, *(() if self.projection is None else (self.projection,))]
        places = [*(place for layer in layers for place in layer[1:]), *(() if self.entry is None else self.entry[1:])]
        paths = [path for path in (*places, self.pool, *self.passed) if isinstance(path, tuple)]
        return list(dict.fromkeys(path[:depth] for path in paths for depth in range(1, len(path))))


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
        structure: of the arguments that hold them; None where each is one.
        reasons: place -> why a convolution is in no chain.
        source: the code of ``run``, for people.
        inlined: modules that are not called as such, since a chain looks out of them.
        straight: ``run`` where it is nothing but chains and functions of PyTorch's, with a :class:`Straight` for the module.
    """

    run: Callable[..., Any]
    sites: tuple[Site, ...]
    guards: tuple[Guard, ...]
    required: int
    reasons: dict[str, str]
    source: str
    inlined: tuple[Path, ...] = ()
    structure: Structure | None = None
    straight: Callable[..., Any] | None = None

    def broken(self, module: nn.Module) -> str | None:
        """Why it holds no longer, or None."""
        for guard in self.guards:
            reason = guard.broken(module)
            if reason is not None:
                return reason
        return None


@dataclass(frozen=True)
class Later:
    """What is found of a forward that takes apart an argument: it can be traced for the structure of what it is called with."""

    reason: str


class Regions:
    """The forwards of one module that were traced, by mode. Copies of the module share them, pickles leave them out."""

    #: How often a module is traced in a mode before it runs unfused for good, or where it is given another structure.
    LIMIT: ClassVar[int] = 4

    def __init__(self) -> None:
        self.traced: dict[bool, list[Region]] = {True: [], False: []}
        self.tries: dict[bool, int] = {True: 0, False: 0}
        self.reason: dict[bool, str | None] = {True: None, False: None}
        self.later: dict[bool, str | None] = {True: None, False: None}  # why it cannot be traced for tensors
        self.refused: dict[tuple[bool, Structure], str] = {}
        self.called: dict[bool, Structure | None] = {}  # what it was called with last; None: tensors

    def add(
        self, mode: bool, found: Region | Later | str | None, structure: Structure | None = None
    ) -> tuple[Region | None, str | None]:
        """Keep what a module was found to be in a mode."""
        if isinstance(found, Later):
            self.later[mode] = found.reason
            return None, found.reason
        self.tries[mode] += 1
        if isinstance(found, Region):
            self.traced[mode].append(found)
            return found, None
        reason = found or "its forward holds no chain in this mode"
        if structure is not None:
            self.refused[mode, structure] = reason
        else:
            self.reason[mode] = reason
        return None, reason

    def holding(self, module: nn.Module, structure: Structure | None) -> tuple[Region | None, str | None]:
        """The forward for a structure that holds now, or why the last of them does not."""
        reason = None
        for region in self.traced[module.training]:
            if region.structure == structure:
                reason = region.broken(module)
                if reason is None:
                    return region, None
        return None, reason

    def __deepcopy__(self, memo: Any) -> Regions:
        copy = Regions()
        copy.traced = {mode: list(regions) for mode, regions in self.traced.items()}
        copy.reason, copy.later, copy.called = dict(self.reason), dict(self.later), dict(self.called)
        copy.refused = dict(self.refused)
        return copy

    def __reduce__(self) -> Any:
        return Regions, ()


def usable(module: Any, structure: Structure | None = None) -> tuple[Region | None, str | None]:
    """The forward of a region that holds now, or why there is none. Traced here if need be, but not under torch.compile.

    Args:
        structure: of the arguments; None: tensors.
    """
    regions: Regions | None = module.__dict__.get("fused_region")
    mode = module.training
    region, reason = (None, None) if regions is None else regions.holding(module, structure)
    if region is not None:
        return region, None
    if reason is not None and ("hook" in reason or "forward was replaced" in reason):  # gone again some day
        return None, reason
    if torch.compiler.is_compiling():
        return None, reason or "not traced yet in this mode: call it once before torch.compile"
    if regions is None:
        regions = module.fused_region = Regions()
    with LOCK:  # another thread may have traced it meanwhile
        return _traced(module, regions, mode, structure)


def _traced(module: Any, regions: Regions, mode: bool, structure: Structure | None) -> tuple[Region | None, str | None]:
    """As :func:`usable`, traced if that may be."""
    region, reason = regions.holding(module, structure)
    if region is not None:
        return region, None
    if structure is None:
        reason = regions.later[mode] or (regions.reason[mode] or reason if regions.tries[mode] >= Regions.LIMIT else None)
    elif regions.tries[mode] >= Regions.LIMIT:
        reason = regions.refused.get((mode, structure)) or reason
        reason = (
            reason or f"its arguments ({told(structure)}) have another structure than the {Regions.LIMIT} it was traced for"
        )
    else:
        reason = regions.refused.get((mode, structure))
    if reason is None:  # what is gone again some day is no reason to give up
        if hooks_everywhere():
            reason = "a hook looks into all modules"
        elif "forward" in module.__dict__:
            reason = f"forward was replaced on this {type(module).__name__}"
        elif type(torch.empty(0)) is not Tensor:
            reason = "not traced yet, and not traced while a mode is on under which tensors are of another class"
    if reason is not None:
        return None, reason
    from .recognise import analysis

    found = analysis()
    return regions.add(mode, found.region(module) if structure is None else found.look(module, structure), structure)


def waits(module: Any) -> bool:
    """Whether a module's forward takes apart its arguments, in the mode that it is in."""
    regions: Regions | None = module.__dict__.get("fused_region")
    return regions is not None and regions.later[module.training] is not None


def current(module: Any) -> tuple[Region | None, str | None]:
    """What is :func:`usable` where a region is called as it was called last."""
    regions: Regions | None = module.__dict__.get("fused_region")
    mode = module.training
    region, reason = usable(module, None if regions is None else regions.called.get(mode))
    if waits(module) and mode not in module.fused_region.called:
        reason = WAITING
    return region, reason


def _region(structure: Structure | None, module: Any) -> tuple[Region | None, list[nn.Module] | None]:
    """The forward that holds now, and the modules inside that it depends on."""
    region, _ = usable(module, structure)
    if region is None or torch.compiler.is_compiling():
        return region, None
    return region, _inside(module, region)


#: What :meth:`.blocks.Fused.recall` takes for a forward that is called with tensors.
_OF_TENSORS = ("region", None), partial(_region, None)


def _inside(module: nn.Module, region: Region) -> list[nn.Module]:
    """The modules inside that a traced forward depends on."""
    inside = [descend(module, guard.path) for guard in region.guards if guard.path]
    return [inner for inner in inside if inner is not None]


class Prepared(NamedTuple):
    """A region whose forward is nothing but chains and functions of PyTorch's, so that nobody changes a module meanwhile (where
    no mode is on that they call): one look at all of them is enough for all chains.

    Attributes:
        places: whose addresses are compared, since the prepared chains do not look there, see :func:`.watch.unchanged`.
    """

    region: Region
    readings: tuple[Reading, ...]
    places: int


class Straight:
    """One call of such a region. Behind a chain that is not prepared for its input, all of them are called as ever."""

    __slots__ = ("module", "prepared", "ready")

    def __init__(self, prepared: Prepared, module: Any) -> None:
        self.prepared, self.module, self.ready = prepared, module, True

    def chain(self, index: int, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.ready:
            reading = self.prepared.readings[index]
            out = functional.again(reading, functional.kind_of(x, skip, False), x, skip)
            if out is not None:
                return out
            self.ready = False
        return self.prepared.region.sites[index].run(self.module, x, *(() if skip is None else (skip,)))


def _prepared(module: Any) -> tuple[Prepared | None, list[nn.Module] | None]:
    """A region with its chains as they are remembered, and all modules that it depends on."""
    region, _ = usable(module)
    if region is None or region.straight is None:  # another thread
        return None, None
    modules, readings = _inside(module, region), []
    for site in region.sites:
        readings.append(module.recall(site.parts, partial(read_off, site.parts)))
        modules += site.parts(module).watched
    prepared = Prepared(region, tuple(readings), max(reading.places for reading in readings))
    return prepared, modules if all(reading.lasts for reading in readings) else None


def _all_ready(module: Fused, region: Region) -> bool:
    """Whether each chain of a region is remembered, and prepared for some input."""
    entries = Memory.of(module).entries
    found = [entries.get(site.parts) for site in region.sites]
    return all([entry is not None and any(entry.value.ready.values()) for entry in found])


def _modes() -> bool:
    """Whether functions of PyTorch's call somebody, who may do anything."""
    return torch._C._len_torch_function_stack() > 0 or torch._C._len_torch_dispatch_stack() > 0


@lru_cache(maxsize=1024)
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Arguments that may be given by place or by name, behind ``self``."""
    parameters = list(signature(forward, follow_wrapped=False).parameters.values())[1:]
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)


def _in_order(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call with those given by name put in their places, if they are the next ones."""
    names = _names(forward)[len(args) : len(args) + len(kwargs)]
    return ((*args, *(kwargs[name] for name in names)), {}) if kwargs.keys() == set(names) else (args, kwargs)


class FusedRegion(Fused):
    """A module of any class whose forward holds chains. ``fused_region`` keeps what was traced, one forward a mode, and one for
    each structure of arguments that are not tensors.
    """

    @staticmethod
    def chains_of(module: Any) -> list[tuple[str, Parts]]:
        region, _ = current(module)
        return [] if region is None else [(site.name, site.parts(module)) for site in region.sites]

    def inlined(self) -> list[nn.Module]:
        region, _ = current(self)
        found = [descend(self, path) for path in region.inlined] if region is not None else []
        return [module for module in found if module is not None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs and not torch.compiler.is_compiling():
            args, kwargs = _in_order(self.unfused_class.forward, args, kwargs)
        quick = False
        if torch.is_grad_enabled():
            if args and self.small(args[0]):
                return super().forward(*args, **kwargs)
        elif not kwargs and not torch.compiler.is_dynamo_compiling():
            quick = all([type(x) is Tensor and x.is_cpu for x in args])
            memory: Memory | None = self.__dict__.get(ATTRIBUTE)
            look = quick and memory is not None and _prepared in memory.entries and self.prepares() and not _modes()
            prepared: Prepared | None = self.holding(_prepared) if look else None
            if prepared is not None and len(args) == prepared.region.required:
                assert prepared.region.straight is not None
                return prepared.region.straight(Straight(prepared, self), *args)
        plain = isinstance(args[0], Tensor) if len(args) == 1 else all(isinstance(x, Tensor) for x in args)
        structure = None if plain or kwargs else structure_of(args)
        if kwargs or not (plain or structure is not None):
            return super().forward(*args, **kwargs)
        if structure is None:
            region = self.recall(*_OF_TENSORS)
        else:
            region = self.recall(("region", structure), partial(_region, structure))
            if ATTRIBUTE in self.__dict__ and not torch.compiler.is_compiling():
                Memory.of(self).entries.pop(_prepared, None)  # the next call with a tensor is one of another kind again
        regions: Regions | None = self.__dict__.get("fused_region")
        if regions is not None and regions.called.get(self.training, ()) != structure and not torch.compiler.is_compiling():
            regions.called[self.training] = structure
        if region is None or (plain and len(args) != region.required):
            return super().forward(*args)
        out = region.run(self, *(args if plain else tensors_of(args)))
        if quick and region.straight is not None and not self.remembers(_prepared) and _all_ready(self, region):
            self.recall(_prepared, _prepared)  # the next call asks once for all
        return out
