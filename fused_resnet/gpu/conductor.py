"""Starts the stages, one process each, watches over their time, and prints what came of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..tuning import measured
from . import budget, summary
from .results import NAME, Results, empty, failures, write
from .stage import POISONED

#: A stage that adds nothing for so long hangs; models are built, compiled and captured in one row.
QUIET = {
    "machine": 90.0,
    "correct": 90.0,
    "launches": 90.0,
    "tuning": 120.0,
    "models": 240.0,
    "profile": 120.0,
    "compiled": 600.0,
}
#: How often a stage is started anew behind a row that took its process with it.
RESTARTS = 6
#: Log lines kept, in bytes.
LOG = 4 << 20

SUMMARY = "summary.md"
LOGS = "log.txt"
TABLE = "tuning.json"


@dataclass
class Run:
    """One call of ``fused-resnet gpu``.

    Attributes:
        folder: where its files go.
        seconds: for all stages.
        dry: through the interpreter.
        stages: those wanted.
        resume: go on behind what the folder holds.
        wanted: what to look at instead of the usual, see :func:`.scope.narrowed`.
    """

    folder: Path
    seconds: float
    dry: bool
    stages: Sequence[str] = budget.STAGES
    resume: bool = False
    wanted: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.cache = tempfile.TemporaryDirectory(prefix="fused-resnet-")
        path = self.folder / NAME
        if self.resume and path.exists():
            self.results = Results.open(path)
            for name in self.stages:
                state = self.results.data["stages"].get(name)
                if state and state.get("status") != "done":
                    del self.results.data["stages"][name]
        else:
            self.results = Results(path, empty(not self.dry, datetime.now(timezone.utc).isoformat(timespec="seconds")))
        self.before = float(self.results.data["seconds"])
        self.results.data.update({"wanted": self.wanted} if self.wanted else {})
        gpu = self.results.data["machine"].get("gpu")
        if gpu and (self.folder / TABLE).exists():  # of the run that is gone on with
            target = Path(self.cache.name, "fused_resnet", "tuning", f"{measured.slug(gpu)}.json")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / TABLE, target)

    def left(self) -> float:
        """Seconds left for all."""
        return self.seconds - (time.monotonic() - self.began)

    def __call__(self) -> int:
        """Run the stages; 0, or 1 if something failed."""
        self.results.save()
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            todo = [name for name in budget.STAGES if name in self.stages and not self._done(name)]
            for place, name in enumerate(todo):
                self._stage(name, budget.allotted(self.left(), todo[place:]))
        except KeyboardInterrupt:
            print("stopped; what was measured is kept, --resume goes on", flush=True)
            return 130
        finally:
            signal.signal(signal.SIGTERM, previous)
            self.cache.cleanup()
            self._write_summary()
            print("\n".join(summary.lines(self.results.data)), flush=True)
        return 1 if failures(self.results.data) else 0

    def _done(self, name: str) -> bool:
        state = self.results.data["stages"].get(name)
        return bool(state) and state.get("status") == "done"

    def _stage(self, name: str, seconds: float) -> None:
        began = time.monotonic()
        state: dict[str, Any] = {"budget": round(seconds, 1), "seconds": 0.0, "status": "done"}
        if seconds < budget.LEAST:
            self._finish(name, {**state, "status": "cut", "notes": ["no time left for it"]}, began)
            return
        print(f"{name}: up to {seconds:.0f} s", flush=True)
        ends = began + seconds
        for restart in range(RESTARTS + 1):
            code, why = self._process(name, ends)
            self.results.reload()
            state["notes"] = self.results.data["stages"].get(name, {}).get("notes", [])
            if code == 0:
                if any(note.startswith("out of time") for note in state["notes"]):
                    state["status"] = "cut"
                break
            if why == "time":
                state["status"] = "cut"
                running = self.results.data["running"]
                state["notes"].append("stopped at the end of its time" + (f", in {running['key']}" if running else ""))
                self.results.data["running"] = None
                break
            blamed = self.results.blame(name, why)
            if (not blamed and code != POISONED) or restart == RESTARTS:
                state.update(status="failed", error=why)
                break
            if ends - time.monotonic() < budget.LEAST:
                state["status"] = "cut"
                break
        self._finish(name, state, began)

    def _finish(self, name: str, state: dict[str, Any], began: float) -> None:
        state["seconds"] = round(time.monotonic() - began, 1)
        self.results.data["stages"][name] = state
        self.results.data["seconds"] = round(self.before + time.monotonic() - self.began, 1)
        self.results.save()
        self._write_summary()
        print(f"{name}: {state['status']} after {state['seconds']:.0f} s", flush=True)

    def _write_summary(self) -> None:
        write(self.folder / SUMMARY, summary.markdown(self.results.data))

    def _process(self, name: str, ends: float) -> tuple[int, str]:
        """Start the stage and wait for it; its exit code, and why it is not 0."""
        seconds = max(1.0, ends - time.monotonic())
        command = [
            sys.executable,
            "-m",
            "fused_resnet.gpu.stage",
            name,
            "--out",
            str(self.folder),
            "--until",
            f"{time.time() + seconds:.1f}",
        ]
        log = self.folder / LOGS
        with log.open("ab") as output:
            start = output.tell()
            process = subprocess.Popen(
                [*command, *["--dry-run"] * self.dry],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(self.dry, Path(self.cache.name)),
                **_own_group(),
            )
            try:
                why = self._watch(process, ends + budget.grace(seconds), QUIET[name])
            finally:
                _stop(process)
        code = process.returncode
        if code and not why:
            why = _last_error(log, start) or f"exit code {code}"
            if code < 0:
                why = f"{signal.Signals(-code).name}: {why}"
        _trim(log)
        return code, why

    def _watch(self, process: subprocess.Popen[bytes], ends: float, quiet: float) -> str:
        """Wait for the end of a process, or of its time: why it has to be stopped, or nothing."""
        path = self.results.path
        while True:
            try:
                process.wait(0.2)
                return ""
            except subprocess.TimeoutExpired:
                pass
            if time.monotonic() > ends:
                return "time"
            if time.time() - path.stat().st_mtime > quiet:
                return f"no answer for {quiet:.0f} s"


def environment(dry: bool, cache: Path) -> dict[str, str]:
    """Of a stage: the checkout on the path, the interpreter in a dry run only, no settings of the person who runs it.

    ``cache`` stands for the user's cache folder, so that the user's own measured choices do not decide what is timed, and those
    of this run's tuning do.
    """
    own = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FUSED_RESNET_BACKEND")}
    root = str(Path(__file__).resolve().parents[2])
    own["PYTHONPATH"] = os.pathsep.join(filter(None, (root, own.get("PYTHONPATH", ""))))
    own["PYTHONUNBUFFERED"] = "1"
    own["XDG_CACHE_HOME"] = str(cache)
    if dry:
        own.update(TRITON_INTERPRET="1", FUSED_RESNET_BACKEND="triton")
    return own


def _own_group() -> dict[str, Any]:
    """For a process whose children shall be stopped with it."""
    return {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGTERM:
            time.sleep(0.05)
    process.wait()


def _last_error(log: Path, start: int) -> str:
    """The last line that a stage printed."""
    with log.open("rb") as stream:
        stream.seek(start)
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _trim(log: Path) -> None:
    """Keep the end of a log that got too long."""
    if log.stat().st_size > LOG:
        data = log.read_bytes()[-LOG // 2 :]
        log.write_bytes(b"[the beginning is cut off]\n" + data)


def machine_differs(data: dict[str, Any], gpu: str, torch_version: str) -> str | None:
    """Why a run cannot go on with the results of another machine, or None."""
    machine = data["machine"]
    there = (machine.get("gpu"), machine.get("versions", {}).get("torch"))
    for what, mine, theirs in zip(("GPU", "PyTorch"), (gpu, torch_version), there):
        if theirs is not None and theirs != mine:
            return f"{what} {theirs} there, {mine} here"
    return None
