"""What ends a run of two processes (gloo) before its time: all save and end, and one tells it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
import training
from test_train_data import folder, recipe  # noqa: F401 (a fixture)

from fused_resnet.train import TrainingError, fit


def work(rank: int) -> list[tuple[str, bool, int, bool]]:
    """Runs over the folders that the test made, of which each has a damaged image that one process alone comes to."""
    found = []
    for kind, where in (("ddp", "train"), ("fsdp2", "train"), ("fsdp2", "val")):
        root = Path(os.environ["FUSED_RESNET_TEST_FOLDER"])
        config = training.config(
            root / f"run {kind} {where}", recipe=recipe(), data_folder=root / where, workers=0, backend="cpu", distributed=kind,
            checkpoint_every=100, model_arguments={"dropout": 0.0}, evaluate_every=1,
        )  # fmt: skip
        with pytest.raises(TrainingError) as error:
            fit(config)
        saved = torch.load(root / f"run {kind} {where}" / "checkpoint.pt", weights_only=True)
        found.append((str(error.value), error.value.of_all, saved["step"], saved["untested"]))
    return found


def test_an_image_that_one_process_cannot_read(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All steps before it are saved, wherever the image is: among those of training or of the test."""
    for part in ("train", "val"):
        shutil.copytree(folder, tmp_path / "work" / part)
        image = tmp_path / "work" / part / part / "bee" / "0.jpg"
        image.write_bytes(image.read_bytes()[:400])
    monkeypatch.setenv("FUSED_RESNET_TEST_FOLDER", str(tmp_path / "work"))
    first, other = ranks.run("test_train_stops_together", "work", tmp_path)
    assert first == other, "every process stops behind the same step, and knows why"
    for says, of_all, step, untested in first:
        part = "val" if untested else "train"
        assert f"stopped behind step {step}: " in says and f"{Path(part) / 'bee' / '0.jpg'}: cannot be read" in says
        assert f"checkpoint.pt, of step {step}" in says and of_all and "\n" not in says
    assert [step > 0 for _, _, step, _ in first] == [True] * 3 and [entry[3] for entry in first] == [False, False, True]


@pytest.mark.slow
def test_torchrun_tells_it_once(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """The command as users start it: one line, no traceback of either process (torchrun adds its own)."""
    image = folder / "val" / "cat" / "1.png"
    image.write_text("no image")
    path = tmp_path / "short.json"
    path.write_text(json.dumps(recipe().data_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fused_resnet"]
    command += ["train", "--recipe", str(path), "--data-dir", str(folder), "--device", "cpu", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ranks.ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert result.returncode == 1
    assert result.stderr.count("fused-resnet: stopped behind step 3: ") == 1 and "TrainingError" not in result.stderr
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 3
