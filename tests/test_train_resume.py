"""A run that is interrupted, in whatever way and moment, ends at the same weights, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training

from fused_resnet.train import Plateau, Row, WarmUp, fit, logs

ROOT = Path(__file__).resolve().parents[1]


def contents(folder: Path) -> dict[str, Any]:
    """The checkpoint of a run, without the times in it."""
    saved: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    saved["window"] = [sums[:3] for sums in saved["window"]]
    return saved


def rows(folder: Path) -> list[Row]:
    """The log of a run, without the times in it."""
    return [replace(row, images_per_second=0.0) for row in logs.read(folder / "log.csv")]


def check_same(folder: Path, whole: Path) -> None:
    assert training.same(contents(folder), contents(whole)) == []
    best = [torch.load(path / "best.pt", weights_only=True) for path in (folder, whole)]
    assert training.same(*best) == []
    assert rows(folder) == rows(whole)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_in_pieces(backend: str, tmp_path: Path) -> None:
    """Ends between rows of the log and between checkpoints' turns, with weights' average, momenta, warm-up and dropout."""
    steps = training.recipe(length=12, warm_up=WarmUp(4, 0.2))
    whole = training.config(tmp_path / "whole", recipe=steps, backend=backend)
    fit(whole)
    pieces = replace(whole, out=tmp_path / "pieces")
    for stop in (4, 7, 0):
        torch.manual_seed(stop)  # a new process does not start with the old one's random state
        history = fit(replace(pieces, stop_after=stop, resume=stop != 4))
        assert (history.step, history.finished) == (stop or 12, stop == 0)
    check_same(tmp_path / "pieces", tmp_path / "whole")


def test_a_plateau_in_pieces(tmp_path: Path) -> None:
    """The rate is divided where the errors of the epochs say so, and at the same steps in pieces that end anywhere."""
    steps = training.recipe(batch=256, length=40, lr=0.2, schedule="plateau", plateau=Plateau(10, 0.1, 2), factor=0.5, ema=None)
    whole = training.config(tmp_path / "whole", recipe=steps, backend="cpu", log_every=1)
    per_epoch, found = 1433 // 256, [row for row in fit(whole).rows if row.split == "train"]
    best, since, rate, rates = 2.0, 0, 0.2, [0.2] * per_epoch
    for epoch in range(1, 8):
        step = epoch * per_epoch
        error = sum(row.error for row in found[step - per_epoch : step]) / per_epoch
        if error < best - 0.1:
            best, since = error, step
        elif step - since >= 10 and rate > 0.05:
            rate, since = rate / 2, step
        rates += [rate] * per_epoch
    assert [row.lr for row in found] == pytest.approx(rates) and len({*rates}) > 1 and best < 0.85, "some of each"
    for stop in (3, 5, 14, 25, 36, 0):
        fit(replace(whole, out=tmp_path / "pieces", stop_after=stop, resume=True))
    check_same(tmp_path / "pieces", tmp_path / "whole")
    ends = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("pieces", "whole")]
    assert ends[0]["falling"] == ends[1]["falling"] and ends[0]["falling"]["divided"] >= 1


@pytest.mark.slow
def test_in_pieces_on_triton(tmp_path: Path) -> None:
    """Through the interpreter where there is no GPU: three steps, and one and two. No evaluation, whose images are 364."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    config = training.config(tmp_path / "whole", recipe=training.recipe(batch=4), backend="triton", device=where)
    fit(replace(config, stop_after=3))
    for stop in (1, 3):
        fit(replace(config, out=tmp_path / "pieces", stop_after=stop, resume=True))
    assert training.same(contents(tmp_path / "pieces"), contents(tmp_path / "whole")) == []


def kill(folder: Path, backend: str, moments: list[str], same: Callable[[Path, Path], None] = check_same) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "killing.py"), str(folder), backend, *moments]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("killed") >= 3 * len(moments) / 4, result.stdout
    for index in range(len(moments)):
        same(folder / str(index), folder / "whole")


def moment(step: int, seconds: float = 0.02) -> str:
    """By chance, up to so long after a step began, which may be in the next."""
    return f"step:{step}:{seconds * torch.rand(()):.4f}"


def test_killed(tmp_path: Path) -> None:
    """Before the third file is in its place (the log, then two checkpoints), after the second, and by chance."""
    kill(tmp_path, "cpu", ["before:3", "after:2", moment(10)])


@pytest.mark.slow
def test_killed_while_it_evaluates(tmp_path: Path) -> None:
    """Early in the first evaluation and later in the second; before and behind the best weights are in their place."""
    kill(tmp_path, "cpu", ["evaluation:1:0.001", "evaluation:2:0.01", "before:1:best.pt", "after:1:best.pt"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_killed_at_twenty_moments(backend: str, tmp_path: Path) -> None:
    kill(tmp_path, backend, [moment(index) for index in range(20)])


@pytest.mark.slow
def test_killed_on_triton(tmp_path: Path) -> None:
    """Through the interpreter, three steps; nothing is evaluated."""

    def same(folder: Path, whole: Path) -> None:
        assert training.same(contents(folder), contents(whole)) == []

    kill(tmp_path, "triton", [moment(0, 1.0), moment(1, 1.0), moment(2, 0.1), "before:2:checkpoint.pt"], same)
