"""explain: what runs, in how many launches, and why something was left alone; for fused and unfused models."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torchvision
from nets import TINY_LAUNCHES, TINY_TRAINING_LAUNCHES, images, tiny
from torch import Tensor, nn
from torch.autograd import forward_ad
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

import fused_resnet
from fused_resnet import count_launches, explain, fuse


def test_table_of_a_fused_model() -> None:
    net = fuse(tiny())
    told = explain(net, show=False)
    assert [(row.name, row.backend, row.launches) for row in told.rows] == [
        ("stem.0", "cpu", 2), ("basic", "cpu", 3), ("bottleneck", "cpu", 3)
    ]  # fmt: skip
    assert all(row.fused for row in told.rows) and not told.left_alone
    assert told.launches == TINY_LAUNCHES
    # conv, bn, relu, pool; 2 (conv, bn, relu) + conv, bn + add; 3 (conv, bn, relu) + add
    assert [row.eager_launches for row in told.rows] == [4, 9, 10]
    text = str(told)
    assert text.splitlines()[-2].split() == ["total", "8", "23"]
    assert "affine_add" in text and "max_pool" in text


def test_what_it_says_is_what_runs() -> None:
    """Launch by launch, in order, for each backend."""
    for backend in ("cpu", "reference"):
        for training in (False, True):
            net = fuse(tiny(), backend=backend).train(training)
            with torch.no_grad(), count_launches() as log:
                net(images())
            told = explain(net, show=False)
            assert "; ".join(str(launch) for _, launch in log.launches) == "; ".join(row.note for row in told.rows)
            assert {row.backend for row in told.rows} == {name for name, _ in log.launches} == {backend}


def test_it_prints_unless_told_not_to(capsys: pytest.CaptureFixture) -> None:
    told = explain(fuse(tiny()))
    assert capsys.readouterr().out == f"{told}\n"
    explain(tiny(), show=False)
    assert capsys.readouterr().out == ""


def test_an_unfused_model_says_call_fuse() -> None:
    told = explain(torchvision.models.resnet18(num_classes=2), show=False)
    assert told.rows and not any(row.fused for row in told.rows)
    assert all("call fuse" in row.note for row in told.rows)
    assert told.launches == told.eager_launches


def test_explain_follows_the_mode() -> None:
    net = fuse(tiny()).train()
    told = explain(net, show=False)
    assert not told.left_alone and told.launches == TINY_TRAINING_LAUNCHES
    assert [row.launches for row in told.rows] == [2, 4, 4]
    assert all("stats" in row.note for row in told.rows) and "bn_add_relu" in told.rows[1].note
    net.eval()
    assert explain(net, show=False).launches == TINY_LAUNCHES
    net.bottleneck.bn2.train()
    told = explain(net, show=False)
    assert not told.left_alone and told.launches == TINY_LAUNCHES
    assert "conv2: conv + stats; conv3: bn_relu + conv + affine_add + relu" in told.rows[2].note


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "resnet101"])
def test_every_block_of_torchvisions_resnets_trains_fused(name: str) -> None:
    with torch.device("meta"):
        told = explain(fuse(getattr(torchvision.models, name)()).train(), show=False)
    assert told.rows and not told.left_alone
    assert all(row.backward for row in told.rows)


def test_explain_follows_the_backend_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    net = fuse(tiny())
    with fused_resnet.backend("reference"):
        assert {row.backend for row in explain(net, show=False).rows} == {"reference"}
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "reference")
    assert {row.backend for row in explain(net, show=False).rows} == {"reference"}


def test_a_launch_that_goes_to_another_executor_is_named() -> None:
    """Nothing falls back silently: oneDNN has no float64."""
    net = fuse(tiny().double())
    with torch.no_grad(), count_launches() as log:
        net(images().double())
    assert ("reference" in {name for name, _ in log.launches}) is True
    assert "on reference: oneDNN on this processor has no torch.float64" in explain(net, show=False).rows[1].note


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_explain_follows_autocast(frozen: bool) -> None:
    """By the launches that then run, in which type and where."""
    norm = FrozenBatchNorm2d(8) if frozen else nn.BatchNorm2d(8)
    net = fuse(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU())).eval()
    assert explain(net, show=False).rows[0].backend == "cpu"
    with torch.autocast("cpu", torch.bfloat16), count_launches() as log:
        row = explain(net, show=False).rows[0]
        net(images())
    assert row.fused == bool(log.launches) == (not frozen)
    assert "autocast" in row.note if frozen else ("on reference" in row.note) == (log.launches[0][0] == "reference")


def test_layers_whose_forward_cannot_be_traced_are_listed() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.block = BasicBlock(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(self.bn(self.conv(x))) if x.sum() > 0 else x

    told = explain(fuse(Own().eval()), show=False)
    assert [(row.name, row.what, row.fused) for row in told.rows] == [
        ("conv", "Conv2d", False), ("bn", "BatchNorm2d", False), ("block", "conv1 + conv2", True)
    ]  # fmt: skip
    assert told.rows[0].note == "the control flow of its forward depends on data: Own"


def test_every_convolution_is_accounted_for() -> None:
    """No convolution of a detection model goes unmentioned."""
    from torchvision.models.detection import retinanet_resnet50_fpn

    model = fuse(retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2).eval())
    told = explain(model, show=False)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    mentioned = sum(row.what.count("+") + 1 if row.fused else int(row.what == "Conv2d") for row in told.rows)
    assert mentioned == convolutions


def test_a_sync_batch_norm_that_nobody_shares_is_named() -> None:
    net = fuse(nn.SyncBatchNorm.convert_sync_batchnorm(tiny()).train())
    net.basic.bn2.eval()
    notes = {row.name: row.note for row in explain(net, show=False).rows}
    assert "SyncBatchNorm of conv1, downsample: no other ranks, an ordinary BatchNorm" in notes["basic"]
    assert "SyncBatchNorm of conv1, conv2, conv3: no other ranks" in notes["bottleneck"] and "stats" in notes["bottleneck"]
    assert not any("SyncBatchNorm" in row.note for row in explain(net.eval(), show=False).rows)
    first = nn.Sequential(nn.SyncBatchNorm(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).train()
    assert "SyncBatchNorm of 0: no other ranks" in explain(fuse(first), show=False).rows[0].note
    assert not any("SyncBatchNorm" in row.note for row in explain(fuse(tiny()).train(), show=False).rows)


def test_under_a_transform_everything_is_left_alone() -> None:
    net, told = fuse(tiny()), []

    def loss(x: Tensor) -> Tensor:
        told.append(explain(net, show=False))
        return net(x).sum()

    torch.func.grad(loss)(images())
    with forward_ad.dual_level():
        loss(images())
    with count_launches() as log:
        loss(images())
    for under in told[:2]:
        assert [row.name for row in under.left_alone] == ["stem.0", "basic", "bottleneck"]
        assert all("torch.func transform or forward-mode" in row.note for row in under.rows)
        assert under.launches == under.eager_launches
    assert told[2].launches == len(log) == TINY_LAUNCHES


def test_nothing_to_say() -> None:
    assert str(explain(nn.Linear(2, 2), show=False)) == "no module is a convolution or a BatchNorm: nothing to fuse"


def test_explain_needs_no_weights() -> None:
    with torch.device("meta"):
        assert explain(fused_resnet.resnet50().eval(), show=False).launches == 54


def test_the_backward_is_told_too() -> None:
    """Which executor runs how many of its launches, in both modes; nothing falls back silently."""
    net = fuse(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval())
    for backend in ("reference", "cpu"):
        for training in (False, True):
            net.train(training)
            with fused_resnet.backend(backend), count_launches() as log:
                explanation = explain(net, show=False)
                out = net(torch.randn(2, 3, 9, 9, requires_grad=True))
                forward = len(log)
                out.sum().backward()
            ran = Counter(name for name, _ in log.launches[forward:])
            assert explanation.rows[0].backward == tuple(sorted(ran.items()))
            assert sum(ran.values()) == 3
            assert all(f"{count} launches on {name}" in str(explanation) for name, count in ran.items())
