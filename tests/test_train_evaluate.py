"""Evaluation: views of an image, averages over views and networks, weights from checkpoints and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import training
from PIL import Image
from test_train_data import folder  # noqa: F401 (a fixture)
from torch import nn
from torchvision import models
from torchvision.transforms.v2 import functional as T

from fused_resnet.cli import main
from fused_resnet.cli.arguments import tell
from fused_resnet.train import TrainingError, UsageError, data, fit, members
from fused_resnet.train.distributed import World
from fused_resnet.train.evaluate import evaluate, probabilities
from fused_resnet.train.members import Member
from fused_resnet.train.sampler import in_order
from fused_resnet.train.views import Views

CPU = torch.device("cpu")


def member(classes: int = 3, seed: int = 0) -> Member:
    torch.manual_seed(seed)
    return Member(f"net {seed}", training.small(classes).double().eval(), None, classes)


def test_ten_crops_of_a_file(folder: Path) -> None:  # noqa: F811
    """torchvision's, in some order; one crop is the centre's; whole images have their shorter side as asked."""
    with Image.open(folder / "val" / "ant" / "0.jpg") as file:
        image = file.convert("RGB")
    ten = Views("ten").of_file(32)(image)
    expected = [T.pil_to_tensor(crop) for crop in T.ten_crop(T.resize(image, [37], antialias=True), [32, 32])]
    assert sorted(view.sum().item() for view in ten) == sorted(view.sum().item() for view in expected)
    assert all(any(torch.equal(view, one) for one in expected) for view in ten)
    assert torch.equal(Views().of_file(32)(image)[0], expected[4])
    shapes = [tuple(view.shape) for view in Views(scales=(32, 48), flip=True).of_file(32)(image)]
    assert shapes == [(3, 39, 32)] * 2 + [(3, 58, 48)] * 2


def test_views_of_a_batch() -> None:
    x = torch.randn(2, 3, 8, 8)
    ten = list(Views("ten").of_batch(x))
    padded = F.pad(x, (4, 4, 4, 4))
    assert len(ten) == 10 and any(torch.equal(view, x) for view in ten) and any(torch.equal(view, x.flip(3)) for view in ten)
    assert torch.equal(ten[0], padded[:, :, :8, :8]) and torch.equal(ten[5], padded[:, :, :8, 8:].flip(3))
    assert [view.shape[-1] for view in Views(scales=(8, 16)).of_batch(x)] == [8, 16]
    assert torch.equal(next(Views(scales=(8,)).of_batch(x)), x)


def test_a_whole_image_is_seen_fully_convolutionally() -> None:
    """The classifier as a 1x1 convolution at every place, averaged over the places (Simonyan and Zisserman 2015, 3.2)."""
    net = member(5).model
    assert isinstance(net, nn.Sequential)
    x = torch.randn(2, 3, 45, 70, dtype=torch.float64)
    features, linear = net[:3](x), net[6]
    dense = F.conv2d(features, linear.weight[:, :, None, None], linear.bias)
    assert dense.shape[2:] != (1, 1)
    torch.testing.assert_close(net(x), dense.mean((2, 3)))


@pytest.mark.parametrize("views", [Views(), Views("ten"), Views(scales=(24, 40)), Views(scales=(32,), flip=True)])
def test_an_ensemble_over_views(views: Views, folder: Path) -> None:  # noqa: F811
    """Against one image and one view at a time, in fp64; images have three shapes."""
    nets = [member(seed=seed) for seed in (0, 1)]
    found = data.for_test("folder", folder, views, None, 32)
    mean, std = (
        255 * torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    for net in nets:
        net.mean, net.std = mean, std
        net.normalise = lambda x, *_: (x.double() - mean) / std  # type: ignore[method-assign]
    expected, labels = [], []
    for path in sorted((folder / "val").glob("*/*")):
        with Image.open(path) as file:
            of_image = views.of_file(32)(file.convert("RGB"))
        scores = [net.model((v.double() - mean)[None] / std).softmax(1)[0] for net in nets for v in of_image]
        expected.append(torch.stack(scores).mean(0))
        labels.append(("ant", "bee", "cat").index(path.parent.name))
    for workers in (0, 2):
        batches = list(found.test.batches(in_order(6, 4), workers))
        got = [probabilities(nets, batch, found, views, CPU) for batch in batches]
        torch.testing.assert_close(torch.cat([scores for scores, _ in got]), torch.stack(expected))
        assert {count for _, count in got} == {len(of_image)}
    result = evaluate(nets, found, views, CPU, batch=4)
    right = [int(scores.argmax()) == label for scores, label in zip(expected, labels)]
    assert (result.top1, result.top5, result.images, result.bad) == (sum(right) / 6, 1.0, 6, [])


def test_an_image_that_another_process_cannot_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Every process comes to know it behind its own images, and the first one tells."""

    class Two(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, (0, 0, 0, 0, [], "bee.jpg: cannot be read as an image")]

    found = data.for_test("folder", folder, Views(), None, 32)
    seen: list[float] = []
    net = Member("a net", training.small(3).eval(), None, 3)
    with pytest.raises(TrainingError, match=r"^bee\.jpg: cannot be read as an image$") as raised:
        evaluate([net], found, Views(), CPU, batch=2, world=Two(CPU, 0, 2), progress=seen.append)
    assert seen == pytest.approx([1 / 3, 1.0]), "of its own three images, in batches of one and two"
    for rank, told in (("0", "fused-resnet: bee.jpg: cannot be read as an image\n"), ("1", "")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", rank)
            tell(raised.value)
        assert capsys.readouterr().err == told


def test_checkpoints_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What train found on its last line; fused and eager the same; two as an ensemble; best.pt of a folder."""
    config = training.config(tmp_path / "a", recipe=training.recipe(length=40), backend="cpu")
    history = fit(config)
    fit(replace(config, out=tmp_path / "b", seed=1))
    for backend in ("auto", "eager", "reference"):
        assert main(["evaluate", str(tmp_path / "a"), "--device", "cpu", "--backend", backend]) == 0
        out = capsys.readouterr().out
        assert f"top-1 accuracy {1 - history.best:.2%}" in out and "364 images" in out
    more = ["--device", "cpu", "--crops", "ten", "--batch", "100"]
    assert main(["evaluate", str(tmp_path / "a" / "checkpoint.pt"), str(tmp_path / "b"), *more]) == 0
    assert "ensemble of 2 on the test images of digits, ten crops (10 a network)" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "a"), "--device", "cpu", "--scales", "24,40"]) == 0
    assert "whole images at 24, 40 (2 a network)" in capsys.readouterr().out


def test_torchvisions_weights_from_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Fused logits are those of torchvision's own network, on every backend; a damaged image is skipped and named."""
    torch.manual_seed(0)
    own = models.resnet18(num_classes=3)
    torch.save(own.state_dict(), tmp_path / "resnet18.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in own.state_dict().items()}}, tmp_path / "wrapped.pth")
    x = torch.randn(2, 3, 40, 40)
    for name in ("resnet18.pth", "wrapped.pth"):
        for backend in ("cpu", "eager"):
            loaded = members.from_weights("resnet18", tmp_path / name, CPU, backend)
            torch.testing.assert_close(loaded.model(x), own.eval()(x), rtol=1e-4, atol=1e-4)
    image = folder / "val" / "bee" / "0.jpg"
    image.write_bytes(image.read_bytes()[:400])
    command = ["evaluate", "--model", "resnet18", "--weights", str(tmp_path / "resnet18.pth"), "--data-dir", str(folder)]
    command += ["--size", "32", "--device", "cpu", "--workers", "0"]
    assert main(command) == 1
    assert "bee/0.jpg: cannot be read as an image" in capsys.readouterr().err
    assert main([*command, "--on-corrupt", "skip"]) == 0
    out = capsys.readouterr().out
    assert "5 images in" in out and "1 images could not be read and were skipped" in out


def test_an_ensemble_of_files_of_several_networks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """The mean of their softmaxes, one file for each network in its order, and a checkpoint among them."""
    for name in ("resnet18", "resnet34"):
        torch.save(models.get_model(name, num_classes=3).state_dict(), tmp_path / f"{name}.pth")
    files = [["--model", name, "--weights", str(tmp_path / f"{name}.pth")] for name in ("resnet34", "resnet18")]
    more = ["--data-dir", str(folder), "--size", "32", "--device", "cpu", "--workers", "0"]
    assert main(["evaluate", *files[0], *files[1], *more]) == 0
    assert "ensemble of 2 on the test images of folder" in capsys.readouterr().out
    swapped = ["--model", "resnet18", "--model", "resnet34", "--weights", files[0][3], "--weights", files[1][3]]
    assert main(["evaluate", *swapped, *more]) == 2
    assert "resnet34.pth, for resnet18: the weights are of another model" in capsys.readouterr().err
    fit(training.config(tmp_path / "run", recipe=training.recipe(length=2), backend="cpu"))
    (tmp_path / "ten.py").write_text(
        "from torch.nn import *\ndef make(num_classes):\n"
        "    return Sequential(AdaptiveAvgPool2d(1), Flatten(), Linear(3, num_classes), BatchNorm1d(num_classes))\n"
    )
    ten = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10), nn.BatchNorm1d(10))
    torch.save(ten.state_dict(), tmp_path / "ten.pth")
    mixed = [str(tmp_path / "run"), "--model", f"{tmp_path / 'ten.py'}:make", "--weights", str(tmp_path / "ten.pth")]
    assert main(["evaluate", *mixed, "--device", "cpu", "--workers", "0"]) == 0
    assert "ensemble of 2 on the test images of digits" in capsys.readouterr().out


def test_wrong_input(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    torch.save(models.resnet18(num_classes=4).state_dict(), tmp_path / "four.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text('{"no": "weights"}')
    (tmp_path / "cut.pth").write_bytes((tmp_path / "four.pth").read_bytes()[:5000])
    model = ["--model", "resnet18", "--device", "cpu", "--data-dir", str(folder)]
    for arguments, code, says in (
        ([], 2, "expected checkpoints, or --model with --weights"),
        ([*2 * ["--model", "resnet18"], *3 * ["--weights", "x.pth"]], 2, "or one for each, got 2 for 3 files"),
        (["--model", "resnet18"], 2, "--model and --weights belong together"),
        (["nowhere.pt"], 2, "nowhere.pt: no such file"),
        ([300 * "x"], 2, "xxx: no such file"),
        (["--model", "resnet34", "--weights", str(tmp_path / "four.pth")], 2, "the weights are of another model"),
        ([*model, "--weights", str(tmp_path / "four.pth")], 2, "has 4 classes, data 'folder' has 3"),
        ([*model, "--weights", str(tmp_path / "list.pth")], 2, "not a state_dict"),
        ([*model, "--weights", str(tmp_path / "text.pth")], 2, "text.pth: not weights, expected a file that torch.save wrote"),
        ([*model, "--weights", str(tmp_path / "cut.pth")], 1, "cut off or damaged"),
        ([*model, "--weights", str(tmp_path)], 2, "is a folder, expected a file"),
        ([*model, "--weights", str(tmp_path / "four.pth"), "--crops", "ten", "--scales", "32"], 2, "--crops ten cuts images"),
        ([str(tmp_path / "four.pth")], 2, "not a checkpoint of fused-resnet train"),
    ):
        assert main(["evaluate", *arguments]) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and says in lines[0], lines
    with pytest.raises(UsageError, match="--size is for folders"):
        data.for_test("digits", None, Views(), None, 32)


@pytest.mark.parametrize(
    ("head", "got"),
    [(nn.Linear(3 * 32 * 32, 4), r"\[2, 4\]"), (nn.GRU(3 * 32 * 32, 3), "tuple")],
    ids=["more classes", "a tuple"],
)
def test_an_answer_that_is_no_scores(head: nn.Module, got: str, folder: Path) -> None:  # noqa: F811
    found = data.for_test("folder", folder, Views(), None, 32, "stop")
    net = Member("a net", nn.Sequential(nn.Flatten(), head).eval(), None, 3)
    batch = next(iter(found.test.batches(in_order(2, 2), 0)))
    with pytest.raises(UsageError, match=rf"a net: must return a tensor \[2, 3\], got {got}"):
        probabilities([net], batch, found, Views(), CPU)


def test_images_that_a_network_does_not_take(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Tried before the work, in eval mode alone: in training this network answers with more than a tensor."""
    model = models.inception_v3(num_classes=3, init_weights=False)
    torch.save(model.state_dict(), tmp_path / "inception.pth")
    command = ["evaluate", "--model", "inception_v3", "--weights", str(tmp_path / "inception.pth"), "--device", "cpu"]
    command += ["--data-dir", str(folder), "--workers", "0", "--backend", "eager"]
    name = f"model inception_v3 of {tmp_path / 'inception.pth'}"
    for more, says in (
        (["--size", "64"], f"{name}: fails in eval mode on images of 64x64: RuntimeError: "),
        (["--scales", "96,64"], f"{name}: fails in eval mode on images of 64x64: RuntimeError: "),
        (["--size", "2000000000"], "size must be from 1 to 4096 pixels, got 2000000000"),
        (["--scales", "224,2000000000"], "scales must be from 1 to 4096 pixels, got 2000000000"),
    ):
        assert main([*command, *more]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and says in lines[0], lines
    assert main([*command, "--size", "96"]) == 0


def test_a_classifier_that_is_a_convolution(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """SqueezeNet's weights have no matrix: the data set says how many classes there are."""
    command = ["evaluate", "--model", "squeezenet1_1", "--device", "cpu", "--data-dir", str(folder), "--workers", "0"]
    for classes in (3, 4):
        torch.save(models.squeezenet1_1(num_classes=classes).state_dict(), tmp_path / f"{classes}.pth")
    assert main([*command, "--weights", str(tmp_path / "3.pth"), "--size", "64"]) == 0
    assert "6 images in" in capsys.readouterr().out
    assert main([*command, "--weights", str(tmp_path / "4.pth"), "--size", "64"]) == 2
    says = "the weights are of another model: 'classifier.1.weight' is (4, 512, 1, 1) in the file, (3, 512, 1, 1) in the model"
    assert says in capsys.readouterr().err
    with pytest.raises(UsageError, match="no classifier in it"):
        members.from_weights("squeezenet1_1", tmp_path / "3.pth", CPU, "cpu")
