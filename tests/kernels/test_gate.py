"""The end of a highway block and its backward, on every backend, against autograd through torch.nn.functional in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from launches import end_of_block, operands_of, run_all
from tolerances import assert_close, relative_error
from torch import Tensor

from fused_resnet.backends import count_launches
from fused_resnet.backends import triton as executor
from fused_resnet.launch import Launch
from fused_resnet.tuning.tile import Strip

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NORM = ("mean", "invstd", "gamma", "beta")
SIDE_NORM = tuple(f"shortcut_{role}" for role in NORM)
ENDS = {
    "plain": (),
    "bn": NORM,
    "bn without affine": NORM[:2],
    "bn and bn": (*NORM, *SIDE_NORM),
    "bn behind the shortcut": SIDE_NORM[:2],
}
#: N, P, Q, K: pixels and channels past a strip, channels not in whole 16 bytes.
SHAPE = (3, 5, 7, 40)
STRIPS = [None, Strip(8, 16, 1), Strip(8, 16, 3), Strip(16, 64, 2)]


def forward_launch(end: str, *shape: int, dtype: torch.dtype = torch.float32, activation: str = "relu") -> Launch:
    return end_of_block(*shape, operands=("y", "shortcut", "t", *ENDS[end]), dtype=dtype, activation=activation, kind="gate")


def backward_launch(end: str, *shape: int, dtype: torch.dtype = torch.float32, activation: str = "relu") -> Launch:
    outputs = ["dz", "sum", "dt", "dt_sum", "dside"]
    outputs += ["dot"] if "mean" in ENDS[end] else []
    outputs += ["dside_sum", "shortcut_dot"] if "shortcut_mean" in ENDS[end] else []
    operands = ("dout", "y", "shortcut", "t", *ENDS[end])
    return end_of_block(
        *shape, operands=operands, outputs=tuple(outputs), dtype=dtype, activation=activation, kind="gate_backward"
    )


def normalised(o: dict[str, Tensor], prefix: str, tensor: str) -> Tensor:
    if prefix + "mean" not in o:
        return o[tensor]
    var = o[prefix + "invstd"] ** -2 - 1e-12
    return F.batch_norm(o[tensor], o[prefix + "mean"], var, o.get(prefix + "gamma"), o.get(prefix + "beta"), eps=1e-12)


def mixed(launch: Launch, o: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The output; and what its gradients are wanted of: in front of the activation, and the shortcut behind its BatchNorm."""
    z, side = normalised(o, "", "y"), normalised(o, "shortcut_", "shortcut")
    if o["t"].requires_grad:
        z, side = z.detach().requires_grad_(), side.detach().requires_grad_()
    h = F.relu(z) if launch.activation == "relu" else z
    opened = torch.sigmoid(o["t"])
    return opened * h + (1 - opened) * side, z, side


def backward_truth(launch: Launch, operands: dict[str, Tensor]) -> dict[str, Tensor]:
    o = {role: tensor.double().cpu() for role, tensor in operands.items()}
    o["t"].requires_grad_()
    out, z, side = mixed(launch, o)
    dz, dt, dside = torch.autograd.grad(out, (z, o["t"], side), o["dout"])
    truth = {"dz": dz, "dt": dt, "dside": dside}
    truth |= {"sum": dz.sum((0, 2, 3)), "dt_sum": dt.sum((0, 2, 3)), "dside_sum": dside.sum((0, 2, 3))}
    for role, gradient, tensor, prefix in (("dot", dz, "y", ""), ("shortcut_dot", dside, "shortcut", "shortcut_")):
        if prefix + "mean" in o:
            centred = o[tensor] - o[prefix + "mean"].view(1, -1, 1, 1)
            truth[role] = (gradient * centred).sum((0, 2, 3)) * o[prefix + "invstd"]
    return {role: truth[role] for role, _ in launch.outputs}


def operands_for(launch: Launch) -> dict[str, Tensor]:
    operands = operands_of(launch)
    operands["t"] *= 3
    if "mean" not in operands and launch.activation == "relu":
        operands["y"].relu_()  # what the activation gave
    return operands


def check(launch: Launch, operands: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
    if launch.kind == "gate":
        truth, pixels = {"out": mixed(launch, {r: t.double().cpu() for r, t in operands.items()})[0]}, 16
    else:
        truth, pixels = backward_truth(launch, operands), launch.geometry.N * launch.geometry.P * launch.geometry.Q
    assert set(actual) == set(truth)
    for role, tensor in actual.items():
        if role.endswith(("sum", "dot")) and launch.dtype != torch.float32:
            # Of what was stored, rounded: some thousandths of each of the terms.
            assert relative_error(tensor, truth[role]) < 4 * torch.finfo(launch.dtype).eps, role
        else:
            assert_close(tensor, truth[role], pixels, what=role)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("end", ENDS)
def test_forward(end: str, dtype: torch.dtype) -> None:
    launch = forward_launch(end, *SHAPE, dtype=dtype)
    for strip in (None, Strip(8, 16)):
        operands = operands_for(launch)
        check(launch, operands, run_all(launch, operands, tile=strip))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("end", ENDS)
def test_backward(end: str, dtype: torch.dtype) -> None:
    launch = backward_launch(end, *SHAPE, dtype=dtype)
    for strip in STRIPS[: 4 if end == "bn and bn" else 3 : 2]:
        operands = operands_for(launch)
        check(launch, operands, run_all(launch, operands, tile=strip))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 4, 4, 300), (2, 21, 19, 16)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    for make in (forward_launch, backward_launch):
        launch = make("bn and bn", *shape, activation="identity")
        operands = operands_for(launch)
        check(launch, operands, run_all(launch, operands))
        check(launch, operands, run_all(launch, operands, tile=Strip(8, 16, 2 if make is backward_launch else 1), wide=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("end", ENDS)
def test_other_backends(end: str, name: str, dtype: torch.dtype) -> None:
    other = importlib.import_module(f"fused_resnet.backends.{name}")
    for make in (forward_launch, backward_launch):
        launch = make(end, *SHAPE, dtype=dtype)
        operands = {role: tensor.cpu() for role, tensor in operands_for(launch).items()}
        before = {role: tensor.clone() for role, tensor in operands.items()}
        made = other.run(launch, operands, frozenset(), *([{}] if name == "cpu" else []))
        made = made if isinstance(made, tuple) else (made,)
        check(launch, operands, {role: tensor for (role, _), tensor in zip(launch.outputs, made, strict=True)})
        assert all(torch.equal(operands[role], tensor) for role, tensor in before.items())


def test_a_wide_open_and_a_shut_gate() -> None:
    """Where exp overflows the sigmoid is 0 or 1: the branch alone, the shortcut alone, no gradient of the gate."""
    launch = backward_launch("bn", *SHAPE)
    operands = operands_for(launch)
    operands["t"] = operands["t"].sign() * 200
    actual, truth = run_all(launch, operands), backward_truth(launch, operands)
    for role in ("dz", "dside", "sum", "dot"):
        assert_close(actual[role], truth[role], 105, what=role)
    assert not actual["dt"].any() and not actual["dt_sum"].any()
    launch = forward_launch("bn", *SHAPE)
    check(launch, operands, run_all(launch, operands))


def test_not_finite_values_travel() -> None:
    launch = forward_launch("bn and bn", *SHAPE)
    operands = operands_for(launch)
    operands["y"][0, 3, 2, 1], operands["t"][0, 4, 2, 1], operands["shortcut"][0, 5, 2, 1] = torch.nan, torch.nan, torch.inf
    actual = run_all(launch, operands)["out"].cpu()
    truth = mixed(launch, {role: tensor.double().cpu() for role, tensor in operands.items()})[0]
    assert torch.equal(actual.isnan(), truth.isnan()) and torch.equal(actual.isinf(), truth.isinf())
    assert actual.isnan().sum() >= 2 and actual.isinf().any()


def test_the_same_bits_and_one_kernel_each() -> None:
    launch = backward_launch("bn and bn", *SHAPE)
    operands = operands_for(launch)
    first, second = (run_all(launch, operands, tile=Strip(8, 16, 3)) for _ in range(2))
    assert all(torch.equal(first[role], second[role]) for role in first)
    with count_launches() as log:
        for one in (forward_launch("bn", *SHAPE), launch):
            executor.run(one, operands_for(one))
    assert log.kernels == ["gate", "gate_backward"]


def test_no_images() -> None:
    made = executor.run(launch := backward_launch("bn", 0, 5, 7, 40), operands_for(launch))
    assert made[0].shape == (0, 40, 5, 7) and not any(tensor.any() for tensor in made)
