"""Contenders, and the one way in which a case is timed.

Every case is a group of pytest-benchmark's table, with a row for each contender: eager contiguous, eager channels_last,
torch.compile and fused. pytest-benchmark times the rows one after another, so the fused row also carries ``speedup``: its time
against the faster eager one, from rounds in which the three took turns (:func:`fused_resnet.measure.interleaved`).
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import counts, measure, specimens

CONTIGUOUS, CHANNELS_LAST, COMPILED, FUSED = "eager contiguous", "eager channels_last", "torch.compile", "fused"
CONTENDERS = (CONTIGUOUS, CHANNELS_LAST, COMPILED, FUSED)

#: The one case that torch.compile runs by default on a CPU, where compiling a network takes minutes.
COMPILED_BY_DEFAULT = "BasicBlock"


def _no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot run on ``device``, or None."""
    compilers = [os.environ.get("CXX", ""), "g++", "c++", "clang++"]
    if device.type == "cpu" and not any(name and shutil.which(name) for name in compilers):
        return "torch.compile on a CPU needs a C++ compiler, and none was found"
    return None


@dataclass(frozen=True)
class Case:
    """A group of the table: a module, and what it is given."""

    name: str
    module: nn.Module
    channels: int
    batch: int
    size: int
    dtype_name: str


@dataclass
class Bench:
    """Times the contenders of one case; made anew for each test.

    Attributes:
        benchmark: pytest-benchmark's fixture.
        device: where it runs.
        seconds: time to spend on a row.
        compile_all: torch.compile for every case, on a CPU too.
    """

    benchmark: Any
    device: torch.device
    seconds: float
    compile_all: bool

    def contender(self, name: str, case: Case) -> tuple[nn.Module, Callable[[], object]]:
        """A contender's module, and the call to time: the module on the next of its inputs."""
        dtype = specimens.DTYPES[case.dtype_name]
        module = copy.deepcopy(case.module).to(self.device, dtype)
        layout = torch.contiguous_format if name == CONTIGUOUS else torch.channels_last
        module = fused_resnet.fuse(module) if name == FUSED else module.to(memory_format=layout)
        if name == COMPILED:
            torch._dynamo.reset()
            module = torch.compile(module)  # type: ignore[assignment]

        def make() -> torch.Tensor:
            x = specimens.images(case.batch, case.size, case.channels)
            return x.to(self.device, dtype).contiguous(memory_format=layout)

        inputs = measure.rotation(make, self.device)
        return module, lambda: module(next(inputs))

    def skip_compile(self, name: str, case: Case) -> None:
        """Skip torch.compile where it cannot run, or was not asked for."""
        if name != COMPILED:
            return
        if self.device.type == "cpu" and not self.compile_all and case.name != COMPILED_BY_DEFAULT:
            pytest.skip("torch.compile on a CPU takes long: --compile for all cases")
        reason = _no_compiler(self.device)
        if reason:
            pytest.skip(reason)

    @torch.no_grad()
    def __call__(self, name: str, case: Case) -> None:
        """Time one row and note what must stand next to it."""
        self.skip_compile(name, case)
        module, call = self.contender(name, case)
        for _ in range(3):
            call()
        timing = measure.interleaved({name: call}, self.device, seconds=0.2, rounds=(2, 10), warm_up=0)[name]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.benchmark.name = name
        self.benchmark.group = f"{case.name}, batch {case.batch}, {case.size}x{case.size}, {case.dtype_name}"
        calls = max(1, round(2e-3 / timing.median)) if self.device.type == "cuda" else 1
        rounds = int(min(200, max(3, self.seconds / (timing.median * calls))))
        self.benchmark.pedantic(call, rounds=rounds, iterations=calls, warmup_rounds=1)
        self.note(name, case, module)

    def note(self, name: str, case: Case, module: nn.Module) -> None:
        """Fill ``extra_info``."""
        info = self.benchmark.extra_info
        info.update(measure.circumstances(self.device))
        info.update(case=case.name, contender=name, batch=case.batch, size=case.size, dtype=case.dtype_name)
        if self.benchmark.stats is not None:  # None with --benchmark-disable
            info["images_per_s"] = case.batch / self.benchmark.stats.stats.median
        if self.device.type == "cuda":
            info["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        if name == COMPILED:
            return  # what Inductor makes of it is not counted
        x = specimens.images(case.batch, case.size, case.channels).to(self.device, specimens.DTYPES[case.dtype_name])
        work = counts.Work.of(counts.kernels(module, x))
        info.update(launches=work.kernels, flops=work.flops, bytes=work.bytes)
        if name == FUSED:
            info.update(self.turns(case))

    def turns(self, case: Case) -> dict[str, Any]:
        """The honest ratio: eager and fused in turns, medians."""
        calls = {name: self.contender(name, case)[1] for name in (CONTIGUOUS, CHANNELS_LAST, FUSED)}
        times = measure.interleaved(calls, self.device, seconds=3 * self.seconds, rounds=(3, 200))
        faster = min(times[CONTIGUOUS].median, times[CHANNELS_LAST].median)
        return {
            "speedup": faster / times[FUSED].median,
            "interleaved_ms": {name: timing.milliseconds for name, timing in times.items()},
            "interleaved_rounds": len(times[FUSED].samples),
        }
