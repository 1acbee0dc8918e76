"""Where a network's time and memory go: images a second, seconds by launch, bytes kept by layer, and what bounds each.

What a launch reaches is held against what the device reaches here and now, at a copy and at a product of matrices
(:func:`ceilings`), not against a data sheet.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import counts, measure
from .backends import clock_launches
from .blocks import Fused
from .functional import ChainFunction
from .launch import Launch
from .models import build, image_size
from .swap import unfuse

MODES = ("train", "infer")
#: Part of a ceiling from which a launch counts as bound by it; below both it is the host, or too small to fill the device.
BOUND = 0.5


@dataclass(frozen=True)
class Subject:
    """What is profiled: a network's name, its mode, and images.

    Attributes:
        model: a name for :func:`fused_resnet.models.build`.
        batch, size: images, their rows and columns; size 0 is the network's own.
        mode: ``train`` (forward and backward to all parameters) or ``infer``.
    """

    model: str
    batch: int
    size: int = 0
    mode: str = "train"

    def images(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Random ones, channels_last."""
        size = self.size or image_size(self.model)
        return torch.randn(self.batch, 3, size, size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Pair:
    """The same network fused and eager, in one mode, on one device."""

    fused: nn.Module
    eager: nn.Module

    @staticmethod
    def of(subject: Subject, device: torch.device, dtype: torch.dtype, memory: str | None = None) -> Pair:
        """Built by name, channels_last; ``memory`` None is the network's own."""
        fused = build(subject.model).to(device, dtype).to(memory_format=torch.channels_last).train(subject.mode == "train")
        if memory is not None:
            for module in fused.modules():
                if isinstance(module, Fused):
                    module.fused_memory = memory
        return Pair(fused, unfuse(copy.deepcopy(fused)))


def call_of(model: nn.Module, x: Tensor, mode: str) -> Callable[[], None]:
    """One step, or one forward, without an optimizer."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def train() -> None:
        out = model(x)
        torch.autograd.grad(out.float().sum(), parameters)

    def infer() -> None:
        with torch.no_grad():
            model(x)

    return train if mode == "train" else infer


def throughput(
    subject: Subject, pair: Pair, device: torch.device, dtype: torch.dtype, seconds: float
) -> dict[str, measure.Timing]:
    """Times of ``eager`` and ``fused``, in turn."""
    x = subject.images(device, dtype)
    calls = {"eager": call_of(pair.eager, x, subject.mode), "fused": call_of(pair.fused, x, subject.mode)}
    return measure.interleaved(calls, device, seconds=seconds, rounds=(3, 50))


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: bytes a second in a copy, FLOP a second in a product of matrices of the type."""

    bandwidth: float
    arithmetic: float


def ceilings(device: torch.device, dtype: torch.dtype, size: int = 0) -> Ceilings:
    """Measured now, in some tenths of a second.

    Args:
        size: elements of the copy and the square of the matrices' side; 0 for what fills the device.
    """
    count = size or (1 << 28 if device.type == "cuda" else 1 << 24)
    side = max(16, int(count**0.5) // 16 * 16) // (1 if device.type == "cuda" else 4) or 16
    source = torch.empty(count, device=device, dtype=dtype).normal_()
    target = torch.empty_like(source)
    matrix = torch.empty(side, side, device=device, dtype=dtype).normal_()
    times = measure.interleaved(
        {"copy": lambda: target.copy_(source), "product": lambda: matrix @ matrix}, device, seconds=0.3, rounds=(3, 20)
    )
    best = {name: min(timing.samples) for name, timing in times.items()}
    return Ceilings(2 * count * dtype.itemsize / best["copy"], 2 * side**3 / best["product"])


@dataclass(frozen=True)
class Line:
    """Launches that are one kernel on one size, or of one kind.

    Attributes:
        what: for people.
        times: how often it ran in one call.
        seconds, flops, bytes: of all of them together.
        bound: what it is nearest to: ``bandwidth``, ``arithmetic`` (``tensor cores``), or ``host or size``.
    """

    what: str
    times: int
    seconds: float
    flops: int
    bytes: int
    bound: str


@dataclass(frozen=True)
class Times:
    """Where one call's time went.

    Attributes:
        whole: seconds of the call.
        host: until the host had started everything; on a CPU the same.
        kinds, launches: by kind and by launch, the longest first.
    """

    whole: float
    host: float
    kinds: tuple[Line, ...]
    launches: tuple[Line, ...]

    @property
    def inside(self) -> float:
        """Seconds of the launches."""
        return sum(line.seconds for line in self.kinds)

    def flags(self, device: torch.device) -> list[str]:
        """What bounds the call, in words."""
        found = []
        if device.type == "cuda" and self.host > 0.9 * self.whole:
            found.append("host: starting the launches takes as long as running them; try graphed, torch.compile or more images")
        if device.type != "cuda" and self.inside < 0.5 * self.whole:
            found.append("host: more than half of the time is outside the launches; try more images or larger ones")
        by_bound: dict[str, float] = {}
        for line in self.launches:
            by_bound[line.bound] = by_bound.get(line.bound, 0.0) + line.seconds
        for bound, seconds in sorted(by_bound.items(), key=lambda item: -item[1]):
            if seconds > 0.25 * self.inside:
                found.append(f"{bound}: {seconds / self.inside:.0%} of the launches' time")
        return found


def bound_of(seconds: float, flops: int, moved: int, limits: Ceilings, device: torch.device) -> str:
    """Which ceiling a launch is nearest to, if it is near one."""
    reached = {
        "bandwidth": moved / seconds / limits.bandwidth if seconds else 0.0,
        "tensor cores" if device.type == "cuda" else "arithmetic": flops / seconds / limits.arithmetic if seconds else 0.0,
    }
    nearest = max(reached, key=lambda name: reached[name])
    return nearest if reached[nearest] >= BOUND else "host or size"


def launches(call: Callable[[], None], device: torch.device, limits: Ceilings, rounds: int = 3) -> Times:
    """Where the time of ``call`` goes, by launch; means over some rounds.

    On a CPU by the host's clock, on a GPU by events around each launch.
    """
    call()
    seen: list[tuple[Launch, float]] = []
    host = whole = 0.0
    for _ in range(rounds):
        _wait(device)
        began = time.perf_counter()
        with clock_launches(_event if device.type == "cuda" else time.perf_counter) as log:
            call()
        host += (time.perf_counter() - began) / rounds
        _wait(device)
        whole += (time.perf_counter() - began) / rounds
        seen += [(launch, _between(start, end)) for launch, start, end in log]

    def lines(key: Callable[[Launch], str]) -> tuple[Line, ...]:
        groups: dict[str, list[tuple[Launch, float]]] = {}
        for launch, seconds in seen:
            groups.setdefault(key(launch), []).append((launch, seconds))
        made = []
        for what, group in groups.items():
            seconds = sum(spent for _, spent in group) / rounds
            flops, moved = (sum(getattr(launch, name) for launch, _ in group) // rounds for name in ("flops", "bytes"))
            bound = bound_of(seconds, flops, moved, limits, device)
            made.append(Line(what, len(group) // rounds, seconds, flops, moved, bound))
        return tuple(sorted(made, key=lambda line: -line.seconds))

    return Times(whole, host, lines(lambda launch: launch.kind), lines(lambda launch: launch.signature))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


# ------------------------------------------------------------------------------------------------------------- memory


def kept_by_layer(pair: Pair, x: Tensor) -> list[tuple[str, int, int]]:
    """``(place, eager, fused)`` bytes that a forward keeps for its backward, parameters left out, each storage once.

    It belongs to the place that saved it first. The last row is what was saved outside all chains.
    """
    places = counts._places(pair.fused)
    eager = _eager_kept(pair.eager, x, places)
    fused = _fused_kept(pair.fused, x)
    order = [place for place in dict.fromkeys([*fused, *eager]) if place]
    rows = [(place, eager.get(place, 0), fused.get(place, 0)) for place in order]
    return [*rows, ("outside the chains", eager.get("", 0), fused.get("", 0))]


def _eager_kept(model: nn.Module, x: Tensor, places: dict[str, str]) -> dict[str, int]:
    skipped = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    stack = [""]
    kept: dict[str, int] = {}
    alive: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in skipped and storage._cdata not in alive:
            alive[storage._cdata] = storage
            kept[stack[-1]] = kept.get(stack[-1], 0) + storage.nbytes()
        return tensor

    hooks = []
    for name, module in model.named_modules():
        if name in places:
            hooks.append(module.register_forward_pre_hook(lambda _m, _x, name=name: stack.append(places[name])))
            hooks.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    del out
    return kept


def _fused_kept(model: nn.Module, x: Tensor) -> dict[str, int]:
    """By the nodes of the graph, in the order of the model's chains: a hook on a block would change what it keeps."""
    skipped = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    total: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        total[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    ran = [node for node in counts.nodes([out]) if node.name() == f"{ChainFunction.__name__}Backward"]
    ran.sort(key=lambda node: node._sequence_nr())
    names = [
        ".".join(filter(None, (name, chain)))
        for name, module in model.named_modules()
        if isinstance(module, Fused)
        for chain, _ in module.chains()
    ]
    if len(names) != len(ran):  # some ran one by one
        names = [f"chain {index}" for index in range(1, len(ran) + 1)]
    kept: dict[str, int] = {}
    taken = set(skipped)
    for name, node in zip(names, ran):
        for tensor in node.saved_tensors:
            key = tensor.untyped_storage()._cdata
            if key not in taken:
                taken.add(key)
                kept[name] = kept.get(name, 0) + tensor.untyped_storage().nbytes()
    rest = sum(storage.nbytes() for key, storage in total.items() if key not in taken)
    return {**kept, "": rest}


def trace(call: Callable[[], None], device: torch.device, path: Path) -> None:
    """One call under PyTorch's profiler, as a Chrome trace."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    call()
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        _wait(device)
    profiler.export_chrome_trace(str(path))


def subjects(models: Sequence[str], batches: Sequence[int], size: int, mode: str) -> list[Subject]:
    """Every model with every batch."""
    return [Subject(model, batch, size, mode) for model in models for batch in batches]
