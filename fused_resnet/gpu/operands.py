"""Random operands of a launch on a device, its truth, and whether what a kernel wrote is that.

Sizes and types are those of :func:`fused_resnet.backends.triton_arguments.weightless_operands`, which the compiler is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS
from ..backends import reference
from ..backends.triton_arguments import weightless_operands
from ..launch import PROLOGUES, Geometry, Launch, PoolGeometry

Operands = dict[str, Tensor]

#: What a launch updates in place.
IN_PLACE = ("running_mean", "running_var", "batches")

#: Part of the elements that may differ where a value next to zero decides: on which side of a ReLU it falls, which of two
#: equal maxima is the first. A wrong rim, tile or tap is more than that. A choice of what is less than the maximum by more than
#: a rounding is wrong however rare: see :func:`_choices`.
_UNDECIDED = {"mask": 1e-5, "indices": 1e-3}


def random_operands(launch: Launch, device: torch.device, seed: int) -> Operands:
    """Operands as a training brings them about: means off zero, variances off one, some gammas negative, ReLU's outputs sparse.

    Args:
        launch: of any kind but the ones between ranks.
        device: where they go.
        seed: other numbers for another one.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shapes = weightless_operands(launch, torch.float32)
    made: Operands = {}
    for role, _ in launch.operands:
        made[role] = _random(launch, role, shapes[role], generator, device)
    if "indices" in made:
        made.update(_pooled(launch, made))
    return made


def _random(launch: Launch, role: str, like: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
    g = launch.geometry
    if role == "batches":
        return torch.full((), 5, dtype=torch.int64, device=device)
    if role == "count":
        return torch.full((1,), float(g.N * g.P * g.Q), device=device)
    if role == "indices":
        return torch.empty(0, device=device)
    if like.dim() > 1:
        value = torch.empty(like.shape, dtype=like.dtype, device=device, memory_format=torch.channels_last)
        value.normal_(generator=generator)
        if role == "w":
            assert isinstance(g, Geometry)
            value.mul_((g.R * g.S * (g.C // g.groups)) ** -0.5)
        return ACTIVATIONS[launch.activation].in_place(value, launch.slope) if role in ("out", "a_previous") else value
    vector = torch.empty(like.shape, device=device)
    if role.endswith(("var", "invstd")):
        vector.uniform_(0.5, 2.0, generator=generator)
    else:
        vector.normal_(generator=generator)
    if role in ("sum", "dot"):  # as large as sums over the pixels are
        vector.mul_((g.N * g.P * g.Q) ** 0.5)
    return vector.to(like.dtype)


def _pooled(launch: Launch, operands: Operands) -> Operands:
    """What the max-pooling wrote whose backward ``launch`` is: its choices, and its output where that is read."""
    activation = "" if launch.activation == "identity" else launch.activation
    prologue = "_".join(filter(None, ("bn" if "x_mean" in operands else "", activation))) or "identity"
    read = tuple((role, role) for role in ("x", *PROLOGUES[prologue]) if role in operands)
    written = (("y", "y"), ("indices", "indices"))
    forward = Launch(
        "max_pool", launch.layer, launch.geometry, launch.dtype, read, written, prologue=prologue, x_slope=launch.slope
    )
    y, indices = reference.run(forward, {role: operands[role] for role, _ in read})
    made = {"out": y, "indices": indices}
    return {role: made[role].contiguous(memory_format=torch.channels_last) for role in made if role in operands}


def copies(operands: Operands) -> Operands:
    """The same operands; those that a launch writes in place are new tensors."""
    return {role: tensor.clone() if role in IN_PLACE else tensor for role, tensor in operands.items()}


def poisoned_outputs(launch: Launch, device: torch.device) -> Operands:
    """Outputs full of NaN (of 255 for bytes): what a kernel does not write shows."""
    from ..backends.triton_start import outputs_of

    outputs: Operands = outputs_of(launch, device)
    for tensor in outputs.values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else 255)
    return outputs


def run(launch: Launch, operands: Operands, tile: Any = None, how: str | None = None) -> Operands:
    """What Triton makes of it, in poisoned memory: outputs by role, and what was updated in place."""
    from ..backends import triton

    given = copies(operands)
    outputs = poisoned_outputs(launch, next(iter(operands.values())).device)
    with torch.no_grad():
        made = triton.run(launch, given, tile=tile, out=outputs, how=how)
    results = made if isinstance(made, tuple) else (made,)
    outputs = {role: result for (role, _), result in zip(launch.outputs, results, strict=True)}
    return {**outputs, **{role: given[role] for role in IN_PLACE if role in given}}


def truth(launch: Launch, operands: Operands) -> Operands:
    """What the reference executor makes of it: of fp32 in float64, of 16 bits in fp32 with the kernels' roundings."""
    exact = launch.dtype == torch.float32
    given = {
        role: tensor.double() if exact and tensor.is_floating_point() else tensor for role, tensor in copies(operands).items()
    }
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.no_grad():
        made = reference.run(replace(launch, dtype=torch.float64) if exact else launch, given)
    results = made if isinstance(made, tuple) else (made,)
    outputs = {role: result for (role, _), result in zip(launch.outputs, results, strict=True)}
    return {**outputs, **{role: given[role] for role in IN_PLACE if role in given}}


@dataclass(frozen=True)
class Verdict:
    """How far a launch is from its truth.

    Attributes:
        error: largest difference over the largest magnitude, over all outputs but what may be undecided.
        allowed: what ``error`` may be.
        norm: ``||difference|| / ||truth||`` of the worst output.
        undecided: largest part of elements that differ beyond ``allowed`` for a value next to zero.
        wrong: the outputs that are off, with their errors; empty if all is well.
    """

    error: float
    allowed: float
    norm: float
    undecided: float
    wrong: tuple[str, ...]


def compare(launch: Launch, given: Operands, made: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Verdict:
    """Hold all outputs of a launch against their truth. NaN is always wrong.

    Args:
        launch: what was run.
        given: its operands, which tell what a max-pooling's choices are worth.
        made: the outputs by role, as of :func:`run`.
        expected: the truth, as of :func:`truth`.
    """
    allowed = tolerance(launch)
    error = norm = undecided = 0.0
    wrong = []
    for role, truth_of_role in expected.items():
        if role == "indices":
            others, off = _choices(launch, given, made[role], allowed)
            undecided = max(undecided, others)
            if off or others > _UNDECIDED[role]:
                wrong.append(f"indices {others:.1e} are others, {off} of them not of a maximum")
            continue
        difference, scale = _difference(made[role], truth_of_role)
        may_differ = _may_differ(launch, role)
        beyond = (difference > allowed * scale).float().mean().item() if difference.numel() else 0.0
        far = difference.max().item() / scale if difference.numel() else 0.0
        apart = difference.square().mean().sqrt().item() / max(_root_mean_square(truth_of_role), 1e-30)
        norm = max(norm, apart)
        if may_differ:
            undecided = max(undecided, beyond)
        else:
            error = max(error, far)
        if beyond > may_differ or apart > max(allowed, 4 * may_differ**0.5) or difference.isnan().any():
            wrong.append(f"{role} {far:.1e}")
    return Verdict(error, allowed, norm, undecided, tuple(wrong))


def tolerance(launch: Launch) -> float:
    """Largest error, relative to the largest value: two roundings to the launch's type, and sums in fp32.

    Both the kernel and its truth round what is stored; and what is multiplied is rounded on both sides after sums in another
    order. The sums' part is that of tests/tolerances.py.
    """
    g = launch.geometry
    length = g.N * g.P * g.Q
    if isinstance(g, Geometry):
        length = max(length, g.R * g.S * (g.C // g.groups), g.R * g.S * (g.K // g.groups))
    rounding = torch.finfo(launch.dtype).eps
    return 8 * torch.finfo(torch.float32).eps * max(length, 16) ** 0.5 + (
        rounding if launch.dtype.itemsize < 4 else rounding / 2
    )


def _choices(launch: Launch, given: Operands, made: Tensor, allowed: float) -> tuple[float, int]:
    """What a max-pooling chose otherwise than its truth, of what is pooled in float64 and rounded to the launch's type.

    (Not in fp32, where GELU's tail is zero long before.)

    Returns:
        The part of all choices that are others; and how many lie outside their plane, or on a value that is less than the
        maximum by more than a rounding.
    """
    g = launch.geometry
    assert isinstance(g, PoolGeometry)
    wide = {role: tensor.double() if tensor.is_floating_point() else tensor for role, tensor in given.items()}
    pooled = reference.prologue(replace(launch, dtype=torch.float64), wide).to(launch.dtype).double()
    largest, exact = reference.pooled(launch, g, pooled)
    places = reference.flat_places(g, made)
    inside = (places >= 0) & (places < g.H * g.W) & (made < g.kernel[0] * g.kernel[1])
    chosen = pooled.flatten(2).gather(2, places.where(inside, 0).flatten(2)).view(largest.shape)
    # The scale's part: what cancels in a BatchNorm is fp32's rounding of the larger values.
    rounding = allowed * largest.abs() + 8 * torch.finfo(torch.float32).eps * largest.abs().max()
    other = made != exact
    off = other & ~(inside & ((chosen == largest) | ((largest - chosen).abs() <= rounding)))
    return other.float().mean().item(), int(off.sum())


def _difference(made: Tensor, expected: Tensor) -> tuple[Tensor, float]:
    wide = torch.float64 if expected.dtype == torch.float64 else torch.float32
    expected = expected.to(wide)
    scale = max(expected.abs().max().item(), 1e-30) if expected.numel() else 1.0
    difference = (made.to(wide) - expected).abs()
    return difference.nan_to_num_(nan=float("inf")), scale


def _root_mean_square(value: Tensor) -> float:
    return value.double().square().mean().sqrt().item() if value.numel() else 0.0


def _may_differ(launch: Launch, role: str) -> float:
    """Part of an output's elements that may differ."""
    recomputed = launch.epilogue == "bn_mask" or launch.kind == "max_pool_backward"
    masked = recomputed and launch.activation != "identity"
    return _UNDECIDED["mask"] if masked and role == "dx" else 0.0


def vendor_convolution(launch: Launch, operands: Operands) -> Any:
    """The convolution of a launch by PyTorch alone (cuDNN), channels_last, without all that is fused; None if it has none.

    Returns:
        A function of no arguments: the forward, or the gradient of the input or of the filters.
    """
    g = launch.geometry
    if launch.kind not in ("conv", "dgrad", "wgrad") or not isinstance(g, Geometry):
        return None
    where = operands["x" if launch.kind == "conv" else "dz"]

    def like(shape: tuple[int, ...]) -> Tensor:
        new = torch.empty(shape, dtype=launch.dtype, device=where.device, memory_format=torch.channels_last)
        return new.normal_()

    x = operands.get("x") if operands.get("x") is not None else like(g.x_shape)
    w = operands.get("w") if operands.get("w") is not None else like(g.w_shape)
    assert x is not None and w is not None
    if launch.kind == "conv":
        return lambda: F.conv2d(x, w, None, g.stride, g.padding, g.dilation, g.groups)
    mask = [launch.kind == "dgrad", launch.kind == "wgrad", False]
    return lambda: torch.ops.aten.convolution_backward(
        operands["dz"], x, w, None, g.stride, g.padding, g.dilation, False, [0, 0], g.groups, mask
    )
