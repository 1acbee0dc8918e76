"""The command line: what it prints, its exit codes, and that wrong input is one line on stderr."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nets import look_at_launches
from torch import nn

from fused_resnet import blocks, cli, fused
from fused_resnet.cli import info, main, named
from fused_resnet.cli.zoo import COLUMNS
from fused_resnet.launch import Launch

ROOT = Path(__file__).resolve().parents[1]

#: A file of models for fuse-check: one that fuses, one with nothing in it, and things that are no models.
MODELS = """
import torch
from torch import nn

def net():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))

def number():
    return 3

def broken():
    raise KeyError("no such\\nkey")

value = 5
ready = net()
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "their_models.py"
    path.write_text(MODELS)
    return path


def test_a_stdout_that_takes_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A reader who went away: all is well. A full disk: one line. No stream at all, as without a console: silence."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["info", "resnet18"]) == 0
    if Path("/dev/full").exists():
        with open("/dev/full", "w", encoding="utf-8") as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert main(["info", "resnet18"]) == 1
            assert main(["--version"]) == 0, "what is left in the buffer has found a place"
        assert capsys.readouterr().err == "fused-resnet: stdout cannot be written (No space left on device)\n"
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["info", "resnet18"]) == 0
    assert main(["info", "zebra"]) == 2


def test_under_torchrun_a_process_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all went well (or its end would be the end of the one that tells why not); not where main is somebody's function,
    nor where nobody started several, nor if the command is none for several.
    """
    ends: list[int] = []
    codes = {"train": 0, "evaluate": 1, "info": 0}
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(cli, "_run", lambda argv: codes[(argv or sys.argv[1:])[0]])
    for several in (False, True):
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if several else ():
            monkeypatch.setenv(name, "1")
        for command, code in codes.items():
            monkeypatch.setattr(sys, "argv", ["fused-resnet", command, "--quiet"])
            ends.clear()
            assert main([command]) == code and ends == []
            assert main() == code
            assert ends == ([0] if several and command == "train" else [])


def test_a_name_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed with its bytes spelt out: a strict stdout would end a command behind its work."""
    with io.TextIOWrapper(io.BytesIO(), encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(info, "run", lambda arguments: print("image-\udcff.jpg") or 0)
        assert main(["info", "resnet18"]) == 0
        assert stream.buffer.getvalue() == b"image-\\udcff.jpg\n"


def test_info_where_no_batch_has_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "resnet18", "--size", "32"]) == 0
    assert "none for this input: Expected more than 1 value per channel" in capsys.readouterr().out


def test_fuse_check_agrees(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuse-check", f"{models}:net", "--size", "8", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "launches: 5 in eager mode, 3 fused (1 of plans, 2 of PyTorch)" in out
    verdicts = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.strip().startswith(("fp", "bf"))}
    assert verdicts == {"fp32": "ok", "fp16": "ok", "bf16": "ok"}


def test_fuse_check_takes_a_torchvision_name_and_a_module(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    assert main(["fuse-check", "resnet18", "--size", "32", "--dtype", "fp32", "--device", "cpu"]) == 0
    monkeypatch.syspath_prepend(models.parent)
    assert main(["fuse-check", "their_models:ready", "--size", "8", "--dtype", "fp32", "--device", "cpu"]) == 0


def test_fuse_check_downloads_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models for segmentation and detection have weights of their own for it."""

    def download(*_: object, **__: object) -> None:
        raise AssertionError("weights are downloaded")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    assert main(["fuse-check", "lraspp_mobilenet_v3_large", "--size", "32", "--dtype", "fp32", "--device", "cpu"]) == 0


def test_fuse_check_says_that_nothing_fuses(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuse-check", f"{models}:linear", "--size", "8", "--dtype", "fp32", "--device", "cpu"]) == 0
    assert "nothing in it could be fused" in capsys.readouterr().out


def test_fuse_check_finds_a_difference(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fused model that is wrong by a part in ten thousand does not pass."""
    right = blocks.FusedSequential.forward
    monkeypatch.setattr(blocks.FusedSequential, "forward", lambda self, x: right(self, x) * 1.0001)
    assert main(["fuse-check", f"{models}:net", "--size", "8", "--dtype", "fp32", "--device", "cpu"]) == 1
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["info", "resnet5"], "did you mean resnet50"),
        (["info", "zebra"], "resnet101"),
        (["info", "cifar_resnet21"], "depth must be 6n + 2"),
        (["info"], "MODEL"),
        (["info", "resnet18", "--batch", "0"], "--batch"),
        (["info", "resnet18", "--size", "-3"], "--size"),
        (["info", "resnet18", "--size", "many"], "--size"),
        (["info", "resnet18", "--dtype", "int8"], "expected one of fp32, fp16, bf16, fp64"),
        (["info", "resnet18", "--colour"], "--colour"),
        (["fuse-check", "zebra"], "zebra"),
        (["fuse-check", "nowhere.py:net"], "no file 'nowhere.py'"),
        (["fuse-check", "nowhere.py"], "nowhere.py:FUNCTION"),
        (["fuse-check", "no_such_module_here:net"], "no_such_module_here"),
        (["fuse-check", "{models}:missing"], "has no function 'missing'"),
        (["fuse-check", "{models}:number"], "returned a int, expected an nn.Module"),
        (["fuse-check", "{models}:value"], "is a int"),
        (["fuse-check", "{models}:broken"], "KeyError"),
        (["fuse-check", "{models}:linear", "--size", "16"], "for example --input 16x192, got 2x3x16x16, on which eager"),
        (["fuse-check", "{models}:net", "--dtype", "fp8"], "expected one of fp32"),
        (["fuse-check", "{models}:net", "--backend", "cudnn"], "--backend"),
        (["fuse-check", "{models}:net", "--device", "toaster"], "--device"),
        (["demo", "--batch", "1,0"], "--batch"),
        (["demo", "--seconds", "nan"], "--seconds"),
        (["demo", "--output", "no/such/folder/demo.png"], "no folder"),
        (["demo", "--output", "{models.parent}"], "is a folder"),
        (["demo", "--seconds", "1e300"], "--seconds: expected a number above 0 and of at most 2147483647, got '1e300'"),
        (["info", "resnet18", "--size", "100000000000"], "--size: expected a whole number of at most 2147483647"),
        (["info", "resnet18", "--batch", "9" * 5000], "--batch: expected a whole number"),
        (["info", "resnet18", "--size", "2147483647"], "expected images that fit into memory, got 1 x 3 x 2147483647 x 2147"),
        (["inspect", "--batch", f"1{30 * '0'}"], "--batch: expected a whole number of at most 2147483647"),
        (["fuse-check", "{models}:net", "--size", "99999999"], "fit into memory, got 2 x 3 x 99999999 x 99999999"),
        (["profile", "cifar_resnet8", "--size", "99999999"], "fit into memory, got 8 x 3 x 99999999 x 99999999"),
        (["profile", "cifar_resnet8", "--batch", "1,99999999999"], "--batch: expected a whole number of at most 2147483647"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(models=models) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("fused-resnet: error: ")
    assert says in lines[0]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("demo", "info", "fuse-check"))
    assert main(["--version"]) == 0
    assert "fused-resnet" in capsys.readouterr().out


def test_fuse_check_of_a_fused_model_that_fails(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one element type, or in all: a row that says so, and exit code 1; not a traceback."""

    def look(launch: Launch, operands: object) -> None:
        if launch.dtype in broken:
            raise RuntimeError("out of registers\nand more")

    look_at_launches(monkeypatch, look)
    for broken in ({torch.float32}, set[torch.dtype]()):
        code = main(["fuse-check", f"{models}:net", "--size", "8", "--dtype", "fp32,fp64", "--device", "cpu"])
        out = capsys.readouterr().out
        assert code == (1 if broken else 0)
        assert ("FAILS: RuntimeError: out of registers" in out) == ("the fused model does not run" in out) == bool(broken)


@pytest.mark.parametrize(("command", "says"), [("demo", "with eager PyTorch"), ("zoo", "as CSV"), ("tune", "on this GPU")])
def test_help_keeps_names_as_they_are(command: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert says in " ".join(capsys.readouterr().out.split())


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole tour on a small network, with the picture where matplotlib is there."""
    picture = tmp_path / "demo.png"
    arguments = ["--model", "resnet18", "--size", "32", "--batch", "1,2", "--seconds", "0.01", "--device", "cpu"]
    assert main(["demo", *arguments, "--output", str(picture)]) == 0
    captured = capsys.readouterr()
    rows = [line.split() for line in captured.out.splitlines()]
    ran = {row[0]: row[-3:] for row in rows if row and row[0].startswith(("stem", "layer"))}
    assert ran["stem"] == ["4", "2", "2"]
    assert ran["layer1"] == ["14", "4", "4"]
    assert ran["layer2"] == ["16", "5", "5"]
    fused = [row for row in rows if row[:1] == ["fused"]]
    assert float(fused[0][-1]) < 1e-5  # outputs
    training = {row[0]: row[3:] for row in rows if row[1:3] == ["statistics", "fused"]}
    frozen, batch = training["frozen"], training["batch"]
    assert float(frozen[-1]) < 1e-9 and float(batch[-1]) < 1e-9  # gradients in fp64
    assert batch[:3] == ["77", "on", "cpu"]  # 29 forward, 48 backward
    assert (float(frozen[-5]), float(batch[-5])) == pytest.approx((0.48, 0.67), abs=0.02)  # kept for the backward
    assert "measured on this CPU" in captured.out
    assert "timing batch 2" in captured.err
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "no picture" in captured.out
    else:
        assert picture.read_bytes().startswith(b"\x89PNG")


class Odd(nn.Module):
    """Makes a dict, in training alone; or wants more than images."""

    def __init__(self, wants: int = 0) -> None:
        super().__init__()
        self.conv, self.wants = nn.Conv2d(3, 4, 3), wants

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> object:
        if len(more) < self.wants:
            raise TypeError("forward() missing labels\nand more")
        out = self.conv(x).mean((2, 3))
        return {"out": out, "aux": out} if self.training else out


@pytest.mark.parametrize(
    ("model", "size", "says"),
    [
        (Odd(), "8", "expected a model that makes a tensor of images, got a dict in training mode"),
        (Odd(1), "8", "takes no 8 x 8 images in eval mode (forward() missing labels)"),
        (Odd(), "2", "takes no 2 x 2 images in eval mode"),
        (Odd(), "99999999", "--batch and --size: expected images that fit into memory"),
    ],
    ids=["a dict", "labels", "too small", "too large"],
)
def test_demo_refuses_a_model_before_the_work(
    model: nn.Module, size: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """GoogLeNet makes a tuple in training, detectors lists; others want videos, or two images."""
    monkeypatch.setattr("fused_resnet.cli.demo.eager_model", lambda name: model.eval())
    assert main(["demo", "--model", "odd", "--size", size, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    progress, error = captured.err.splitlines()
    assert captured.out == "" and "building odd" in progress
    assert error.startswith("fused-resnet: error: ") and says in error


def _python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


def test_runs_from_a_checkout_without_torchvision(tmp_path: Path) -> None:
    """``python -m fused_resnet`` needs no install; without torchvision and matplotlib the demo takes our own plain model."""
    code = (
        "import sys; sys.modules['torchvision'] = sys.modules['matplotlib'] = None\n"
        "from fused_resnet.cli import main\n"
        "sys.exit(main('demo --model resnet18 --size 32 --batch 1 --seconds 0.01 --device cpu'.split()))"
    )
    result = _python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "fused_resnet.plain resnet18" in result.stdout
    assert "no picture: matplotlib is not installed" in result.stdout
    result = _python("-m", "fused_resnet", "info", "resnet9000", cwd=tmp_path)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)


def test_import_is_light(tmp_path: Path) -> None:
    code = "import sys, fused_resnet.cli; print(*{'torchvision', 'matplotlib', 'triton', 'sympy'} & set(sys.modules))"
    before = "import sys, torch; print(*{'torchvision', 'matplotlib', 'triton', 'sympy'} & set(sys.modules))"
    assert _python("-c", code, cwd=tmp_path).stdout == _python("-c", before, cwd=tmp_path).stdout


def test_models_of_others_are_left_as_they_are(models: Path) -> None:
    """fuse-check works on a copy: a model kept in a module is still eager, with its statistics filled at most."""
    model = named.load(f"{models}:ready")
    assert isinstance(model, nn.Sequential)
    assert not any(isinstance(module, fused.Fused) for module in model.modules())
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 4)


def test_zoo_goes_on_where_it_was_stopped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows, page = tmp_path / "zoo.csv", tmp_path / "models.md"
    small = ["--size", "32", "--counted", "32", "--csv", str(rows), "--markdown", str(page)]
    assert main(["zoo", "resnet18", *small]) == 0
    assert "1 of them new; 0 disagree" in capsys.readouterr().out
    assert main(["zoo", "resnet18", *small]) == 0
    assert "1 models" in (out := capsys.readouterr().out) and "0 of them new" in out
    header, line = rows.read_text().splitlines()
    assert dict(zip(header.split(","), line.split(",")))["launches_fused"] == "23"
    assert "| resnet18 | 9 | 68 → 23 |" in page.read_text()
    rows.write_text(rows.read_text().replace(",yes,", ",NO,"))
    assert main(["zoo", *small]) == 1 and "resnet18" in capsys.readouterr().out
    assert main(["zoo", "zebra*", *small]) == 2


def test_zoo_takes_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 2, nothing is written: no table of no rows over the one that is there."""
    page, missing = tmp_path / "models.md", tmp_path / "missing.csv"
    page.write_text("as it was")
    for name, content in (
        ("bytes", b"\x80\x81"),
        ("other", b"a,b\n1,2\n"),
        ("cut", ",".join(COLUMNS).encode() + b"\nresnet18,9,68\n"),
    ):
        (tmp_path / name).write_bytes(content)
    for arguments, says in (
        (["--csv", str(tmp_path / "bytes"), "--markdown", str(page)], "not CSV ("),
        (["--csv", str(tmp_path / "other"), "--markdown", str(page)], "no rows of fused-resnet zoo"),
        (["--csv", str(tmp_path / "cut"), "--markdown", str(page)], "no rows of fused-resnet zoo"),
        (["--csv", str(missing), "--markdown", str(page)], "no such file"),
        (["--csv", str(missing)], "expected names of models"),
        (["--csv", str(tmp_path), "resnet18"], "cannot be read (Is a directory)"),
        (["--csv", str(page / "zoo.csv"), "resnet18"], "cannot be read (Not a directory)"),
        (["--csv", str(missing), "--markdown", str(tmp_path / "none" / "models.md"), "resnet18"], "cannot write to the folder"),
    ):
        assert main(["zoo", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("fused-resnet: error: ") and says in error and error.count("\n") == 1
    assert page.read_text() == "as it was" and not missing.exists()
