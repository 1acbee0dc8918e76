"""Convolutions that make the statistics of their output: mean and spread of the stored output, running statistics, order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gradient_launches import last_program_first
from launches import DEVICE, conv, expected, operands_of, run_all
from test_conv import CLASSES
from tolerances import assert_close, bound
from torch import Tensor

from fused_resnet.backends import before_slot, count_launches
from fused_resnet.backends import triton as executor
from fused_resnet.backends.triton_start import begin
from fused_resnet.launch import Geometry, Launch
from fused_resnet.tuning import Tile

RUNNING = ("running_mean", "running_var", "batches")


def statistics(launch: Launch, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each filter of a stored output, in float64."""
    y = y.double().cpu()
    return y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)


def check(launch: Launch, tile: Tile | None = None, parameters: torch.dtype = torch.float32) -> None:
    """y as the convolution gives it; the statistics those of *this* y; the running ones as F.batch_norm updates them."""
    g = launch.geometry
    assert isinstance(g, Geometry)
    operands = operands_of(launch, parameters)
    before = {role: operands[role].double().cpu() for role in RUNNING if role in operands}
    versions = {role: operands[role]._version for role in before}
    kept: dict[str, Tensor] = {}
    out = run_all(launch, operands, tile, shared=kept)
    assert_close(out["y"], expected(launch, operands), g.R * g.S * g.C // g.groups, what=str(launch))
    mean, var = statistics(launch, out["y"])
    pixels = g.N * g.P * g.Q
    scale = var.sqrt().max().item() + mean.abs().max().item()
    assert (out["mean"].double().cpu() - mean).abs().max().item() <= bound(torch.float32, 16) * scale
    if "invstd" in out:
        assert_close(out["invstd"], (var + launch.eps).rsqrt(), 128, what="invstd")
    else:
        assert_close(out["var"], var, 128, what="var")
    assert [*kept] == ([before_slot(launch)] if before else [])
    if before:
        aside = dict(zip(("running_mean", "running_var"), kept[before_slot(launch)].chunk(2), strict=True))
        assert all(torch.equal(tensor.double().cpu(), before[role]) for role, tensor in aside.items())
        factor = 1 / (before["batches"].item() + 1) if launch.momentum is None else launch.momentum
        F.batch_norm(
            out["y"].double().cpu(), before["running_mean"], before["running_var"], None, None, True, factor, launch.eps
        )
        assert operands["batches"].item() == before["batches"].item() + 1
        for role in ("running_mean", "running_var"):
            assert_close(operands[role], before[role], pixels, what=role)
        # Autograd is told of what eager PyTorch tells it of: the count.
        assert {role for role, version in versions.items() if operands[role]._version > version} == {"batches"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        # One type by turns in the default run, the others in the long run.
        pytest.param(name, dtype, marks=[pytest.mark.slow] if i % 3 != j else [])
        for i, name in enumerate(CLASSES)
        for j, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16))
    ],
    ids=str,
)
def test_behind_every_loader(name: str, dtype: torch.dtype) -> None:
    """Several tiles of pixels and of filters, rims in every direction."""
    _, make, tile = CLASSES[name]
    check(make(dtype=dtype, epilogue="stats", without=("bias",)), tile)


@pytest.mark.parametrize("prologue", ["identity", pytest.param("bn", marks=pytest.mark.slow), "bn_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_every_prologue_in_every_type(prologue: str, dtype: torch.dtype) -> None:
    launch = conv(2, 5, 6, 24, 40, 3, 3, padding=(1, 1), dtype=dtype, prologue=prologue, epilogue="stats")
    check(launch, Tile(1, 2, 4, 16, 16))


def test_two_levels() -> None:
    """More tiles than a group holds, the last group not full, more groups than one row of loads."""
    check(conv(3, 17, 21, 16, 20, 1, 1, epilogue="stats"), Tile(1, 1, 16, 16, 16, group=3))
    check(conv(2, 19, 31, 16, 16, 3, 3, padding=(1, 1), epilogue="stats"), Tile(1, 4, 4, 16, 16))


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
def test_momentum(momentum: float | None) -> None:
    launch = conv(2, 5, 6, 16, 40, 1, 1, epilogue="stats", momentum=momentum)
    check(launch, Tile(1, 1, 16, 16, 16))


@pytest.mark.parametrize("parameters", [torch.float16, torch.bfloat16], ids=str)
def test_running_statistics_of_the_models_type(parameters: torch.dtype) -> None:
    check(conv(2, 5, 6, 16, 24, 1, 1, epilogue="stats", dtype=parameters), parameters=parameters)


def test_without_running_statistics() -> None:
    check(conv(2, 5, 6, 16, 24, 1, 1, epilogue="stats", without=RUNNING))
    check(conv(2, 5, 6, 16, 24, 1, 1, epilogue="stats", without=("bias", *RUNNING), momentum=None))


def test_variance_for_other_ranks() -> None:
    check(conv(2, 5, 6, 16, 24, 3, 3, epilogue="stats", outputs=("y", "mean", "var"), without=RUNNING))


def test_one_pixel() -> None:
    check(conv(1, 1, 1, 16, 16, 1, 1, epilogue="stats", without=RUNNING))


def test_running_statistics_that_are_not_dense() -> None:
    launch = conv(2, 5, 6, 16, 24, 1, 1, epilogue="stats")
    operands = operands_of(launch)
    sparse = {role: torch.stack((operands[role], operands[role]), 1)[:, 0] for role in ("running_mean", "running_var")}
    executor.run(launch, {**operands, **sparse})
    executor.run(launch, {**operands, "batches": torch.tensor(5, device=DEVICE)})
    for role, tensor in sparse.items():
        assert not tensor.is_contiguous() and torch.equal(tensor, operands[role])


@pytest.mark.parametrize("tile", [None, Tile(1, 2, 4, 16, 16)], ids=["the rule's", "small"])
def test_a_mean_far_from_zero(tile: Tile | None) -> None:
    """The mean is 1000 times the deviation: BatchNorm's result is no worse than twice eager's own error."""
    launch = conv(2, 13, 12, 16, 24, 3, 3, padding=(1, 1), epilogue="stats", without=RUNNING)
    launch = replace(launch, eps=1e-5)
    operands = operands_of(launch)
    operands["w"].mul_(1e-3)
    operands["bias"].fill_(1.0).mul_(torch.tensor([1.0, -1.0], device=DEVICE).repeat(12))
    out = {role: tensor.cpu() for role, tensor in run_all(launch, operands, tile).items()}
    o = {role: tensor.cpu() for role, tensor in operands.items()}
    y, eager = out["y"], F.conv2d(o["x"], o["w"], o["bias"], padding=1)
    assert (y.mean((0, 2, 3)).abs() >= 900 * y.std((0, 2, 3))).all()

    def of(t: Tensor) -> Tensor:
        return F.batch_norm(t, None, None, training=True, eps=1e-12)

    truth = of(F.conv2d(o["x"].double(), o["w"].double(), o["bias"].double(), padding=1))
    invstd = (out["invstd"].double() ** -2 - launch.eps + 1e-12).rsqrt().float()  # eps hides the deviation
    ours = (y - out["mean"].view(1, -1, 1, 1)) * invstd.view(1, -1, 1, 1)
    assert (ours - truth).abs().max() <= 2 * (of(eager) - truth).abs().max()


def test_bitwise_equal_on_every_run() -> None:
    launch = conv(2, 13, 12, 16, 24, 3, 3, padding=(1, 1), epilogue="stats", without=RUNNING)
    operands, tile = operands_of(launch), Tile(1, 2, 4, 16, 16)
    first, second = (run_all(launch, operands, tile) for _ in range(2))
    with last_program_first():
        third = run_all(launch, operands, tile)
    assert all(torch.equal(first[role], second[role]) and torch.equal(first[role], third[role]) for role in first)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_filters_stay_by_themselves(bad: float) -> None:
    launch = conv(2, 5, 6, 16, 24, 1, 1, epilogue="stats")
    operands = operands_of(launch)
    operands["bias"][7] = bad
    out = run_all(launch, operands, Tile(1, 1, 16, 16, 16))
    others = [k for k in range(24) if k != 7]
    for tensor in (out["mean"], out["invstd"], operands["running_mean"], operands["running_var"]):
        assert not tensor[7].isfinite() and tensor[others].isfinite().all()


def test_one_kernel_start() -> None:
    launch = conv(2, 5, 6, 16, 24, 1, 1, epilogue="stats")
    with count_launches() as log:
        executor.run(launch, operands_of(launch))
    assert log.kernels == ["conv_forward"]


def test_an_interrupted_launch_leaves_no_counters_behind() -> None:
    class Interrupted:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            raise KeyboardInterrupt

    launch = conv(2, 5, 6, 16, 24, 1, 1, epilogue="stats")
    start = executor.plan_start(launch, executor.arch_of(DEVICE))
    counters = start.workspace(DEVICE).counters
    assert counters is not None
    counters.fill_(1)
    with pytest.raises(KeyboardInterrupt):
        begin(replace(start, kernel=Interrupted()), (), (), DEVICE)
    check(launch)
