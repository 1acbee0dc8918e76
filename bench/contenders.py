"""Contenders, and the one way in which a case is timed, in inference and in training.

Every case is a group of pytest-benchmark's table, with a row for each contender: eager contiguous, eager channels_last,
torch.compile, fused, and in training fused with ``memory="low"``. pytest-benchmark times the rows one after another, so the
fused row also carries ``speedup``: its time against the faster eager one, from rounds in which they took turns
(:func:`fused_resnet.measure.interleaved`).
"""

from __future__ import annotations

import copy
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import counts, measure, specimens

CONTIGUOUS, CHANNELS_LAST, COMPILED, FUSED = "eager contiguous", "eager channels_last", "torch.compile", "fused"
LOW = 'fused, memory="low"'
CONTENDERS = (CONTIGUOUS, CHANNELS_LAST, COMPILED, FUSED)
TRAINERS = (*CONTENDERS, LOW)

#: What is timed: a forward in eval mode without gradients; and in training mode a forward, with its backward, and with SGD.
INFERENCE, FORWARD, BACKWARD, STEP = "inference", "training forward", "forward and backward", "training step"
TRAINING = (FORWARD, BACKWARD, STEP)

#: The one case that torch.compile runs by default on a CPU, where compiling a network takes minutes.
COMPILED_BY_DEFAULT = ("BasicBlock", INFERENCE)


def _no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot run on ``device``, or None."""
    compilers = [os.environ.get("CXX", ""), "g++", "c++", "clang++"]
    if device.type == "cpu" and not any(name and shutil.which(name) for name in compilers):
        return "torch.compile on a CPU needs a C++ compiler, and none was found"
    return None


@dataclass(frozen=True)
class Case:
    """A group of the table: a module, what it is given, and what is timed.

    ``frozen``: training with the statistics the BatchNorms have, not with the batch's.
    """

    name: str
    module: nn.Module
    channels: int
    batch: int
    size: int
    dtype_name: str
    work: str = INFERENCE
    frozen: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return specimens.DTYPES[self.dtype_name]

    @property
    def training(self) -> bool:
        """With gradients."""
        return self.work != INFERENCE

    @property
    def mixed(self) -> bool:
        """Training in fp16 and bf16 is under autocast, with parameters in fp32."""
        return self.training and self.dtype in (torch.float16, torch.bfloat16)

    @property
    def group(self) -> str:
        """What pytest-benchmark's table calls it."""
        what = [self.name, f"batch {self.batch}", f"{self.size}x{self.size}", self.dtype_name]
        return ", ".join([*what, *[self.work] * self.training, *["frozen statistics"] * self.frozen])

    def images(self) -> Tensor:
        """Input, on the CPU."""
        return specimens.images(self.batch, self.size, self.channels).to(self.dtype)

    def counted(self, name: str) -> counts.Work:
        """Kernels, FLOPs and bytes of a contender that is not compiled, from sizes alone; the optimizer's are not counted."""
        module = copy.deepcopy(self.module).to("meta", self.dtype).train(self.training and not self.frozen)
        module = _fused(name, module)
        x = self.images().to("meta")
        if not self.training:
            return counts.Work.of(counts.kernels(module, x))
        step = counts.step(module, self.leaf(x))
        return counts.Work.of(step.forward if self.work == FORWARD else step.kernels)

    def leaf(self, x: Tensor) -> Tensor:
        """``x`` as a step finds it: the input of a block needs a gradient, images do not."""
        return x.detach().requires_grad_(self.training and self.channels != 3)


def _fused(name: str, module: nn.Module) -> nn.Module:
    """The contender's module; eager ones stay as they are."""
    if name not in (FUSED, LOW):
        return module
    return fused_resnet.fuse(module, memory="low" if name == LOW else "default")


class Contender:
    """One row's module on a device.

    Attributes:
        module: as ``name`` says.
        inputs: endlessly the next input.
    """

    def __init__(self, name: str, case: Case, device: torch.device) -> None:
        stored = torch.float32 if case.mixed else case.dtype
        layout = torch.contiguous_format if name == CONTIGUOUS else torch.channels_last
        module = copy.deepcopy(case.module).to(device, stored).train(case.training and not case.frozen)
        self.module = _fused(name, module) if name in (FUSED, LOW) else module.to(memory_format=layout)
        if name == COMPILED:
            torch._dynamo.reset()
            self.module = torch.compile(self.module)  # type: ignore[assignment]
        self.case, self.device = case, device
        self.inputs: Iterator[Tensor] = measure.rotation(
            lambda: case.images().to(device).contiguous(memory_format=layout), device
        )
        # So slow that weights stay as they are, however many rounds there are.
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-9, momentum=0.9)
        self.gradient: Tensor | None = None

    def forward(self) -> Tensor:
        """The module on the next of its inputs."""
        with torch.autocast(self.device.type, self.case.dtype if self.case.mixed else None, enabled=self.case.mixed):
            y: Tensor = self.module(self.case.leaf(next(self.inputs)))
        return y

    def __call__(self) -> None:
        """What is timed."""
        with torch.set_grad_enabled(self.case.training):
            y = self.forward()
        if self.case.work in (INFERENCE, FORWARD):
            return
        if self.gradient is None:
            self.gradient = torch.randn_like(y)
        self.optimizer.zero_grad()
        y.backward(self.gradient)
        if self.case.work == STEP:
            self.optimizer.step()

    def saved_bytes(self) -> int:
        """Kept for the backward, counted as it runs."""
        return measure.saved_bytes(self.forward, (*self.module.parameters(), *self.module.buffers()))


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

    def skip_compile(self, name: str, case: Case) -> None:
        """Skip torch.compile where it cannot run, or was not asked for."""
        if name != COMPILED:
            return
        if self.device.type == "cpu" and not self.compile_all and (case.name, case.work) != COMPILED_BY_DEFAULT:
            pytest.skip("torch.compile on a CPU takes long: --compile for all cases")
        reason = _no_compiler(self.device)
        if reason:
            pytest.skip(reason)

    def __call__(self, name: str, case: Case) -> None:
        """Time one row and note what must stand next to it."""
        self.skip_compile(name, case)
        contender = Contender(name, case, self.device)
        timing = measure.interleaved({name: contender}, self.device, seconds=0.2, rounds=(1, 10))[name]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.benchmark.name = name
        self.benchmark.group = case.group
        calls = max(1, round(2e-3 / timing.median)) if self.device.type == "cuda" else 1
        rounds = int(min(200, max(3, self.seconds / (timing.median * calls))))
        self.benchmark.pedantic(contender, rounds=rounds, iterations=calls)
        self.note(name, case, contender)

    def note(self, name: str, case: Case, contender: Contender) -> None:
        """Fill ``extra_info``."""
        info = self.benchmark.extra_info
        info.update(measure.circumstances(self.device))
        info.update(case=case.name, work=case.work, contender=name)
        info.update(batch=case.batch, size=case.size, dtype=case.dtype_name, frozen_statistics=case.frozen)
        if self.benchmark.stats is not None:  # None with --benchmark-disable
            info["images_per_s"] = case.batch / self.benchmark.stats.stats.median
        if self.device.type == "cuda":
            info["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        if case.training:
            info["saved_bytes"] = contender.saved_bytes()
        if name == COMPILED:
            return  # what Inductor makes of it is not counted
        work = case.counted(name)
        info.update(launches=work.kernels, flops=work.flops, bytes=work.bytes)
        if name in (FUSED, LOW):
            with fused_resnet.count_launches() as log:
                contender()
            info["ran"] = Counter(backend for backend, _ in log.launches)
        if name == FUSED:
            info.update(self.turns(case))

    def turns(self, case: Case) -> dict[str, Any]:
        """The honest ratio: eager and fused in turns, medians."""
        names = (CONTIGUOUS, CHANNELS_LAST, FUSED, *[LOW] * case.training)
        calls: dict[str, Callable[[], object]] = {name: Contender(name, case, self.device) for name in names}
        times = measure.interleaved(calls, self.device, seconds=len(calls) * self.seconds, rounds=(3, 200), warm_up=1)
        faster = min(times[CONTIGUOUS].median, times[CHANNELS_LAST].median)
        return {
            "speedup": faster / times[FUSED].median,
            "interleaved_ms": {name: timing.milliseconds for name, timing in times.items()},
            "interleaved_rounds": len(times[FUSED].samples),
        }
