"""``fused-resnet fuse-check``: a training step is compared too, inputs of any shape, and what names no function is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_resnet import agreement, blocks
from fused_resnet.cli import fuse_check, main

MODELS = """
import torch
from torch import nn

def net():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 4)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), *head)

def rows():
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))

def signals():
    return nn.Sequential(nn.Conv1d(8, 16, 3), nn.BatchNorm1d(16), nn.ReLU())

class Output(dict):
    # A container that PyTorch's trees do not know, as transformers' are.
    pass

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return Output(logits=self.inner(x))

class Choice(Named):
    def forward(self, x):
        return self.inner(x).argmax(1)

class Particular(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        if self.training:
            raise ValueError("targets are missing")
        return self.inner(x)
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "some_models.py"
    path.write_text(MODELS)
    return path


def run(models: Path, name: str, *arguments: str) -> int:
    return main(["fuse-check", f"{models}:{name}", "--dtype", "fp32", "--device", "cpu", *arguments])


@pytest.mark.parametrize(("mode", "tables"), [("infer", (1, 0)), ("train", (0, 1)), ("both", (1, 1))])
def test_what_is_compared_by_mode(mode: str, tables: tuple[int, int], models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(models, "net", "--size", "8", "--mode", mode) == 0
    out = capsys.readouterr().out
    assert (out.count("eval mode"), out.count("training step")) == tables and out.endswith("agrees with eager\n")
    assert out.count("  ok") == sum(tables)
    assert ("gradients: eager" in out) == ("statistics: eager" in out) == bool(tables[1])


def test_a_training_step_has_enough_values_for_statistics(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless the user says how many: BatchNorms of two values are ill-conditioned, and eager itself far from float64."""
    assert run(models, "net", "--size", "8") == 0
    assert "input 2 x 3 x 8 x 8, in training 8 x 3 x 8 x 8, on cpu" in capsys.readouterr().out
    for asked in (("--size", "8", "--batch", "4"), ("--input", "4x3x8x8"), ("--size", "8", "--mode", "infer")):
        assert run(models, "net", *asked) == 0
        assert "in training" not in capsys.readouterr().out


@pytest.mark.parametrize(("batch", "told"), [("2", True), ("8", False)])
def test_few_values_of_a_channel_are_told(batch: str, told: bool, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One pixel an image is left: BatchNorms of as many values as there are images. Whatever it comes to, the reader knows."""
    run(models, "net", "--size", "1", "--batch", batch)
    assert (f"statistics of {batch} values" in capsys.readouterr().out) == told


def test_all_types_in_training(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    types = "fp32,fp16,bf16,fp64"
    assert main(["fuse-check", f"{models}:net", "--size", "8", "--device", "cpu", "--mode", "train", "--dtype", types]) == 0
    assert capsys.readouterr().out.count("  ok") == 4


class Wrong(torch.autograd.Function):
    """Right in the forward, gradients that are too large by a part in a thousand."""

    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: object, *gradients: Tensor) -> Tensor:
        return gradients[0] * 1.001


@pytest.mark.parametrize("what", ["output", "gradients", "statistics"])
def test_a_difference_in_training_alone(
    what: str, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In eval mode all agrees; in a training step one of the three is wrong, and the table says which."""
    right = blocks.FusedSequential.forward

    def forward(self: blocks.FusedSequential, x: Tensor) -> Tensor:
        made = right(self, x)
        if self.training and what == "output":
            made = made + 0.001 * made.detach()  # whose gradients are as they were
        if self.training and what == "gradients":
            made = Wrong.apply(made)
        if self.training and what == "statistics":
            for name, buffer in self.named_buffers():
                buffer.mul_(1.001) if name.endswith("running_var") else None
        return made

    monkeypatch.setattr(blocks.FusedSequential, "forward", forward)
    assert run(models, "net", "--size", "8", "--mode", "infer") == 0
    assert run(models, "net", "--size", "8") == 1
    out = capsys.readouterr().out
    assert f"DIFFERS: {what}" in out and out.endswith("DISAGREES with eager\n")


def test_a_fused_model_that_fails_in_training(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = blocks.FusedSequential.forward

    def forward(self: blocks.FusedSequential, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("out of registers\nand more")
        return right(self, x)

    monkeypatch.setattr(blocks.FusedSequential, "forward", forward)
    assert run(models, "net", "--size", "8") == 1
    assert "FAILS: RuntimeError: out of registers\n" in capsys.readouterr().out


def test_what_eager_does_not_do_is_not_compared(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(models, "Particular", "--size", "8") == 0
    assert "skipped: eager does not run in it here (targets are missing)" in capsys.readouterr().out
    assert run(models, "Particular", "--size", "8", "--mode", "train") == 1, "nothing is no agreement"
    assert capsys.readouterr().out.endswith("nothing could be compared\n")


@pytest.mark.parametrize(("name", "shape"), [("rows", "16x8"), ("signals", "4x8x100"), ("net", "2x3x9x17")])
def test_inputs_of_any_shape(name: str, shape: str, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(models, name, "--input", shape) == 0
    assert f"input {shape.replace('x', ' x ')} on cpu" in capsys.readouterr().out


#: A file with one model by each of the ways to say so, among what is none.
ONE = """
from functools import wraps
import torch
from torch import nn
from torch.nn import Conv2d, Sequential
from torchvision.models import resnet18

class Block(nn.Module):  # has to be given something
    def __init__(self, channels):
        super().__init__()

class _Hidden(nn.Module):
    pass

def main():
    raise SystemExit("a training")

def unknown() -> "Missing":
    raise SystemExit("called")

def sized(channels: int) -> nn.Module:
    return nn.Identity()

def layers():
    torch.manual_seed(5)
    return Sequential(Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

"""
WAYS = {
    "class": """class Net(nn.Sequential):
    def __init__(self, channels=4, **others):
        super().__init__(*layers())
""",
    "function": """def net(*, classes: int = 10) -> nn.Sequential:
    return layers()
""",
    "text": """def net() -> "Sequential":
    return layers()
""",
    "module": """net = layers()
net[0].weight.data.fill_(0.25)
""",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_file_with_one_model_is_enough(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else in it is called; the model's weights are its own."""
    (tmp_path / f"alone_{way}.py").write_text(ONE + WAYS[way])
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[float] = []
    real = fuse_check.agreement

    def agreement(eager: nn.Module, *others: Any) -> Any:
        seen.append(eager[0].weight.flatten()[0].item())
        return real(eager, *others)

    monkeypatch.setattr(fuse_check, "agreement", agreement)
    for source in (str(tmp_path / f"alone_{way}.py"), f"alone_{way}"):
        assert main(["fuse-check", source, "--size", "8", "--dtype", "fp32", "--device", "cpu"]) == 0
        assert "agrees with eager" in capsys.readouterr().out
    torch.manual_seed(5)
    assert seen == [0.25 if way == "module" else nn.Conv2d(3, 4, 3).weight.flatten()[0].item()] * 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{models}:rows"], "for example --input 16x8, got 2x3x64x64, on which eager PyTorch fails (RuntimeError: mat1"),
        (["{models}:signals", "--input", "4x7x100"], "for example --input 4x8x100, got 4x7x100"),
        (["{models}:net", "--input", "2x5x8x8"], "for example --input 2x3x64x64, got 2x5x8x8"),
        (
            ["{models}:rows", "--input", "16"],
            "--input: expected a batch and what is in it, such as 16x8 or 2x3x64x64, got '16'",
        ),
        (
            ["{models}:rows", "--input", "16xmany"],
            "--input: expected a shape such as 16x8, 4x8x100 or 2x3x64x64, got '16xmany'",
        ),
        (["{models}:rows", "--input", "16x0"], "at least 1, got '0'"),
        (["{models}:rows", "--input", "16x8", "--batch", "2"], "leave --batch and --size out"),
        (["{models}:rows", "--input", "99999999x99999999"], "fits into memory, got 99999999x99999999"),
        (["{models}:rows", "--mode", "eval"], "--mode"),
        (["{models}"], "names a file with several models (Named, Choice, Particular): say which, such as {models}:Particular"),
        (["{models}:"], "say which, such as {models}:Particular"),
        (["some_models"], "'some_models' names a module with several models (Named, Choice, Particular): say which"),
        (["json"], "'json' names a module but no function in it: expected json:FUNCTION, which returns an nn.Module, such as"),
    ],
)
def test_wrong_input(
    arguments: list[str], says: str, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models.parent)
    assert main(["fuse-check", *(argument.format(models=models) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and says.format(models=models) in captured.err


def test_the_help_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuse-check", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(
        word in out for word in ("timm/NAME", "Exit code 0", "1 where they disagree", "2 for wrong input", "--input SHAPE")
    )


def test_results_in_containers_of_others(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their tensors are compared; where there are none at all that is no agreement."""
    assert run(models, "Named", "--size", "8") == 0
    assert run(models, "Choice", "--size", "8") == 1
    assert capsys.readouterr().out.count("skipped: it gives no floating-point tensors") == 2
    right = blocks.FusedSequential.forward
    monkeypatch.setattr(blocks.FusedSequential, "forward", lambda self, x: right(self, x) * 1.01)
    assert run(models, "Named", "--size", "8") == 1
    assert capsys.readouterr().out.count("DIFFERS") == 2


def test_where_eager_itself_is_too_far_off() -> None:
    """Gradients of zeros would agree there: the row says so."""
    far = agreement.Distance(0.5, 1.4, 1.5)
    row = fuse_check.TrainingAgreement(torch.bfloat16, {"output": agreement.Distance(0.1, 0.1, 0.3), "gradients": far})
    assert row.ok and row.undecided == ["gradients"] and row.cells[-1] == "ok (gradients undecided)"


def test_the_rule_of_distances() -> None:
    """NaN is no agreement; one input by chance is, where five say so."""
    assert agreement.Distance(1e-6, 3e-6, 3e-6).ok and not agreement.Distance(1e-6, float("nan"), 1.0).ok
    assert agreement.Distance(1e-6, 1.0, 1e-5, median=1.2).ok and not agreement.Distance(1e-6, 1.0, 1e-5, median=3.1).ok
    plain = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    found = agreement.in_training(plain, plain, torch.randn(4, 3))
    assert list(found) == ["output", "gradients", "statistics"] and all(one.ok for one in found.values())
