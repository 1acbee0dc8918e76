"""Compiles kernels ahead of their launches, in as many processes as there are processors, into Triton's cache on disk.

Compiling a kernel takes seconds, and a network has dozens. No worker touches the GPU: :class:`_Absent` stands where Triton asks
for the device, and the arguments are tensors without memory. What they compile is what the launch will look for, because they
go through ``JITFunction.warmup``, which makes the same key (tests/test_gpu_command_warm.py holds it to that).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch

from ..launch import Launch

#: What is compiled: a launch, its tile (None is the rule's) and whether fp32 may be tf32.
Item = tuple[Launch, Any, bool]


@dataclass(frozen=True)
class _Absent:
    """A driver for a GPU that is not there, as far as compiling asks it."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _begin(arch: str) -> None:
    """In each worker: Triton compiles for ``arch``."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported
    import triton

    from ..backends.triton_compile import gpu_target

    torch.set_num_threads(1)
    triton.runtime.driver.set_active(_Absent(gpu_target(arch)))


def compile_one(item: Item, arch: str) -> tuple[float, str]:
    """Compile one launch for ``arch``; seconds, and the error if there was one."""
    from ..backends.triton_compile import _start_of

    began = time.perf_counter()
    launch, tile, tf32 = item
    try:
        start, arguments = _start_of(launch, arch, tile, tf32, torch.float32)
        start.kernel.warmup(grid=(start.programs,), **arguments, num_warps=start.num_warps, num_stages=start.num_stages)
    except Exception as error:
        text = [line.strip() for line in str(error).splitlines() if line.strip()]
        return time.perf_counter() - began, f"{type(error).__name__}: {text[0] if text else ''}"[:300]
    return time.perf_counter() - began, ""


@dataclass
class Warm:
    """The workers and what they were given. With ``arch`` None (the interpreter) there is nothing to do."""

    arch: str | None
    workers: int = 0
    pool: ProcessPoolExecutor | None = None
    waiting: dict[Item, Future[tuple[float, str]]] = field(default_factory=dict)

    def __enter__(self) -> Warm:
        if self.arch is not None:
            available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            self.workers = self.workers or max(1, available - 3)
            self.pool = ProcessPoolExecutor(self.workers, get_context("spawn"), _begin, (self.arch,))
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            processes = list((getattr(self.pool, "_processes", None) or {}).values())
            self.pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()

    def add(self, items: Iterable[Item]) -> None:
        """Compile these next, in their order."""
        if self.pool is None or self.arch is None:
            return
        for item in items:
            if item not in self.waiting:
                self.waiting[item] = self.pool.submit(compile_one, item, self.arch)

    def add_chosen(self, launches: Iterable[Launch], gpu: str) -> None:
        """Compile what these launches will run, as it is chosen for them; pieces that take little to compile are left."""
        for launch in launches:
            self.add(self._chosen(launch, gpu))

    def wait_chosen(self, launch: Launch, gpu: str, seconds: float) -> None:
        """Wait for what a launch will run. An error comes again where it is launched."""
        for item in self._chosen(launch, gpu):
            self.wait(item, seconds)

    def _chosen(self, launch: Launch, gpu: str) -> list[Item]:
        from ..tuning.choice import choose
        from ..tuning.pieces import pieces

        if self.arch is None:
            return []
        choice = choose(launch, self.arch, gpu=gpu)
        parts = pieces(launch, choice.how) if choice.how == "apart" else None
        if parts is not None:
            return [(parts.core, choice.tile, False)]
        return [(launch, choice.tile, False)] if choice.how == "fused" else []

    def wait(self, item: Item, seconds: float) -> str:
        """Wait for one of them; the compiler's error, or nothing. What is late is compiled by whoever launches it."""
        future = self.waiting.get(item)
        if future is None:
            return ""
        try:
            return future.result(max(0.0, seconds))[1]
        except Late:
            return ""
        except Exception as error:  # a worker died: the pool is of no more use
            return f"the compiler's process died ({type(error).__name__})"

    def ready(self, item: Item) -> bool:
        """Whether it is compiled, or failed."""
        future = self.waiting.get(item)
        return future is None or future.done()
