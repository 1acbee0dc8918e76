"""Compiles kernels ahead of their launches, in as many processes as there are processors, into Triton's cache on disk.

Compiling a kernel takes seconds, and a network has dozens. No worker touches the GPU: :class:`_Absent` stands where Triton asks
for the device, and the arguments are tensors without memory. What they compile is what the launch will look for, because they
go through ``JITFunction.warmup``, which makes the same key (tests/test_gpu_command_warm.py holds it to that).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from ..launch import Launch
from . import networks
from .scope import Cell


class Item(NamedTuple):
    """What is compiled: a launch, its tile (None is the rule's), whether fp32 may be tf32, the type of BatchNorm's vectors."""

    launch: Launch
    tile: Any = None
    tf32: bool = False
    parameters: torch.dtype = torch.float32


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
    try:
        start, arguments = _start_of(item.launch, arch, item.tile, item.tf32, item.parameters)
        start.kernel.warmup(grid=(start.programs,), **arguments, num_warps=start.num_warps, num_stages=start.num_stages)
    except Exception as error:
        text = [line.strip() for line in str(error).splitlines() if line.strip()]
        return time.perf_counter() - began, f"{type(error).__name__}: {text[0] if text else ''}"[:300]
    return time.perf_counter() - began, ""


def chosen(
    launch: Launch, arch: str, gpu: str, multiprocessors: int = 0, parameters: torch.dtype = torch.float32
) -> list[Item]:
    """What a launch will run, as it is chosen for it; pieces that take little to compile are left."""
    from ..tuning.choice import choose
    from ..tuning.pieces import pieces

    choice = choose(launch, arch, gpu=gpu, multiprocessors=multiprocessors)
    parts = pieces(launch, choice.how) if choice.how == "apart" else None
    if parts is not None:
        return [Item(parts.core, choice.tile, parameters=parameters)]
    return [Item(launch, choice.tile, parameters=parameters)] if choice.how == "fused" else []


def chosen_of(cell: Cell, size: int, arch: str, gpu: str, multiprocessors: int = 0) -> list[Item]:
    """What a network will launch, in its order."""
    items = []
    parameters = cell.parameters
    for memory in ("default", "low")[: 2 if cell.mode == "train" else 1]:
        for use in networks.uses(cell.network, cell.batch, size, torch.bfloat16, cell.mode, memory):
            items += chosen(use.launch, arch, gpu, multiprocessors, parameters)
    return items


def _key(item: Item) -> Any:
    """Launches of one signature are one kernel, whatever layer they are of."""
    return (item.launch.signature, *item[1:])


@dataclass
class Warm:
    """The workers and what they were given. With ``arch`` None (the interpreter) there is nothing to do."""

    arch: str | None
    gpu: str = ""
    multiprocessors: int = 0
    workers: int = 0
    pool: ProcessPoolExecutor | None = None
    waiting: dict[Any, Future[tuple[float, str]]] = field(default_factory=dict)

    def __enter__(self) -> Warm:
        if self.arch is not None:
            self.workers = self.workers or max(1, processors() - 3)
            self.pool = ProcessPoolExecutor(self.workers, get_context("spawn"), _begin, (self.arch,))
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            processes = list((getattr(self.pool, "_processes", None) or {}).values())
            self.pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()

    def _submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any] | None:
        if self.pool is None:
            return None
        try:
            return self.pool.submit(work, *arguments)
        except RuntimeError:  # a worker died, or all is over: whoever launches compiles
            self.pool = None
            return None

    def add(self, items: Iterable[Item]) -> None:
        """Compile these next, in their order."""
        for item in items:
            if self.pool is not None and _key(item) not in self.waiting:
                future = self._submit(compile_one, item, self.arch)
                if future is not None:
                    self.waiting[_key(item)] = future

    def add_chosen(self, launches: Iterable[Launch]) -> None:
        """Compile what these launches will run."""
        if self.arch is not None:
            for launch in launches:
                self.add(chosen(launch, self.arch, self.gpu, self.multiprocessors))

    def add_cell(self, cell: Cell, size: int) -> None:
        """Compile what a network will run; a worker finds out what that is."""
        future = self._submit(chosen_of, cell, size, self.arch, self.gpu, self.multiprocessors)
        if future is not None:
            future.add_done_callback(lambda done: self.add(() if done.cancelled() or done.exception() else done.result()))

    def wait_chosen(self, launch: Launch, seconds: float) -> None:
        """Wait for what a launch will run. An error comes again where it is launched."""
        if self.arch is not None:
            for item in chosen(launch, self.arch, self.gpu, self.multiprocessors):
                self.wait(item, seconds)

    def wait(self, item: Item, seconds: float) -> str:
        """Wait for one of them; the compiler's error, or nothing. What is late is compiled by whoever launches it."""
        future = self.waiting.get(_key(item))
        if future is None:
            return ""
        try:
            return future.result(max(0.0, seconds))[1]
        except Late:
            return ""
        except Exception as error:  # a worker died: the pool is of no more use
            return f"the compiler's process died ({type(error).__name__})"

    def unfinished(self) -> int:
        """How many are not compiled yet."""
        return sum(not future.done() for future in list(self.waiting.values()))


def processors() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
