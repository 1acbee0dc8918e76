"""The CPU executor's convolutions in training and their gradients, each way they are computed, against float64 autograd."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close, assert_no_worse, relative_error

from fused_resnet.backends import cpu_convolution
from fused_resnet.launch import Geometry

#: By the way it takes: matrix products, oneDNN with contiguous tensors, and with channels_last ones.
WAYS = {
    "product": Geometry(3, 5, 7, 24, 40, 1, 1),
    "strided product": Geometry(2, 9, 8, 24, 40, 1, 1, (2, 3)),
    "one channel": Geometry(2, 5, 4, 1, 3, 1, 1),
    "one filter": Geometry(2, 5, 4, 3, 1, 1, 1),
    "rows": Geometry(5, 1, 1, 33, 18, 1, 1),
    "blocked": Geometry(2, 5, 4, 256, 128, 3, 3, padding=(1, 1)),
    "blocked, strided": Geometry(2, 7, 6, 128, 256, 3, 3, (2, 1), (1, 2), (1, 2)),
    "channels_last": Geometry(2, 9, 8, 32, 48, 3, 3, (2, 2), (1, 1)),
    "skips pixels": Geometry(1, 9, 8, 24, 40, 1, 1, (2, 2)),
    "groups": Geometry(2, 9, 8, 32, 64, 3, 3, padding=(1, 1), groups=4),
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written is seen."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))


def problem(g: Geometry, layout: torch.memory_format) -> tuple[torch.Tensor, ...]:
    made = [torch.randn(shape).contiguous(memory_format=torch.channels_last) for shape in (g.x_shape, g.y_shape)]
    return *made, torch.randn(g.w_shape).contiguous(memory_format=layout), torch.randn(g.K)


def truth(g: Geometry, x: torch.Tensor, dy: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> list[torch.Tensor]:
    x, w = (tensor.double().contiguous().requires_grad_() for tensor in (x, w))
    y = torch.conv2d(x, w, None if bias is None else bias.double(), g.stride, g.padding, g.dilation, g.groups)
    return [y.detach(), *torch.autograd.grad(y, (x, w), dy.double().contiguous())]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("way", WAYS)
def test_values(way: str, layout: torch.memory_format) -> None:
    g = WAYS[way]
    x, dy, w, bias = problem(g, layout)
    reads, writes = g.C // g.groups * g.R * g.S, g.K // g.groups * g.R * g.S
    for shift in (None, bias):
        y, dx, dw = truth(g, x, dy, w, shift)
        actual = cpu_convolution.forward(g, x, w, shift)
        assert_close(actual, y, reads)
        assert actual.is_contiguous(memory_format=torch.channels_last) and actual._base is None
    both = cpu_convolution.gradients(g, dy, x, w)
    of_input, nothing = cpu_convolution.gradients(g, dy, None, w)
    no_input, of_filters = cpu_convolution.gradients(g, dy, x, None)
    assert nothing is None and no_input is None
    for actual in (both[0], of_input):
        assert_close(actual, dx, writes)
        assert actual.is_contiguous(memory_format=torch.channels_last)
    for actual in (both[1], of_filters):
        assert_close(actual, dw, g.N * g.P * g.Q)


@pytest.mark.parametrize("way", ["product", "strided product", "rows", "blocked", "channels_last"])
def test_values_that_are_not_finite(way: str) -> None:
    """As in PyTorch: they reach what they are a factor of, and nothing else."""
    g = WAYS[way]
    x, dy, w, _ = problem(g, torch.contiguous_format)
    middle = tuple(size // 2 for size in dy.shape[2:])  # whose taps meet no padding: kernels differ in what NaN times that is
    x[1, 2, 0, 0], dy[(1, 3, *middle)] = torch.inf, torch.nan
    made = [cpu_convolution.forward(g, x, w, None), *cpu_convolution.gradients(g, dy, x, w)]
    for actual, expected in zip(made, truth(g, x, dy, w, None), strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())


@pytest.mark.parametrize("way", ["product", "strided product", "rows", "blocked", "channels_last", "skips pixels"])
def test_without_images(way: str) -> None:
    """A rank of a SyncBatchNorm may have none: its gradient is zero, whatever was in memory."""
    known = WAYS[way]
    g = Geometry(0, known.H, known.W, known.C, known.K, known.R, known.S, known.stride, known.padding, known.dilation)
    x, dy, w, bias = problem(g, torch.contiguous_format)
    assert cpu_convolution.forward(g, x, w, bias).shape == g.y_shape
    dx, dw = cpu_convolution.gradients(g, dy, x, w)
    assert dx.shape == g.x_shape and dw.shape == g.w_shape and not dw.any()


def test_filters_larger_than_images_are_rounded_as_eager_does() -> None:
    """oneDNN's channels_last kernels add up one product after another: four times as far from float64 (AVX-512)."""
    g = Geometry(2, 4, 4, 512, 256, 3, 3, padding=(1, 1))
    x, dy, w, _ = problem(g, torch.contiguous_format)
    args = (None, g.stride, g.padding, g.dilation)
    y = torch.conv2d(x.contiguous(), w, *args, g.groups)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy.contiguous(), x.contiguous(), w, *args, False, [0, 0], g.groups, [True, True, False]
    )
    actual = cpu_convolution.forward(g, x, w, None), *cpu_convolution.gradients(g, dy, x, w)
    for ours, eagers, expected in zip(actual, (y, dx, dw), truth(g, x, dy, w, None), strict=True):
        assert_no_worse(relative_error(ours, expected), 1.1 * relative_error(eagers, expected), "ours", floor=0)


def test_which_way(monkeypatch: pytest.MonkeyPatch) -> None:
    product, blocked, fp32 = cpu_convolution.is_product, cpu_convolution.is_blocked, torch.float32
    assert product(WAYS["product"], fp32) and product(WAYS["strided product"], fp32) and product(WAYS["rows"], fp32)
    assert not product(WAYS["product"], torch.bfloat16) and not product(WAYS["skips pixels"], fp32)
    for capability, images in (("AVX2", 8), ("AVX512", 2)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        cpu_convolution._most_pixels.cache_clear()
        assert product(Geometry(images, 8, 8, 64, 64, 1, 1), fp32), capability
        assert not product(Geometry(images, 8, 9, 64, 64, 1, 1), fp32), capability
    monkeypatch.undo()
    cpu_convolution._most_pixels.cache_clear()
    assert not product(Geometry(2, 5, 5, 64, 64, 1, 1, padding=(1, 1)), fp32)
    assert not product(Geometry(2, 5, 5, 64, 64, 1, 1, groups=2), fp32)
    little = Geometry(2, 8, 8, 256, 128, 3, 3, padding=(1, 1))  # its filters are six times as large
    assert blocked(little, fp32, True) and not blocked(little, fp32, False)
    assert not blocked(Geometry(6, 8, 8, 256, 128, 3, 3, padding=(1, 1)), fp32, True)
    assert blocked(WAYS["blocked"], fp32, False) and not blocked(Geometry(1, 3, 3, 128, 128, 3, 3), fp32, True)
    assert not blocked(WAYS["blocked"], torch.bfloat16, True) and not blocked(WAYS["channels_last"], fp32, True)
    assert not blocked(Geometry(1, 2, 2, 512, 512, 1, 1), fp32, True)
