"""``fused-resnet gpu``: the whole way in a dry run, and what happens when a stage fails, hangs or has no time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet.cli import main
from fused_resnet.gpu import budget, conductor, results, stage, summary
from fused_resnet.gpu.conductor import Run
from fused_resnet.gpu.results import Results, ResultsError
from fused_resnet.gpu.stage import POISONED, Stage, attempt
from fused_resnet.tuning import measured
from fused_resnet.whole_file import LOCK, held

KINDS = {"conv", "bn_add_relu", "bn_add_relu_backward", "dgrad", "wgrad", "max_pool", "max_pool_backward"}


# ---- the dry run


def test_a_dry_run_goes_through_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All stages, started as a user would; one test, since it takes most of a minute."""
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "fused_resnet", "gpu", "--out", str(folder), "--minutes", "9", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + (folder / conductor.LOGS).read_text()
    data = results.load(folder / results.NAME)
    _every_stage(data)
    _no_times(data, folder)
    _few_files_and_a_short_summary(folder, done.stdout)

    before = (folder / results.NAME).read_bytes()
    assert main(["gpu", "--out", str(folder), "--dry-run"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (folder / results.NAME).read_bytes() == before
    assert main(["gpu", "--out", str(folder), "--dry-run", "--resume"]) == 0
    assert "up to" not in capsys.readouterr().out, "what is done was started again"


def _every_stage(data: dict[str, Any]) -> None:
    assert {name: state["status"] for name, state in data["stages"].items()} == dict.fromkeys(budget.STAGES, "done")
    assert all(row["status"] == "ok" or row["kind"] == "sanitizer" for part in results.PARTS for row in data[part])
    assert {row["key"].split()[0] for row in data["checks"]} == KINDS
    assert all(row["bitwise_twice"] and row["relative_error"] <= row["allowed"] for row in data["checks"])
    assert sum(row.get("passed", 0) for row in data["tests"]) == 2
    assert {row["kind"] for row in data["launches"]} == {row["kind"] for row in data["tuning"]} == KINDS
    assert {"fused", "apart", "vendor"} <= {how for row in data["tuning"] for how in row["times"]}
    assert {row["mode"] for row in data["models"]} == {"infer", "train"} and data["models"][-1]["compiled"] == "default"
    assert [row["errors"]["fused"] < (0.4 if row["mode"] == "train" else 0.02) for row in data["models"][:2]] == [True, True]
    assert {line["kind"] for line in data["profile"][0]["lines"]} == KINDS


def _no_times(data: dict[str, Any], folder: Path) -> None:
    times = [time for part in results.PARTS for row in data[part] for _, time in results.times_of(row)]
    assert len(times) > 30 and set(times) == {None}
    assert data["measured"] is False and data["grade"] == "interpreted"
    assert "not measured" in (folder / conductor.SUMMARY).read_text()


def _few_files_and_a_short_summary(folder: Path, output: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    assert {path.name for path in files} == {results.NAME, conductor.TABLE, conductor.SUMMARY, conductor.LOGS}
    assert all(path.stat().st_size < 16 << 20 for path in files)
    lines = output.splitlines()
    assert len(lines) - lines.index("no failures") <= summary.LINES
    table = measured.read(folder / conductor.TABLE)
    assert table is not None and dict(table.entries) == {}


# ---- the conductor


def fake(monkeypatch: pytest.MonkeyPatch, behave: Any) -> list[str]:
    """Stages as functions of the results: they write rows as the processes would; a list of those started."""
    started: list[str] = []

    def process(self: Run, name: str, ends: float) -> tuple[int, str]:
        started.append(name)
        there = Results.open(self.results.path)
        there.data["stages"].setdefault(name, {})["notes"] = []
        there.save()
        code, why = behave(name, there, len(started))
        return code, why

    monkeypatch.setattr(Run, "_process", process)
    return started


def run(folder: Path, **how: Any) -> tuple[int, dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    code = Run(folder, how.pop("seconds", 540), True, **how)()
    return code, results.load(folder / results.NAME)


def test_a_crash_costs_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def behave(name: str, there: Results, turn: int) -> tuple[int, str]:
        for key in "abc":
            if name == "launches" and there.row("launches", key) is None:
                there.begin(name, "launches", key)
                if key == "b":
                    return -11, "SIGSEGV: at a bad place"
                there.put("launches", {"key": key, "status": "ok", "times": {}, "signature": key, "uses": 1})
        return 0, ""

    started = fake(monkeypatch, behave)
    code, data = run(tmp_path / "out")
    assert code == 1 and started.count("launches") == 2 and started[-1] == "compiled"
    assert [(row["key"], row["status"]) for row in data["launches"]] == [("a", "ok"), ("b", "crashed"), ("c", "ok")]
    assert data["stages"]["launches"]["status"] == "done"
    said = capsys.readouterr().out.splitlines()
    first = said.index("1 failures")
    assert said[first + 1] == "  FAILED launches: b: crashed: SIGSEGV: at a bad place"


def test_a_lost_device_starts_the_stage_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = fake(
        monkeypatch, lambda name, there, turn: (POISONED, "x") if started.count("checks") == 0 and turn == 2 else (0, "")
    )
    code, _ = run(tmp_path / "out")
    assert (code, started[:4]) == (0, ["machine", "correct", "correct", "launches"])


def test_a_stage_that_cannot_start_fails_once_and_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = fake(monkeypatch, lambda name, there, turn: (1, "ImportError: no") if name == "correct" else (0, ""))
    code, data = run(tmp_path / "out")
    assert code == 1 and started == list(budget.STAGES)
    assert data["stages"]["correct"]["status"] == "failed"
    assert results.failures(data) == ["stage correct: ImportError: no"]


def test_a_stage_that_always_crashes_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def behave(name: str, there: Results, turn: int) -> tuple[int, str]:
        if name != "launches":
            return 0, ""
        there.begin(name, "launches", f"row {turn}")
        return -9, "SIGKILL"

    started = fake(monkeypatch, behave)
    _, data = run(tmp_path / "out")
    assert started.count("launches") == conductor.RESTARTS + 1
    assert data["stages"]["launches"]["status"] == "failed" and started[-1] == "compiled"


def test_time_over_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def behave(name: str, there: Results, turn: int) -> tuple[int, str]:
        if name == "tuning":
            there.put("tuning", {"key": "a", "status": "ok"})
            there.begin(name, "tuning", "b")
            return -9, "time"
        return 0, ""

    fake(monkeypatch, behave)
    code, data = run(tmp_path / "out")
    assert code == 0 and data["stages"]["tuning"]["status"] == "cut"
    assert "in b" in data["stages"]["tuning"]["notes"][-1]
    assert [row["key"] for row in data["tuning"]] == ["a"] and data["running"] is None


def test_resume_goes_on_with_what_was_cut_or_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = {"correct": (1, "broken"), "tuning": (-9, "time")}
    fake(monkeypatch, lambda name, there, turn: statuses.get(name, (0, "")))
    run(tmp_path / "out")
    started = fake(monkeypatch, lambda name, there, turn: (0, ""))
    code, data = run(tmp_path / "out", resume=True)
    assert started == ["correct", "tuning"] and code == 0
    assert {state["status"] for state in data["stages"].values()} == {"done"}


def test_no_time_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = fake(monkeypatch, lambda name, there, turn: (0, ""))
    _, data = run(tmp_path / "out", seconds=20)
    assert "machine" not in started and data["stages"]["machine"]["notes"] == ["no time left for it"]


def test_a_hanging_process_is_stopped_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real start of a process, with a stage that sleeps in a child of its own."""
    monkeypatch.setattr(conductor, "QUIET", dict.fromkeys(budget.STAGES, 1.0))
    monkeypatch.setattr(conductor, "RESTARTS", 0)
    marker = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(marker)!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    original = subprocess.Popen
    monkeypatch.setattr(conductor.subprocess, "Popen", lambda command, **how: original([sys.executable, "-c", code], **how))
    (tmp_path / "out").mkdir()
    began = time.monotonic()
    assert Run(tmp_path / "out", 100, True, ["machine"])() == 1
    assert time.monotonic() - began < 15
    assert "no answer for 1 s" in results.load(tmp_path / "out" / results.NAME)["stages"]["machine"]["error"]
    time.sleep(max(0.0, 5 - (time.monotonic() - began)))
    assert not marker.exists()


def test_stages_see_the_interpreter_only_in_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "cpu")
    assert "TRITON_INTERPRET" not in conductor.environment(False, tmp_path)
    assert "FUSED_RESNET_BACKEND" not in conductor.environment(False, tmp_path)
    dry = conductor.environment(True, tmp_path)
    assert (dry["TRITON_INTERPRET"], dry["FUSED_RESNET_BACKEND"]) == ("1", "triton")
    assert dry["XDG_CACHE_HOME"] == str(tmp_path)


# ---- time


def test_what_a_stage_leaves_the_later_ones_get() -> None:
    stages = list(budget.STAGES)
    assert budget.allotted(540, stages) == pytest.approx((540 - budget.END) * 25 / 525)
    assert budget.allotted(500, ["models"]) == 500 - budget.END
    assert budget.allotted(300, ["models", "profile"]) > budget.allotted(200, ["models", "profile"])
    left, spent = 540.0, []
    for place in range(len(stages)):
        spent.append(budget.allotted(left, stages[place:]))
        left -= spent[-1]
    assert sum(spent) == pytest.approx(540 - budget.END) and left == pytest.approx(budget.END)


# ---- a stage's rows


def stage_of(folder: Path, seconds: float = 60) -> Stage:
    from fused_resnet.gpu import scope

    there = Results(folder / results.NAME, results.empty(False, "2026-11-25"))
    return Stage("launches", there, scope.toy(), torch.device("cpu"), time.monotonic() + seconds)


def test_rows_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    here = stage_of(tmp_path)
    here.results.put("launches", {"key": "a", "status": "crashed"})
    made: list[str] = []
    here.each("launches", "ab", str, lambda key: made.append(key) or {"status": "ok"})
    assert made == ["b"]
    assert [row["status"] for row in results.load(tmp_path / results.NAME)["launches"]] == ["crashed", "ok"]


def test_out_of_time_is_noted(tmp_path: Path) -> None:
    here = stage_of(tmp_path, seconds=0)
    here.each("launches", "abc", str, lambda key: {"status": "ok"})
    assert here.notes == ["out of time: 3 of 3 launches left out"] and here.results.rows("launches") == []


def test_errors_become_rows() -> None:
    def raising(error: Exception) -> Any:
        def work() -> dict[str, Any]:
            raise error

        return attempt(work, torch.device("cpu"))

    row, fatal = raising(RuntimeError("\n\nfirst line\nsecond"))
    assert (row, fatal) == ({"status": "failed", "error": "RuntimeError: first line"}, False)
    assert raising(torch.OutOfMemoryError("no"))[0]["status"] == "out of memory"


def test_a_lost_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(stage.torch.cuda, "synchronize", lost)
    row, fatal = attempt(lambda: lost() or {}, torch.device("cuda", 0))
    assert fatal and row["status"] == "crashed" and "illegal memory access" in row["error"]


# ---- the file


def test_a_file_of_another_schema(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**results.empty(True, ""), "schema": 99}))
    with pytest.raises(ResultsError, match=r"r\.json: results of schema 99, this version reads 1"):
        results.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "no results"), ('{"schema": 1}', "not whole"), (None, "cannot be read")],
)
def test_a_file_that_is_none(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ResultsError, match=message):
        results.load(path)


def test_a_dry_run_cannot_hold_times() -> None:
    data = results.empty(False, "")
    data["launches"] = [
        {"key": "a", "status": "ok", "times": {"fused": {"median": 1e-3, "low": 1e-3, "high": 1e-3, "rounds": 5}}}
    ]
    with pytest.raises(ResultsError, match="'a' has a time for 'fused', but nothing was measured"):
        results.check(data, "r.json")
    assert results.check({**data, "measured": True}, "r.json")


def test_a_killed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Results(tmp_path / "r.json", results.empty(True, ""))
    there.save()
    before = there.path.read_text()
    monkeypatch.setattr(results.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        there.put("launches", {"key": "a", "status": "ok"})
    assert there.path.read_text() == before and [path.name for path in tmp_path.iterdir()] == ["r.json"]


# ---- wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "expected a number above 0"),
        (["--stages", "models,lunch"], "got 'lunch'"),
        ([], "--dry-run"),
    ],
)
def test_wrong_input(tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["gpu", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["gpu", "--out", str(tmp_path / "file" / "out"), "--dry-run"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_two_runs_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Anew or going on: the second one is refused and starts nothing; with the end of the first it may."""
    started = fake(monkeypatch, lambda name, there, turn: (0, ""))
    out = tmp_path / "out"
    command = ["gpu", "--out", str(out), "--dry-run", "--stages", "machine"]
    out.mkdir()
    with held(out / LOCK):
        for more in ([], ["--resume"]):
            assert main([*command, *more]) == 2
            error = capsys.readouterr().err
            assert f"{out}: another run is writing into it" in error and "--out" in error and error.count("\n") == 1
        assert started == [] and [path.name for path in out.iterdir()] == [LOCK]
    assert main(command) == 0 and started == ["machine"]


@pytest.mark.parametrize("key", ["stages", "seconds", "running", "begun"])
def test_going_on_behind_a_damaged_file_is_refused(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = results.empty(False, "")
    del data[key]
    (tmp_path / results.NAME).write_text(json.dumps(data))
    assert main(["gpu", "--out", str(tmp_path), "--dry-run", "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"results.json: not whole: '{key}' is missing" in error and error.count("\n") == 1


def test_going_on_elsewhere_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = results.empty(True, "")
    (tmp_path / results.NAME).write_text(json.dumps(data))
    assert main(["gpu", "--out", str(tmp_path), "--dry-run", "--resume"]) == 2
    assert "measured" in capsys.readouterr().err
    data["machine"] = {"gpu": "NVIDIA H100", "versions": {"torch": "2.11.0"}}
    assert conductor.machine_differs(data, "NVIDIA H200", "2.11.0") == "GPU NVIDIA H100 there, NVIDIA H200 here"
    assert conductor.machine_differs(data, "NVIDIA H100", "2.12.0") == "PyTorch 2.11.0 there, 2.12.0 here"
    assert conductor.machine_differs(data, "NVIDIA H100", "2.11.0") is None
