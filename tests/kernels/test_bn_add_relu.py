"""The end of a block and its backward, against torch.nn.functional in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launches import DEVICE, end_of_block, operands_of, run_all
from tolerances import assert_close, bound
from torch import Tensor

from fused_resnet.backends import count_launches
from fused_resnet.backends import triton as executor
from fused_resnet.launch import Launch
from fused_resnet.tuning.tile import Strip

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NORM = ("y", "mean", "invstd", "gamma", "beta")
SHORTCUT_NORM = ("shortcut", "shortcut_mean", "shortcut_invstd", "shortcut_gamma", "shortcut_beta")

FORWARD = {
    "y": ("y",),
    "y and x": ("y", "shortcut"),
    "bn": NORM,
    "bn without affine": NORM[:3],
    "bn and x": (*NORM, "shortcut"),
    "bn and bn": (*NORM, *SHORTCUT_NORM),
    "bn and bn without affine": (*NORM, *SHORTCUT_NORM[:3]),
}

#: What is read and what is made in the backward of the ends above; ``dz`` is not made where it would be ``dout``.
BACKWARD = {
    "sum": (("dout", "out"), ("dz", "sum")),
    "bn": (("dout", "out", *NORM[:3]), ("dz", "sum", "dot")),
    "bn and bn": (("dout", "out", *NORM[:3], *SHORTCUT_NORM[:3]), ("dz", "sum", "dot", "shortcut_dot")),
    "frozen and bn": (("dout", "out", *SHORTCUT_NORM[:3]), ("dz", "sum", "shortcut_dot")),
    "dot alone": (("dout", "out", *NORM[:3]), ("dz", "dot")),
    "dz alone": (("dout", "out"), ("dz",)),
    "no activation": (("dout", *NORM[:3]), ("sum", "dot")),
    "no activation, dz": (("dout", *NORM[:3]), ("dz", "sum", "dot")),
}

#: N, P, Q, K: pixels and channels past a strip, channels not in whole 16 bytes.
SHAPE = (3, 5, 7, 40)
STRIPS = [None, Strip(8, 16, 1), Strip(8, 16, 3), Strip(16, 64, 2)]


def standardised(o: dict[str, Tensor], prefix: str, tensor: str) -> Tensor:
    return (o[tensor] - o[prefix + "mean"].view(1, -1, 1, 1)) * o[prefix + "invstd"].view(1, -1, 1, 1)


def normalised(o: dict[str, Tensor], prefix: str, tensor: str) -> Tensor:
    """By F.batch_norm: its variance is 1 / invstd^2, eps almost nothing."""
    var = o[prefix + "invstd"] ** -2 - 1e-12
    return F.batch_norm(o[tensor], o[prefix + "mean"], var, o.get(prefix + "gamma"), o.get(prefix + "beta"), eps=1e-12)


def forward(launch: Launch, operands: dict[str, Tensor]) -> Tensor:
    o = {role: tensor.double().cpu() for role, tensor in operands.items()}
    z = normalised(o, "", "y") if "mean" in o else o["y"]
    if "shortcut" in o:
        z = z + (normalised(o, "shortcut_", "shortcut") if "shortcut_mean" in o else o["shortcut"])
    return F.relu(z) if launch.activation == "relu" else z


def backward(launch: Launch, operands: dict[str, Tensor]) -> dict[str, Tensor]:
    o = {role: tensor.double().cpu() for role, tensor in operands.items()}
    dz = o["dout"].masked_fill(o["out"] <= 0, 0) if launch.activation == "relu" else o["dout"]
    truth = {"dz": dz, "sum": dz.sum((0, 2, 3))}
    if "y" in o:
        truth["dot"] = (dz * standardised(o, "", "y")).sum((0, 2, 3))
    if "shortcut" in o:
        truth["shortcut_dot"] = (dz * standardised(o, "shortcut_", "shortcut")).sum((0, 2, 3))
    return {role: truth[role] for role, _ in launch.outputs}


def backward_launch(name: str, *sizes: int, dtype: torch.dtype = torch.float32) -> Launch:
    operands, outputs = BACKWARD[name]
    activation = "relu" if "out" in operands else "identity"
    return end_of_block(*sizes, operands=operands, outputs=outputs, dtype=dtype, activation=activation)


def check_forward(launch: Launch, operands: dict[str, Tensor], **how: Any) -> None:
    out = run_all(launch, operands, **how)["out"]
    assert_close(out, forward(launch, operands), 16, what=str(launch))


def check_backward(launch: Launch, operands: dict[str, Tensor], **how: Any) -> None:
    if "out" in operands:
        operands["out"].relu_()
    actual, truth = run_all(launch, operands, **how), backward(launch, operands)
    pixels = launch.geometry.N * launch.geometry.P * launch.geometry.Q
    for role, tensor in actual.items():
        if role == "dz":
            assert torch.equal(tensor.double().cpu(), truth[role])
        else:
            assert_close(tensor, truth[role], pixels, what=role)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str, dtype: torch.dtype) -> None:
    launch = end_of_block(*SHAPE, operands=FORWARD[name], dtype=dtype)
    check_forward(launch, operands_of(launch))
    check_forward(launch, operands_of(launch), tile=Strip(8, 16))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 4, 4, 300)], ids=str)
def test_forward_shapes(shape: tuple[int, ...]) -> None:
    launch = end_of_block(*shape, operands=FORWARD["bn and bn"], activation="identity")
    check_forward(launch, operands_of(launch))
    check_forward(launch, operands_of(launch), wide=True)


def test_forward_with_vectors_of_the_models_type() -> None:
    launch = end_of_block(*SHAPE, operands=FORWARD["bn and bn"], dtype=torch.bfloat16)
    check_forward(launch, operands_of(launch, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name: str, dtype: torch.dtype) -> None:
    launch = backward_launch(name, *SHAPE, dtype=dtype)
    for strip in STRIPS[: 4 if name == "bn and bn" else 3 : 2]:
        check_backward(launch, operands_of(launch), tile=strip)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 4, 4, 300), (2, 21, 19, 16)], ids=str)
@pytest.mark.parametrize("strip", STRIPS, ids=str)
def test_backward_shapes(shape: tuple[int, ...], strip: Strip | None) -> None:
    launch = backward_launch("bn and bn", *shape)
    check_backward(launch, operands_of(launch), tile=strip)


def test_backward_with_wide_offsets() -> None:
    launch = backward_launch("bn and bn", *SHAPE)
    check_backward(launch, operands_of(launch), tile=Strip(8, 16, 3), wide=True)


def test_backward_of_a_gradient_in_another_order() -> None:
    """dout comes from outside: it may be contiguous, or expanded from a single number."""
    launch = backward_launch("bn", *SHAPE)
    operands = operands_of(launch)
    operands["dout"] = operands["dout"].contiguous()
    check_backward(launch, operands)
    operands["dout"] = torch.ones((), device=DEVICE).expand(operands["out"].shape)
    truth = backward(launch, operands)
    for tensor, expected in zip(executor.run(launch, operands), truth.values(), strict=True):
        assert_close(tensor, expected, 105)


def test_a_mean_far_from_zero() -> None:
    """1000 deviations off: the error is the stored y's, not multiplied by cancelling terms."""
    launch = end_of_block(*SHAPE, operands=NORM, activation="identity")
    operands = operands_of(launch)
    operands["mean"] += 1000
    operands["y"] += operands["mean"].view(1, -1, 1, 1)
    check_forward(launch, operands)
    launch = backward_launch("bn", *SHAPE)
    operands = {**operands_of(launch), **{role: operands[role] for role in NORM[:3]}}
    check_backward(launch, operands)


def test_not_finite_values_travel() -> None:
    launch = end_of_block(*SHAPE, operands=FORWARD["bn and bn"])
    operands = operands_of(launch)
    operands["y"][0, 3, 2, 1] = torch.nan
    operands["shortcut"][0, 4, 2, 1] = torch.inf
    operands["shortcut"][0, 5, 2, 1] = -torch.inf
    operands["gamma"][6] = torch.nan
    actual, truth = run_all(launch, operands, Strip(8, 16))["out"].cpu(), forward(launch, operands)
    assert torch.equal(actual.isnan(), truth.isnan()) and torch.equal(actual.isinf(), truth.isinf())


def test_nan_in_the_mask_lets_the_gradient_pass() -> None:
    launch = backward_launch("bn", *SHAPE)
    operands = operands_of(launch)
    operands["out"].relu_()
    operands["out"][0, 3, 2, 1] = torch.nan
    operands["out"][0, 4, 2, 1] = 0
    operands["dout"][0, 4, 2, 1] = torch.nan  # masked: gone
    operands["dout"][0, 5, 2, 1], operands["out"][0, 5, 2, 1] = torch.nan, 1
    actual, truth = run_all(launch, operands, Strip(8, 16)), backward(launch, operands)
    eager = torch.ops.aten.threshold_backward(operands["dout"], operands["out"], 0)
    assert torch.equal(actual["dz"].nan_to_num(7e7), eager.nan_to_num(7e7))
    for role in actual:
        assert torch.equal(actual[role].isnan().cpu(), truth[role].isnan()), role
    assert actual["sum"][[3, 4]].isfinite().all() and actual["sum"][5].isnan()


def test_bitwise_equal_on_every_run() -> None:
    launch = backward_launch("bn and bn", *SHAPE)
    operands = operands_of(launch)
    first, second = (run_all(launch, operands, Strip(8, 16, 3)) for _ in range(2))
    assert all(torch.equal(first[role], second[role]) for role in first)


def test_no_images() -> None:
    launch = backward_launch("bn", 0, 5, 7, 40)
    dz, total, dot = executor.run(launch, operands_of(launch))
    assert dz.shape == (0, 40, 5, 7) and not total.any() and not dot.any()
    launch = end_of_block(0, 5, 7, 40, operands=NORM)
    assert executor.run(launch, operands_of(launch)).shape == (0, 40, 5, 7)


def test_one_kernel_start_each() -> None:
    with count_launches() as log:
        for launch in (end_of_block(*SHAPE, operands=NORM), backward_launch("bn and bn", *SHAPE)):
            executor.run(launch, operands_of(launch))
    assert log.kernels == ["bn_add_relu", "bn_add_relu_backward"]


def test_bound_is_tight() -> None:
    """A tolerance that let a dropped pixel through would test nothing."""
    assert bound(torch.float32, 105) < 1 / 1050
