"""Kernels, FLOPs and bytes of one forward pass, counted when it runs: of an eager model and of a fused one, by the same rule.

The rule: a kernel reads each of its operands once and writes its result once. In eager PyTorch every operator that makes a
tensor is a kernel: a convolution reads x and w and writes y, BatchNorm and ReLU each read y and write it again, ``+`` reads two
tensors and writes one, pooling reads and writes. In a fused model every launch of a plan is one, with the bytes of
:attr:`fused_resnet.launch.Launch.bytes`, and what runs outside the plans is counted as in eager. Views cost nothing; a second
result (the indices that max-pooling writes beside the maxima) is not counted, in favour of eager.

Nothing has to be computed for it: ``info`` counts on the ``meta`` device, where tensors have sizes and no contents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .backends import LaunchLog, count_launches
from .blocks import Fused
from .describe import read
from .plan import forward_plan, nominal_size


@dataclass(frozen=True)
class Kernel:
    """One kernel that ran.

    Attributes:
        place: dotted name of the module, or the chain, that it ran for.
        name: the operator or the launch.
        flops: multiplications and additions of its contraction, 0 where it has none.
        bytes: operands and result, each once.
        fused: a launch of a plan.
    """

    place: str
    name: str
    flops: int
    bytes: int
    fused: bool = False


@dataclass(frozen=True)
class Work:
    """Kernels, FLOPs and bytes, added up."""

    kernels: int = 0
    flops: int = 0
    bytes: int = 0

    @staticmethod
    def of(kernels: Iterable[Kernel]) -> Work:
        """The sum over ``kernels``."""
        kernels = list(kernels)
        return Work(len(kernels), sum(kernel.flops for kernel in kernels), sum(kernel.bytes for kernel in kernels))


@dataclass(frozen=True)
class Row:
    """What one place of a model costs in eager mode and fused; ``chain`` is False for what was left to PyTorch."""

    place: str
    eager: Work
    fused: Work
    chain: bool


#: A kernel with its turn: modules end in another order than their kernels start in.
_Stamped = tuple[int, Kernel]


@dataclass
class _Frame:
    """A module that is running: what ran in it directly, outside its children."""

    place: str
    module: nn.Module | None
    operators: list[_Stamped] = field(default_factory=list)
    launches: list[_Stamped] = field(default_factory=list)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flops(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(function.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


class _Operators(TorchDispatchMode):
    """Notes every operator that makes or changes a tensor on the frame on top."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not results or function.is_view or function in _FREE:
            return result
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        moved = sum(map(_bytes, operands)) + _bytes(results[0])
        frame = self.counter.stack[-1]
        kernel = Kernel(frame.place, function.overloadpacket.__name__, _flops(function, args, kwargs, result), moved)
        frame.operators.append((self.counter.turn(), kernel))
        return result


#: Operators that move nothing although they are not marked as views.
_FREE = frozenset(
    {
        torch.ops.aten._unsafe_view.default,
        torch.ops.aten._reshape_alias.default,
        torch.ops.aten.as_strided_.default,
        torch.ops.aten.detach.default,
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
    }
)


class _Counter:
    """Follows the modules as they run."""

    def __init__(self, model: nn.Module, log: LaunchLog) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.log = log
        self.seen = 0
        self.stack = [_Frame("", None)]
        self.kernels: list[_Stamped] = []
        self.turns = 0

    def turn(self) -> int:
        """The number of the kernel that starts now."""
        self.turns += 1
        return self.turns

    def claim(self) -> None:
        """Launches that ran since the last look belong to the module on top."""
        frame = self.stack[-1]
        for _, launch in self.log.launches[self.seen :]:
            frame.launches.append((self.turn(), Kernel(frame.place, str(launch), launch.flops, launch.bytes, True)))
        self.seen = len(self.log.launches)

    def enter(self, module: nn.Module, args: Any) -> None:
        """A module starts."""
        self.claim()
        self.stack.append(_Frame(self.names.get(id(module), self.stack[-1].place), module))

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        """A module ends. The operators by which an executor ran launches are the launches, not kernels beside them."""
        self.claim()
        frame = self.stack.pop()
        if isinstance(frame.module, Fused) and frame.launches:
            self.kernels += _by_chain(frame.module, frame)
        else:
            self.kernels += frame.operators


def _by_chain(module: Fused, frame: _Frame) -> list[_Stamped]:
    """The launches of a fused module, each under the name of its chain."""
    launches = iter(frame.launches)
    named = []
    for name, parts in module.chains():
        chain = read(parts).chain
        if chain is None:
            continue
        place = ".".join(filter(None, (frame.place, name)))
        for _ in forward_plan(chain, *nominal_size(chain), torch.float32).launches:
            turn, launch = next(launches)
            named.append((turn, replace(launch, place=place)))
    return named


def _followed(model: nn.Module) -> list[nn.Module]:
    """All modules but those that a chain stands for: they do not run, and a hook on one would make its block run one by one."""
    inside: set[int] = set()
    for module in model.modules():
        for _, parts in module.chains() if isinstance(module, Fused) else []:
            if read(parts).chain is not None:
                inside.update(id(part) for part in (*parts.modules, *parts.containers))
    return [module for module in model.modules() if id(module) not in inside]


@contextmanager
def _counting(model: nn.Module) -> Iterator[_Counter]:
    with count_launches() as log:
        counter = _Counter(model, log)
        hooks = []
        for module in _followed(model):
            hooks.append(module.register_forward_pre_hook(counter.enter))
            hooks.append(module.register_forward_hook(counter.leave))
        try:
            with _Operators(counter):
                yield counter
        finally:
            for hook in hooks:
                hook.remove()


def kernels(model: nn.Module, x: Tensor) -> list[Kernel]:
    """Run ``model(x)`` once without gradients and list the kernels, in their order.

    Args:
        model: eager or fused.
        x: [N, C, H, W]; on the meta device (as the model) nothing is computed.
    """
    with torch.no_grad(), _counting(model) as counter:
        model(x)
    return [kernel for _, kernel in sorted(counter.kernels, key=lambda stamped: stamped[0])]


def _places(model: nn.Module) -> dict[str, str]:
    """Module -> chain, by name, for all modules that a chain of the fused ``model`` stands for."""
    names = {id(module): name for name, module in model.named_modules()}
    places = {}
    for name, module in model.named_modules():
        if not isinstance(module, Fused):
            continue
        for chain, parts in module.chains():
            place = ".".join(filter(None, (name, chain)))
            places[place] = place
            places.update((names[id(part)], place) for part in parts.modules)
            if not chain:
                places[name] = place
    return places


def compare(eager: nn.Module, fused: nn.Module, x: Tensor) -> list[Row]:
    """Kernels, FLOPs and bytes of one forward pass of a model and of its fused copy, chain by chain.

    Args:
        eager, fused: the same model, before and after :func:`fused_resnet.fuse`.
        x: [N, C, H, W], for both.
    """
    places = _places(fused)
    work: dict[str, tuple[list[Kernel], list[Kernel]]] = {}
    for side, model in enumerate((fused, eager)):
        for kernel in kernels(model, x):
            work.setdefault(places.get(kernel.place, kernel.place), ([], []))[side].append(kernel)
    chains = set(places.values())
    return [Row(place, Work.of(rows[1]), Work.of(rows[0]), place in chains) for place, rows in work.items()]


def total(rows: Iterable[Row]) -> tuple[Work, Work]:
    """Eager and fused, added up over ``rows``."""
    rows = list(rows)
    sums = []
    for works in ([row.eager for row in rows], [row.fused for row in rows]):
        sums.append(Work(sum(w.kernels for w in works), sum(w.flops for w in works), sum(w.bytes for w in works)))
    return sums[0], sums[1]
