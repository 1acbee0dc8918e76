"""fused-resnet paper: options that are passed on to the trainer, and images that cannot be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_paper import fake  # noqa: F401 (a fixture)
from test_train_data import damage, folder  # noqa: F401 (a fixture)
from test_train_data import recipe as folder_recipe

from fused_resnet.cli import main
from fused_resnet.paper import runs as runner
from fused_resnet.paper import worker
from fused_resnet.paper.scales import SCALES, Run


def test_the_trainers_options_reach_the_runs(
    fake: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of images in files those of files, too. Runs with another element type are no runs of a set, whatever else differs."""
    out = tmp_path / "out"
    command = ["paper", "--scale", "imagenet", "--out", str(out), "--device", "cpu", "--data-dir", str(tmp_path)]
    more = ["--amp", "bf16", "--compile", "--memory", "low", "--backend", "eager", "--workers", "0", "--on-corrupt", "skip"]
    assert main([*command, *more]) == 0
    told = json.loads((out / "plain18-seed0" / "job.json").read_text())
    wanted = {"device": "cpu", "amp": "bf16", "compile": True, "memory": "low", "backend": "eager", "workers": 0}
    assert {**told, **wanted, "on_corrupt": "skip"} == told
    assert main([*command, "--draw", "--amp", "bf16"]) == 0
    capsys.readouterr()
    assert main([*command, "--draw"]) == 2
    assert "is of amp 'bf16', not 'off': name another --out" in capsys.readouterr().err
    done = out / "plain18-seed0" / "done.json"
    done.write_text(json.dumps({name: value for name, value in json.loads(done.read_text()).items() if name != "amp"}))
    assert main([*command, "--draw", "--amp", "bf16"]) == 2
    assert "is of amp 'off', not 'bf16'" in capsys.readouterr().err, "written before there was a choice"


def test_networks_keep_their_own_memory_where_none_is_asked_for(fake: Path, tmp_path: Path) -> None:  # noqa: F811
    """Those of 110 layers and more choose less; ``default`` passed on would take it from them."""
    out = tmp_path / "out"
    assert main(["paper", "--scale", "imagenet", "--out", str(out), "--device", "cpu", "--data-dir", str(tmp_path)]) == 0
    assert json.loads((out / "plain18-seed0" / "job.json").read_text())["memory"] is None


@pytest.mark.parametrize("scale", ["tiny", "cifar"])
@pytest.mark.parametrize("option", [("--workers", "2"), ("--on-corrupt", "stop")])
def test_what_is_for_images_in_files(
    scale: str, option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["paper", "--scale", scale, "--out", str(tmp_path / "out"), *option]) == 2
    error = capsys.readouterr().err
    assert error == f"fused-resnet: error: {option[0]}: for --scale imagenet, whose images are files, got --scale {scale}\n"
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_is_one_line_and_may_be_skipped(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the worker, which ends with 1 and no traceback, and trains the rest where it may."""
    damage(folder)
    (tmp_path / "recipe.json").write_text(json.dumps(folder_recipe().data_dict()), encoding="utf-8")
    scale = replace(SCALES["imagenet"], recipe=str(tmp_path / "recipe.json"), responses=("cifar_resnet8",))
    run = Run("cifar_resnet8", 0)
    for on_corrupt, code in (("stop", 1), ("skip", 0)):
        options = runner.Options(tmp_path / on_corrupt, 1, 1, folder, "cpu", "cpu", workers=0, on_corrupt=on_corrupt)
        (tmp_path / on_corrupt / run.name).mkdir(parents=True)
        job = tmp_path / "job.json"
        job.write_text(json.dumps(runner.job_of(scale, run, options)), encoding="utf-8")
        assert worker.main(str(job)) == code
        error = capsys.readouterr().err
        assert worker.is_done(options.out, run) == (not code)
        if code:
            assert "cannot be read as an image" in error and error.count("\n") == 1 and "TrainingError" not in error
