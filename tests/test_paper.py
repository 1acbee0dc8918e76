"""fused-resnet paper: runs, what is read off their logs, figures and the page, with logs that are made up here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fused_resnet import count_launches
from fused_resnet.cli import main
from fused_resnet.models import NAMES
from fused_resnet.paper import runs as runner
from fused_resnet.paper import worker
from fused_resnet.paper.files import LogError
from fused_resnet.paper.networks import make, responses
from fused_resnet.paper.page import draw
from fused_resnet.paper.results import Outcome, Row, Spread, collect, read, verdict
from fused_resnet.paper.scales import SCALES, Run
from fused_resnet.train import UsageError
from fused_resnet.train import recipe as recipes

TINY = SCALES["tiny"]
ROOT = Path(__file__).resolve().parents[1]
WHERE = {"device": "a CPU", "versions": {"torch": "2"}, "date": "2026-01-01", "evidence": "made up"}

#: Stands for the worker: errors by network, a little more for each seed.
FAKE = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
job = json.loads(Path(sys.argv[1]).read_text())
out = Path(job["out"])
if job["network"] == "{broken}":
    sys.exit("no such luck")
last = {{"cifar_plain56": 0.5, "cifar_plain20": 0.2}}.get(job["network"], 0.1) + 0.01 * job["seed"]
rows = ["step,epoch,split,loss,error"]
for step in range(1, 9):
    rows.append(f"{{step}},{{step / 2}},train,1.0,{{0.9 if step < 7 else last}}")
rows.append(f"8,4,test,1.0,{{last / 2}}")
(out / "log.csv").write_text("\\n".join(rows) + "\\n")
if job["responses"]:
    (out / "responses.json").write_text(json.dumps([2.0 if "plain" in job["network"] else 1.0] * 5))
(out / "done.json").write_text(json.dumps({{**job, "processor_seconds": 90.0}}))
"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command with :data:`FAKE` in place of the worker; the file to write it into."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(broken=""), encoding="utf-8")
    real = runner.everything

    def everything(scale: object, options: object, tell: object) -> None:
        real(scale, options, tell, command=(sys.executable, str(script)))  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "everything", everything)
    return script


def test_scales_name_networks_and_recipes_that_are_there() -> None:
    for scale in SCALES.values():
        for name in scale.networks if scale is TINY else ():
            with torch.device("meta"):
                assert make(10, name).fc.out_features == 10
        assert all(re.sub("_([abc]|1x1)$", "", name) in NAMES for name in scale.networks)
        assert recipes.load(scale.recipe).data == scale.data
        assert set(scale.deep) <= set(scale.networks) and set(scale.responses) <= set(scale.networks)
        assert len(scale.plain) > max(scale.compared) and len(scale.residual) > max(scale.compared)
        runs = scale.runs(2)
        assert len(set(runs)) == len(runs) == 2 * len(scale.networks)
        assert [run.seed for run in runs] == sorted(run.seed for run in runs), "every network once, then again"
    assert recipes.load(SCALES["cifar"].deep_recipe).warm_up is not None


def test_the_command_from_runs_to_page(fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["paper", "--out", str(out), "--seeds", "2", "--jobs", "3"]) == 0
    page = (out / "paper.md").read_text(encoding="utf-8")
    assert "cifar_plain56 50.5% (50.0% to 51.0%), cifar_plain20 20.5% (20.0% to 21.0%) | yes, every seed |" in page
    assert "The residual network gets worse with depth (training error) | cifar_resnet56 10.5% (10.0% to 11.0%)" in page
    assert page.count("| no |") == 4 and "Not complete" not in page
    assert "| cifar_resnet56 | 0.86 M | 2 |" in page.replace("0.85 M", "0.86 M")
    assert "| Responses of the plain network are larger (mean over layers) |" in page
    for picture in out.glob("*.svg"):
        ElementTree.fromstring(picture.read_text(encoding="utf-8"))
        assert picture.name in page
    assert len(list(out.glob("*.svg"))) == 5
    printed = capsys.readouterr().out
    assert "[14/14]" in printed and str(out / "paper.md") in printed
    assert "Processor time of the 14 runs: 21 minutes" in page
    rows = (out / "runs.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "network,seed,recipe,training_error,test_error,processor_seconds" and len(rows) == 15
    assert "cifar_plain56,1,digits-paper,0.5100,0.2550,90" in rows
    done = out / "cifar_plain20-seed1" / "done.json"
    done.write_text(done.read_text(encoding="utf-8").replace("processor_seconds", "other"), encoding="utf-8")
    # What is done is not done again; a time that is not known of all is not told.
    fake.write_text("raise SystemExit('must not run')", encoding="utf-8")
    assert main(["paper", "--out", str(out), "--seeds", "2"]) == 0
    assert main(["paper", "--out", str(out), "--seeds", "2", "--draw"]) == 0
    assert "Processor time" not in (out / "paper.md").read_text(encoding="utf-8")
    # Of another recipe or length they are no runs of this set.
    for more, says in (
        (["--recipe", "digits"], "recipe 'digits-paper', not 'digits'"),
        (["--epochs", "3"], "epochs 8, not 3.0"),
    ):
        assert main(["paper", "--out", str(out), "--seeds", "2", *more]) == 2
        assert f"cifar_plain20-seed0 in it is of {says}: name another --out" in capsys.readouterr().err
    assert main(["paper", "--out", str(out), "--recipe", "digit"]) == 2
    assert "unknown recipe 'digit'" in capsys.readouterr().err


def test_a_run_that_fails_is_named_and_the_rest_is_drawn(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.write_text(FAKE.format(broken="cifar_highway56"), encoding="utf-8")
    assert main(["paper", "--out", str(tmp_path / "o"), "--seeds", "1", "--jobs", "1"]) == 1
    assert "cifar_highway56-seed0: no such luck" in capsys.readouterr().err
    page = (tmp_path / "o" / "paper.md").read_text(encoding="utf-8")
    assert "Not complete" in page and "cifar_highway56 (0 of 1)" in page and "yes, of one seed each" in page


def test_asked_to_end_it_ends_its_runs(tmp_path: Path) -> None:
    """SIGTERM: the run that is under way gets it, too, and nothing is left behind."""
    script = tmp_path / "sleeping.py"
    script.write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        "Path(sys.argv[1]).with_name('pid').write_text(str(os.getpid()))\ntime.sleep(100)\n"
    )
    code = (
        "import sys\nfrom pathlib import Path\nfrom fused_resnet.paper.runs import Options, everything\n"
        "from fused_resnet.paper.scales import SCALES\n"
        "everything(SCALES['tiny'], Options(Path(sys.argv[1]), 1), command=(sys.executable, sys.argv[2]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(script)], cwd=ROOT, stderr=subprocess.DEVNULL)
    told = tmp_path / "cifar_plain20-seed0" / "pid"
    until = time.monotonic() + 100
    while not (told.exists() and told.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


def test_nothing_to_draw_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "--out", str(tmp_path), "--draw"]) == 2
    assert "no run of scale tiny has come to its end there" in capsys.readouterr().err
    assert main(["paper", "--out", str(tmp_path / "none"), "--draw"]) == 2 and not (tmp_path / "none").exists()
    assert "no run of scale tiny has come to its end there" in capsys.readouterr().err
    assert main(["paper", "--scale", "huge"]) == 2


def test_data_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found out by the first run, a process of its own; the user's mistake all the same."""
    there = ["--data-dir", str(tmp_path / "none"), "--out", str(tmp_path / "runs"), "--jobs", "1"]
    assert main(["paper", "--scale", "cifar", *there]) == 2
    assert capsys.readouterr().err.startswith("fused-resnet: error: cifar_plain20-seed0: data 'cifar10': there is no ")
    assert not [path.name for path in (tmp_path / "runs").iterdir() if path.name != ".lock"], "nothing stands for a run"


@pytest.mark.parametrize(
    ("text", "message"),
    [("step,epoch,split,loss\n1,1,train,1\n", "missing error"), ("step,epoch,split,loss,error\n1,1,train,1,x\n", "line 2")],
)
def test_a_log_that_is_none(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LogError, match=message):
        read(path)


def finished(out: Path) -> Path:
    """The folder of a run of the tiny scale that came to its end."""
    folder = out / "cifar_plain20-seed0"
    folder.mkdir(parents=True)
    job = runner.job_of(TINY, Run("cifar_plain20", 0), runner.Options(out, 1))
    (folder / "done.json").write_text(json.dumps({**job, "processor_seconds": 9.0}), encoding="utf-8")
    (folder / "responses.json").write_text("[1.0, 2.0]", encoding="utf-8")
    (folder / "log.csv").write_text("step,epoch,split,loss,error\n1,1,train,1,0.5\n2,1,test,1,0.4\n", encoding="utf-8")
    return folder


HEAD = b"step,epoch,split,loss,error\n"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("done.json", b'{"network": "cif', "done.json: not JSON, cut off or damaged"),
        ("done.json", b"[1]", "done.json: expected a JSON object, got a list"),
        ("done.json", b"\xff", "done.json: not UTF-8"),
        ("done.json", None, "done.json: cannot be read (Is a directory)"),
        ("done.json", "minutes", "done.json: processor_seconds must be a number, got 'minutes'"),
        ("responses.json", b"[1.0, 2", "responses.json: not JSON, cut off or damaged"),
        ("responses.json", b"3", "responses.json: expected a list of numbers, got a int"),
        ("responses.json", b"[]", "responses.json: expected a list of numbers, got an empty one"),
        ("responses.json", b'[1.0, "x"]', "responses.json: entry 2 must be a number, got 'x'"),
        ("log.csv", b"", "log.csv: expected the columns"),
        ("log.csv", HEAD, "log.csv: expected rows of the splits train and test, found none of train"),
        ("log.csv", HEAD + b"1,1,train,1,0.5\n", "found none of test"),
        ("log.csv", HEAD + b"1,1,train,1,\xff\n", "log.csv: not UTF-8"),
        ("log.csv", HEAD + b"1,nan,train,1,0.5\n", "log.csv, line 2: not a row of numbers"),
        ("log.csv", None, "log.csv: cannot be read (Is a directory)"),
        ("paper.md", None, "paper.md: cannot be written (Is a directory)"),
    ],
)
def test_a_damaged_file_is_one_line(
    name: str, content: bytes | str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which names it; of ``done.json`` a text is one of its values."""
    folder = finished(tmp_path)
    path = tmp_path / name if name == "paper.md" else folder / name
    if isinstance(content, str):
        content = json.dumps({**json.loads(path.read_text()), "processor_seconds": content}).encode()
    path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)
    assert main(["paper", "--out", str(tmp_path), "--seeds", "1", "--draw"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fused-resnet: error: ") and says in lines[0], lines


def test_files_of_a_run_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log has to be there, responses need not; seeds have the same layers."""
    folder = finished(tmp_path)
    other = tmp_path / "cifar_plain20-seed1"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "responses.json").write_text("[1.0]")
    command = ["paper", "--out", str(tmp_path), "--seeds", "2", "--draw"]
    assert main(command) == 2
    assert "seed1/responses.json: expected 2 layers as in " in capsys.readouterr().err
    (other / "responses.json").unlink()
    assert main(command) == 0
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".paper")]
    (other / "log.csv").unlink()
    assert main(command) == 2
    assert "seed1/log.csv: cannot be read (No such file or directory)" in capsys.readouterr().err


def test_a_run_of_no_steps(tmp_path: Path) -> None:
    job = {**runner.job_of(TINY, Run("cifar_resnet8", 0), runner.Options(tmp_path, 1)), "epochs": 0.001}
    with pytest.raises(UsageError, match=r"epochs must be at least one step together, got 0\.001 epochs of 44 steps"):
        worker.run(job)


def test_what_is_read_off_a_log() -> None:
    """The last epoch's mean for training, the last value for the test; one point an epoch."""
    rows = tuple(Row(epoch / 2, "train", error) for epoch, error in enumerate((0.9, 0.7, 0.5, 0.3), 1))
    rows += (Row(1.0, "test", 0.8), Row(2.0, "test", 0.6))
    outcome = Outcome("x", (0, 1), (rows, tuple(Row(r.epoch, r.split, r.error + 0.1) for r in rows)), ((1.0, 2.0), (3.0, 2.0)))
    assert outcome.last("train").values == pytest.approx((0.4, 0.5)) and outcome.last("test").values == pytest.approx(
        (0.6, 0.7)
    )
    assert [x for x, *_ in outcome.curve("train")] == [1, 2]
    assert outcome.curve("train")[1][1:] == pytest.approx((0.45, 0.4, 0.5))
    assert outcome.response_curve() == [(1, 2.0, 1.0, 3.0), (2, 2.0, 2.0, 2.0)]


def test_verdicts_are_careful() -> None:
    assert verdict(Spread((0.5, 0.6)), Spread((0.1, 0.4))) == "yes, every seed"
    assert verdict(Spread((0.5, 0.3)), Spread((0.1, 0.4))) == "in the mean only, the seeds overlap"
    assert verdict(Spread((0.1, 0.2)), Spread((0.3, 0.3))) == "no"
    assert verdict(Spread((0.1,)), Spread((0.1,))) == "no"


def test_responses_are_of_the_batch_norms_in_order() -> None:
    """Of each BatchNorm outside the shortcuts, by hand; the fused network gives what the plain one gives, and stays fused."""
    torch.manual_seed(0)
    model = make(10, "cifar_resnet8_b", pool=2).train()
    x = torch.randn(8, 3, 32, 32)
    model(x)
    found = responses(model, x)
    assert len(found) == 7 and model.training
    first = model.eval()[1].bn1(model[1].conv1(nn.functional.avg_pool2d(x, 2)))
    assert found[0] == pytest.approx(float(first.detach().std()), rel=1e-5)
    with count_launches() as log:
        model(x)
    assert len(log) > 7


def test_a_figure_without_runs_is_left_out(tmp_path: Path) -> None:
    run = Run("cifar_plain20", 0)
    folder = tmp_path / run.name
    folder.mkdir()
    (folder / "log.csv").write_text("step,epoch,split,loss,error\n1,1,train,1,0.5\n2,1,test,1,0.4\n", encoding="utf-8")
    assert not collect(tmp_path, TINY.runs(1)), "it has not come to its end"
    (folder / "done.json").write_text("{}", encoding="utf-8")
    files = draw(TINY, collect(tmp_path, TINY.runs(1)), 1, WHERE)
    assert set(files) == {"paper.md", "runs.csv", "degradation-train.svg", "degradation-test.svg"}


def test_a_run_that_is_killed_at_its_end_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file would count as done, and could not be read."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    run = Run("cifar_resnet8", 0)
    (tmp_path / run.name).mkdir()
    monkeypatch.setattr("fused_resnet.train.fit", lambda config: SimpleNamespace(step=1))
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        worker.run({**runner.job_of(TINY, run, runner.Options(tmp_path, 1)), "responses": False})
    assert not worker.is_done(tmp_path, run) and not list((tmp_path / run.name).iterdir())


@pytest.mark.slow
def test_one_real_run(tmp_path: Path) -> None:
    """The worker itself: a network for an epoch on digits, and what it leaves behind."""
    pytest.importorskip("sklearn")
    run = Run("cifar_resnet8", 0)
    options = runner.Options(tmp_path, 1, 2)
    job = {**runner.job_of(TINY, run, options), "epochs": 1, "responses": True}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    from fused_resnet.paper.worker import run as work

    work(json.loads((tmp_path / "job.json").read_text(encoding="utf-8")))
    rows = read(tmp_path / run.name / "log.csv")
    assert {row.split for row in rows} == {"train", "test"} and rows[-1].epoch == 1
    assert len(json.loads((tmp_path / run.name / "responses.json").read_text(encoding="utf-8"))) == 7


@pytest.mark.slow
def test_56_plain_layers_train_worse_than_56_residual_ones(tmp_path: Path) -> None:
    """What the paper is about, trained: one seed of each, by the recipe of the scale ``tiny``; two minutes of processor time.

    Three seeds ended at 72% to 74% and at 2% to 3% (docs/paper/runs.csv), so that half and a tenth leave room for rounding.
    """
    pytest.importorskip("sklearn")
    two = replace(TINY, plain=TINY.plain[1:], residual=TINY.residual[1:], compared=(0, 0), options=(), highway=(), responses=())
    runner.everything(two, runner.Options(tmp_path, 1, jobs=2, device="cpu"))
    found = collect(tmp_path, two.runs(1))
    plain, residual = (found[name].last("train").mean for name in ("cifar_plain56", "cifar_resnet56"))
    print({name: [outcome.last(split).mean for split in ("train", "test")] for name, outcome in found.items()})
    assert len(found) == 2 and plain > 0.5 and residual < 0.1
