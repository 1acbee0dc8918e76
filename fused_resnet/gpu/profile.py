"""Stage ``profile``: one training step under PyTorch's profiler, reduced to a table: time by kind of launch, and idle time."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..backends import count_launches
from .contenders import CHANNELS_LAST, FUSED, Contender
from .models import eager_model
from .results import Row
from .stage import Stage

#: Names of our kernels.
KERNELS = {
    "conv_forward": "conv",
    "dgrad": "dgrad",
    "wgrad": "wgrad",
    "vectors_only": "wgrad",
    "bn_add_relu_backward": "bn_add_relu_backward",
    "bn_add_relu": "bn_add_relu",
    "gate_backward": "gate_backward",
    "gate": "gate",
    "max_pool_backward": "max_pool_backward",
    "max_pool": "max_pool",
    "zero_pad_backward": "zero_pad_backward",
    "zero_pad": "zero_pad",
    "output_gradient": "dy apart",
    "conv_end": "end of a vendor's conv",
    "dgrad_end": "end of a vendor's dgrad",
}

#: Names of others' kernels by what stands in them, the first that fits.
_OTHERS = (
    (("memcpy", "memset"), "copies and fills"),
    (("gemm", "cutlass", "cublas", "xmma", "sm90_", "sm80_", "nvjet", "wgmma"), "PyTorch: products and convolutions"),
    (("conv", "cudnn", "implicit"), "PyTorch: products and convolutions"),
    (("batch_norm", "bn_", "batchnorm"), "PyTorch: BatchNorm"),
    (("multi_tensor", "foreach"), "PyTorch: optimizer"),
    (("pool",), "PyTorch: pooling"),
    (("softmax", "nll", "cross"), "PyTorch: loss"),
    (("reduce",), "PyTorch: sums"),
)


@dataclass(frozen=True)
class Event:
    """A kernel that ran on the device: its name, and microseconds."""

    name: str
    start: float
    seconds: float

    @property
    def end(self) -> float:
        return self.start + self.seconds


def kind_of(name: str) -> str:
    """What a kernel's time counts as."""
    if name in KERNELS:
        return KERNELS[name]
    lower = name.lower()
    for words, kind in _OTHERS:
        if any(word in lower for word in words):
            return kind
    return "PyTorch: element by element"


def run(stage: Stage) -> None:
    """The fused step, and eager's beside it."""

    def row(name: str) -> Row:
        cell = stage.scope.profiled
        contender = Contender(
            name, eager_model(cell.network, stage.device, stage.scope.size), cell, stage.scope.size, stage.device
        )
        if stage.dry:
            with count_launches() as log:
                contender()
            counted = Counter(launch.kind for _, launch in log.launches)
            lines: list[Row] = [{"kind": kind, "launches": n, "seconds": None, "part": None} for kind, n in counted.items()]
            return {"status": "ok", "cell": cell.key, "measured": False, "times": {}, "lines": lines}
        return {"status": "ok", "cell": cell.key, "measured": True, **_profiled(contender)}

    stage.each("profile", [FUSED] if stage.dry else [FUSED, CHANNELS_LAST], lambda name: name, row)


def _profiled(contender: Contender) -> dict[str, Any]:
    for _ in range(3):
        contender()
    torch.cuda.synchronize()
    began = time.perf_counter()
    contender()
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    whole = time.perf_counter() - began
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        contender()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = read(json.loads(path.read_text(encoding="utf-8")))
    if not events:
        return {"status": "failed", "error": "the profiler saw no kernels on this machine", "times": {}, "lines": []}
    return reduce(events, host, whole)


def read(trace: Mapping[str, Any]) -> list[Event]:
    """The device's events of a Chrome trace, in their order."""
    found = [
        Event(str(event["name"]), float(event["ts"]) / 1e6, float(event["dur"]) / 1e6)
        for event in trace.get("traceEvents", [])
        if str(event.get("cat", "")).lower() in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in event
    ]
    return sorted(found, key=lambda event: event.start)


def reduce(events: Sequence[Event], host: float, whole: float) -> dict[str, Any]:
    """The table.

    Args:
        events: in their order.
        host: seconds that the host needed to start everything, without the profiler.
        whole: seconds until the device was through, without the profiler.
    """
    span = max(event.end for event in events) - events[0].start
    gaps = list(_gaps(events))
    busy = span - sum(gap for gap, _, _ in gaps)
    by_kind: dict[str, list[float]] = {}
    for event in events:
        by_kind.setdefault(kind_of(event.name), []).append(event.seconds)
    lines = [
        {"kind": kind, "launches": len(values), "seconds": sum(values), "part": sum(values) / span}
        for kind, values in sorted(by_kind.items(), key=lambda item: -sum(item[1]))
    ]
    longest = sorted(gaps, reverse=True)[:3]
    return {
        "times": {},
        "lines": lines,
        "span": span,
        "busy": busy,
        "idle": span - busy,
        "launches": len(events),
        "longest_gaps": [{"seconds": gap, "after": kind_of(a), "before": kind_of(b)} for gap, a, b in longest],
        "host": host,
        "whole": whole,
        "cpu_bound": host > 0.9 * whole,
    }


def _gaps(events: Iterable[Event]) -> Iterable[tuple[float, str, str]]:
    """Idle time between events, with the names around it."""
    last: Event | None = None
    for event in events:
        if last is not None and event.start > last.end:
            yield event.start - last.end, last.name, event.name
        if last is None or event.end > last.end:
            last = event
