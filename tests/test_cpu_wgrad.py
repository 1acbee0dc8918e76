"""Gradients of filters as matrix products (the CPU executor's own) against PyTorch's convolution in float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close, relative_error

from fused_resnet.backends import cpu_wgrad
from fused_resnet.launch import Geometry


def truth(g: Geometry, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """By autograd, contiguous, float64."""
    w = torch.zeros(g.w_shape, dtype=torch.float64, requires_grad=True)
    y = torch.conv2d(x.double().contiguous(), w, None, g.stride, g.padding, g.dilation)
    return torch.autograd.grad(y, w, dy.double().contiguous())[0]


def problem(g: Geometry, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    made = (torch.randn(shape, dtype=dtype) for shape in (g.y_shape, g.x_shape))
    dy, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in made)
    return dy, x


@pytest.mark.parametrize("images", [1, 2, 100], ids=["one image at a time", "two", "all together"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 4), (5, 2)], ids=str)
def test_any_convolution(kernel, stride, dilation, images, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact in float64 with any padding, also one so wide that taps meet nothing but zeros."""
    for padding in ((0, 0), (1, 2), (4, 7)):
        for h, w in ((13, 11), (16, 9)):
            g = Geometry(5, h, w, 3, 4, *kernel, stride, padding, dilation)
            rows = g.P + (g.R - 1) * g.dilation[0] // g.stride[0]
            planes = len({r * g.dilation[0] % g.stride[0] for r in range(g.R)})
            monkeypatch.setattr(cpu_wgrad, "TAPS_BYTES", images * planes * rows * g.Q * g.S * g.C * 8)
            dy, x = problem(g, torch.float64)
            actual = cpu_wgrad.wgrad(g, dy, x)
            assert actual.is_contiguous(memory_format=torch.channels_last)
            assert relative_error(actual, truth(g, dy, x)) < 1e-13, f"{g}"


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)], ids=str)
def test_in_fp32_and_with_nan(kernel) -> None:
    g = Geometry(8, 28, 28, 32, 48, *kernel, (1, 1), (kernel[0] // 2,) * 2)
    dy, x = problem(g, torch.float32)
    assert_close(cpu_wgrad.wgrad(g, dy, x), truth(g, dy, x), g.N * g.P * g.Q)
    x[3, 5, 7, 9] = float("nan")
    dw = cpu_wgrad.wgrad(g, dy, x)
    assert dw[:, 5].isnan().all() and not dw[:, :5].isnan().any() and not dw[:, 6:].isnan().any()


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)], ids=str)
def test_without_images(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of a SyncBatchNorm may have none; its gradient is zero, whatever was in memory."""
    g = Geometry(0, 9, 8, 4, 5, *kernel)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *sizes: new_empty(*sizes).fill_(torch.nan))
    dw = cpu_wgrad.wgrad(g, *problem(g, torch.float32))
    assert dw.shape == g.w_shape and dw.is_contiguous(memory_format=torch.channels_last) and not dw.any()


def test_what_it_is_taken_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 without groups and with channels enough, on processors where it was measured to be faster."""
    g = Geometry(2, 9, 9, 128, 128, 3, 3, padding=(1, 1))
    monkeypatch.setattr(cpu_wgrad, "_slow_there", lambda: True)
    assert cpu_wgrad.suits(g, torch.float32)
    assert not cpu_wgrad.suits(g, torch.bfloat16)
    assert not cpu_wgrad.suits(Geometry(2, 9, 9, 128, 128, 3, 3, groups=2), torch.float32)
    assert not cpu_wgrad.suits(Geometry(2, 9, 9, 3, 128, 3, 3), torch.float32)
    assert not cpu_wgrad.suits(Geometry(2, 9, 9, 128, 64, 3, 3), torch.float32)
    assert not cpu_wgrad.suits(Geometry(2, 31, 33, 64, 64, 3, 3, padding=(1, 1)), torch.float32)
    assert cpu_wgrad.suits(Geometry(2, 32, 32, 64, 64, 3, 3, padding=(1, 1)), torch.float32)
    monkeypatch.setattr(cpu_wgrad, "_slow_there", lambda: False)
    assert not cpu_wgrad.suits(g, torch.float32)
