"""Random launches of one convolution, what they should give in float64, and how to run them into poisoned memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.backends import triton as executor
from fused_resnet.launch import EPILOGUES, Geometry, Launch, PoolGeometry
from fused_resnet.tuning import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def conv(
    *sizes: int,
    dtype: torch.dtype = torch.float32,
    epilogue: str = "store",
    activation: str = "identity",
    without: tuple[str, ...] = (),
    prologue: str = "identity",
    **how: Any,
) -> Launch:
    """A launch from N, H, W, C, K, R, S and the keyword arguments of Geometry; ``without`` leaves out operands."""
    roles = ("x", "w", *(role for role in EPILOGUES[epilogue] if role not in without))
    if prologue == "bn_relu":
        roles += ("scale", "shift")
    return Launch(
        "conv",
        "layer",
        Geometry(*sizes, **how),
        dtype,
        tuple((role, role) for role in roles),
        (("y", "y"),),
        prologue=prologue,
        epilogue=epilogue,
        activation=activation,
        eps=1e-3,
    )


def max_pool(*sizes: int, dtype: torch.dtype = torch.float32, **how: Any) -> Launch:
    """A launch from N, H, W, C and the keyword arguments of PoolGeometry."""
    return Launch("max_pool", "pool", PoolGeometry(*sizes, **how), dtype, (("x", "x"),), (("y", "y"),))


def activations(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


def operands_of(launch: Launch, parameters: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random operands; BatchNorm's as after a training: means off zero, variances off one, some gammas negative."""
    g = launch.geometry
    operands = {"x": activations(g.x_shape, launch.dtype)}
    for role in launch.roles - {"x"}:
        assert isinstance(g, Geometry)
        if role == "w":
            reduction = g.R * g.S * (g.C // g.groups)
            operands[role] = activations(g.w_shape, torch.float32).div(max(reduction, 1) ** 0.5).to(launch.dtype)
            operands[role] = operands[role].contiguous(memory_format=torch.channels_last)
        elif role == "shortcut":
            operands[role] = activations(g.y_shape, launch.dtype)
        elif role in ("scale", "shift"):
            operands[role] = torch.randn(g.C, device=DEVICE)
        elif role == "var":
            operands[role] = (0.5 + 1.5 * torch.rand(g.K, device=DEVICE)).to(parameters)
        else:
            operands[role] = torch.randn(g.K, device=DEVICE).to(parameters)
    return operands


def expected(launch: Launch, operands: dict[str, Tensor]) -> Tensor:
    """The launch in float64 by torch.nn.functional, written down a second time and not from the launch's own executors."""
    g = launch.geometry
    o = {role: tensor.double().cpu() for role, tensor in operands.items()}
    if isinstance(g, PoolGeometry):
        return F.max_pool2d(o["x"], g.kernel, g.stride, g.padding, g.dilation)
    if launch.prologue == "bn_relu":
        # As a kernel that writes it would round it, to the launch's type.
        normalised = F.relu(o["x"].float() * o["scale"].float().view(1, -1, 1, 1) + o["shift"].float().view(1, -1, 1, 1))
        o["x"] = normalised.to(launch.dtype).double()
    y = F.conv2d(o["x"], o["w"], o.get("bias"), g.stride, g.padding, g.dilation, g.groups)
    if "var" in o:
        y = F.batch_norm(y, o["mean"], o["var"], o.get("gamma"), o.get("beta"), training=False, eps=launch.eps)
    if "shortcut" in o:
        y = y + o["shortcut"]
    return F.relu(y) if launch.activation == "relu" else y


def run_poisoned(launch: Launch, operands: dict[str, Tensor], tile: Tile | None = None, **how: Any) -> Tensor:
    """Run through Triton into memory full of NaN: an element that is not written, or is read, shows."""
    out = torch.empty(launch.geometry.y_shape, dtype=launch.dtype, device=DEVICE, memory_format=torch.channels_last)
    out.fill_(torch.nan)
    given = {role: tensor.clone(memory_format=torch.preserve_format) for role, tensor in operands.items()}
    result = executor.run(launch, operands, tile=tile, out=out, **how)
    assert result is out
    for role, tensor in given.items():
        assert torch.allclose(tensor, operands[role], rtol=0, atol=0, equal_nan=True), f"the kernel wrote to its operand {role}"
    return out


def loaders(launch: Launch, tile: Tile | None = None) -> tuple[str | None, str | None]:
    """Names of the loaders a launch takes where the tests run."""
    constants = executor.plan_start(launch, executor.arch_of(DEVICE), tile).constants
    tables = (executor.boxes.PIXELS, executor.boxes.FILTERS)
    names = {id(function): name for table in tables for name, function in table.items()}
    pixels, filters = (names.get(id(constants[key])) for key in ("PIXELS", "FILTERS"))
    return pixels, filters
