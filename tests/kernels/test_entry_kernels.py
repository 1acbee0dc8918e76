"""A chain's entry, a BatchNorm without a convolution: its statistics, its prologue with given ones, and the way back."""

from __future__ import annotations

from dataclasses import replace

import gradient_launches as gradients
import pytest
import torch
import torch.nn.functional as F
from gradient_launches import last_program_first
from launches import DEVICE, activations, conv, expected, operands_of, run_all
from tolerances import assert_close, bound

from fused_resnet.backends import before_slot, count_launches, triton
from fused_resnet.launch import Geometry, Launch
from fused_resnet.tuning import Tile
from fused_resnet.tuning.tile import Strip

RUNNING = ("running_mean", "running_var", "batches")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LARGER = [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:])]
GIVEN = ("x_invstd",)


def entry(
    kind: str,
    sizes: tuple[int, int, int, int],
    operands: tuple[str, ...],
    outputs: tuple[str, ...],
    dtype: torch.dtype,
    **how: object,
) -> Launch:
    """A launch from N, H, W, C."""
    n, h, w, c = sizes
    named = (tuple((role, role) for role in roles) for roles in (operands, outputs))
    return Launch(kind, "entry", Geometry(n, h, w, c, c, 1, 1), dtype, *named, eps=0.02, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "momentum"), [(torch.float32, None), (torch.float16, 0.3), (torch.bfloat16, 0.3)], ids=str)
def test_statistics(dtype: torch.dtype, momentum: float | None) -> None:
    """Several strips in two levels, the last of each not full; a mean far off, against float64."""
    launch = entry("statistics", (3, 7, 11, 21), ("x", *RUNNING), ("mean", "invstd"), dtype, momentum=momentum)
    operands = operands_of(launch)
    operands["x"] = (3 * operands["x"].float() + 40).to(dtype)
    before = {role: operands[role].double().cpu() for role in RUNNING}
    kept: dict[str, torch.Tensor] = {}
    out = run_all(launch, operands, Strip(16, 16), shared=kept)
    aside = zip(RUNNING, kept[before_slot(launch)].chunk(2), strict=False)
    assert all(torch.equal(tensor.double().cpu(), before[role]) for role, tensor in aside)
    x = operands["x"].double().cpu()
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    assert (out["mean"].double().cpu() - mean).abs().max() <= bound(torch.float32, 16) * (var.sqrt().max() + mean.abs().max())
    assert_close(out["invstd"], (var + launch.eps).rsqrt(), 128, what="invstd")
    factor = 1 / 6 if momentum is None else momentum
    F.batch_norm(x, before["running_mean"], before["running_var"], None, None, True, factor, launch.eps)
    for role in RUNNING[:2]:
        assert_close(operands[role], before[role], 128, what=role)
    assert operands["batches"].item() == 6
    with last_program_first():
        again = run_all(launch, operands, Strip(16, 16))
    assert all(torch.equal(again[role], out[role]) for role in out), "the same bits whoever is last"


def test_statistics_for_other_ranks_and_of_no_images() -> None:
    launch = entry("statistics", (2, 5, 6, 20), ("x",), ("mean", "var"), torch.float32)
    operands = operands_of(launch)
    out = run_all(launch, operands, wide=True)
    x = operands["x"].double().cpu()
    assert_close(out["mean"], x.mean((0, 2, 3)), 128)
    assert_close(out["var"], x.var((0, 2, 3), unbiased=False), 128)
    nothing = entry("statistics", (0, 5, 6, 20), ("x",), ("mean", "var"), torch.float32)
    assert not any(tensor.any() for tensor in run_all(nothing, operands_of(nothing)).values())


@pytest.mark.parametrize("shortcut", [False, True], ids=["alone", "with a shortcut"])
@pytest.mark.parametrize("gradient", ["scale", "bn_backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_gradient(dtype: torch.dtype, gradient: str, shortcut: bool) -> None:
    """Odd sizes, several strips; rounded once, behind the sum."""
    roles = ("dz", "gamma", "var") if gradient == "scale" else ("dz", "y", "mean", "invstd", "gamma", "sum", "dot")
    launch = entry("output_gradient", (2, 7, 9, 21), (*roles, *["dshortcut"] * shortcut), ("dy",), dtype, gradient=gradient)
    operands = gradients.operands_of(launch)
    o = {role: tensor.double().cpu() for role, tensor in operands.items()}
    truth = gradients._dy(launch, o) + o.get("dshortcut", 0)
    for strip in (Strip(16, 16), None):
        out = run_all(launch, operands, strip)
        assert_close(out["dy"], truth, 16, what=str(launch))
    with count_launches() as log:
        triton.run(launch, operands)
    assert log.kernels == ["output_gradient"]


#: Sizes, tile, what is left out: padding that is zero behind the activation, channels that are no whole chunks, flat loads.
PROLOGUES = [
    ((1, 4, 5, 24, 20, 3, 3), Tile(1, 2, 4, 16, 16), ()),
    ((2, 5, 4, 40, 20, 1, 1), Tile(1, 1, 16, 16, 32), ("x_gamma", "x_beta")),
    ((1, 5, 4, 7, 20, 3, 3), None, ()),
]


@pytest.mark.parametrize("row", range(len(PROLOGUES)))
@pytest.mark.parametrize("dtype", LARGER, ids=str)
def test_prologue_with_given_statistics(dtype: torch.dtype, row: int) -> None:
    sizes, tile, without = PROLOGUES[row]
    how = {"padding": (1, 1)} if sizes[-1] == 3 else {}
    prologue = "bn" if without else "bn_relu"
    launch = conv(*sizes, dtype=dtype, prologue=prologue, without=(*GIVEN, *without), **how)
    launch = replace(launch, x_eps=0.07)
    operands = operands_of(launch)
    assert "x_var" in operands
    out = run_all(launch, operands, tile)
    assert_close(out["y"], expected(launch, operands), sizes[3] * sizes[5] ** 2, what=str(launch))


def test_an_eps_of_zero_makes_no_nan_past_the_last_channel() -> None:
    """Lanes that stand for no channel divide by 1, not by the square root of what they loaded, 0."""
    launch = replace(conv(1, 4, 5, 20, 16, 1, 1, prologue="bn_relu", without=GIVEN), x_eps=0.0)
    operands = operands_of(launch)
    assert_close(run_all(launch, operands, Tile(1, 1, 16, 16, 32))["y"], expected(launch, operands), 20)


@pytest.mark.parametrize("how", ["apart", "vendor"])
def test_given_statistics_in_pieces(how: str) -> None:
    launch = replace(conv(2, 5, 6, 24, 40, 3, 3, padding=(1, 1), prologue="bn_relu", without=GIVEN), x_eps=0.07)
    operands = operands_of(launch)
    assert_close(run_all(launch, operands, how=how)["y"], expected(launch, operands), 9 * 24)


@pytest.mark.parametrize("dtype", LARGER, ids=str)
def test_wgrad_with_given_statistics_on_load(dtype: torch.dtype) -> None:
    how = {"gradient": "bn_backward", "prologue": "bn_relu", "without": ("count", "x_invstd")}
    launch = gradients.wgrad(2, 5, 4, 24, 20, 3, 3, padding=(1, 1), dtype=dtype, **how)
    launch = replace(launch, x_eps=0.07)
    operands = gradients.operands_of(launch)
    out = gradients.run_poisoned(launch, operands, Tile(1, 2, 4, 16, 16, splits=2))
    assert_close(out["dw"], gradients.expected(launch, operands)["dw"], 2 * 5 * 4)


@pytest.mark.parametrize("statistics", ["given", "of the batch"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", LARGER, ids=str)
def test_dgrad_ends_in_front_of_the_entry(dtype: torch.dtype, stride: int, statistics: str) -> None:
    """The projection's gradient is added in front of the mask, also at pixels that no tap reads."""
    without = ("count", *(GIVEN if statistics == "given" else ()))
    launch = gradients.dgrad(
        2, 7, 6, 24, 40, 1, 1, stride=(stride, stride), dtype=dtype, epilogue="bn_mask", activation="relu", without=without
    )
    launch = replace(launch, x_eps=0.07)
    operands = gradients.operands_of(launch)
    operands["dshortcut"] = activations(launch.geometry.x_shape, dtype).to(DEVICE)
    out = gradients.run_poisoned(launch, operands, Tile(1, 2, 4, 16, 16))
    assert_close(out["dx"], gradients.expected(launch, operands)["dx"], 40)
    stored = out["dx"].double().cpu()
    standardised = gradients._standardised(launch, {role: tensor.double().cpu() for role, tensor in operands.items()})
    assert_close(out["sum_previous"], stored.sum((0, 2, 3)), stored.numel())
    assert_close(out["dot_previous"], (stored * standardised).sum((0, 2, 3)), stored.numel())
