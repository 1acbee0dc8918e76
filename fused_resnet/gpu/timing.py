"""Timing of single launches on a GPU: CUDA events around calls in a row, behind a kernel that lets the host get ahead.

A launch of tens of microseconds is shorter than the Python that starts it. So the device is first kept busy by a kernel that
only waits; meanwhile the host queues all calls of a sample, and the events around them see one launch behind the other. Inputs
rotate through more memory than the L2 cache. Rounds of all contenders are interleaved (docs/gpu.md).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

import torch
from torch import Tensor

from .results import Time

#: Seconds of work in a sample.
SAMPLE = 2e-3
#: Calls queued at once: the driver's queue holds about a thousand.
MOST = 64

Call = Callable[[], object]


def summed(samples: Sequence[float]) -> Time:
    """Median and quartiles."""
    ordered = sorted(samples)
    low, _, high = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else (ordered[0],) * 3
    return {
        "median": statistics.median(ordered),
        "low": max(low, ordered[0]),
        "high": min(high, ordered[-1]),
        "rounds": len(ordered),
    }


def rotating(make: Callable[[int], Call], moved: int, device: torch.device) -> Call:
    """A call that works on the next of several sets of operands, so that none is in the L2 cache it left.

    Args:
        make: the call on a set, from its number.
        moved: bytes that one call touches.
        device: whose cache.
    """
    sets = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        free, _ = torch.cuda.mem_get_info(device)
        sets = max(1, min(16, 1 + -(-2 * cache // max(moved, 1)), int(free // 3 // max(moved, 1))))
    calls = cycle([make(number) for number in range(sets)])

    def following() -> object:
        return next(calls)()

    return following


def interleaved(
    contenders: Mapping[str, Call], device: torch.device, seconds: float = 0.25, rounds: tuple[int, int] = (5, 30)
) -> dict[str, Time | None]:
    """Time contenders in turn, round after round; None for each on a CPU, where each is called once.

    Args:
        contenders: what to call, by name; warmed up here.
        device: where they run.
        seconds: to spend on the rounds.
        rounds: least and most of them.
    """
    if device.type != "cuda":
        for call in contenders.values():
            call()
        return dict.fromkeys(contenders)
    plans = {name: _plan(call) for name, call in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    began = time.perf_counter()
    for index in range(rounds[1]):
        for place in range(len(names)):
            name = names[(index + place) % len(names)]
            samples[name].append(_sample(contenders[name], *plans[name]))
        if index + 1 >= rounds[0] and time.perf_counter() - began > seconds:
            break
    return {name: summed(values) for name, values in samples.items()}


def _plan(call: Call) -> tuple[int, int]:
    """Calls a sample, and cycles to wait before them."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(3):
        call()
    host = (time.perf_counter() - began) / 3
    torch.cuda.synchronize()
    first = _sample(call, 4, _cycles(4 * host))
    calls = max(1, min(MOST, round(SAMPLE / first)))
    return calls, _cycles(calls * host)


def _cycles(seconds: float) -> int:
    """Cycles that the device waits, at 2 GHz: half again as long as the host needs, and some."""
    return int(2e9 * (1.5 * seconds + 50e-6))


def _sample(call: Call, calls: int, cycles: int) -> float:
    """Seconds of one call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(cycles)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end) / 1e3 / calls, 1e-9)


def touched(*tensors: Tensor) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
