"""Starts the runs of a scale, some at a time, each in a process of its own; what is done already is not done again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ..train import UsageError
from ..train.files import LOCK
from ..whole_file import write_whole
from . import files
from .scales import Run, Scale
from .worker import DONE, is_done

#: Of a run's folder: what the worker is told, and what it says.
JOB, OUTPUT = "job.json", "output.txt"


class RunFailed(Exception):
    """A run ended with an error: its last line."""


@dataclass(frozen=True)
class Options:
    """What a user may choose.

    Attributes:
        out: folder; each run has one in it.
        seeds: how often each network is trained.
        jobs: runs at a time; on a CPU they share its threads.
        data_folder: where the data set lies, if it has to be brought.
        backend, device, memory, amp, compile, workers, on_corrupt: as of ``fused-resnet train``.
    """

    out: Path
    seeds: int
    jobs: int = 1
    data_folder: Path | None = None
    backend: str = "auto"
    device: str = "auto"
    memory: str | None = None
    amp: str = "off"
    compile: bool = False
    workers: int = 2
    on_corrupt: str = "stop"

    def manner(self) -> dict[str, Any]:
        """What the trainer is told as it is."""
        names = ("backend", "device", "memory", "amp", "compile", "workers", "on_corrupt")
        return {name: getattr(self, name) for name in names}


def job_of(scale: Scale, run: Run, options: Options) -> dict[str, Any]:
    """What the worker is told."""
    deep = run.network in scale.deep
    return {
        "network": run.network,
        "seed": run.seed,
        "pool": scale.pool,
        "data": scale.data,
        "data_folder": options.data_folder and str(options.data_folder),
        "recipe": scale.deep_recipe if deep else scale.recipe,
        "epochs": scale.epochs,
        **options.manner(),
        "out": str(options.out / run.name),
        "threads": max(1, (os.cpu_count() or 1) // options.jobs) if options.jobs > 1 else 0,
        "responses": run.network in scale.responses,
    }


def check_same(scale: Scale, options: Options) -> None:
    """What is done in the folder was done as it would be now.

    Raises:
        UsageError: a run is of another recipe, length, data set or element type of autocast.
        LogError: what a run says about itself cannot be read.
    """
    for run in scale.runs(options.seeds):
        if is_done(options.out, run):
            done = files.done(options.out / run.name / DONE)
            wanted = job_of(scale, run, options)
            for name in ("recipe", "epochs", "data", "pool", "amp"):
                was = done.get(name, "off" if name == "amp" else None)  # runs of before it could be chosen do not say
                if was != wanted[name]:
                    what = f"{name} {was!r}, not {wanted[name]!r}"
                    raise UsageError(f"{options.out}: {run.name} in it is of {what}: name another --out")


def everything(scale: Scale, options: Options, tell: Callable[[str], None] = print, command: Sequence[str] = ()) -> None:
    """Do all runs that are not done.

    Args:
        scale: which.
        options: how.
        tell: takes a line when a run starts or ends.
        command: instead of the worker's own (tests).

    Raises:
        UsageError: one was told something wrong, such as a folder without the data; the others are stopped.
        RunFailed: one did not end well; the others are stopped. Starting again goes on where they were.
    """
    waiting = [run for run in scale.runs(options.seeds) if not is_done(options.out, run)]
    total = len(scale.runs(options.seeds))
    running: dict[Run, tuple[subprocess.Popen[bytes], float]] = {}
    started: list[Path] = []
    before = signal.signal(signal.SIGTERM, _interrupt) if threading.current_thread() is threading.main_thread() else None
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                run = waiting.pop(0)
                started.append(options.out / run.name)
                running[run] = _start(scale, run, options, command), time.monotonic()
            time.sleep(0.05)
            for run, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                if process.returncode:
                    failed = UsageError if process.returncode == 2 else RunFailed
                    raise failed(f"{run.name}: {_last_line(options.out / run.name / OUTPUT)}")
                left = len(waiting) + len(running)
                tell(f"[{total - left}/{total}] {run.name}: {time.monotonic() - began:.0f} s")
    except UsageError:
        _end(running)
        for folder in started:
            _clear(folder)
        raise
    finally:
        _end(running)
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _end(running: dict[Run, tuple[subprocess.Popen[bytes], float]]) -> None:
    """Stop what was started, and wait for it."""
    for process, _ in running.values():
        process.terminate()
    for process, _ in running.values():
        process.wait()


def _clear(folder: Path) -> None:
    """Take away what stands for a run that never began: the folder, if nothing was trained in it."""
    begun = {JOB, OUTPUT, LOCK}
    try:
        if {path.name for path in folder.iterdir()} <= begun:
            for name in begun:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
    except OSError:  # it may stay, and the error that is under way says more
        pass


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Whoever is asked to end stops what it has started, too."""
    raise KeyboardInterrupt


def _start(scale: Scale, run: Run, options: Options, command: Sequence[str]) -> subprocess.Popen[bytes]:
    folder = options.out / run.name
    job = job_of(scale, run, options)
    path = folder / JOB
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(job, indent=1).encode())
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror})") from error
    environment = dict(os.environ)
    if job["threads"]:
        environment["OMP_NUM_THREADS"] = str(job["threads"])
    with (folder / OUTPUT).open("wb") as output:
        return subprocess.Popen(
            [*(command or (sys.executable, "-m", "fused_resnet.paper.worker")), str(path)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "ended without a word"
