"""Where a network's time goes: images a second, seconds by launch, and what bounds each.

What a launch reaches is held against what the device reaches here and now, at a copy and at a product of matrices
(:func:`ceilings`), not against a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import measure
from .backends import clock_launches
from .blocks import ConvBNReLU
from .kept import Pair
from .launch import Launch
from .models import build, image_size

MODES = ("train", "infer")
#: Part of a ceiling from which a launch counts as bound by it.
BOUND = 0.5
#: Bounds of launches that are far from both ceilings, see :func:`bound_of`.
HOST, NEITHER = "host", "neither"


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


def pair_of(subject: Subject, device: torch.device, dtype: torch.dtype, memory: str | None = None) -> Pair:
    """The network fused and eager, built by name, channels_last; ``memory`` None is the network's own."""
    fused = build(subject.model).to(device, dtype).to(memory_format=torch.channels_last).train(subject.mode == "train")
    return Pair.of(fused, memory)


def step_of(model: nn.Module, mode: str) -> Callable[[Tensor], None]:
    """One step, or one forward, of given images, without an optimizer."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def train(x: Tensor) -> None:
        out = model(x)
        torch.autograd.grad(out.float().sum(), parameters)

    def infer(x: Tensor) -> None:
        with torch.no_grad():
            model(x)

    return train if mode == "train" else infer


def call_of(model: nn.Module, x: Tensor, mode: str) -> Callable[[], None]:
    """:func:`step_of` of the same images each time."""
    step = step_of(model, mode)
    return lambda: step(x)


def throughput(
    subject: Subject, pair: Pair, device: torch.device, dtype: torch.dtype, seconds: float
) -> dict[str, measure.Timing]:
    """Times of ``eager`` and ``fused``, in turn."""
    x = subject.images(device, dtype)
    calls = {"eager": call_of(pair.eager, x, subject.mode), "fused": call_of(pair.fused, x, subject.mode)}
    return measure.interleaved(calls, device, seconds=seconds, rounds=(3, 50))


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches.

    Attributes:
        bandwidth: bytes a second in a copy.
        arithmetic: FLOP a second in a product of matrices of the type.
        start: seconds of a launch on one pixel, which is nothing but its start.
    """

    bandwidth: float
    arithmetic: float
    start: float = 0.0


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
    return Ceilings(2 * count * dtype.itemsize / best["copy"], 2 * side**3 / best["product"], _start(device, dtype))


def _start(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the launch of a 1x1 convolution of one pixel."""
    layer = ConvBNReLU(16, 16, 1).to(device, dtype).eval()
    pixel = torch.zeros(1, 16, 1, 1, device=device, dtype=dtype)
    with torch.no_grad(), clock_launches(_clock(device)) as log:
        for _ in range(20):
            layer(pixel)
    _wait(device)
    return min(_between(start, end) for _, start, end in log)


@dataclass(frozen=True)
class Line:
    """Launches that are one kernel on one size, or of one kind.

    Attributes:
        what: for people.
        times: how often it ran in one call.
        seconds, flops, bytes: of all of them together.
        bound: what it is nearest to, see :func:`bound_of`.
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
        """What bounds the call, in words: the host, and what bounds the launches, the most of their time first."""
        found = []
        if device.type == "cuda" and self.host > 0.9 * self.whole:
            found.append("host: starting the launches takes as long as running them; try graphed, torch.compile or more images")
        if device.type != "cuda" and self.inside < 0.5 * self.whole:
            found.append("host: more than half of the time is outside the launches; try more images or larger ones")
        by_bound: dict[str, float] = {}
        for line in self.launches:
            by_bound[line.bound] = by_bound.get(line.bound, 0.0) + line.seconds
        for index, (bound, seconds) in enumerate(sorted(by_bound.items(), key=lambda item: -item[1])):
            if index == 0 or seconds > 0.25 * self.inside:
                found.append(f"{WORDS.get(bound, bound)}: {seconds / self.inside:.0%} of the launches' time")
        return found


#: Bounds that need more than their name.
WORDS = {
    HOST: "host (launches so small that their start takes as long as their work)",
    NEITHER: "neither bandwidth nor arithmetic (launches below half of both)",
}


def bound_of(seconds: float, flops: int, moved: int, limits: Ceilings, device: torch.device, times: int = 1) -> str:
    """What bounds ``times`` launches together.

    ``bandwidth`` or ``tensor cores`` (on a CPU ``arithmetic``): the ceiling that is nearest, from :data:`BOUND` of it on. Else
    ``host``: at the ceilings they would take less time than starting as many takes. Else ``neither``.
    """
    reached = {
        "bandwidth": moved / seconds / limits.bandwidth if seconds else 0.0,
        "tensor cores" if device.type == "cuda" else "arithmetic": flops / seconds / limits.arithmetic if seconds else 0.0,
    }
    nearest = max(reached, key=lambda name: reached[name])
    if reached[nearest] >= BOUND:
        return nearest
    return HOST if reached[nearest] * seconds < times * limits.start else NEITHER


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
        with clock_launches(_clock(device)) as log:
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
            times = len(group) // rounds
            bound = bound_of(seconds, flops, moved, limits, device, times)
            made.append(Line(what, times, seconds, flops, moved, bound))
        return tuple(sorted(made, key=lambda line: -line.seconds))

    return Times(whole, host, lines(lambda launch: launch.kind), lines(lambda launch: launch.signature))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clock(device: torch.device) -> Callable[[], Any]:
    return _event if device.type == "cuda" else time.perf_counter


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


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
