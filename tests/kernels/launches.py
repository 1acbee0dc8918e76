"""Random launches of one convolution, what they should give in float64, and how to run them into poisoned memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import interpreter

from fused_resnet.backends import triton as executor
from fused_resnet.backends.triton_arguments import weightless_operands
from fused_resnet.backends.triton_start import Space, Start, outputs_of
from fused_resnet.kernels import finish
from fused_resnet.launch import EPILOGUES, PROLOGUES, Geometry, Launch, PoolGeometry
from fused_resnet.tuning import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prologue_roles(prologue: str, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Of a prologue's vectors; ``x_var``, given statistics, where ``without`` leaves the batch's out."""
    without = without if "x_invstd" in without else (*without, "x_var")
    return tuple(role for role in PROLOGUES[prologue] if role not in without)


def conv(
    *sizes: int,
    dtype: torch.dtype = torch.float32,
    epilogue: str = "store",
    activation: str = "identity",
    without: tuple[str, ...] = (),
    prologue: str = "identity",
    outputs: tuple[str, ...] = (),
    momentum: float | None = 0.1,
    **how: Any,
) -> Launch:
    """A launch from N, H, W, C, K, R, S and the keyword arguments of Geometry; ``without`` leaves out operands."""
    roles = tuple(role for role in ("x", "w", *prologue_roles(prologue, without), *EPILOGUES[epilogue]) if role not in without)
    outputs = outputs or (("y", "mean", "invstd") if epilogue == "stats" else ("y",))
    return Launch(
        "conv",
        "layer",
        Geometry(*sizes, **how),
        dtype,
        tuple((role, role) for role in roles),
        tuple((role, role) for role in outputs),
        prologue=prologue,
        epilogue=epilogue,
        activation=activation,
        eps=1e-3,
        momentum=momentum,
    )


def end_of_block(
    *sizes: int,
    operands: tuple[str, ...],
    outputs: tuple[str, ...] = ("out",),
    dtype: torch.dtype = torch.float32,
    activation: str = "relu",
    kind: str = "",
    gradient: str = "identity",
) -> Launch:
    """A bn_add_relu, or a bn_add_relu_backward if its operands have a ``dout``, on an output of sizes N, P, Q, K."""
    N, P, Q, K = sizes
    kind = kind or ("bn_add_relu_backward" if "dout" in operands else "bn_add_relu")
    geometry = Geometry(N, P, Q, K, K, 1, 1)
    named = (tuple((role, role) for role in roles) for roles in (operands, outputs))
    return Launch(kind, "layer", geometry, dtype, *named, activation=activation, gradient=gradient, momentum=0.1)


def max_pool(
    *sizes: int,
    dtype: torch.dtype = torch.float32,
    prologue: str = "identity",
    outputs: tuple[str, ...] = ("y",),
    without: tuple[str, ...] = (),
    **how: Any,
) -> Launch:
    """A launch from N, H, W, C and the keyword arguments of PoolGeometry."""
    roles = ("x", *prologue_roles(prologue, without))
    named = (tuple((role, role) for role in roles) for roles in (roles, outputs))
    return Launch("max_pool", "pool", PoolGeometry(*sizes, **how), dtype, *named, prologue=prologue)


def max_pool_backward(
    *sizes: int,
    dtype: torch.dtype = torch.float32,
    operands: tuple[str, ...] = ("dy", "x"),
    outputs: tuple[str, ...] = ("dx",),
    activation: str = "identity",
    **how: Any,
) -> Launch:
    """A launch from N, H, W, C and the keyword arguments of PoolGeometry."""
    named = (tuple((role, role) for role in roles) for roles in (operands, outputs))
    return Launch("max_pool_backward", "pool", PoolGeometry(*sizes, **how), dtype, *named, activation=activation)


def zero_pad(*sizes: int, stride: tuple[int, int], dtype: torch.dtype = torch.float32, backward: bool = False) -> Launch:
    """A launch from N, H, W, C, K."""
    read, made = ("dz", "dx") if backward else ("x", "y")
    kind = "zero_pad_backward" if backward else "zero_pad"
    return Launch(kind, "shortcut", Geometry(*sizes, 1, 1, stride), dtype, ((read, read),), ((made, made),))


def activations(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


def operands_of(launch: Launch, parameters: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random operands; BatchNorm's as after a training: means off zero, variances off one, some gammas negative."""
    g = launch.geometry
    operands = {}
    for role in sorted(launch.roles, key=lambda role: (role != "x", role)):
        if role == "w":
            assert isinstance(g, Geometry)
            reduction = g.R * g.S * (g.C // g.groups)
            operands[role] = activations(g.w_shape, torch.float32).div(max(reduction, 1) ** 0.5).to(launch.dtype)
            operands[role] = operands[role].contiguous(memory_format=torch.channels_last)
        elif role == "x":
            operands[role] = activations(g.x_shape, launch.dtype)
        elif role in ("shortcut", "y", "dy", "dout", "out", "t"):
            operands[role] = activations(g.y_shape, launch.dtype)
        elif role == "indices":
            operands[role] = activations(g.y_shape, torch.float32).zero_().to(torch.uint8)  # the test sets them
        elif role == "batches":
            operands[role] = torch.tensor(5, device=DEVICE)
        else:
            size = g.C if role.startswith("x_") else g.y_shape[1]
            spread = role.endswith(("var", "invstd"))
            vector = 0.5 + 1.5 * torch.rand(size, device=DEVICE) if spread else torch.randn(size, device=DEVICE)
            operands[role] = vector if role.endswith(("mean", "invstd")) and "running" not in role else vector.to(parameters)
    return operands


def normalised(launch: Launch, operands: dict[str, Tensor]) -> Tensor:
    """What a prologue makes of x, in the launch's type as a kernel that wrote it would round it, as float64."""
    o = {role: tensor.float().cpu() for role, tensor in operands.items()}
    ones = torch.ones_like(o["x_mean"])
    invstd = o["x_invstd"] if "x_var" not in o else (o["x_var"].double() + launch.x_eps).rsqrt()
    scale, shift = invstd * o.get("x_gamma", ones), o.get("x_beta", 0 * ones)
    z = (o["x"] - o["x_mean"].view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    return (F.relu(z) if launch.prologue == "bn_relu" else z).to(launch.dtype).double()


def expected(launch: Launch, operands: dict[str, Tensor]) -> Tensor:
    """The launch in float64 by torch.nn.functional, written down a second time and not from the launch's own executors."""
    g = launch.geometry
    o = {role: tensor.double().cpu() for role, tensor in operands.items()}
    if launch.prologue != "identity":
        o["x"] = normalised(launch, o)
    if isinstance(g, PoolGeometry):
        return F.max_pool2d(o["x"], g.kernel, g.stride, g.padding, g.dilation)
    y = F.conv2d(o["x"], o["w"], o.get("bias"), g.stride, g.padding, g.dilation, g.groups)
    if "var" in o:
        y = F.batch_norm(y, o["mean"], o["var"], o.get("gamma"), o.get("beta"), training=False, eps=launch.eps)
    if "shortcut" in o:
        y = y + o["shortcut"]
    return F.relu(y) if launch.activation == "relu" else y


def run_all(launch: Launch, operands: dict[str, Tensor], tile: Tile | None = None, **how: Any) -> dict[str, Tensor]:
    """Run through Triton into memory full of NaN: an element that is not written, or is read, shows. All outputs by role.

    What the launch updates in place is as new in ``operands`` behind it; nothing else there may have changed, and the counters
    must be zero again.
    """
    out = outputs_of(launch, DEVICE)
    check_stand_ins(launch, operands)
    for tensor in out.values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else 255)
    given = {role: tensor.clone(memory_format=torch.preserve_format) for role, tensor in operands.items()}
    with poisoned_workspace(), wide_offsets((*operands.values(), *out.values())) if how.get("wide") else nullcontext():
        result = executor.run(launch, operands, tile=tile, out=out, **how)
    results = result if isinstance(result, tuple) else (result,)
    assert all(given is made for given, made in zip(out.values(), results, strict=True))
    for role, tensor in given.items():
        if role not in executor.epilogues.IN_PLACE:
            same = torch.allclose(tensor, operands[role], rtol=0, atol=0, equal_nan=True)
            assert same, f"the kernel wrote to its operand {role}"
    return out


def check_stand_ins(launch: Launch, operands: dict[str, Tensor]) -> None:
    """What arguments are laid out and kernels compiled with has the shapes of what is given, activations the type too."""
    for role, stand_in in weightless_operands(launch).items():
        if role not in ("batches", "count"):
            assert stand_in.shape == operands[role].shape, role
        assert stand_in.dtype == operands[role].dtype or stand_in.dim() == 1, role


@contextmanager
def poisoned_workspace() -> Iterator[None]:
    """Partials are full of NaN before the launch, and so is much room behind them, where nothing is written; the counters are
    zero behind it.

    The room keeps what else is in memory away: a pointer to a part that there is not, which is masked, would else be the first
    of an activation where the allocator put one there.
    """
    original, used, rooms = Start.workspace, [], []

    def with_room(floats: Tensor) -> Tensor:
        whole = torch.full(((1 + finish.AT_ONCE.value) * floats.numel() + 64,), torch.nan, device=floats.device)
        rooms.append(whole[floats.numel() :])
        return whole[: floats.numel()]

    def workspace(self: Start, device: torch.device) -> Space:
        space = original(self, device)
        if device.type == "meta":  # what arguments are laid out with
            return space
        if space.partials is not None:
            partials = with_room(space.partials)
            behind = None if self.partials_behind is None else partials[self.partials_behind :]
            space = space._replace(partials=partials, partials_behind=behind)
        if space.before is not None:
            space = space._replace(before=with_room(space.before))
        used.append(space.counters)
        return space

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Start, "workspace", workspace)
        yield
    assert not any(counters is not None and counters.any() for counters in used), "a counter was not reset"
    assert all(room.isnan().all() for room in rooms), "the kernel wrote behind its workspace"


@contextmanager
def wide_offsets(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Every tile of pointers into an activation or into filters is made with 64-bit offsets, where kernels are interpreted."""
    bases = {tensor.data_ptr() for tensor in tensors if tensor.dim() == 4}
    original = interpreter.InterpreterBuilder.create_addptr

    def create_addptr(self: Any, pointer: Any, offset: Any) -> Any:
        if offset.data.size > 1 and int(pointer.data.flat[0]) in bases and (pointer.data == pointer.data.flat[0]).all():
            assert offset.data.dtype.itemsize == 8, f"offsets of {offset.data.dtype}"
        return original(self, pointer, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_addptr", create_addptr)
        yield


def run_poisoned(launch: Launch, operands: dict[str, Tensor], tile: Tile | None = None, **how: Any) -> Tensor:
    """As :func:`run_all`; the first output."""
    return next(iter(run_all(launch, operands, tile, **how).values()))


def loaders(launch: Launch, tile: Tile | None = None) -> tuple[str | None, str | None]:
    """Names of the loaders a launch takes where the tests run."""
    constants = executor.plan_start(launch, executor.arch_of(DEVICE), tile).constants
    tables = (executor.boxes.PIXELS, executor.boxes.FILTERS)
    names = {id(function): name for table in tables for name, function in table.items()}
    pixels, filters = (names.get(id(constants[key])) for key in ("PIXELS", "FILTERS"))
    return pixels, filters
