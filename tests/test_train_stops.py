"""What ends a run before its time: one line that says why and where the last good checkpoint is."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
from test_train_data import folder, recipe  # noqa: F401 (a fixture)
from torch import nn

from fused_resnet.train import TrainingError, WarmUp, data, files, fit, loop
from fused_resnet.train.errors import ended_elsewhere

ROOT = Path(__file__).resolve().parents[1]


def written(out: Path) -> set[str]:
    """Names of the files of a run; the file that is locked may stay or not."""
    return {path.name for path in out.iterdir()} - {files.LOCK}


def stopped(out: Path, says: str, rate: float) -> None:
    """A run whose rate rises behind step 3 stops; what is left is of finite weights."""
    recipe = training.recipe(
        lr=rate, schedule="constant", warm_up=WarmUp(3, 1e-3 / rate, "constant"), weight_decay=0.0, length=40
    )
    with pytest.raises(TrainingError, match=says) as error:
        fit(training.config(out, recipe=recipe, backend="cpu"))
    assert "\n" not in str(error.value)
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["model"].values()) and saved["step"] == 3


def test_a_loss_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named with its step; where only the weights are not finite yet, they are not saved."""
    last = r"; the last good checkpoint is .*\.pt, of step 3"
    stopped(tmp_path / "loss", r"stopped: the loss of step [56] is (nan|inf)" + last, 1e38)
    real = loop._Run._step

    def step(self: loop._Run, got: data.Batch) -> None:
        real(self, got)
        if self.state.step == 6:
            with torch.no_grad():
                next(self.state.model.parameters())[0, 0, 0, 0] = float("inf")

    monkeypatch.setattr(loop._Run, "_step", step)
    stopped(tmp_path / "weights", r"stopped: after step 6 0\.0\.weight is not finite" + last, 1e-3)


@pytest.mark.parametrize("tested", [True, False])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_best_weights_are_finite(ema: float | None, tested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate so large that the losses of both steps are finite still, but not the weights behind: none are written, whatever
    the test found.
    """
    if not tested:
        monkeypatch.setattr(loop.metrics, "evaluate", lambda *_: (0.5, 0.5, 364, []))
    recipe = training.recipe(lr=2e9, weight_decay=1.0, length=2, schedule="constant", ema=ema)
    with pytest.raises(TrainingError, match=r"stopped: after step 2 .* is not finite; there is no checkpoint yet"):
        fit(training.config(tmp_path / "run", recipe=recipe, backend="cpu", checkpoint_every=100))
    assert written(tmp_path / "run") == {"log.csv"}


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_test_loss_that_is_not_finite_is_no_best(loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its error: scores that are NaN are right where the first class is."""
    found = iter([(0.5, 0.5, 364, []), (loss, 0.1, 364, [])])
    monkeypatch.setattr(loop.metrics, "evaluate", lambda *_: next(found))
    recipe = training.recipe(length=2, unit="epochs", batch=512)
    history = fit(training.config(tmp_path, recipe=recipe, backend="cpu", evaluate_every=1))
    assert history.best == 0.5 and torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 2


def killer(num_classes: int) -> nn.Module:
    """A network that ends a process that decodes images behind a few calls."""

    def kill(*_: object) -> None:
        nonlocal calls
        calls += 1
        workers = multiprocessing.active_children()
        if calls > 6 and workers:
            os.kill(workers[0].pid or 0, signal.SIGKILL)

    calls, net = 0, training.small(num_classes, dropout=0.0)
    net.register_forward_pre_hook(kill)
    return net


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX")
def test_a_decoding_worker_that_is_killed(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """As by a system that runs out of memory: one line, in training and in evaluation."""
    path = tmp_path / "short.json"
    path.write_text(json.dumps({**recipe().data_dict(), "length": 500}))
    where = ["--device", "cpu", "--data-dir", str(folder), "--workers", "2"]

    def line(*command: str) -> str:
        """In a process of its own: the signal of a worker's end comes wherever the program is."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        command = (sys.executable, "-m", "fused_resnet", *command, *where)
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        said = [line for line in result.stderr.splitlines() if line.startswith("fused-resnet: ")]
        # the other worker may say on stderr that its parent has gone
        assert result.returncode == 1 and len(said) == 1 and "RuntimeError" not in result.stderr, result.stderr
        return said[0]

    train = ["train", "--recipe", str(path), "--out", str(tmp_path / "run"), "--model", f"{__file__}:killer"]
    said = line(*train, "--checkpoint-every", "1", "--evaluate-every", "1000")
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert said.startswith("fused-resnet: stopped at step ") and said.endswith(f"checkpoint.pt, of step {step}")
    assert "a process that decodes images failed (DataLoader worker (pid" in said
    for copy in range(60):
        shutil.copy(folder / "val" / "bee" / "0.jpg", folder / "val" / "bee" / f"more {copy}.jpg")
    said = line("evaluate", str(tmp_path / "run" / "checkpoint.pt"), "--batch", "2")
    assert " of 66 images: a process that decodes images failed (DataLoader worker" in said


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "DataLoader worker (pid(s) 7) exited unexpectedly",
            "a process that decodes images failed (DataLoader worker (pid(s) 7)",
        ),
        ("[/w/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer", "another process of the run ended"),
        ("NCCL communicator was aborted on rank 1.\nmore", "another process of the run ended"),
        ("mat1 and mat2 shapes cannot be multiplied", ""),
        ("", ""),
    ],
)
def test_what_ended_elsewhere(said: str, told: str) -> None:
    """Errors of PyTorch that are not this process's; all others stay as they are."""
    found = ended_elsewhere(RuntimeError(said)) or ""
    assert found.startswith(told) and bool(found) == bool(told)
