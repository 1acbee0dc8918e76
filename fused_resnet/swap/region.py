"""Regions: modules of any class whose forward holds chains.

A region is the innermost module whose forward calls all of a chain, itself or through children. Its class is swapped
as that of every fused module; its forward is the traced one, with a call for each chain (:mod:`.analysis`). Where a guard no
longer holds, the forward of the original class runs. A forward that takes apart its arguments is traced when it is called, for
their structure (:mod:`.arguments`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from inspect import signature
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from .. import whole
from ..describe import Entry, Parts, WeightLayer, hooks_everywhere
from ..fused import Fused
from ..whole import Network
from .arguments import Structure, structure_of, tensors_of, told
from .functions import Function
from .guards import Guard, Tie, descend
from .tracing import LOCK

Path = tuple[str, ...]
Place = Path | Function
Places = tuple[str, Place, Place | None, Path | nn.Module | None]

#: Why a forward that takes apart its arguments holds no chain yet.
WAITING = "traced at its first call in this mode, for the structure of its arguments"


@dataclass(frozen=True, eq=False)
class Site:
    """A chain in a region, by the places of its modules; ``unfused(region, x)`` calls them one by one, with a second input
    where the chain has one, ``skip``.

    Layers are ``(name, convolution, norm, activation)``, an entry is ``(name, norm, activation)``; where a function is called,
    the activation is a module of its own, and another layer a :class:`.functions.Function`. ``runner``: the place of the module
    that runs the chain, in a network around it.
    """

    name: str
    layers: tuple[Places, ...]
    residual: bool
    projection: Places | None
    pool: Place | None
    passed: tuple[Path, ...]
    unfused: Callable[..., Tensor]
    skip: bool = False
    entry: tuple[str, Place, Path | nn.Module | None] | None = None
    runner: Path | None = None

    def run(self, region: Any, x: Tensor, *skip: Tensor) -> Tensor:
        """The chain, or its modules one by one."""
        return self.run_owned(region, x, False, *skip)[0]

    def run_owned(self, region: Any, x: Tensor, donate: bool, *skip: Tensor) -> tuple[Tensor, bool]:
        """As :meth:`.fused.Fused.run_owned`."""
        result: tuple[Tensor, bool] = region.run_owned(self.parts, x, partial(self.unfused, region), donate, skip=skip)
        return result

    def there(self, network: nn.Module) -> bool:
        """Whether the module that runs it is still fused, where that is not the one around it."""
        if self.runner is None:
            return True
        runner = descend(network, self.runner)
        return runner is not None and runs_chains(runner)

    def parts(self, region: nn.Module) -> Parts:
        """The modules, as they are now."""

        def at(place: Place | nn.Module | None) -> Any:
            if isinstance(place, Function):
                return place.layer(region)
            return _at(region, place) if isinstance(place, tuple) else place

        def layer(places: Any) -> WeightLayer:
            return WeightLayer(places[0], at(places[1]), at(places[2]), at(places[3]))

        projection = None if self.projection is None else layer(self.projection)
        containers = tuple(at(path) for path in self.passed)
        layers = [layer(places) for places in self.layers]
        entry = None if self.entry is None else Entry(self.entry[0], at(self.entry[1]), at(self.entry[2]))
        way = tuple(at(path) for path in self._way())
        return Parts(layers, self.residual, projection, at(self.pool), containers, skip=self.skip, entry=entry, way=way)

    def _way(self) -> list[Path]:
        """The places between the region and its chain's modules, and those of the modules that have the functions' tensors."""
        layers = [*self.layers, *(() if self.projection is None else (self.projection,))]
        places = [*(place for layer in layers for place in layer[1:]), *(() if self.entry is None else self.entry[1:])]
        paths = [path for path in (*places, self.pool, *self.passed) if isinstance(path, tuple)]
        paths += [tuple(at.split(".")) for place in places if isinstance(place, Function) for _, at in place.tensors]
        return list(dict.fromkeys(path[:depth] for path in paths for depth in range(1, len(path))))


def _at(region: nn.Module, path: Path) -> Any:
    module: Any = region
    for name in path:
        module = module._modules[name]
        if module is None:
            return nn.Identity()
    return module


@dataclass(frozen=True, eq=False)
class Block:
    """A block that is one chain, in a network, by its place."""

    path: Path

    def there(self, network: nn.Module) -> bool:
        """Whether it is still a fused block."""
        block = descend(network, self.path)
        return block is not None and runs_chains(block)

    def parts(self, network: nn.Module) -> Parts:
        """Its modules, as they are now, itself and those around it."""
        block = _at(network, self.path)
        ((_, parts),) = block.chains()
        way = tuple(_at(network, self.path[:depth]) for depth in range(1, len(self.path) + 1))
        return replace(parts, way=(*parts.way, *way))

    def run_owned(self, network: Any, x: Tensor, donate: bool, *skip: Tensor) -> tuple[Tensor, bool]:
        """As :meth:`.fused.Fused.run_owned`."""
        result: tuple[Tensor, bool] = network.run_owned(self.parts, x, _at(network, self.path), donate, skip=skip)
        return result


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
        network: the same where it is nothing but chains and functions of PyTorch's, to be looked at once a call.
    """

    run: Callable[..., Any]
    sites: tuple[Site, ...]
    guards: tuple[Guard | Tie, ...]
    required: int
    reasons: dict[str, str]
    source: str
    inlined: tuple[Path, ...] = ()
    structure: Structure | None = None
    network: Network | None = None

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


#: What :meth:`.fused.Fused.recall` takes for a forward that is called with tensors.
_OF_TENSORS = ("region", None), partial(_region, None)


def _inside(module: nn.Module, region: Region) -> list[nn.Module]:
    """The modules inside that a traced forward depends on."""
    inside = [descend(module, guard.path) for guard in region.guards if guard.path]
    return [inner for inner in inside if inner is not None]


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
        if torch.is_grad_enabled() and args and self.small(args[0]):
            return super().forward(*args, **kwargs)
        done = None if kwargs else whole.once(self, *args)
        if done is not None:
            self._called(None)
            return done[0]
        plain = isinstance(args[0], Tensor) if len(args) == 1 else all(isinstance(x, Tensor) for x in args)
        structure = None if plain or kwargs else structure_of(args)
        if kwargs or not (plain or structure is not None):
            return super().forward(*args, **kwargs)
        if structure is None:
            region = self.recall(*_OF_TENSORS)
        else:
            region = self.recall(("region", structure), partial(_region, structure))
        if not torch.compiler.is_compiling():
            self._called(structure)
        if region is None or (plain and len(args) != region.required):
            return super().forward(*args)
        return region.run(self, *(args if plain else tensors_of(args)))

    def _called(self, structure: Structure | None) -> None:
        """Note what it was called with."""
        regions: Regions | None = self.__dict__.get("fused_region")
        if regions is not None and regions.called.get(self.training, ()) != structure:
            regions.called[self.training] = structure


class FusedNetwork(Fused):
    """A module of any class in which there are chains, all of them of modules inside: looked at as a whole where it can be."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs and not torch.compiler.is_compiling():
            args, kwargs = _in_order(self.unfused_class.forward, args, kwargs)
        done = None if kwargs else whole.once(self, *args)
        return super().forward(*args, **kwargs) if done is None else done[0]


def runs_chains(module: nn.Module) -> TypeGuard[Fused]:
    """Whether a module is fused, and not only what is in it."""
    return isinstance(module, Fused) and not isinstance(module, FusedNetwork)
