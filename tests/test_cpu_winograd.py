"""3x3 convolutions by minimal filtering (the CPU executor's own) against PyTorch's convolution in float64."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tolerances import assert_close, assert_no_worse, distance
from torch import nn

import fused_resnet
from fused_resnet.backends import cpu_inference, cpu_winograd
from fused_resnet.launch import Geometry


def problem(g: Geometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(g.x_shape).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(g.w_shape) * 0.1, torch.randn(g.K)


def truth(g: Geometry, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.conv2d(x.double().contiguous(), w.double(), None if bias is None else bias.double(), 1, g.padding)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("part", [1, 20, 45, 1000], ids=["a row of tiles", "some rows", "some images", "all"])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 0), (3, 1)], ids=str)
def test_any_image_in_any_parts(padding, part, bias, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is poisoned; the last part of each kind overlaps the one before where they do not divide."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *sizes: new_empty(*sizes).fill_(torch.nan))
    for n, h, w in ((5, 12, 10), (1, 9, 14), (3, 11, 7), (2, 3, 3)):
        g = Geometry(n, h, w, 24, 40, 3, 3, (1, 1), padding)
        monkeypatch.setattr(cpu_winograd, "PART_BYTES", part * 16 * 4 * 40 // torch.get_num_threads() + 1)
        cpu_winograd._part.cache_clear()
        x, weight, shift = problem(g)
        shift_or_none = shift if bias else None
        before = x.clone()
        with torch.no_grad():
            y = cpu_winograd.convolve(g, cpu_winograd.Filters(weight, g, shift_or_none), x)
        assert y.is_contiguous(memory_format=torch.channels_last) and torch.equal(x, before)
        assert_close(y, truth(g, x, weight, shift_or_none), 9 * g.C, what=f"{g}")
    cpu_winograd._part.cache_clear()


def test_no_farther_from_the_truth_than_onednn() -> None:
    g = Geometry(1, 29, 30, 256, 128, 3, 3, (1, 1), (1, 1))
    x, w, bias = problem(g)
    with torch.no_grad():
        ours = cpu_winograd.convolve(g, cpu_winograd.Filters(w, g, bias), x)
        eagers = torch.conv2d(x, w, bias, padding=1)
    expected = truth(g, x, w, bias)
    assert distance([(ours, expected)]) <= 1.2 * distance([(eagers, expected)])


def test_filters_follow_the_size_of_the_images() -> None:
    first = Geometry(1, 40, 40, 24, 40, 3, 3, (1, 1), (1, 1))
    w, bias = torch.randn(first.w_shape), torch.randn(40)
    filters = cpu_winograd.Filters(w, first, bias)
    for n, h in ((1, 40), (2, 13), (1, 40), (7, 5), (3, 8), (2, 13)):
        g = Geometry(n, h, h, 24, 40, 3, 3, (1, 1), (1, 1))
        x = torch.randn(g.x_shape).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            assert_close(cpu_winograd.convolve(g, filters, x), truth(g, x, w, bias), 9 * g.C)
        assert filters.laid_out(g) is filters.laid_out(g) and len(filters._layouts) <= cpu_winograd.LAYOUTS


@pytest.mark.parametrize(
    ("suits", "g", "dtype"),
    [
        (True, Geometry(1, 28, 28, 256, 256, 3, 3, (1, 1), (1, 1)), torch.float32),
        (True, Geometry(8, 14, 14, 256, 256, 3, 3, (1, 1), (1, 1)), torch.float32),
        (False, Geometry(1, 28, 28, 256, 256, 3, 3, (1, 1), (1, 1)), torch.bfloat16),
        (False, Geometry(1, 28, 28, 256, 256, 3, 3, (2, 2), (1, 1)), torch.float32),
        (False, Geometry(1, 28, 28, 256, 256, 3, 3, (1, 1), (2, 2), (2, 2)), torch.float32),
        (False, Geometry(1, 28, 28, 384, 384, 3, 3, (1, 1), (1, 1), (1, 1), 2), torch.float32),
        (False, Geometry(1, 28, 28, 256, 256, 3, 1, (1, 1), (1, 0)), torch.float32),
        (False, Geometry(1, 56, 56, 128, 128, 3, 3, (1, 1), (1, 1)), torch.float32),
        (False, Geometry(1, 14, 14, 256, 256, 3, 3, (1, 1), (1, 1)), torch.float32),
        (False, Geometry(16, 7, 7, 512, 512, 3, 3, (1, 1), (1, 1)), torch.float32),
        (False, Geometry(0, 28, 28, 128, 128, 3, 3, (1, 1), (1, 1)), torch.float32),
    ],
)
def test_what_suits(suits: bool, g: Geometry, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert cpu_winograd.suits(g, dtype) is suits


class Block(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(192, 192, 3, padding=1, bias=False), nn.BatchNorm2d(192)
        self.conv2, self.bn2 = nn.Conv2d(192, 192, 3, padding=1, bias=False), nn.BatchNorm2d(192)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def test_blocks_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind BatchNorm, with a shortcut and an activation; parameters that change are seen, and a NaN is too."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cpu_inference.inference.cache_clear()
    eager = nn.Sequential(Block(), Block()).eval()
    with torch.no_grad():
        for module in eager.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_()
    fused = fused_resnet.fuse(deepcopy(eager), backend="cpu")
    calls = []
    convolve = cpu_winograd.convolve
    monkeypatch.setattr(cpu_winograd, "convolve", lambda g, *rest: calls.append(g) or convolve(g, *rest))
    with torch.no_grad():
        for side in (28, 28, 26):
            x = torch.randn(1, 192, side, side)
            expected = deepcopy(eager).double()(x.double())
            calls.clear()
            actual = fused(x.contiguous(memory_format=torch.channels_last))
            assert len(calls) == 4
            assert_no_worse(distance([(actual, expected)]), distance([(eager(x), expected)]), "output")
            for model in (eager, fused):
                model[0].conv1.weight.mul_(1.5)
                model[1].bn2.running_mean.add_(1)
        x[0, 3, 10, 10] = torch.nan
        assert fused(x).isnan().any()
    cpu_inference.inference.cache_clear()
