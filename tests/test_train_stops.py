"""What ends a run before its time: one line that says why and where the last good checkpoint is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training

from fused_resnet.train import TrainingError, WarmUp, data, files, fit, loop


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
