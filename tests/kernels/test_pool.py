"""Max-pooling and its backward against PyTorch, exactly where nothing is rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launches import expected, max_pool, max_pool_backward, normalised, operands_of, run_all, run_poisoned
from tolerances import assert_close, bound
from torch import Tensor

from fused_resnet.backends import count_launches
from fused_resnet.backends import triton as executor
from fused_resnet.launch import Launch, PoolGeometry
from fused_resnet.tuning.tile import Strip

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    ((2, 11, 12, 64), {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}),
    ((1, 9, 7, 70), {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1)}),
    ((3, 8, 9, 5), {"kernel": (2, 3), "stride": (2, 1)}),
    ((1, 9, 11, 3), {"kernel": (3, 3), "stride": (2, 3), "padding": (1, 1), "dilation": (2, 2)}),
    ((1, 4, 4, 1), {"kernel": (4, 4), "stride": (4, 4)}),
    ((2, 30, 31, 16), {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}),
]
STEM: dict[str, Any] = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
NORM = ("x_mean", "x_invstd", "x_gamma", "x_beta")


def chosen(launch: Launch, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's maxima and their places, as ``r * S + s`` of each window."""
    g = launch.geometry
    assert isinstance(g, PoolGeometry)
    y, places = F.max_pool2d(pooled, g.kernel, g.stride, g.padding, g.dilation, return_indices=True)
    p, q = torch.arange(g.P).view(-1, 1), torch.arange(g.Q)
    r = (places // g.W - (p * g.stride[0] - g.padding[0])) // g.dilation[0]
    s = (places % g.W - (q * g.stride[1] - g.padding[1])) // g.dilation[1]
    return y, r * g.kernel[1] + s


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "how"), SHAPES, ids=str)
def test_values(sizes: tuple[int, ...], how: dict[str, Any], dtype: torch.dtype) -> None:
    launch = max_pool(*sizes, dtype=dtype, **how)
    operands = operands_of(launch)
    operands["x"].sub_(3)  # mostly negative: a padding of zeros would show
    assert torch.equal(run_poisoned(launch, operands).double().cpu(), expected(launch, operands))


@pytest.mark.parametrize(("sizes", "how"), SHAPES, ids=str)
def test_indices(sizes: tuple[int, ...], how: dict[str, Any]) -> None:
    """Few different values, so that most windows have several maxima; NaN and infinities among them."""
    launch = max_pool(*sizes, outputs=("y", "indices"), **how)
    operands = operands_of(launch)
    x = operands["x"].round_()
    x[torch.rand(x.shape, device=x.device) < 0.05] = torch.nan
    x[torch.rand(x.shape, device=x.device) < 0.05] = torch.inf
    x[0] = torch.where(torch.rand(x[0].shape, device=x.device) < 0.7, -torch.inf, x[0])
    for strip in (None, Strip(8, 16)):
        out = run_all(launch, operands, strip)
        y, index = chosen(launch, x.cpu())
        assert torch.equal(out["y"].cpu().nan_to_num(7e7), y.nan_to_num(7e7))
        assert torch.equal(out["indices"].cpu().long(), index)


@pytest.mark.parametrize("prologue", ["bn", "bn_relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prologue(prologue: str, dtype: torch.dtype) -> None:
    """The padding stays -inf behind it: with a beta far below zero every value is negative."""
    for without in ((), NORM[2:]):
        launch = max_pool(2, 11, 12, 20, prologue=prologue, outputs=("y", "indices"), dtype=dtype, without=without, **STEM)
        operands = operands_of(launch)
        if "x_beta" in operands:
            operands["x_beta"].sub_(5)
        out = run_all(launch, operands, Strip(16, 16))
        y, _ = chosen(launch, normalised(launch, operands))
        assert_close(out["y"], y, 16)
        # The indices belong to the values that were stored: at a near tie another rounding may choose another tap.
        pooled = F.pad(normalised(launch, operands), (1, 1, 1, 1), value=-torch.inf)
        taps = torch.stack([pooled[:, :, r : r + 11 : 2, s : s + 11 : 2] for r in range(3) for s in range(3)])
        picked = taps.gather(0, out["indices"].cpu().long().unsqueeze(0))[0]
        assert_close(out["y"], picked, 16)


def test_wide_offsets() -> None:
    launch = max_pool(2, 11, 12, 64, outputs=("y", "indices"), **STEM)
    operands = operands_of(launch)
    out = run_all(launch, operands, wide=True)
    y, index = chosen(launch, operands["x"].cpu())
    assert torch.equal(out["y"].cpu(), y) and torch.equal(out["indices"].cpu().long(), index)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite(bad: float) -> None:
    launch = max_pool(1, 11, 12, 8, **STEM)
    operands = operands_of(launch)
    operands["x"][0, 2, 5, 6] = bad
    operands["x"][0, 3] = bad
    actual = run_poisoned(launch, operands).double().cpu()
    assert torch.allclose(actual, expected(launch, operands), rtol=0, atol=0, equal_nan=True)


def test_no_images() -> None:
    launch = max_pool(0, 11, 12, 8, **STEM)
    assert executor.run(launch, operands_of(launch)).shape == (0, 8, 6, 6)


def scattered(launch: Launch, pooled: Tensor, dy: Tensor) -> Tensor:
    """PyTorch's gradient of pooling ``pooled``, in float64."""
    g = launch.geometry
    assert isinstance(g, PoolGeometry)
    pooled = pooled.double().cpu().requires_grad_()
    return torch.autograd.grad(F.max_pool2d(pooled, g.kernel, g.stride, g.padding, g.dilation), pooled, dy.double().cpu())[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [False, True], ids=["found again", "stored"])
@pytest.mark.parametrize(("sizes", "how"), SHAPES, ids=str)
def test_backward(sizes: tuple[int, ...], how: dict[str, Any], stored: bool, dtype: torch.dtype) -> None:
    launch = max_pool_backward(*sizes, operands=("dy", "x", "indices") if stored else ("dy", "x"), dtype=dtype, **how)
    operands = operands_of(launch)
    operands["x"].round_()
    if stored:
        operands["indices"].copy_(chosen(launch, operands["x"].float().cpu())[1])
    truth = scattered(launch, operands["x"], operands["dy"])
    assert_close(run_poisoned(launch, operands), truth, 16)
    if dtype == torch.float32 and (stored or sizes[0] == 3):
        assert_close(run_poisoned(launch, operands, Strip(16, 16, 3)), truth, 16)


def test_backward_where_x_is_not_finite() -> None:
    launch = max_pool_backward(2, 11, 12, 20, **STEM)
    operands = operands_of(launch)
    x = operands["x"].round_()
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[torch.rand(x.shape, device=x.device) < 0.1] = bad
    assert_close(run_poisoned(launch, operands), scattered(launch, x, operands["dy"]), 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("without", [(), NORM[2:]], ids=["affine", "no affine"])
def test_backward_behind_a_batchnorm(activation: str, without: tuple[str, ...], dtype: torch.dtype) -> None:
    """The gradient in front of the activation, and BatchNorm's two sums of it."""
    roles = tuple(role for role in ("dy", "x", "indices", *NORM) if role not in without)
    how = {"operands": roles, "outputs": ("dx", "sum", "dot"), "activation": activation, "dtype": dtype}
    launch = max_pool_backward(2, 11, 12, 20, **how, **STEM)
    operands = operands_of(launch)
    for role in ("x_mean", "x_beta"):  # one channel of exact zeros: no gradient in front of a ReLU
        if role in operands:
            operands[role][3] = 0
    operands["x"][:, 3] = 0
    x, mean, invstd = (operands[role].double().cpu() for role in ("x", "x_mean", "x_invstd"))
    forward = max_pool(2, 11, 12, 20, prologue="bn_relu" if activation == "relu" else "bn", dtype=dtype, **STEM)
    a = normalised(forward, operands)
    operands["indices"].copy_(chosen(launch, a)[1])
    truth = scattered(launch, a, operands["dy"])
    if activation == "relu":
        truth = truth.masked_fill(a <= 0, 0)
    for strip in (None, Strip(8, 16, 3)):
        out = run_all(launch, operands, strip)
        assert_close(out["dx"], truth, 16)
        stored = out["dx"].double().cpu()
        xhat = (x - mean.view(1, -1, 1, 1)) * invstd.view(1, -1, 1, 1)
        assert_close(out["sum"], stored.sum((0, 2, 3)), 264)
        assert_close(out["dot"], (stored * xhat).sum((0, 2, 3)), 264)


def test_backward_lets_the_gradient_of_nan_pass() -> None:
    launch = max_pool_backward(1, 4, 4, 16, operands=("dy", "x", "indices", *NORM), activation="relu", **STEM)
    operands = operands_of(launch)
    operands["x"][0, 3] = torch.nan
    operands["indices"].fill_(4)
    assert torch.equal(run_poisoned(launch, operands)[0, 3, ::2, ::2], operands["dy"][0, 3])


def test_backward_is_bitwise_equal_on_every_run() -> None:
    how = {"operands": ("dy", "x", "indices", *NORM), "outputs": ("dx", "sum", "dot"), "activation": "relu"}
    launch = max_pool_backward(2, 11, 12, 20, **how, **STEM)
    operands = operands_of(launch)
    operands["indices"].fill_(4)
    first, second = (run_all(launch, operands, Strip(8, 16, 3)) for _ in range(2))
    assert all(torch.equal(first[role], second[role]) for role in first)
    assert_close(run_all(launch, operands, Strip(8, 16, 3), wide=True)["dx"], first["dx"], 16)


def test_one_kernel_start_each() -> None:
    with count_launches() as log:
        for launch in (max_pool(2, 11, 12, 20, **STEM), max_pool_backward(2, 11, 12, 20, **STEM)):
            executor.run(launch, operands_of(launch))
    assert log.kernels == ["max_pool", "max_pool_backward"]


def test_what_is_not_supported() -> None:
    wide = max_pool(1, 40, 40, 16, kernel=(17, 17), stride=(1, 1), outputs=("y", "indices"))
    assert "one byte" in str(executor.supports(wide))
    assert executor.supports(max_pool(1, 40, 40, 16, kernel=(17, 17), stride=(1, 1))) is None
    assert "indices" in str(executor.supports(max_pool_backward(2, 11, 12, 20, operands=("dy", "x", *NORM), **STEM)))


def test_bound_is_tight() -> None:
    """A tolerance that let a dropped pixel through would test nothing."""
    assert bound(torch.float32, 264) < 1 / 2640
