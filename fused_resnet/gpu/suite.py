"""The repository's own tests on the device: the same functions as the interpreter's, by pytest, within the time there is."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .results import Row
from .stage import Stage
from .warm import processors

#: In order of worth: what only a GPU can show, then kernel by kernel.
FILES = (
    "tests/test_gpu.py",
    "tests/kernels/test_finish.py",
    "tests/kernels/test_stats.py",
    "tests/kernels/test_dgrad.py",
    "tests/kernels/test_wgrad.py",
    "tests/kernels/test_conv.py",
    "tests/kernels/test_split.py",
    "tests/kernels/test_apart.py",
    "tests/kernels/test_bn_add_relu.py",
    "tests/kernels/test_gate.py",
    "tests/kernels/test_pool.py",
    "tests/kernels/test_entry_kernels.py",
    "tests/kernels/test_activation_kernels.py",
    "tests/kernels/test_pad.py",
)
#: What the dry run takes of them.
FEW = "tests/kernels/test_pool.py"

_STATUS = {"passed": "ok", "failed": "failed", "skipped": "skipped"}


def run(stage: Stage) -> None:
    """A row for each file, with its failures by name; a row for each failure."""
    from .correct import repository

    root = repository()
    missing = None
    if root is None:
        missing = "there are no tests beside the package: run it from a checkout"
    elif importlib.util.find_spec("pytest") is None:
        missing = "pytest is not installed"
    if missing or root is None:
        stage.results.put("tests", {"key": "pytest", "kind": "summary", "status": "skipped", "error": missing})
        return
    log = stage.folder / ".tests.jsonl"
    log.unlink(missing_ok=True)
    try:
        code, output = _pytest(stage, root, log)
        lines = list(_read(log))
    finally:
        log.unlink(missing_ok=True)
    for row in rows(lines):
        stage.results.put("tests", row)
    if not lines:
        error = f"pytest ran no test (exit code {code}): {output}"
        stage.results.put("tests", {"key": "pytest", "kind": "summary", "status": "failed", "error": error[:300]})


def _pytest(stage: Stage, root: Path, log: Path) -> tuple[int | None, str]:
    seconds = max(1.0, stage.left())
    files = [FEW] if stage.dry else [name for name in FILES if (root / name).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "fused_resnet.gpu.recorder", *files]
    command += ["-m", "not slow", "--continue-on-collection-errors", *_optional(stage.dry)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"FUSED_RESNET_TEST_LOG": str(log), "FUSED_RESNET_TEST_END": str(time.time() + 0.9 * seconds)}
    code, output = stage.watched(command, environment, seconds, root)
    if code is None:
        stage.note("out of time: the tests were stopped")
    print(output[-20000:], flush=True)
    said = [line for line in output.splitlines() if line.strip()]
    return code, said[-1] if said else ""


def _optional(dry: bool) -> Iterator[str]:
    """Options of plugins that may be there."""
    if dry:
        yield from ("-k", "test_no_images or test_one_kernel_start_each")
    if importlib.util.find_spec("xdist") is not None:
        workers = 0 if dry else min(6, processors() // 2)
        yield from (("-n", str(workers)) if workers > 1 else ("-p", "no:xdist"))
    if importlib.util.find_spec("pytest_benchmark") is not None:
        yield from ("-p", "no:benchmark")


def _read(log: Path) -> Iterator[dict[str, Any]]:
    if not log.exists():
        return
    for text in log.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # killed in the middle of it
            continue
        yield line


def rows(lines: list[dict[str, Any]]) -> list[Row]:
    """A row for each file, and one for each test that failed."""
    from .recorder import LATE

    by_file: dict[str, dict[str, int]] = {}
    made = []
    for line in lines:
        counts = by_file.setdefault(line["test"].partition("::")[0], {"passed": 0, "failed": 0, "skipped": 0, "late": 0})
        late = line["outcome"] == "skipped" and LATE in line["reason"]
        counts["late" if late else line["outcome"]] += 1
        if line["outcome"] == "failed":
            made.append({"key": line["test"], "kind": "test", "status": "failed", "error": line["reason"]})
    files = []
    for name, counts in by_file.items():
        status = "failed" if counts["failed"] else "ok" if counts["passed"] else "skipped"
        error = f"{counts['failed']} tests" if counts["failed"] else None
        files.append({"key": name, "kind": "file", "status": status, "error": error, **counts})
    return [*files, *made]
