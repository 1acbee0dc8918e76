"""What all fused modules share: chains read off modules, remembered, and run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import backends, functional, inputs
from .describe import Parts, Reading, hooks_everywhere, read
from .watch import ATTRIBUTE, Children, Memory


class Fused(nn.Module):
    """What all fused modules share.

    Attributes:
        unfused_class: the class behind, whose forward runs the children one by one.
        fused_backend: backend of this module, None to let context, environment and device decide.
        fused_memory: what its training keeps for the backward, ``default``, ``less`` or ``low``; see
            :func:`fused_resnet.fuse`.
    """

    unfused_class: ClassVar[type[nn.Module]]
    unfused_forward: ClassVar[Callable[..., Any]]
    fused_backend: str | None = None
    fused_memory: str = "default"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "unfused_class" in cls.__dict__:
            cls.unfused_forward = cls.unfused_class.forward  # what torch.fx traces, by name

    @classmethod
    def chains_of(cls, module: Any) -> list[tuple[str, Parts]]:
        """The chains of a module with this class's children, as it is now, by name; none but those of modules inside."""
        return []

    def chains(self) -> list[tuple[str, Parts]]:
        """The chains of this module, as it is now, by name."""
        return self.chains_of(self)

    def inlined(self) -> list[nn.Module]:
        """Modules inside that are not called as such, besides those of the chains."""
        return []

    def recall(self, what: Any, make: Callable[[Any], tuple[Any, Iterable[nn.Module] | None]]) -> Any:
        """What ``make(self)`` says first; it is asked again only where this module or one of those that it lists is not as it
        was, or where it lists None.
        """
        if torch.compiler.is_compiling() or hooks_everywhere():  # the compiler has guards of its own
            return make(self)[0]
        memory = Memory.of(self)
        value = memory.recall(what, self)
        if value is None:
            value, modules = make(self)
            if modules is not None:
                memory.remember(what, value, self, modules)
        return value

    def remembers(self, what: Any) -> bool:
        """Whether a call without gradients finds something remembered as ``what``."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        memory: Memory | None = self.__dict__.get(ATTRIBUTE)
        return memory is not None and what in memory.entries

    def again(self, what: Any, x: Any, second: Tensor | None = None, donate: bool = False) -> Any:
        """``x`` through the chain whose reading is remembered as ``what``, where all is as it was and the chain is prepared for
        such a call without gradients; else None. In one look at each module: where their tensors lie the prepared launches see
        for themselves (but for filters that they were given as images, and for what a BatchNorm on load reads).
        """
        if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
            return None  # (other tracers of compilers come with tensors of their own)
        memory: Memory | None = self.__dict__.get(ATTRIBUTE)
        entry = None if memory is None else memory.entries.get(what)
        if entry is None or not entry.value.ready or not self.prepares():
            return None
        reading: Reading = entry.value
        kind = functional.kind_of(x, second, donate)
        if kind is None or reading.ready.get(kind) is None or not entry.holds(self, reading.places):
            return None
        return functional.again(reading, kind, x, second)

    def prepares(self) -> bool:
        """Whether a call without gradients, which no compiler traces, may find chains prepared."""
        if hooks_everywhere() or inputs.transformed_eagerly() or torch.is_autocast_enabled("cpu"):
            return False
        return backends.prepares(self.fused_backend)

    def holding(self, what: Any) -> Any:
        """What is remembered as ``what`` if all is as it was, looking at the places of those tensors that its ``places`` names;
        else None, and all of this module is forgotten.
        """
        memory: Memory | None = self.__dict__.get(ATTRIBUTE)
        entry = None if memory is None else memory.entries.get(what)
        return None if memory is None or entry is None else memory.recall(what, self, entry.value.places)

    def small(self, x: Any) -> bool:
        """Whether autograd records, and x are rows or signals so few that the modules are called one by one, see
        :func:`.backends.leaves_alone`.
        """
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.dim() not in (2, 3):
            return False
        memory: Memory | None = self.__dict__.get(ATTRIBUTE)
        little: Little | None = None if memory is None else memory.little
        if little is None or little.training is not self.training or not little.children.same(self):
            little = self._little()
        if x.dim() != little.dimensions or not x.is_cpu or self.fused_memory != "default":
            return False
        return backends.leaves_alone(self.fused_backend, little.dimensions, x.numel() * little.work)

    def may_be_small(self, dimensions: int) -> bool:
        """Whether there are inputs of so many dimensions that are :meth:`small`."""
        known = self.fused_memory == "default" and self._little().dimensions == dimensions
        return known and backends.leaves_alone(self.fused_backend, dimensions, 0)

    def _little(self) -> Little:
        """How much work this module's chains are, found anew."""
        memory = Memory.of(self)
        little, lasts = Little.of(self)
        memory.little = little if lasts else None
        return little

    def run(self, parts_of: Callable[[Any], Parts], x: Tensor, unfused: Callable[..., Tensor], *skip: Tensor) -> Tensor:
        """``x`` through the chain that the modules ``parts_of(self)`` are now, or through ``unfused`` where they are none; with
        the second input of a chain that has one.
        """
        return self.run_owned(parts_of, x, unfused, False, skip=skip)[0]

    def run_owned(
        self,
        parts_of: Callable[[Any], Parts],
        x: Tensor,
        unfused: Callable[..., Tensor],
        donate: bool,
        drop: bool = False,
        skip: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, bool]:
        """As :meth:`run`; also whether the result was made by a chain, so that nobody else has it.

        ``donate``: nobody else has ``x``, it may be written over. ``drop``: see :func:`fused_resnet.functional.chain`.
        """
        if issubclass(type(x), torch.fx.Proxy):  # torch.fx traces the model: into the modules themselves
            return unfused(x, *skip), False
        out = self.again(parts_of, x, skip[0] if skip else None, donate)
        if out is not None:
            return out, True
        reading = self.recall(parts_of, partial(read_off, parts_of))
        return self.run_reading(reading, x, unfused, donate, drop, skip)

    def run_reading(
        self,
        reading: Reading,
        x: Tensor,
        unfused: Callable[..., Tensor],
        donate: bool = False,
        drop: bool = False,
        skip: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, bool]:
        """As :meth:`run_owned`, of a chain that has been read."""
        second = skip[0] if skip else None
        transformed, kind = inputs.transformed(), None
        if reading.lasts and not transformed and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            kind = functional.kind_of(x, second, donate)
            kind = kind if kind is not None and self.prepares() else None
            out = None if kind is None else functional.again(reading, kind, x, second)
            if out is not None:
                return out, True
        if reading.chain is None or transformed or inputs.unfit(reading, x, *skip):
            return unfused(x, *skip), False
        out = functional.read_chain(x, reading, self.fused_backend, skip=second, donate=donate, drop=drop)
        if kind is not None:
            functional.prepare(reading, kind, x, second)
        return out, True


def read_off(parts_of: Callable[[Any], Parts], module: Fused) -> tuple[Reading, Iterable[nn.Module] | None]:
    """A chain, and the modules that it was read off; None where another reading may differ all the same."""
    parts = parts_of(module)
    reading = read(parts, module.fused_memory)
    return reading, parts.watched if reading.lasts else None


class Little(NamedTuple):
    """How much work a module's chains are.

    Attributes:
        training, children: what it was read off. Other shapes of the same modules' filters are not seen: both ways are right.
        dimensions: of the input of all chains; 0 for several kinds, images, no chain, or ranks that share a batch.
        work: multiplications of a chain, on average, for an element of the input of the first.
    """

    training: bool
    children: Children
    dimensions: int = 0
    work: float = 0

    @staticmethod
    def of(module: Fused) -> tuple[Little, bool]:
        """Of a module as it is now, and whether it is so while its mode and children stay the same."""
        chains = [parts for _, parts in module.chains()]
        children = Children(module, [inner for parts in chains for inner in parts.watched])
        readings = [read(parts, module.fused_memory) for parts in chains]
        dimensions = {reading.dimensions for reading in readings}
        shared = any(isinstance(norm, nn.SyncBatchNorm) for parts in chains for norm in parts.norms)
        lasts = bool(chains) and all(reading.lasts and reading.chain is not None for reading in readings)
        if len(dimensions) != 1 or dimensions == {4} or shared:
            return Little(module.training, children), lasts
        weights = [getattr(layer.conv, "weight", None) for parts in chains for layer in parts.weight_layers]
        elements = sum(weight.numel() for weight in weights if isinstance(weight, Tensor))
        spec = readings[0].chain
        channels = spec.layers[0].channels if spec is not None else 1
        return Little(module.training, children, dimensions.pop(), elements / len(chains) / channels), lasts
