"""The padded shortcut and its gradient, exactly: every pixel where it belongs, zeros everywhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from launches import activations, zero_pad

from fused_resnet.backends import count_launches
from fused_resnet.backends import triton as executor
from fused_resnet.tuning.tile import Strip

#: N, H, W, C, K: odd and even sides, channels past a tile, as many filters as channels.
SIZES = [(3, 7, 10, 20, 40), (2, 8, 5, 16, 16), (1, 1, 1, 3, 70)]
STRIPS = [None, Strip(8, 16, 1), Strip(16, 64, 1)]


def padded(x: torch.Tensor, stride: tuple[int, int], filters: int) -> torch.Tensor:
    return F.pad(x[:, :, :: stride[0], :: stride[1]], (0, 0, 0, 0, 0, filters - x.shape[1]))


@pytest.mark.parametrize("wide", [False, True], ids=["32-bit", "64-bit"])
@pytest.mark.parametrize("strip", STRIPS, ids=str)
@pytest.mark.parametrize("stride", [(2, 2), (1, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_ways(dtype: torch.dtype, stride: tuple[int, int], strip: Strip | None, wide: bool) -> None:
    for sizes in SIZES:
        n, h, w, c, k = sizes
        x = activations((n, c, h, w), dtype)
        leaf = x.double().requires_grad_()
        truth = padded(leaf, stride, k)
        dz = activations(tuple(truth.shape), dtype)
        (expected,) = torch.autograd.grad(truth, leaf, dz.double())
        y, dx = torch.full_like(dz, torch.nan), torch.full_like(x, torch.nan)
        with count_launches() as log:
            launch = zero_pad(*sizes, stride=stride, dtype=dtype)
            executor.run(launch, {"x": x}, tile=strip, wide=wide, out={"y": y})
            launch = zero_pad(*sizes, stride=stride, dtype=dtype, backward=True)
            executor.run(launch, {"dz": dz}, tile=strip, wide=wide, out={"dx": dx})
        assert torch.equal(y.double(), truth.detach()) and torch.equal(dx.double(), expected)
        assert log.kernels == ["zero_pad", "zero_pad_backward"]


def test_nan_and_infinity_travel() -> None:
    x = activations((2, 4, 6, 6), torch.float32)
    x[0, 1, 2, 4], x[1, 3, 0, 0], x[0, 0, 1, 1] = torch.nan, torch.inf, torch.nan  # the last is between the strides
    y = executor.run(zero_pad(2, 6, 6, 4, 8, stride=(2, 2)), {"x": x})
    assert isinstance(y, torch.Tensor)
    assert y.isnan().nonzero().tolist() == [[0, 1, 1, 2]] and y.isinf().nonzero().tolist() == [[1, 3, 0, 0]]
