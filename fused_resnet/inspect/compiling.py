"""Compiles many launches ahead of time: one compile for all launches that are the same kernel, in parallel, kept on disk."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from math import ceil
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING

from ..launch import Launch
from .cache import Cache
from .facts import Facts, facts_of

if TYPE_CHECKING:
    from ..tuning.tile import Strip, Tile


#: Kernels that a process compiles, then reads with one call of the disassembler.
HANDFUL = 8


@dataclass(frozen=True)
class Job:
    """A launch to compile for an architecture."""

    launch: Launch
    arch: str
    tf32: bool = False


@dataclass(frozen=True)
class Planned:
    """How a job is started.

    Attributes:
        key: of its compile, with the architecture in front.
        tile: None for a kernel that has none.
        programs: size of the grid.
    """

    key: str
    tile: Tile | Strip | None
    programs: int

    @property
    def digest(self) -> str:
        """The key's short form, a part of file names."""
        return self.key.rpartition(" ")[2][:12]


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        planned: None where there is no kernel for the launch.
        facts: None where it did not compile.
        error: the reason for either.
        assembly: if it was asked for.
    """

    planned: Planned | None = None
    facts: Facts | None = None
    error: str = ""
    assembly: str | None = None


def workers() -> int:
    """Processes that compile at once: one a core."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _prepare_process() -> None:
    """In a new process, before Triton is imported: kernels are compiled, not interpreted, and Triton has a cache."""
    os.environ.pop("TRITON_INTERPRET", None)
    if not _takes_files(_triton_folder()):  # Triton compiles nothing where it cannot keep it
        folder = tempfile.mkdtemp(prefix="fused-resnet-triton-")
        os.environ["TRITON_CACHE_DIR"] = folder
        # What runs at the end of such a process; its atexit does not.
        Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=0)


def _triton_folder() -> Path:
    """Where Triton keeps what it compiled, as its ``knobs`` say."""
    own = os.environ.get("TRITON_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~/"), ".triton", "cache")


def _takes_files(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def pool(processes: int | None = None) -> ProcessPoolExecutor:
    """Processes that compile. They are new ones, so that a process that interprets can have them."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes or workers(), mp_context=context, initializer=_prepare_process)


def interpreting() -> bool:
    """Whether Triton interprets here, or would."""
    return "TRITON_INTERPRET" in os.environ


def plan(jobs: Sequence[Job]) -> list[Planned | str]:
    """How each job is started, or why it is not. Not in a process that interprets."""
    from ..backends.triton_compile import prepare, tile_of, unsupported

    planned: list[Planned | str] = []
    for job in jobs:
        if reason := unsupported(job.launch):
            planned.append(reason)
            continue
        prepared = prepare(job.launch, job.arch, tf32=job.tf32)
        planned.append(Planned(f"{job.arch} {prepared.key}", tile_of(prepared.start), prepared.start.programs))
    return planned


#: What came of one compile: facts, and the assembly if it was asked for; or the first line of the compiler's complaint.
Compiled = tuple[Facts, "str | None"] | str


def compile_some(jobs: Sequence[Job], assembly: bool = False) -> list[Compiled]:
    """Compile jobs of one architecture, then read all that came out with one call of the disassembler."""
    from ..backends.triton_compile import build, prepare, read_built

    results: dict[int, Compiled] = {}
    built = {}
    for number, job in enumerate(jobs):
        try:
            prepared = prepare(job.launch, job.arch, tf32=job.tf32)
            built[number] = prepared, build(prepared)
        except Exception as error:  # whatever Triton, LLVM or ptxas raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            results[number] = f"{type(error).__name__}: {lines[0] if lines else ''}"
    for number, compiled in zip(built, read_built(list(built.values()), jobs[0].arch) if built else (), strict=True):
        results[number] = facts_of(compiled), compiled.assembly if assembly else None
    return [results[number] for number in range(len(jobs))]


def compile_all(
    jobs: Sequence[Job],
    cache: Cache | None = None,
    *,
    assembly: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
    executor: Executor | None = None,
) -> list[Outcome]:
    """Compile jobs, each kernel once.

    Args:
        jobs: launches and architectures.
        cache: of facts; by default the user's.
        assembly: also return assembly.
        progress: called with the number of kernels done, and of all that have to be compiled; a handful at a time.
        executor: processes of :func:`pool`; by default they are started where they are needed.

    Raises:
        RuntimeError: a compiling process died.
    """
    cache = cache or Cache()
    own: list[ProcessPoolExecutor] = []

    def processes() -> Executor:
        if executor is not None:
            return executor
        if not own:
            own.append(pool())
        return own[0]

    try:
        planned = processes().submit(plan, jobs).result() if interpreting() else plan(jobs)
        done: dict[str, Compiled] = {}
        missing: dict[str, Job] = {}
        for job, how in zip(jobs, planned, strict=True):
            if isinstance(how, str) or how.key in done or how.key in missing:
                continue
            facts, text = cache.facts(how.key), cache.assembly(how.key) if assembly else None
            if facts is None or (assembly and text is None):
                missing[how.key] = job
            else:
                done[how.key] = (facts, text)
        futures: dict[Future[list[Compiled]], list[str]] = {}
        progress(0, len(missing))
        for keys in _handfuls(missing):
            futures[processes().submit(compile_some, [missing[key] for key in keys], assembly)] = keys
        number = 0
        for future in as_completed(futures):
            for key, result in zip(futures[future], future.result(), strict=True):
                done[key] = result
                if not isinstance(result, str):
                    cache.keep(key, *result)
            number += len(futures[future])
            progress(number, len(missing))
    except BrokenProcessPool as error:
        raise RuntimeError("a process that compiles was ended from outside (out of memory?)") from error
    finally:
        for started in own:
            started.shutdown(wait=sys.exc_info()[0] is None, cancel_futures=True)
    return [_outcome(how, done) for how in planned]


def _handfuls(missing: Mapping[str, Job]) -> Iterator[list[str]]:
    """Keys of a few jobs of one architecture at a time, enough for all processes."""
    size = min(HANDFUL, ceil(len(missing) / workers()))
    for arch in dict.fromkeys(job.arch for job in missing.values()):
        keys = [key for key, job in missing.items() if job.arch == arch]
        for first in range(0, len(keys), size):
            yield keys[first : first + size]


def _outcome(how: Planned | str, done: Mapping[str, Compiled]) -> Outcome:
    if isinstance(how, str):
        return Outcome(error=how)
    result = done[how.key]
    if isinstance(result, str):
        return Outcome(how, error=result)
    return Outcome(how, result[0], assembly=result[1])
