"""Networks that are nothing but chains, and layers and functions of PyTorch's and of model zoos: looked at once a call.

In a small network seeing that all is as it was (:mod:`.watch`) takes as long in front of its chains as some of them take. So
such a forward, on the CPU and without gradients, is traced as a whole when it is called again and again: between its start and
its end nobody's code runs that could change a module, and one look at all of them is enough. Where it cannot be traced, or not
now (a hook), it runs as ever, module by module, and so it does in front of the first look. (docs/decisions/009)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import functional
from .describe import Parts, Reading, hooked
from .fused import Fused, read_off
from .watch import Memory

#: What a module's look is remembered as, and that there is none as it is.
LOOK, IN_VAIN = "whole", "in parts"
#: The call at which a module is looked at as a whole. What is inside another is not called any more where that succeeds.
FIRST = 3
#: After how many calls it is tried again at the latest, where it is not as it was. Each time it takes twice as many.
MOST = 1000


class Chain(Protocol):
    """A chain by the places of its modules."""

    def there(self, module: nn.Module) -> bool:
        """Whether who ran it is still one that runs chains."""
        ...

    def parts(self, module: nn.Module) -> Parts:
        """Its modules, as they are now."""
        ...

    def run_owned(self, module: Any, x: Tensor, donate: bool, *skip: Tensor) -> tuple[Tensor, bool]:
        """As :meth:`.fused.Fused.run_owned`."""
        ...


class Holds(Protocol):
    """What must hold of a module: :class:`fused_resnet.swap.guards.Guard`."""

    def broken(self, root: nn.Module) -> str | None:
        """What has changed, or None."""
        ...


@dataclass(frozen=True, eq=False)
class Network:
    """A forward as a whole.

    Attributes:
        run: ``run(call, *tensors)`` with a :class:`Call`.
        chains: in the order in which they run.
        leaves, tensors: the places of modules that are called as such, and of parameters and buffers that are read.
        guards: what must still hold.
        classes: those of modules inside that are not PyTorch's, of which somebody may replace a method, with what is in them;
            none of somebody's own region.
        required: how many tensors it is given.
    """

    run: Callable[..., Any]
    chains: tuple[Chain, ...]
    leaves: tuple[tuple[str, ...], ...]
    tensors: tuple[tuple[str, ...], ...]
    guards: tuple[Holds, ...]
    classes: tuple[tuple[type[nn.Module], tuple[Any, ...]], ...]
    required: int

    def holds(self, module: nn.Module) -> bool:
        """Whether it is still the forward of the module, of whose chains none was unfused."""
        if not all(chain.there(module) for chain in self.chains) or any(guard.broken(module) for guard in self.guards):
            return False
        return self.written()

    def written(self) -> bool:
        """Whether the classes are as they were."""
        return all([tuple(vars(kind).values()) == held for kind, held in self.classes])


class Look(NamedTuple):
    """A network that holds for a module, with its chains as they were read.

    Attributes:
        places: whose addresses are compared, since the prepared chains do not look there, see :func:`.watch.unchanged`.
    """

    network: Network
    readings: tuple[Reading, ...]
    leaves: tuple[nn.Module, ...]
    tensors: tuple[Tensor, ...]
    places: int


class Call:
    """One call of a network. Behind a chain that is not prepared for its input all of them look for themselves.

    A block of a stage may write over what the one in front of it has made (``donate``), unless that ran one by one.
    """

    __slots__ = ("first", "look", "module", "ours", "ready")

    def __init__(self, module: Fused, look: Look, first: bool) -> None:
        """``first``: such inputs came before, when it was not looked at."""
        self.module, self.look, self.first = module, look, first
        self.ready = self.ours = True

    def chain(self, index: int, donate: bool, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """The chain of that number."""
        if self.ready:
            reading = self.look.readings[index]
            out = functional.again(reading, functional.kind_of(x, skip, donate), x, skip)
            if out is not None:
                return out
            self.ready = False
        chain, donate = self.look.network.chains[index], donate and self.ours
        if self.first:
            self.look.readings[index].met.add(functional.kind_of(x, skip, donate))
        out, ours = chain.run_owned(self.module, x, donate, *(() if skip is None else (skip,)))
        self.ours = self.ours and ours
        return out

    def leaf(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """The module of that number that is called as such."""
        return self.look.leaves[index](*args, **kwargs)

    def tensor(self, index: int) -> Tensor:
        """The parameter or buffer of that number."""
        return self.look.tensors[index]


class Tries:
    """How often a module was called without a look at the whole of it."""

    __slots__ = ("calls", "network", "wait")

    def __init__(self) -> None:
        self.calls, self.wait = 0, FIRST
        self.network: Network | None = None

    def due(self) -> bool:
        """Whether to look now; asked in front of each call."""
        self.calls += 1
        if self.calls < self.wait:
            return False
        self.calls, self.wait = 0, min(2 * self.wait, MOST)
        return True


def _modes() -> bool:
    """Whether functions of PyTorch's call somebody, who may do anything."""
    return torch._C._len_torch_function_stack() > 0 or torch._C._len_torch_dispatch_stack() > 0


def once(module: Fused, *args: Any) -> tuple[Any] | None:
    """What a module gives, in one look at all that is in it; None where it has to run as ever.

    Args:
        module: in front of the forward of whose ``unfused_class`` this is asked.
        args: what it is called with.
    """
    if module.training or torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
        return None
    for x in args:
        if type(x) is not Tensor or not x.is_cpu:
            return None
    if not module.prepares() or _modes():
        return None
    look: Look | None = module.holding(LOOK)
    first = look is None
    if first:
        memory = Memory.of(module)
        tries: Tries | None = memory.whole
        if tries is None:
            tries = memory.whole = Tries()
        if not tries.due() or memory.recall(IN_VAIN, module) is not None:
            return None
        look, called = _look(module, tries)
        inside = list(module.modules())[1:]
        if look is not None:
            memory.remember(LOOK, look, module, inside, called)
        elif not any(map(hooked, inside)):
            memory.remember(IN_VAIN, True, module, inside)
    if look is None or len(args) != look.network.required:
        return None
    if not look.network.written():
        Memory.of(module).entries.pop(LOOK, None)
        return None
    return (look.network.run(Call(module, look, first), *args),)


def _look(module: Fused, tries: Tries) -> tuple[Look | None, list[nn.Module]]:
    """The forward of a module as a whole, if it is one now; and the modules inside that run by themselves, of which it may have
    read attributes alone.
    """
    from .swap.recognise import analysis
    from .swap.trusted import all_known

    network = tries.network
    if network is None or not network.holds(module) or (network.classes and not all_known(module)):
        network = tries.network = analysis().network(module)
    if network is None:
        return None, []
    Memory.of(module).entries.clear()  # chains that were read in front of this
    readings = tuple([module.recall(chain.parts, partial(read_off, chain.parts)) for chain in network.chains])
    leaves = tuple(module.get_submodule(".".join(path)) for path in network.leaves)
    owners = [module.get_submodule(".".join(path[:-1])) for path in network.tensors]
    tensors = tuple(getattr(owner, path[-1]) for owner, path in zip(owners, network.tensors, strict=True))
    inside = list(module.modules())[1:]
    chained = [part for chain in network.chains for part in chain.parts(module).watched]
    mine = module.fused_backend, module.fused_memory
    fused = [part for part in inside if isinstance(part, Fused)]
    alike = all((part.fused_backend, part.fused_memory) == mine for part in fused)
    alike = alike and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
    if not alike or any(map(_is_watched, (*inside, *chained))):
        return None, []
    if any(not reading.lasts or reading.chain is None for reading in readings):
        return None, []
    places = max(reading.places for reading in readings)
    read = {*chained, *owners}
    called = [part for leaf in leaves for part in leaf.modules() if part not in read]
    return Look(network, readings, leaves, tensors, places), called


def _is_watched(module: nn.Module) -> bool:
    """Whether a call of a module is more than its class's forward."""
    return hooked(module) or "forward" in module.__dict__ or module._compiled_call_impl is not None
