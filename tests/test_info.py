"""fused-resnet info: what it counts, of our networks and of torchvision's, and what it refuses."""

from __future__ import annotations

import pytest

from fused_resnet.cli import main


def test_info_counts_resnet50(capsys: pytest.CaptureFixture[str]) -> None:
    """174 kernels of eager mode are 56 (54 launches, average pooling, classifier); 41 and 14.5 GB as worked out by hand."""
    assert main(["info", "resnet50", "--batch", "256", "--dtype", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    total = next(line for line in lines if line.strip().startswith("total")).split()
    assert total[2:4] == ["174", "56"]
    assert float(total[1].replace(",", "")) == pytest.approx(2 * 4.09 * 256, rel=1e-2)  # torchvision: 4.09 G multiply-adds
    assert float(total[4].replace(",", "")) == pytest.approx(41_000, rel=0.02)
    assert float(total[5].replace(",", "")) == pytest.approx(14_500, rel=0.02)
    assert "50 weight layers and 4 projections, 25.6 M parameters" in lines[1]
    assert next(line for line in lines if "layer1.0" in line).split()[2:4] == ["12", "4"]


def test_info_counts_a_training_step(capsys: pytest.CaptureFixture[str]) -> None:
    """70 and 122 launches of plans, and two and four kernels of PyTorch's; ratios as docs/training.md has them."""
    assert main(["info", "resnet50", "--batch", "8"]) == 0
    out = capsys.readouterr().out
    lines = [line.strip() for line in out.partition("a training step")[2].splitlines()]
    eager, fused, low = (
        next(line for line in lines if line.startswith(name)).split() for name in ("eager", "fused ", "fused,")
    )
    assert eager[2:4] == ["227", "228"] and eager[5::2] == ["1.00", "1.00"]
    assert fused[1] == eager[1] and fused[2:4] == ["72", "126"] and fused[5::2] == ["0.69", "0.79"]
    assert low[3:5] == ["72", "154"] and low[-1] == "0.32"
    assert "eager moves 7,945.0 MB (fused: 0.60 of it)" in out


def test_info_of_a_network_for_cifar(capsys: pytest.CaptureFixture[str]) -> None:
    """Images of its own size, without being told."""
    assert main(["info", "cifar_resnet20", "--batch", "2"]) == 0
    text = capsys.readouterr().out
    assert "input 2 x 3 x 32 x 32" in text and "20 weight layers, 270 k parameters, 162 MFLOP" in text


@pytest.mark.parametrize(
    ("name", "layers", "adds"),
    [
        ("vgg16", "16 weight layers, 138 M parameters, 30.9 GFLOP", "15.5 G multiply-adds (15.3 G in convolutions)"),
        ("vgg16_bn", "16 weight layers, 138 M parameters, 30.9 GFLOP", "15.5 G multiply-adds (15.3 G in convolutions)"),
        ("vgg19", "19 weight layers, 144 M parameters, 39.3 GFLOP", "19.6 G multiply-adds (19.5 G in convolutions)"),
        ("resnet152_1x1", "152 weight layers and 4 projections, 60.2 M parameters", "11.3 G multiply-adds"),
        ("highway34", "34 weight layers, 3 projections and 16 gates, ", "3.85 G multiply-adds"),
        ("highway152", "152 weight layers, 4 projections and 50 gates, ", "21.3 G multiply-adds"),
    ],
)
def test_info_of_152_layers_and_of_vgg(name: str, layers: str, adds: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Section 4.1 of the paper: 152 layers cost 11.3 G, VGG-16 and VGG-19 15.3 G (its convolutions) and 19.6 G."""
    assert main(["info", name]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].startswith(layers) and out.splitlines()[2].startswith(adds) and not err


def test_info_says_that_a_shortcut_costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Layers, parameters and multiply-adds of the plain network and of the residual one with option A are the same."""
    said = []
    for name in ("plain34", "resnet34_a"):
        assert main(["info", name]) == 0
        said.append(capsys.readouterr().out.splitlines()[1:3])
    assert said[0] == said[1] and said[0][0] == "34 weight layers, 21.6 M parameters, 7.29 GFLOP"


def test_info_of_what_is_in_nobodys_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Near names are those of torchvision too; RegNets cannot be made without values, ViTs have one size of images."""
    for arguments, says in (
        (["vgg61"], "unknown model 'vgg61'; did you mean vgg"),
        (["resnet1010"], "did you mean resnet101 or resnet50"),
        (["fcn_resnet50"], "unknown model 'fcn_resnet50'"),
        (["cifar_resnet21"], "depth must be 6n + 2"),
        (["vit_b_16", "--size", "100"], "Expected 224 but got 100"),
    ):
        assert main(["info", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("fused-resnet: error: ") and says in error and error.count("\n") == 1
    assert main(["info", "regnet_y_400mf"]) == 0
    assert "82 weight layers and 4 projections, 4.34 M parameters" in capsys.readouterr().out
    monkeypatch.setattr("fused_resnet.specimens.torchvision_models", lambda: None)
    assert main(["info", "vgg16"]) == 2
    assert "torchvision, whose classifiers are known too, is not installed" in capsys.readouterr().err
