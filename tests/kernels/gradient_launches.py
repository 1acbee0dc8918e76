"""Random launches of a convolution's two gradients, their truth by autograd in float64, and how to run them poisoned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launches import DEVICE, activations, check_stand_ins, poisoned_workspace, prologue_roles, wide_offsets
from torch import Tensor
from triton.runtime import interpreter

from fused_resnet.backends import triton_gradients as executor
from fused_resnet.backends.triton_start import outputs_of
from fused_resnet.launch import DGRAD_EPILOGUES, GRADIENTS, Geometry, Launch
from fused_resnet.tuning import Tile

#: Roles that are a tensor like the convolution's output, and like its input.
_LIKE_Y = ("dz", "y")
_LIKE_X = ("x", "a_previous", "z_previous", "dshortcut")


def dgrad(
    *sizes: int,
    dtype: torch.dtype = torch.float32,
    gradient: str = "identity",
    epilogue: str = "store",
    activation: str = "identity",
    without: tuple[str, ...] = ("count", "dshortcut", "z_previous"),
    **how: Any,
) -> Launch:
    """A launch from N, H, W, C, K, R, S and the keyword arguments of Geometry; ``without`` leaves out operands."""
    without = without if "x_invstd" in without else (*without, "x_var")
    roles = [role for role in ("dz", "w", *GRADIENTS[gradient], *DGRAD_EPILOGUES[epilogue]) if role not in without]
    outputs = {"store": ("dx",), "mask": ("dx", "sum_previous"), "bn_mask": ("dx", "sum_previous", "dot_previous")}[epilogue]
    return _launch("dgrad", sizes, dtype, roles, outputs, how, gradient=gradient, epilogue=epilogue, activation=activation)


def wgrad(
    *sizes: int,
    dtype: torch.dtype = torch.float32,
    gradient: str = "identity",
    prologue: str = "identity",
    without: tuple[str, ...] = ("count",),
    outputs: tuple[str, ...] = ("dw",),
    **how: Any,
) -> Launch:
    """The same for the filters' gradient."""
    roles = ["dz", "x", "w", *GRADIENTS[gradient]]
    if gradient != "bn_backward":
        roles += ["sum", "bias", *(["mean"] if gradient == "scale" else [])]
    roles += prologue_roles(prologue, without)
    roles = [role for role in roles if role not in without]
    return _launch("wgrad", sizes, dtype, roles, outputs, how, gradient=gradient, prologue=prologue)


def _launch(
    kind: str,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    roles: list[str],
    outputs: tuple[str, ...],
    how: dict[str, Any],
    **ends: str,
) -> Launch:
    named = tuple((role, role) for role in roles), tuple((role, role) for role in outputs)
    return Launch(kind, "layer", Geometry(*sizes, **how), dtype, *named, eps=1e-3, **ends)  # type: ignore[arg-type]


def operands_of(launch: Launch, parameters: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random operands. Means lie off zero, some gammas are negative, and no normalised value is 0 after rounding."""
    g = launch.geometry
    assert isinstance(g, Geometry)
    operands = {}
    for role, _ in launch.operands:
        if role in _LIKE_Y:
            operands[role] = activations(g.y_shape, launch.dtype)
        elif role in _LIKE_X:
            operands[role] = activations(g.x_shape, launch.dtype)
        elif role == "w":
            length = g.R * g.S * (g.K // g.groups)
            operands[role] = activations(g.w_shape, torch.float32).div(max(length, 1) ** 0.5).to(launch.dtype)
            operands[role] = operands[role].contiguous(memory_format=torch.channels_last)
        elif role == "count":
            operands[role] = torch.tensor([3.0 * g.N * g.P * g.Q], device=DEVICE)
        elif role in ("sum", "dot"):  # of the order of m, so that their terms count
            operands[role] = torch.randn(g.K, device=DEVICE) * g.N * g.P * g.Q
        elif role.endswith(("invstd", "var")):
            operands[role] = 0.5 + 1.5 * torch.rand(g.C if role.startswith("x_") else g.K, device=DEVICE)
        else:
            operands[role] = torch.randn(g.C if role.startswith("x_") else g.K, device=DEVICE)
            if not role.endswith("mean"):
                operands[role] = operands[role].to(parameters)
    return operands


def _column(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _dy(launch: Launch, o: dict[str, Tensor]) -> Tensor:
    """dy in float64; BatchNorm's formula written as autograd derives it (PyTorch's batch_norm_backward)."""
    if launch.gradient == "identity":
        return o["dz"]
    if launch.gradient == "scale":
        return F.batch_norm(o["dz"], torch.zeros_like(o["var"]), o["var"], o.get("gamma"), None, eps=launch.eps)
    g = launch.geometry
    assert isinstance(g, Geometry)
    m = o["count"] if "count" in o else g.N * g.P * g.Q
    xhat = (o["y"] - _column(o["mean"])) * _column(o["invstd"])
    dxhat = o["dz"] - _column(o["sum"] / m) - xhat * _column(o["dot"] / m)
    return dxhat * _column(o["invstd"]) * _column(o["gamma"] if "gamma" in o else torch.ones_like(o["mean"]))


def _standardised(launch: Launch, o: dict[str, Tensor]) -> Tensor:
    invstd = o["x_invstd"] if "x_var" not in o else 1 / (o["x_var"] + launch.x_eps).sqrt()
    return (o["x"] - _column(o["x_mean"])) * _column(invstd)


def _normalised(launch: Launch, o: dict[str, Tensor]) -> Tensor:
    z = _standardised(launch, o)
    if "x_gamma" in o:
        z = z * _column(o["x_gamma"])
    return z + _column(o["x_beta"]) if "x_beta" in o else z


def _rounded(value: Tensor, launch: Launch) -> Tensor:
    """What is multiplied is of the launch's type."""
    return value.to(launch.dtype).double()


def expected(launch: Launch, operands: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every output in float64, through autograd of torch.nn.functional.conv2d."""
    o = {role: tensor.double().cpu() for role, tensor in operands.items()}
    return _expected_dgrad(launch, o) if launch.kind == "dgrad" else _expected_wgrad(launch, o)


def _expected_dgrad(launch: Launch, o: dict[str, Tensor]) -> dict[str, Tensor]:
    g = launch.geometry
    assert isinstance(g, Geometry)
    x = torch.zeros(g.x_shape, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, o["w"], None, g.stride, g.padding, g.dilation, g.groups)
    (dx,) = torch.autograd.grad(y, x, _rounded(_dy(launch, o), launch))
    if launch.epilogue == "store":
        return {"dx": dx + o["dshortcut"] if "dshortcut" in o else dx}
    dx = dx + o.get("dshortcut", 0)
    if launch.activation == "relu":
        before = o["a_previous"] if launch.epilogue == "mask" else _normalised(launch, o)
        dx = torch.where(before <= 0, 0.0, dx)
    sums = {"dx": dx, "sum_previous": dx.sum((0, 2, 3))}
    if launch.epilogue == "bn_mask":
        sums["dot_previous"] = (dx * _standardised(launch, o)).sum((0, 2, 3))
    return sums


def _expected_wgrad(launch: Launch, o: dict[str, Tensor]) -> dict[str, Tensor]:
    g = launch.geometry
    assert isinstance(g, Geometry)
    truth: dict[str, Tensor] = {"dbias": torch.zeros(g.K, dtype=torch.float64)}
    scale = None
    if launch.gradient != "bn_backward":
        truth["dbeta"] = truth["dbias"] = o["sum"]
    if launch.gradient == "scale":
        invstd = 1 / (o["var"] + launch.eps).sqrt()
        scale = invstd * o["gamma"] if "gamma" in o else invstd
        truth["dbias"] = scale * o["sum"]
    if "x" not in o:
        return truth
    x = o["x"]
    if launch.prologue != "identity":
        x = _normalised(launch, o) if "x_mean" in o else x
        x = _rounded(F.relu(x) if launch.prologue.endswith("relu") else x, launch)
    w = torch.zeros(g.w_shape, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, w, None, g.stride, g.padding, g.dilation, g.groups)
    dy = o["dz"] if launch.gradient == "scale" else _rounded(_dy(launch, o), launch)
    (dw,) = torch.autograd.grad(y, w, dy)
    truth["dw"] = dw if scale is None else dw * _column(scale).view(-1, 1, 1, 1)
    if launch.gradient == "scale" and "w" in o:
        offset = o.get("bias", torch.zeros_like(o["mean"])) - o["mean"]
        truth["dgamma"] = invstd * ((o["w"] * dw).sum((1, 2, 3)) + offset * o["sum"])
    return truth


def run_poisoned(
    launch: Launch,
    operands: dict[str, Tensor],
    tile: Tile | None = None,
    **how: Any,
) -> dict[str, Tensor]:
    """Run through Triton into outputs and a workspace full of NaN: what is not written, or is read too soon, shows."""
    outputs = outputs_of(launch, DEVICE)
    check_stand_ins(launch, operands)
    for output in outputs.values():
        output.fill_(torch.nan)
    given = {role: tensor.clone(memory_format=torch.preserve_format) for role, tensor in operands.items()}
    with poisoned_workspace(), wide_offsets((*operands.values(), *outputs.values())) if how.get("wide") else nullcontext():
        results = executor.run(launch, operands, tile=tile, out=outputs, **how)
    results = results if isinstance(results, tuple) else (results,)
    assert all(result is outputs[role] for result, (role, _) in zip(results, launch.outputs, strict=True))
    for role, tensor in given.items():
        assert torch.allclose(tensor, operands[role], rtol=0, atol=0, equal_nan=True), f"the kernel wrote to its operand {role}"
    return outputs


@contextmanager
def last_program_first() -> Iterator[None]:
    """Interpret the programs of a launch in the opposite order: another one arrives last, and finds the same."""
    builder = interpreter.interpreter_builder
    original = builder.set_grid_idx
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", lambda x, y, z: original(builder.grid_dim[0] - 1 - x, y, z))
        yield


@dataclass
class TwoLayers:
    """``relu(bn(conv(relu(bn(x)))))`` in training, in float64 by autograd: what its launches read, and all its gradients."""

    operands: dict[str, Tensor]
    gradients: dict[str, Tensor]


def two_layers(g: Geometry, eps: float = 1e-3) -> TwoLayers:
    """x stands for the previous convolution's output; the means lie far off, and every parameter is random."""
    leaves = {
        "x": 2 + 3 * torch.randn(g.x_shape, dtype=torch.float64),
        "w": torch.randn(g.w_shape, dtype=torch.float64),
        "x_gamma": torch.randn(g.C, dtype=torch.float64),
        "x_beta": torch.randn(g.C, dtype=torch.float64),
        "gamma": torch.randn(g.K, dtype=torch.float64),
        "beta": torch.randn(g.K, dtype=torch.float64),
    }
    leaves = {name: leaf.float().double().requires_grad_() for name, leaf in leaves.items()}
    z_previous = F.batch_norm(leaves["x"], None, None, leaves["x_gamma"], leaves["x_beta"], training=True, eps=eps)
    y = F.conv2d(F.relu(z_previous), leaves["w"], None, g.stride, g.padding, g.dilation, g.groups)
    z = F.batch_norm(y, None, None, leaves["gamma"], leaves["beta"], training=True, eps=eps)
    names = ["w", "x_gamma", "x_beta", "gamma", "beta"]
    loss = (F.relu(z) * torch.randn(g.y_shape, dtype=torch.float64)).sum()
    found = torch.autograd.grad(loss, [*(leaves[name] for name in names), z, z_previous])
    gradients = dict(zip([*names, "z", "z_previous"], found, strict=True))
    operands = {name: leaf.detach() for name, leaf in leaves.items()}
    for prefix, value in (("", y), ("x_", leaves["x"])):
        var, mean = torch.var_mean(value.detach(), (0, 2, 3), correction=0)
        operands |= {f"{prefix}mean": mean, f"{prefix}invstd": (var + eps).rsqrt()}
    operands |= {"y": y.detach(), "dz": gradients["z"], "sum": gradients["beta"], "dot": gradients["gamma"]}
    for role, tensor in operands.items():
        operands[role] = tensor.float().to(DEVICE)
        if tensor.dim() == 4:
            operands[role] = operands[role].contiguous(memory_format=torch.channels_last)
    return TwoLayers(operands, gradients)
