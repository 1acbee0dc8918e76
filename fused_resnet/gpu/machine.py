"""Stage ``machine``: what the GPU is, as found, and the rates that it really reaches. Nothing is changed on it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from datetime import date
from typing import Any

import torch

from .. import measure
from .results import Row
from .stage import Stage
from .timing import interleaved

#: What nvidia-smi is asked for; it is only read.
_QUERY = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    "persistence_mode",
    "compute_mode",
    "mig.mode.current",
    "utilization.gpu",
)


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, its settings and versions."""
    found: dict[str, Any] = {
        "gpu": None,
        "processor": measure.device_name(torch.device("cpu")),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": measure.versions(),
        "date": date.today().isoformat(),
    }
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    amd = torch.version.hip is not None
    found["gpu"] = properties.name
    found["arch"] = properties.gcnArchName.split(":")[0] if amd else f"sm_{properties.major}{properties.minor}"
    found["multiprocessors"] = properties.multi_processor_count
    found["memory_bytes"] = properties.total_memory
    found["l2_bytes"] = properties.L2_cache_size
    found["versions"]["cudnn"] = torch.backends.cudnn.version()
    found["as_found"] = settings()
    return found


def settings() -> dict[str, str]:
    """Clocks, power and modes, as nvidia-smi tells them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_QUERY, (value.strip() for value in text.splitlines()[0].split(",")))) if text.strip() else {}


def ceilings(device: torch.device, dry: bool) -> list[tuple[str, str, float, Callable[[], Any]]]:
    """Name, unit, units of work in a call, and a function that makes the call."""
    large, side = (1 << 16, 64) if dry else (1 << 30, 8192)
    small = 1 << 10 if dry else 8 << 20

    def copy(size: int) -> Callable[[], Any]:
        source = torch.randn(size // 4, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def product(dtype: torch.dtype) -> Callable[[], Any]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return lambda: a @ b

    def nothing() -> Callable[[], Any]:
        one = torch.zeros(1, device=device)
        return lambda: one.add_(1)

    flops = 2.0 * side**3
    return [
        ("copy", "B/s", 2.0 * large, lambda: copy(large)),
        ("copy in the L2 cache", "B/s", 2.0 * small, lambda: copy(small)),
        ("bf16 product", "FLOP/s", flops, lambda: product(torch.bfloat16)),
        ("fp16 product", "FLOP/s", flops, lambda: product(torch.float16)),
        ("tf32 product", "FLOP/s", flops, lambda: product(torch.float32)),
        ("fp32 product", "FLOP/s", flops, lambda: product(torch.float32)),
        ("small launches in a row", "launches/s", 1.0, nothing),
    ]


def run(stage: Stage) -> None:
    """Describe the machine, measure its ceilings."""
    stage.results.data["machine"] = describe(stage.device)
    stage.results.save()

    def row(entry: tuple[str, str, float, Callable[[], Any]]) -> Row:
        name, unit, work, make = entry
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = name.startswith("tf32")
        try:
            call = make()
            time = interleaved({name: call}, stage.device, seconds=0.5)[name]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        rate = None if time is None else work / time["median"]
        return {"status": "ok", "unit": unit, "rate": rate, "measured": not stage.dry, "times": {name: time}}

    stage.each("ceilings", ceilings(stage.device, stage.dry), lambda entry: entry[0], row)
    if not stage.dry:
        stage.results.data["machine"]["behind_the_products"] = settings()


def rate(data: dict[str, Any], name: str) -> float | None:
    """A measured ceiling, by its name."""
    found: float | None = next((row.get("rate") for row in data["ceilings"] if row["key"] == name), None)
    return found


def roofline_seconds(data: dict[str, Any], flops: int, moved: int, dtype: torch.dtype) -> float | None:
    """Time at the measured ceilings: the larger of the FLOPs' and the bytes'; None if they are not known."""
    product = {torch.bfloat16: "bf16 product", torch.float16: "fp16 product"}.get(dtype, "fp32 product")
    bandwidth, matrix = rate(data, "copy"), rate(data, product)
    if not bandwidth or not matrix:
        return None
    return max(flops / matrix, moved / bandwidth)
