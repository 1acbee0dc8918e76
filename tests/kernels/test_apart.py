"""Launches in pieces, around our convolution and around PyTorch's, against what the fused launch should give in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gradient_launches import dgrad, wgrad
from gradient_launches import expected as expected_gradients
from gradient_launches import operands_of as gradient_operands
from launches import DEVICE, conv, expected, operands_of, poisoned_workspace, run_all
from tolerances import assert_close, bound

from fused_resnet.backends import count_launches, triton, triton_apart
from fused_resnet.backends.triton_start import outputs_of
from fused_resnet.launch import Geometry, Launch
from fused_resnet.tuning import Choice, Tile
from fused_resnet.tuning.pieces import pieces

DTYPES = [torch.float32, torch.bfloat16]
STATS = {"epilogue": "stats", "without": ("bias",)}


@pytest.mark.parametrize("how", ["apart", "vendor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_in_training(dtype: torch.dtype, how: str) -> None:
    """Several strips of pixels, statistics of what is stored, a padding that is zero behind the ReLU."""
    launch = conv(3, 13, 11, 24, 40, 3, 3, padding=(1, 1), dtype=dtype, prologue="bn_relu", **STATS)
    operands = operands_of(launch)
    before = {role: operands[role].clone() for role in ("running_mean", "running_var", "batches")}
    out = run_all(launch, operands, how=how)
    assert_close(out["y"], expected(launch, operands), 9 * 24)
    y = out["y"].double().cpu()
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
    assert (out["mean"].double().cpu() - mean).abs().max() <= bound(torch.float32, 16) * (var.sqrt().max() + mean.abs().max())
    assert_close(out["invstd"], (var + launch.eps).rsqrt(), 128)
    running = 0.9 * before["running_mean"].double().cpu() + 0.1 * mean
    assert_close(operands["running_mean"], running, 128)
    running = 0.9 * before["running_var"].double().cpu() + 0.1 * y.var((0, 2, 3))
    assert_close(operands["running_var"], running, 128)
    assert operands["batches"].item() == before["batches"].item() + 1


@pytest.mark.parametrize("epilogue", ["store", "bias", "affine", "bias_add", "affine_add", "stats"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_of_the_vendors_convolution(dtype: torch.dtype, epilogue: str) -> None:
    activation = "identity" if epilogue == "stats" else "relu"
    launch = conv(2, 9, 8, 20, 36, 3, 3, stride=(2, 2), padding=(1, 1), dtype=dtype, epilogue=epilogue, activation=activation)
    operands = operands_of(launch)
    out = run_all(launch, operands, how="vendor")
    # The convolution's own result is rounded once more than the fused kernel's.
    assert_close(out["y"], expected(launch, operands), 9 * 20, layers=4)


@pytest.mark.parametrize("how", ["apart", "vendor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", ["store", "bn_mask"])
def test_dgrad(epilogue: str, dtype: torch.dtype, how: str) -> None:
    activation = "relu" if epilogue == "bn_mask" else "identity"
    launch = dgrad(
        3, 9, 10, 24, 40, 3, 3, stride=(2, 2), padding=(1, 1), dtype=dtype,
        gradient="bn_backward", epilogue=epilogue, activation=activation,
    )  # fmt: skip
    check_gradients(launch, how)


@pytest.mark.parametrize("how", ["apart", "vendor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wgrad(dtype: torch.dtype, how: str) -> None:
    launch = wgrad(3, 9, 10, 24, 40, 3, 3, padding=(1, 1), gradient="bn_backward", prologue="bn_relu", dtype=dtype)
    check_gradients(launch, how)


def check_gradients(launch: Launch, how: str) -> None:
    g = launch.geometry
    assert isinstance(g, Geometry)
    operands = gradient_operands(launch)
    out = outputs_of(launch, DEVICE)
    for tensor in out.values():
        tensor.fill_(torch.nan)
    with poisoned_workspace():
        triton.run(launch, operands, out=out, how=how)
    truth = expected_gradients(launch, operands)
    length = g.N * g.P * g.Q if launch.kind == "wgrad" else g.R * g.S * g.K
    if "sum_previous" in out:  # of the dx that is stored
        dx, o = out["dx"].double().cpu(), {role: tensor.double().cpu() for role, tensor in operands.items()}
        xhat = (o["x"] - o["x_mean"].view(1, -1, 1, 1)) * o["x_invstd"].view(1, -1, 1, 1)
        truth |= {"sum_previous": dx.sum((0, 2, 3)), "dot_previous": (dx * xhat).sum((0, 2, 3))}
    for role, tensor in out.items():
        # dx is rounded twice around the vendor's convolution.
        assert_close(tensor.cpu(), truth[role], length, layers=4 if how == "vendor" else 1, what=role)


def test_dgrad_reads_the_dy_its_layers_wgrad_left() -> None:
    sizes = (2, 5, 6, 16, 24, 3, 3)
    backward = wgrad(*sizes, padding=(1, 1), gradient="bn_backward", prologue="bn_relu")
    onward = dgrad(*sizes, padding=(1, 1), gradient="bn_backward")
    operands = gradient_operands(backward)
    shared: dict[str, torch.Tensor] = {}
    triton.run(backward, operands, (), shared, how="apart")
    assert list(shared) == ["y dy"]
    mine = {**gradient_operands(onward), **{role: operands[role] for role in operands if role in onward.roles}}
    with count_launches() as log:
        dx = triton.run(onward, mine, (), shared)
    assert log.kernels == ["dgrad"] and not shared
    assert_close(dx.cpu() if isinstance(dx, torch.Tensor) else dx[0], expected_gradients(onward, mine)["dx"], 9 * 24)


def test_two_layers_behind_one_dz_do_not_share_their_dy() -> None:
    """A block's last convolution and its projection read the same dz, each with a BatchNorm of its own."""
    sizes = (2, 5, 6, 16, 24, 1, 1)
    last = wgrad(*sizes, gradient="bn_backward")
    other = {"y": "y_d", "mean": "mean_d", "invstd": "invstd_d", "gamma": "gamma_d", "dot": "dot_d"}
    projection = replace(last, operands=tuple((role, other.get(role, slot)) for role, slot in last.operands))
    operands = gradient_operands(last)
    mine = {**gradient_operands(projection), "dz": operands["dz"]}
    shared: dict[str, torch.Tensor] = {}
    triton.run(last, operands, (), shared, how="apart")  # its dgrad is not wanted: nobody takes the dy away
    dw = triton.run(projection, mine, (), shared, how="apart")
    assert_close((dw[0] if isinstance(dw, tuple) else dw).cpu(), expected_gradients(projection, mine)["dw"], 2 * 30)


@pytest.mark.parametrize("how", ["apart", "vendor"])
def test_the_gradient_of_a_bias_in_front_of_batch_norm_is_zero(how: str) -> None:
    check_gradients(wgrad(2, 5, 6, 16, 24, 3, 3, padding=(1, 1), gradient="bn_backward", outputs=("dw", "dbias")), how)


def test_the_measured_tile_of_the_core_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = conv(2, 9, 8, 16, 24, 3, 3, padding=(1, 1), prologue="bn_relu", **STATS)
    tile = Tile(1, 4, 4, 16, 16)
    real = triton.choose

    def measured(asked: Launch, *rest: Any, **how: Any) -> Choice:
        return Choice("apart", tile, 1e-5, "measured") if asked.prologue == "bn_relu" else real(asked, *rest, **how)

    monkeypatch.setattr(triton, "choose", measured)
    tiles, plan = [], triton._plan_conv
    monkeypatch.setattr(triton, "_plan_conv", lambda launch, tile, *rest: tiles.append(tile) or plan(launch, tile, *rest))
    triton.plan_start.cache_clear()
    triton.run(launch, operands_of(launch))
    assert tiles == [tile]


def test_what_has_no_pieces() -> None:
    plain = conv(1, 5, 6, 16, 16, 1, 1)
    assert pieces(plain, "apart") is None and pieces(plain, "vendor") is not None
    assert triton_apart.supports(plain, "fused") is None
    with pytest.raises(ValueError, match="how='apart'"):
        triton.run(plain, operands_of(plain), how="apart")
