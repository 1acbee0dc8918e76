"""What goes wrong in training: one clear line, exit code 2 for wrong input and 1 for failure, and nothing lost."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training

from fused_resnet.cli import main
from fused_resnet.train import TrainingError, UsageError, checkpoint, data, files, fit, loop, networks, progress
from fused_resnet.train.errors import DataError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "short.json"
    path.write_text(json.dumps({**training.recipe().data_dict(), "name": "short", "length": 6}))
    return path


def train(recipe: Path, out: Path, *more: str) -> int:
    return main(["train", "--recipe", str(recipe), "--out", str(out), "--device", "cpu", "--checkpoint-every", "2", *more])


def refused(capsys: pytest.CaptureFixture[str], says: str) -> None:
    """One line on stderr, which says this."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fused-resnet: error: ") and says in lines[0], lines


def written(out: Path) -> set[str]:
    """Names of the files of a run; the file that is locked may stay or not."""
    return {path.name for path in out.iterdir()} - {files.LOCK}


def test_a_whole_run(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command: files, the last line, and that a finished run is left as it is."""
    out = tmp_path / "run"
    assert train(recipe, out, "--log-every", "2") == 0
    said = capsys.readouterr()
    assert said.out.startswith("6 steps; test error ") and "test loss" in said.err
    lines = (out / "log.csv").read_text().splitlines()
    assert lines[0] == "step,epoch,split,loss,error,lr,images_per_second"
    assert [line.split(",")[0::2][:2] for line in lines[1:]] == [["2", "train"], ["4", "train"], ["6", "train"], ["6", "test"]]
    assert written(out) == {"log.csv", "checkpoint.pt", "best.pt"}
    before = {path: path.read_bytes() for path in out.glob("*.*")}
    assert train(recipe, out, "--resume") == 0
    assert "6 steps; test error " in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in out.glob("*.*")}
    assert train(recipe, out) == 2
    refused(capsys, "checkpoint.pt is there already: --resume goes on behind it, another --out starts anew")


def closed_pipe() -> io.TextIOWrapper:
    """What ``| head -1`` leaves behind."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="utf-8")


def test_a_reader_who_goes_away(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``train ... 2>&1 | head -1``: the run comes to its end."""
    with closed_pipe() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        assert train(recipe, tmp_path / "run", "--log-every", "1") == 0
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 6


def test_progress_that_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent from the first failure on, and where there is no stream at all."""
    shown = progress.Progress(6, 0, True, closed_pipe())
    assert shown.show
    shown.say("a line")
    assert not shown.show
    monkeypatch.setattr(sys, "stderr", None)
    progress.Progress(6, 0, True).say("a line")


def test_tensorboard(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its events are the rows of the log, over an interruption too; where it is missing, one line says so."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = training.config(tmp_path / "run", tensorboard=True, backend="cpu", log_every=2, resume=True)
    fit(replace(config, stop_after=9))
    rows = fit(config).rows
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    got = [(event.step, event.value) for event in found.Scalars("loss/train")]
    assert got == [(row.step, pytest.approx(row.loss)) for row in rows if row.split == "train"]
    assert [event.value for event in found.Scalars("error/test")] == [pytest.approx(rows[-1].error)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(recipe, tmp_path / "other", "--tensorboard") == 2
    refused(capsys, "--tensorboard needs the package tensorboard")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--recipe", "paper"], "unknown recipe 'paper'"),
        (["--model", "resnet19"], "unknown model 'resnet19'; did you mean resnet18"),
        (["--model", "cifar_resnet21"], "21"),
        (["--model", "cifar_plain20_b"], "no shortcuts"),
        (["--model", "nowhere.py:net"], "model nowhere.py:net: no file 'nowhere.py'"),
        (["--data", "mnist"], "unknown data set 'mnist'"),
        (["--data", "cifar10", "--data-dir", "nowhere"], "bring cifar-10-python.tar.gz from https"),
        (["--batch", "2000"], "batch must be at most the 1433 training images, got 2000"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "1e-9"], "epochs must be at least one step together, got 1e-09 epochs of 89 steps"),
        (["--epochs", "1e308"], "--epochs: expected a number above 0 and of at most 2147483647, got '1e308'"),
        (["--steps", "1" + 400 * "0"], "--steps: expected a whole number of at most 2147483647, got '1000"),
        (["--evaluate-every", "1e308"], "--evaluate-every: expected a number above 0 and of at most 2147483647, got '1e308'"),
        (["--data", "cifar10", "--data-dir", 300 * "x"], "bring cifar-10-python.tar.gz from https"),
        (["--recipe", "imagenet-paper", "--data-dir", 300 * "x"], "xxx/train: bring a folder with train/CLASS"),
        (["--recipe", 300 * "x"], "unknown recipe 'xxx"),
        (["--recipe", 300 * "x" + ".json"], "x.json: no such file"),
        (["--epochs", "1", "--steps", "5"], "--steps: not allowed with argument --epochs"),
        (["--backend", "cudnn"], "--backend"),
        (["--device", "toaster"], "device must be auto, cpu, cuda or cuda:N, got 'toaster'"),
        (["--amp", "fp8"], "--amp"),
        (["--workers", "-1"], "--workers: expected a whole number of at least 0"),
    ],
)
def test_wrong_input(arguments: list[str], says: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(recipe, tmp_path / "run", *arguments) == 2
    refused(capsys, says)
    assert not (tmp_path / "run").exists()


#: Networks of others that cannot be trained.
THEIRS = """
import torch
from torch import nn
import training

class Answer(nn.Module):
    def __init__(self, answer, outputs=10):
        super().__init__()
        self.net, self.answer = training.small(outputs), answer
    def forward(self, x):
        return self.answer(self.net(x))

def broken(num_classes):
    raise KeyError("no such\\nkey")

def nothing(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

def frozen(num_classes):
    return training.small(num_classes).requires_grad_(False)

def pair(num_classes):
    return Answer(lambda y: (y, y))

def few(num_classes):
    return training.small(num_classes - 1)

def whole_numbers(num_classes):
    return Answer(lambda y: y.argmax(1, keepdim=True).expand(-1, 10))

def raising(num_classes):
    return Answer(lambda y: y[:, 10].sum())
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("broken", "KeyError: 'no such"),
        ("nothing", "has no parameters to train"),
        ("frozen", "has no parameters to train"),
        ("pair", "must return a tensor [images, 10 or more] of floats, got a tuple for 2 images in eval mode"),
        ("few", "must return a tensor [images, 10 or more] of floats, got [2, 9] of float32"),
        ("whole_numbers", "got [2, 10] of int64"),
        ("raising", "fails in eval mode on images of 32x32: IndexError: "),
        ("googlenet", "got a GoogLeNetOutputs for 2 images in training mode"),
        ("alexnet", "fails in eval mode on images of 32x32: RuntimeError: "),
        ("vit_b_32", "fails in eval mode on images of 32x32: AssertionError: "),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_a_network_that_cannot_be_trained(
    name: str, says: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names it, before anything is written."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    model = f"{tmp_path / 'theirs.py'}:{name}" if f"def {name}(" in THEIRS else name
    assert train(recipe, tmp_path / "run", "--model", model, "--backend", "eager") == 2
    line = capsys.readouterr().err
    assert line.startswith(f"fused-resnet: error: model {model}: ") and says in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_trying_a_network_leaves_no_trace() -> None:
    """Neither in its statistics nor in the random numbers, which its dropout draws from."""
    torch.manual_seed(1)
    model = training.small(10).train()
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    networks.try_out(model, "small", 10, 32, torch.device("cpu"))
    assert training.same(before, dict(model.state_dict())) == [] and torch.equal(random, torch.get_rng_state())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_going_on_with_something_else(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(recipe, out) == 0
    before = (out / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    for more, says in (
        (["--lr", "0.01"], "recipe.lr 0.05 -> 0.01"),
        (["--steps", "9"], "recipe.length 6 -> 9"),
        (["--seed", "4", "--amp", "bf16"], "amp 'off' -> 'bf16'; seed 0 -> 4"),
        (["--model", training.OTHER], "model "),
    ):
        assert train(recipe, out, "--resume", *more) == 2
        refused(capsys, says)
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert (out / "checkpoint.pt").read_bytes() == before

    torch.save({**saved, "schema": 99}, out / "checkpoint.pt")
    assert train(recipe, out, "--resume") == 2
    refused(capsys, "written by a newer version (schema 99, this one reads up to 1)")
    torch.save({key: value for key, value in saved.items() if key != "optimizer"}, out / "checkpoint.pt")
    assert train(recipe, out, "--resume") == 2
    refused(capsys, "checkpoint.pt: not whole: 'optimizer' is missing")
    other = {name: value for name, value in saved["model"].items() if "bias" not in name}
    torch.save({**saved, "model": other}, out / "checkpoint.pt")
    assert train(recipe, out, "--resume") == 2
    refused(capsys, "the weights are of another model: ")
    for content, code, says in (
        (before[: len(before) // 2], 1, "cut off or damaged"),
        (b"", 1, "cut off or damaged"),
        (b"\0" * 512, 1, "cut off or damaged"),
        (b"step,epoch\n", 2, "not weights, expected a file that torch.save wrote"),
    ):
        (out / "checkpoint.pt").write_bytes(content)
        assert train(recipe, out, "--resume") == code
        assert says in capsys.readouterr().err


def test_a_checkpoint_that_lacks_something(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What passes for one by its header: one line, whoever reads it. The best weights can be evaluated, not gone on behind."""
    out = tmp_path / "run"
    assert train(recipe, out) == 0
    saved, best = (torch.load(out / name, weights_only=True) for name in ("checkpoint.pt", "best.pt"))
    capsys.readouterr()

    def changed(**changes: object) -> dict:
        return {key: value for key, value in {**saved, **changes}.items() if value != "gone"}

    for content, says, evaluated in (
        (changed(identity="gone"), "not whole: 'identity' is missing", False),
        (changed(identity={}), "identity: not whole: 'model' is missing", False),
        (changed(model=[]), "not whole: 'model': expected an object, got a list", False),
        (best, "holds the weights only (best.pt): cannot be gone on behind", True),
        (changed(window=[[1.0] * 9]), "'window' in it must be up to 7 numbers for each process", True),
        (changed(window=[]), "'window' in it must be of 1 processes as 'random' is, got 0", True),
        (changed(ema=None), "'ema' in it, the average of the weights, must be one by the recipe, got none", True),
        (changed(random=[{}]), "its state is not as train writes it (KeyError: 'python')", True),
        (changed(falling=3), "its state is not as train writes it (TypeError: ", True),
    ):
        torch.save(content, out / "checkpoint.pt")
        assert train(recipe, out, "--resume") == 2
        refused(capsys, says)
        assert main(["evaluate", str(out / "checkpoint.pt"), "--device", "cpu"]) == (0 if evaluated else 2)
        assert evaluated or says in capsys.readouterr().err
        capsys.readouterr()
    (out / "checkpoint.pt").unlink()
    (out / "checkpoint.pt").mkdir()
    assert train(recipe, out, "--resume") == 2
    refused(capsys, "checkpoint.pt: is a folder, expected a file")


def test_a_log_that_is_damaged(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blank lines are nothing; of a line that is no row the place is told, and the run can go on when it is out."""
    out = tmp_path / "run"
    assert train(recipe, out, "--log-every", "2") == 0
    good = (out / "log.csv").read_bytes()
    head, first, *rest = good.splitlines(keepends=True)
    capsys.readouterr()
    for line in (b"garbage\n", b"1,2,3\n", b"2,0.1,train,0.5\xff,0.1,0.1,9\n", b"2,0.1,other,0.5,0.1,0.1,9\n", b"2,0,test\n"):
        (out / "log.csv").write_bytes(head + first + line + b"".join(rest))
        assert train(recipe, out, "--resume") == 2
        refused(capsys, f"{out / 'log.csv'}, line 3: not a row, expected step,epoch,split,loss,error")
    (out / "log.csv").write_bytes(head + b"\n" + first + b"  \n" + b"".join(rest) + b"\n")
    assert train(recipe, out, "--resume") == 0
    assert (out / "log.csv").read_bytes() == good


def test_nothing_but_tensors_is_unpickled(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "touched",))

    (tmp_path / "run").mkdir()
    torch.save({"format": "fused_resnet.checkpoint", "schema": 1, "model": Evil()}, tmp_path / "run" / "checkpoint.pt")
    assert train(recipe, tmp_path / "run", "--resume") == 2
    refused(capsys, "holds more than tensors and plain data")
    assert not (tmp_path / "touched").exists()


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """Files end at this size, as on a full disk, for this process: a write fails midway."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("first", "step"), [("checkpoint.pt", 6), ("log.csv", 5)])
def test_a_full_disk(first: str, step: int, tmp_path: Path) -> None:
    """Whichever file comes to it: the checkpoint before is whole, nothing half-written is left of another, and with room again
    the run ends as if nothing had been.
    """
    config = training.config(tmp_path / "run", backend="cpu", recipe=training.recipe(length=12), resume=True)
    fit(replace(config, stop_after=3))
    size = (tmp_path / "run" / first).stat().st_size
    with (
        full_at(size // 2 if first == "checkpoint.pt" else size + 9),
        pytest.raises(
            TrainingError, match=rf"stopped: the disk is full at step {step}; the last good checkpoint is .*of step 3"
        ),
    ):
        fit(config)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 3
    assert written(tmp_path / "run") == {"log.csv", "checkpoint.pt"}
    fit(config)
    fit(replace(config, out=tmp_path / "whole"))
    weights = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["model"] for run in ("run", "whole")]
    assert training.same(*weights) == []
    rows = [[line.split(",")[:5] for line in (tmp_path / run / "log.csv").read_text().splitlines()] for run in ("run", "whole")]
    assert rows[0] == rows[1]


def test_the_command_on_a_full_disk(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a row of the log does not fit: one line, exit code 1, and the checkpoint as it was."""
    out = tmp_path / "run"
    assert train(recipe, out, "--log-every", "3") == 0
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    torch.save({**saved, "step": 2}, out / "checkpoint.pt")
    before = (out / "checkpoint.pt").read_bytes()
    (out / "log.csv").unlink()
    capsys.readouterr()
    with full_at(70):
        assert train(recipe, out, "--log-every", "3", "--resume") == 1
    going_on, *lines = capsys.readouterr().err.splitlines()
    assert going_on == "going on behind step 2"
    assert lines == [
        f"fused-resnet: stopped: the disk is full at step 3; the last good checkpoint is {out / 'checkpoint.pt'}, of step 2"
    ]
    assert (out / "checkpoint.pt").read_bytes() == before


def test_a_full_disk_where_an_image_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done cannot be saved then: one error that says so, not one in the handling of another."""
    real = loop._Run._step

    def step(self: loop._Run, got: data.Batch) -> None:
        real(self, got)
        if self.state.step == 2:
            monkeypatch.setattr(checkpoint, "save", full)
            raise DataError("image.jpg: cannot be read as an image")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop._Run, "_step", step)
    with pytest.raises(TrainingError, match=r"stopped: the disk is full at step 2; there is no checkpoint yet"):
        fit(training.config(tmp_path, backend="cpu", recipe=training.recipe(length=6)))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        fit(training.config(tmp_path / "file" / "run"))


#: Holds a folder until it is told something.
HOLDER = """
import sys
from pathlib import Path
from fused_resnet.train.files import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["told", "killed"])
def test_two_runs_into_one_folder(
    end: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is refused, with a checkpoint or without, and with the end of the first, whatever it was, it may."""
    out = tmp_path / "run"
    out.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    try:
        for more in ([], ["--resume"]):
            assert train(recipe, out, *more) == 2
            refused(capsys, f"{out}: another run is writing into it: wait for its end, or name another --out")
        assert main(["paper", "--out", str(out)]) == 2
        assert "another run is writing into it" in capsys.readouterr().err
        assert written(out) == set()
    finally:
        other.communicate("go\n") if end == "told" else (other.kill(), other.communicate())
    assert train(recipe, out) == 0
    before = (out / "checkpoint.pt").read_bytes()
    assert train(recipe, out) == 2, "and not over its checkpoint"
    assert (out / "checkpoint.pt").read_bytes() == before
