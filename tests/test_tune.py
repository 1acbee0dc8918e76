"""``fused-resnet tune``: what is tried, in which order, what is kept, and what wrong input gets."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet.cli import main
from fused_resnet.gpu import networks, operands, results, scope, tuning
from fused_resnet.gpu.results import Results
from fused_resnet.gpu.stage import Stage
from fused_resnet.gpu.timing import Call
from fused_resnet.gpu.tuning import Way
from fused_resnet.tuning import choice, measured
from fused_resnet.tuning.choice import Choice, candidates
from fused_resnet.whole_file import held

GPU = "NVIDIA Test 1"


def entries(kind: str = "conv", mode: str = "train") -> list[tuple[str, Any]]:
    return [
        (f"toy {mode}", use)
        for use in networks.uses(scope.TOY, 2, 16, torch.bfloat16, mode)
        if use.launch.kind == kind and use.launch.prologue in ("bn_relu", "identity")
    ]


def stage_of(folder: Path, **wanted: Any) -> Stage:
    there = Results(folder / results.NAME, results.empty(True, "2026-11-25"))
    there.data["machine"] = {"gpu": GPU}
    there.data["wanted"] = wanted
    return Stage("tuning", there, scope.toy(), torch.device("cpu"), time.monotonic() + 100)


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, float]:
    """A GPU whose times are what the test says, by a way's name; the user's cache folder is the test's own."""
    seconds: dict[str, float] = {}

    def interleaved(calls: dict[str, Call], device: torch.device, **how: Any) -> dict[str, Any]:
        for call in calls.values():
            call()
        median = {name: next((s for start, s in seconds.items() if name.startswith(start)), 9e-3) for name in calls}
        return {name: {"median": s, "low": s, "high": s, "rounds": 5} for name, s in median.items()}

    monkeypatch.setattr(tuning, "interleaved", interleaved)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    choice.forget()
    return seconds


def test_the_ways_of_a_launch() -> None:
    launch = next(use.launch for _, use in entries() if use.launch.prologue == "bn_relu")
    best = candidates(launch, "sm_90")
    default = Choice("apart", candidates(launch, "sm_90")[-1], None, "")
    found = tuning.ways(launch, "sm_90", 1, default)
    assert found[0] == Way("apart", default.tile) and found[1] == Way("fused", best[0])
    assert found[-1] == Way("vendor") and len(found) == len(set(found))
    pool = entries("max_pool")[0][1].launch
    assert {way.how for way in tuning.ways(pool, "sm_90", 5, Choice("fused", None, None, ""))} == {"fused"}


def test_the_fastest_right_way_is_kept(tmp_path: Path, clocked: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest is wrong: it is reported and not kept; behind each launch the table is on disk."""
    todo = [entry for entry in entries() if entry[1].launch.prologue == "bn_relu"]
    monkeypatch.setattr(tuning, "timed", lambda stage: todo)
    clocked.update({"fused": 1e-3, "apart": 2e-3, "vendor": 3e-3})
    original = operands.run

    def run(launch: Any, given: Any, tile: Any = None, how: str | None = None) -> Any:
        made = original(launch, given, tile, how)
        if how == "fused":
            made["y"][0, 0, 0, 0] += 100
        return made

    monkeypatch.setattr(tuning.operands, "run", run)
    stage = stage_of(tmp_path)
    tuning.run(stage)
    (row,) = stage.results.rows("tuning")
    assert row["status"] == "wrong" and "y " in row["error"]
    assert row["chosen"]["how"] == "apart" and "fused" not in row["times"]
    table = measured.read(tmp_path / tuning.TABLE)
    assert table is not None and (table.gpu, table.torch) == (GPU, torch.__version__)
    (entry,) = table.entries.values()
    assert (entry.how, entry.seconds, entry.alternatives) == ("apart", 2e-3, {"vendor": 3e-3})
    assert measured.find(todo[0][1].launch, GPU) == entry, "later stages of the run find it"


def test_what_is_measured_is_not_measured_again(
    tmp_path: Path, clocked: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "timed", lambda stage: entries("bn_add_relu"))
    path = tmp_path / "mine.json"
    first = stage_of(tmp_path, table=str(path))
    tuning.run(first)
    assert len(first.results.rows("tuning")) == 1 and len(measured.read(path).entries) == 1  # type: ignore[union-attr]
    again = stage_of(tmp_path, table=str(path))
    tuning.run(again)
    assert again.results.rows("tuning") == []
    monkeypatch.setattr(torch, "__version__", "9.9")
    newer = stage_of(tmp_path, table=str(path))
    tuning.run(newer)
    assert len(newer.results.rows("tuning")) == 1 and measured.read(path).torch == "9.9"  # type: ignore[union-attr]


def test_the_costliest_come_first(tmp_path: Path) -> None:
    stage = stage_of(tmp_path)
    one, two = entries()[:2]
    for entry, median in ((one, 1e-3), (two, 5e-3)):
        key = tuning.key_of(entry)
        stage.results.put("launches", {"key": key, "status": "ok", "roofline": 5e-4, "times": {"fused": {"median": median}}})
    assert tuning.cost(one, stage) == pytest.approx(one[1].times * 5e-4)
    assert tuning.cost(two, stage) > tuning.cost(one, stage)
    unknown = entries("dgrad")[0]
    assert tuning.cost(unknown, stage) > 0


def test_a_corrupt_table_is_named_once_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{"schema": 1, "entries"')
    with pytest.warns(UserWarning, match=r"broken\.json is ignored") as seen:
        assert tuning.known(path, GPU) == {}
    assert len(seen) == 1


@pytest.mark.slow  # make test walks through the same stage in the dry run of gpu
def test_a_dry_run_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["tune", "--dry-run", "--minutes", "3"]) == 0
    said = capsys.readouterr().out
    assert "not measured" in said and "nothing is kept" in said
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet51"], "unknown model 'resnet51'"),
        (["--minutes", "0"], "expected a number above 0"),
        (["--dtype", "fp32"], "only launches in bf16 and fp16"),
        (["--mode", "sideways"], "invalid choice"),
        ([], "--dry-run"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_table_of_another_gpu_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = tmp_path / "other.json"
    measured.write(path, measured.Table("NVIDIA Other", "2", "3", "2026-11-25", {}))
    before = path.read_bytes()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
    assert main(["tune", "--output", str(path)]) == 2
    assert "NVIDIA Other" in capsys.readouterr().err and path.read_bytes() == before


def test_two_runs_into_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The second would write what it read at its start over what the first has found since."""
    path = tmp_path / "table.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
    with held(tmp_path / ".table.json.lock"):
        assert main(["tune", "--output", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}: another run is writing into it" in error and "--output" in error and error.count("\n") == 1
