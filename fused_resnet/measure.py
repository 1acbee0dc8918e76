"""Timing and memory, written once: ``fused-resnet demo`` and bench/ both use it.

Ratios come from interleaved runs: every round calls each contender once, so that whatever else the machine does falls on all of
them alike, and the median of the rounds is taken.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backends import choose

Clock = Callable[[], float]


def cuda_clock() -> Clock:
    """A clock that reads the GPU's time by CUDA events, in seconds; each reading waits for what was queued before it."""
    last = torch.cuda.Event(enable_timing=True)
    last.record()
    now = 0.0

    def cuda_events() -> float:
        nonlocal last, now
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        now += last.elapsed_time(event) / 1e3  # summed here: elapsed_time is fp32 and loses microseconds after minutes
        last = event
        return now

    return cuda_events


def clock(device: torch.device) -> Clock:
    """The clock to time work on ``device`` with."""
    return cuda_clock() if device.type == "cuda" else time.perf_counter


def automatic_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rotation(make: Callable[[], Tensor], device: torch.device, limit: int = 64) -> Iterator[Tensor]:
    """Endlessly the next of several inputs, so that none is found in the cache it was left in.

    On a GPU as many as fill its L2 cache twice (at most ``limit``); two on a CPU, whose caches a network fills by itself.
    """
    first = make()
    count = 2
    if device.type == "cuda":
        size = max(1, first.numel() * first.element_size())
        count = min(limit, max(2, 1 + 2 * torch.cuda.get_device_properties(device).L2_cache_size // size))
    return cycle([first, *(make() for _ in range(count - 1))])


@dataclass(frozen=True)
class Timing:
    """Seconds that one contender took, a sample a round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.samples)

    @property
    def milliseconds(self) -> float:
        """Median in milliseconds."""
        return self.median * 1e3

    def images_per_second(self, batch: int) -> float:
        """At the median."""
        return batch / self.median


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 10.0,
    rounds: tuple[int, int] = (5, 200),
    warm_up: int = 2,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Timing]:
    """Time all contenders in turn, round after round.

    Args:
        contenders: what to call, by name.
        device: where the work runs.
        seconds: time to spend, warm-up not included.
        rounds: least and most rounds, whatever the time.
        warm_up: calls of each before the first round.
        progress: called after each round with the part that is done, 0 to 1.

    Returns:
        A timing for each contender, all with the same number of samples.
    """
    names = list(contenders)
    for _ in range(warm_up):
        for name in names:
            contenders[name]()
    now = clock(device)
    samples: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    for index in range(rounds[1]):
        for place in range(len(names)):
            name = names[(index + place) % len(names)]  # nobody is always the one behind the same other
            start = now()
            contenders[name]()
            samples[name].append(now() - start)
        spent = time.perf_counter() - began
        if progress is not None:
            least, most = (index + 1) / rounds[0], (index + 1) / rounds[1]
            progress(min(1.0, max(most, min(spent / seconds, least))))
        if index + 1 >= rounds[0] and spent >= seconds:
            break
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def saved_bytes(call: Callable[[], object], skip: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd saves for the backward of what ``call()`` computes, each storage once.

    Args:
        call: a forward, which starts no backward; its result is kept until all is counted, so that no memory is counted twice.
        skip: tensors whose memory does not count, such as parameters and buffers. Images count.
    """
    skipped = {tensor.untyped_storage()._cdata for tensor in skip}  # addresses would all be 0 on the meta device
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    total = sum(storage.nbytes() for key, storage in saved.items() if key not in skipped)
    del result
    return total


def largest_difference(result: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and the same relative to the largest value of ``truth``; in float64."""
    result, truth = result.detach().double(), truth.detach().double()
    absolute = (result - truth).abs().max().item()
    scale = truth.abs().max().item()
    return absolute, absolute / scale if scale else absolute


def relative_error(result: Tensor, truth: Tensor) -> float:
    """``||result - truth|| / ||truth||``, in float64."""
    result, truth = result.detach().double(), truth.detach().double()
    error, scale = (result - truth).norm().item(), truth.norm().item()
    return error / scale if scale else error


def device_name(device: torch.device) -> str:
    """The processor's name, with the number of threads for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    table = Path("/proc/cpuinfo")
    if table.exists():
        lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads != 1 else ''}"


def evidence(device: torch.device) -> str:
    """The evidence grade of a time taken on ``device`` now, by the backend in force (CONTRIBUTING.md lists the grades)."""
    if choose(None, device) == "triton" and (device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        return "interpreted: the values are right, the time says nothing"
    if device.type == "cuda":
        return f"measured on a GPU: {device_name(device)}"
    return f"measured on this CPU: {device_name(device)}"


def versions() -> dict[str, str]:
    """Versions that a measurement depends on."""
    from importlib import metadata

    from . import __version__

    found = {"fused_resnet": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "torchvision"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def circumstances(device: torch.device) -> dict[str, Any]:
    """What must stand next to a measurement: device, evidence grade, versions, date."""
    return {
        "device": device_name(device),
        "evidence": evidence(device),
        "versions": versions(),
        "date": date.today().isoformat(),
    }
