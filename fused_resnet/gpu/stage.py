"""One stage, as a process of its own: ``python -m fused_resnet.gpu.stage NAME --out DIR --until T [--dry-run]``.

Not for people: :mod:`.conductor` starts it. It exits with 0 when the stage is through or its time is over, with
:data:`POISONED` when an error has left the device's context useless, so that the conductor starts it again behind that row.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import scope as scopes
from .budget import STAGES
from .results import NAME, Results, Row
from .scope import Scope

POISONED = 7
_Item = TypeVar("_Item")


@dataclass
class Stage:
    """What a stage's module is given: ``run(stage)``.

    Attributes:
        name: of the stage.
        results: where rows go.
        scope: what to go through.
        device: the GPU; the CPU in a dry run.
        ends: when to stop, by ``time.monotonic``.
        notes: said next to the stage in the summary.
    """

    name: str
    results: Results
    scope: Scope
    device: torch.device
    ends: float
    notes: list[str] = field(default_factory=list)

    @property
    def dry(self) -> bool:
        """Nothing is measured: there is no GPU."""
        return not self.results.measured

    @property
    def folder(self) -> Path:
        """Where files go."""
        return self.results.path.parent

    def left(self) -> float:
        """Seconds that the stage may still take."""
        return self.ends - time.monotonic()

    def note(self, text: str) -> None:
        """Say something next to the stage."""
        self.notes.append(text)
        print(f"  {text}", flush=True)

    def watched(
        self, command: Sequence[str], environment: Mapping[str, str], seconds: float, folder: Path | None = None
    ) -> tuple[int | None, str]:
        """Run a program that makes no rows: its exit code, None if its time was over, and what it printed.

        The results are touched meanwhile, which tells the conductor that this process does not hang.
        """
        ends = time.monotonic() + max(1.0, seconds)
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            with subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:
                while process.poll() is None and time.monotonic() < ends:
                    try:
                        process.wait(min(5.0, max(0.1, ends - time.monotonic())))
                    except subprocess.TimeoutExpired:
                        self.results.path.touch()
                late = process.poll() is None
                if late:
                    process.kill()
            output.seek(0)
            return (None if late else process.returncode), output.read()

    def each(self, part: str, items: Iterable[_Item], key: Callable[[_Item], str], work: Callable[[_Item], Row]) -> None:
        """``work(item)`` makes the row of each item that has none yet, until the time is over.

        An error becomes the row's; if the device is lost with it, this process ends and another goes on behind the row.
        """
        items = [item for item in items if self.results.row(part, key(item)) is None]
        for place, item in enumerate(items):
            if self.left() <= 0:
                self.note(f"out of time: {len(items) - place} of {len(items)} {part} left out")
                return
            self.results.begin(self.name, part, key(item))
            row, fatal = attempt(lambda item=item: work(item), self.device)  # type: ignore[misc]
            self.results.put(part, {"key": key(item), **row})
            print(f"  {key(item)}: {row['status']}", flush=True)
            if fatal:
                sys.exit(POISONED)


def attempt(work: Callable[[], Row], device: torch.device) -> tuple[Row, bool]:
    """The row that ``work`` makes, or that its error makes; and whether the device is lost."""
    try:
        return work(), False
    except torch.OutOfMemoryError as error:
        problem, status = describe(error), "out of memory"
    except Exception as error:
        problem, status = describe(error), "failed"
    # Outside the handler: the error's frames hold tensors.
    if device.type != "cuda":
        return {"status": status, "error": problem}, False
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception:
        return {"status": "crashed", "error": problem}, True
    return {"status": status, "error": problem}, False


def describe(error: BaseException) -> str:
    """An error on one line: its type, and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def _end_with_parent() -> None:
    """A stage whose conductor was killed must not go on by itself."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="when to stop, by time.time(): importing PyTorch counts")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args(argv)
    _end_with_parent()
    results = Results.open(arguments.out / NAME)
    if arguments.dry_run:
        device, scope = torch.device("cpu"), scopes.toy()
    else:
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        scope = scopes.full(torch.cuda.get_device_properties(device).total_memory)
    wanted = results.data.get("wanted", {})
    scope = scopes.narrowed(scope, wanted)
    ends = time.monotonic() + arguments.until - time.time()
    stage = Stage(arguments.name, results, scope, device, ends)
    module: Any = importlib.import_module(f"fused_resnet.gpu.{arguments.name}")
    try:
        module.run(stage)
    finally:
        results.data["stages"].setdefault(arguments.name, {})["notes"] = stage.notes
        results.data["running"] = results.data["running"] if sys.exc_info()[0] else None
        results.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
