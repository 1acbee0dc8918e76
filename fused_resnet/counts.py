"""Kernels, FLOPs and bytes of a forward pass or of a training step, counted when it runs: eager and fused, by the same rule.

The rule: a kernel reads each of its operands once and writes its result once. In eager PyTorch every operator that makes a
tensor is a kernel: a convolution reads x and w and writes y, BatchNorm and ReLU each read y and write it again, ``+`` reads two
tensors and writes one, pooling reads and writes. A convolution's backward is the kernels it starts: dy and w make dx, dy and x
make dw, and dy makes db. In a fused model every launch of a plan is one, with the bytes of
:attr:`fused_resnet.launch.Launch.bytes`, and what runs outside the plans is counted as in eager. Views cost nothing. A second
result (the indices that max-pooling writes beside the maxima) is counted in a training step, whose backward reads it; without
gradients it is not, in favour of eager.

The rule favours eager's BatchNorm with the batch's statistics, which needs two passes over its operands: one for the sums, and
one for the result. :func:`in_passes` counts these.

Nothing has to be computed for it: ``info`` counts on the ``meta`` device, where tensors have sizes and no contents, and where
fused models run through the reference executor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import functional
from .backends import LaunchLog, backend, count_launches
from .blocks import FusedResidual, FusedStage, watched
from .chain_function import ChainFunction
from .describe import read
from .fused import Fused
from .launch import Geometry
from .measure import saved_bytes
from .plan import forward_plan, nominal_size
from .swap.region import FusedRegion, waits


@dataclass(frozen=True)
class Kernel:
    """One kernel that ran.

    Attributes:
        place: dotted name of the module, or the chain, that it ran for; empty in the backward.
        name: the operator or the launch.
        flops: multiplications and additions of its contraction, 0 where it has none.
        bytes: operands and results, each once.
        fused: a launch of a plan.
        reread: bytes of operands that it has to read twice: BatchNorm's in training.
        convolution: of an eager convolution ``conv``, ``dgrad`` or ``wgrad``, and its sizes.
    """

    place: str
    name: str
    flops: int
    bytes: int
    fused: bool = False
    reread: int = 0
    convolution: tuple[str, Geometry] | None = None


@dataclass(frozen=True)
class Work:
    """Kernels, FLOPs and bytes, added up."""

    kernels: int = 0
    flops: int = 0
    bytes: int = 0

    @staticmethod
    def of(kernels: Iterable[Kernel]) -> Work:
        """The sum over ``kernels``."""
        return sum((Work(1, kernel.flops, kernel.bytes) for kernel in kernels), Work())

    def __add__(self, other: Work) -> Work:
        return Work(self.kernels + other.kernels, self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Step:
    """A training step without the optimizer's part.

    Attributes:
        forward, backward: kernels in their order.
        saved: bytes that the forward saves for the backward, see :func:`fused_resnet.measure.saved_bytes`.
    """

    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]
    saved: int

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Of both directions."""
        return (*self.forward, *self.backward)


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


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _flops(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(function.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _geometry(x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Geometry | None:
    """Sizes of a 2-D convolution; None of another."""
    if x.dim() != 4 or w.dim() != 4:
        return None
    N, C, H, W = x.shape
    pairs = [(int(value[0]), int(value[-1])) for value in (stride, padding, dilation)]
    return Geometry(N, H, W, C, w.shape[0], w.shape[2], w.shape[3], pairs[0], pairs[1], pairs[2], groups)


def _convolution_gradients(place: str, args: Sequence[Any]) -> list[Kernel]:
    """What a convolution's backward starts; dgrad and wgrad take as many operations as the forward."""
    dy, x, w, transposed, (dx, dw, db) = *args[:3], args[7], args[10]
    flops = 2 * (x if transposed else dy).numel() * w[0].numel()
    moved = _bytes(dy, x, w)
    wanted = ((dx, "dgrad", flops, moved), (dw, "wgrad", flops, moved), (db, "bgrad", 0, _bytes(dy) + _bytes(dy[0, :, 0, 0])))
    g = None if transposed else _geometry(x, w, args[4], args[5], args[6], args[9])
    sizes = {"dgrad": g, "wgrad": g}

    def kernel(name: str, flops: int, moved: int) -> Kernel:
        known = sizes.get(name)
        return Kernel(place, f"convolution_backward: {name}", flops, moved, convolution=(name, known) if known else None)

    return [kernel(name, work, moved) for want, name, work, moved in wanted if want]


def _reread(name: str, args: Sequence[Any]) -> int:
    """Bytes that a BatchNorm in training reads for the sums and again for the result: x, in the backward dy as well."""
    training = next((value for value in args if isinstance(value, bool)), False)
    if not training or "native_batch_norm" not in name:
        return 0
    return _bytes(*(operand for operand in _tensors(args) if operand.dim() > 1))


class _Operators(TorchDispatchMode):
    """Notes every operator that makes or changes a tensor on the frame on top."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        results = _tensors(result)
        if results and not function.is_view and function not in _FREE and not functional.running:
            self.counter.note(self.kernels(function, args, kwargs, result, results))
        return result

    def kernels(self, function: Any, args: Any, kwargs: Any, result: Any, results: list[Tensor]) -> list[Kernel]:
        """The kernels of one operator."""
        name, place = function.overloadpacket.__name__, self.counter.stack[-1].place
        if name == "convolution_backward":
            return _convolution_gradients(place, args)
        written = results if self.counter.training else results[:1]
        moved = _bytes(*_tensors((args, kwargs)), *written)
        convolution = None
        if name == "convolution" and not args[6]:
            g = _geometry(args[0], args[1], args[3], args[4], args[5], args[8])
            convolution = None if g is None else ("conv", g)
        return [Kernel(place, name, _flops(function, args, kwargs, result), moved, False, _reread(name, args), convolution)]


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

    def __init__(self, model: nn.Module, log: LaunchLog, training: bool) -> None:
        self.training = training
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

    def note(self, kernels: Iterable[Kernel]) -> None:
        """Kernels of operators, for the module on top."""
        self.stack[-1].operators += [(self.turn(), kernel) for kernel in kernels]

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
        """A module ends."""
        self.claim()
        frame = self.stack.pop()
        self.kernels += frame.operators
        if isinstance(frame.module, Fused) and frame.launches:
            self.kernels += _by_chain(frame.module, frame)

    def stepping(self, block: FusedResidual) -> Any:
        """The block's own ``step``, followed."""

        def step(*args: Any) -> Any:
            self.enter(block, args)
            result = type(block).step(block, *args)
            self.leave(block, args, result)
            return result

        return step

    def enter_backward(self, gradients: Any) -> None:
        """The backward of a chain starts."""
        self.stack.append(_Frame("", None))

    def leave_backward(self, results: Any, gradients: Any) -> None:
        """The backward of a chain ends."""
        self.claim()
        self.kernels += self.stack.pop().launches

    def in_order(self) -> list[_Stamped]:
        """All kernels by their turns, those outside all modules and chains included."""
        return sorted([*self.kernels, *self.stack[0].operators], key=lambda stamped: stamped[0])


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
    """All modules but those that a chain stands for: they do not run, and a hook on one would make its block run one by one.

    Nor scripted ones, which take no hooks.
    """
    inside: set[int] = set()
    for module in model.modules():
        for _, parts in module.chains() if isinstance(module, Fused) else []:
            if read(parts).chain is not None:
                inside.update(id(part) for part in (*parts.modules, *parts.containers, *parts.owners(module)))
        inside.update(id(part) for part in (module.inlined() if isinstance(module, Fused) else ()))
    return [m for m in model.modules() if id(m) not in inside and not isinstance(m, torch.jit.ScriptModule)]


def _handed_on(model: nn.Module) -> set[int]:
    """Blocks whose stage hands on what they make, which it would not do where a hook may look at it."""
    stages = [module for module in model.modules() if isinstance(module, FusedStage)]
    blocks = [block for stage in stages for block in stage.children()]
    return {id(block) for block in blocks if isinstance(block, FusedResidual) and not watched(block)}


def _settle(model: nn.Module, x: Any) -> None:
    """Run a model once that has forwards which are traced for what they are called with: what follows hooks into them."""
    regions = [module for module in model.modules() if isinstance(module, FusedRegion)]
    for module in regions:
        module.chains()  # which looks at those that nobody has looked at since they were unpickled
    if not any(waits(module) for module in regions):
        return
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model(x)
        for buffer, value in before:
            buffer.copy_(value)


@contextmanager
def _counting(model: nn.Module, x: Tensor, training: bool = False) -> Iterator[_Counter]:
    def on() -> Any:
        return backend("reference") if x.is_meta else nullcontext()

    with on():
        _settle(model, x)
    with count_launches() as log, on():
        counter = _Counter(model, log, training)
        hooks = []
        handed_on = _handed_on(model)
        blocks = [module for module in model.modules() if isinstance(module, FusedResidual) and id(module) in handed_on]
        for block in blocks:
            block.__dict__["step"] = counter.stepping(block)
        for module in _followed(model):
            if id(module) in handed_on:
                continue
            hooks.append(module.register_forward_pre_hook(counter.enter))
            hooks.append(module.register_forward_hook(counter.leave))
        try:
            with _Operators(counter):
                yield counter
        finally:
            for hook in hooks:
                hook.remove()
            for block in blocks:
                del block.__dict__["step"]


def kernels(model: nn.Module, x: Tensor) -> list[Kernel]:
    """Run ``model(x)`` once without gradients and list the kernels, in their order.

    Args:
        model: eager or fused.
        x: [N, C, H, W]; on the meta device (as the model) nothing is computed.
    """
    with torch.no_grad(), _counting(model, x) as counter:
        model(x)
    return [kernel for _, kernel in counter.in_order()]


def fused_share(model: nn.Module, x: Any) -> float:
    """The part of the FLOPs of all convolutions that runs in launches of plans, 0 to 1, in one forward pass.

    Args:
        model: fused.
        x: its input, as :func:`kernels` takes it.
    """
    ran = [kernel for kernel in kernels(model, x) if kernel.fused or "convolution" in kernel.name]
    total = sum(kernel.flops for kernel in ran)
    return sum(kernel.flops for kernel in ran if kernel.fused) / total if total else 0.0


def nodes(outputs: Iterable[Tensor]) -> set[Any]:
    """All nodes of the graph behind ``outputs``."""
    waiting: list[Any] = [output.grad_fn for output in outputs]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return seen


def step(model: nn.Module, x: Tensor) -> Step:
    """Run ``model(x)`` as it is (``model.train()`` for the batch's statistics), and its backward, once each.

    As in a training step running statistics move. No ``.grad`` is touched. The gradient of the outputs is given: a loss is not
    in it.

    Args:
        model: eager or fused.
        x: [N, C, H, W], counted among what is saved; on the meta device (as the model) nothing is computed. Where it requires
            a gradient, that is computed as well as those of the parameters.
    """
    wanted = [tensor for tensor in (x, *model.parameters()) if tensor.requires_grad]
    outputs: list[Tensor] = []
    with torch.enable_grad(), _counting(model, x, training=True) as counter:

        def forward() -> None:
            outputs.extend(output for output in _tensors(model(x)) if output.requires_grad)

        saved = saved_bytes(forward, (*model.parameters(), *model.buffers()))
        turns = counter.turns
        for node in nodes(outputs):
            if node.name() == f"{ChainFunction.__name__}Backward":
                node.register_prehook(counter.enter_backward)
                node.register_hook(counter.leave_backward)
        if outputs:
            gradients = [torch.empty_like(output) for output in outputs]
            torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
    stamped = counter.in_order()
    forward_kernels = tuple(kernel for turn, kernel in stamped if turn <= turns)
    return Step(forward_kernels, tuple(kernel for turn, kernel in stamped if turn > turns), saved)


def in_passes(kernels: Iterable[Kernel]) -> list[Kernel]:
    """The same kernels with PyTorch's BatchNorm in training as the two passes it makes: the sums, then the result."""
    passes: list[Kernel] = []
    for kernel in kernels:
        if kernel.reread:
            passes.append(Kernel(kernel.place, f"{kernel.name}: sums", 0, kernel.reread))
        passes.append(replace(kernel, reread=0))
    return passes


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
            stands_for = (*parts.modules, *parts.owners(module))
            places.update((names[id(part)], place) for part in stands_for if id(part) in names)
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
    return sum((row.eager for row in rows), Work()), sum((row.fused for row in rows), Work())
