"""Runs a launch in pieces, see :mod:`fused_resnet.tuning.pieces`: around our own convolution, or around PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import ceil
from typing import Any

import torch
from torch import Tensor

from ..kernels import activations, ends, epilogues, gradients
from ..launch import Geometry, Launch
from ..tuning.pieces import Pieces, pieces
from ..tuning.tile import Strip, Tile, choose_strip
from . import triton, workspace
from .triton_start import (
    Space,
    Start,
    arch_of,
    channels_last,
    emptiness,
    needs_wide_offsets,
    numbers_of,
    outputs_of,
    start_on,
    updates,
)

#: Kinds of launches that are strips: the pieces, and what stands by itself around a chain's entry.
KINDS = ("statistics", "output_gradient", "conv_end", "dgrad_end")
#: Kind -> kernel, where they have other names: statistics of x are those of a convolution that has been.
_KERNELS = {"statistics": ends.conv_end}

#: What launches of one plan leave for each other: dy, see :func:`fused_resnet.tuning.pieces.dy_slot`.
Shared = dict[str, Tensor]


def supports(launch: Launch, how: str) -> str | None:
    """None, or why ``launch`` cannot run ``how``."""
    if how == "fused":
        return None
    if pieces(launch, how) is None:
        return f"{launch.kind} of this kind has nothing to do apart" if how == "apart" else f"{launch} runs fused only"
    return None


def run(
    launch: Launch,
    how: str,
    operands: Mapping[str, Tensor],
    shared: Shared | None = None,
    *,
    tile: Tile | None = None,
    out: Mapping[str, Tensor] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Run the pieces of a launch; arguments and results are those of :func:`.triton.run`.

    Args:
        shared: what launches of the same plan left, and what this one leaves: a layer's dgrad and wgrad read the same dy.

    Raises:
        ValueError: the launch does not run so, see :func:`supports`.
    """
    parts = pieces(launch, how)
    if parts is None:
        raise ValueError(f"how={how!r}: {supports(launch, how)}")
    given = dict(operands)
    for first in parts.first:
        role = "x" if first.kind == "bn_add_relu" else "dz"
        given[role] = _made(first, operands, shared)
    given = {role: given[role] for role, _ in parts.core.operands}
    wanted = None if out is None else {role: out[role] for role, _ in parts.core.outputs}
    if how == "apart":
        result = triton.run(parts.core, given, (), shared, tile=tile, out=wanted, how="fused")
        of_core = result if isinstance(result, tuple) else (result,)
        made = dict(zip((role for role, _ in parts.core.outputs), of_core, strict=True))
    else:
        made = _around_vendor(parts, given, wanted, shared)
    for role, _ in launch.outputs:
        if role not in made:  # a bias in front of BatchNorm, which subtracts what it adds
            g = launch.geometry
            assert isinstance(g, Geometry)
            new = torch.empty(g.K, dtype=torch.float32, device=given["dz"].device) if out is None else out[role]
            made[role] = new.zero_()
    results = tuple(made[role] for role, _ in launch.outputs)
    return results if len(results) > 1 else results[0]


def _made(first: Launch, operands: Mapping[str, Tensor], shared: Shared | None) -> Tensor:
    """What a launch in front makes in the place of x or dz."""
    slot = first.outputs[0][1]
    if shared is not None and slot in shared:
        return shared.pop(slot)  # a layer's wgrad and dgrad are its only two readers
    if first.kind == "bn_add_relu":
        renamed = {name: operands["x" if name == "y" else f"x_{name}"] for name, _ in first.operands}
        made = triton.run(first, renamed, how="fused")
        assert isinstance(made, Tensor)
        return made
    (made,) = _strip(first, {name: operands[name] for name, _ in first.operands}, None, None).values()
    if shared is not None:
        shared[slot] = made
    return made


def _around_vendor(
    parts: Pieces, given: dict[str, Tensor], out: Mapping[str, Tensor] | None, shared: Shared | None
) -> dict[str, Tensor]:
    """What the core's outputs are, by role."""
    core, g = parts.core, parts.core.geometry
    assert isinstance(g, Geometry)
    if core.kind == "conv":
        raw = torch.conv2d(given["x"], given["w"], None, g.stride, g.padding, g.dilation, g.groups)
    else:
        which = 0 if core.kind == "dgrad" else 1
        # Of the operand whose gradient is asked for only the sizes matter.
        role, shape = ("x", g.x_shape) if which == 0 else ("w", g.w_shape)
        sized = torch.empty(shape, dtype=core.dtype, device=given["dz"].device, memory_format=torch.channels_last)
        both = {**given, role: sized}
        w = both["w"].contiguous(memory_format=torch.channels_last)
        mask = [which == 0, which == 1, False]
        raw = torch.ops.aten.convolution_backward(
            given["dz"], both["x"], w, None, g.stride, g.padding, g.dilation, False, [0, 0], g.groups, mask
        )[which]
    raw = raw.contiguous(memory_format=torch.channels_last)
    main = {"conv": "y", "dgrad": "dx", "wgrad": "dw"}[core.kind]
    made = {main: raw}
    if parts.last is not None:
        given["raw"] = raw
        made = _strip(parts.last, {role: given[role] for role, _ in parts.last.operands}, out, shared)
    elif out is not None:
        made = {main: out[main].copy_(raw)}
    return made


@lru_cache(maxsize=4096)
def plan_start(launch: Launch, arch: str, strip: Strip | None = None, wide: bool | None = None) -> Start:
    """How one of :data:`KINDS` is started on ``arch``."""
    g = launch.geometry
    strip = strip or choose_strip(launch, arch)
    constants: dict[str, Any] = {
        "PIXELS": strip.pixels,
        "CHANNELS": strip.channels,
        "WIDE": needs_wide_offsets(g.y_shape) if wide is None else wide,
    }
    strips, channel_tiles = ceil(g.N * g.P * g.Q / strip.pixels), ceil(g.y_shape[1] / strip.channels)
    counters = partials = group = 0
    summed = launch.kind == "dgrad_end" and len(launch.outputs) > 1
    if launch.kind == "output_gradient":
        constants["COEFFICIENTS"], constants["GRADIENT"], _ = gradients.GRADIENTS[launch.gradient]
    elif launch.kind in ("conv_end", "statistics"):
        after = epilogues.AFTERS.get(_epilogue(launch))
        constants["EPILOGUE"] = epilogues.EPILOGUES[_epilogue(launch)][0]
        constants["ACTIVATION"] = activations.ACTIVATIONS[launch.activation][0]
        constants["AFTER"] = after[0] if after else None
    else:
        constants["EPILOGUE"] = gradients.EPILOGUES[launch.epilogue][0]
        constants["BACKWARD"] = activations.ACTIVATIONS[launch.activation][1]
    if summed or constants.get("AFTER") is not None:
        group = workspace.group_of(strips)
        counters = channel_tiles * workspace.counters_of(strips) + 1
        partials = strips * (2 * g.y_shape[1] + channel_tiles)
    kernel = _KERNELS.get(launch.kind) or getattr(ends, launch.kind)
    programs = strips * channel_tiles
    sizes = (counters, partials, group, updates(launch))
    return Start(kernel, launch, bind, programs, constants, None, None, None, strip.num_warps, 1, *sizes)


def _epilogue(launch: Launch) -> str:
    return "stats" if launch.kind == "statistics" else launch.epilogue


def bind(
    start: Start,
    launch: Launch,
    operands: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    space: Space,
) -> dict[str, Any]:
    """A kernel's arguments by name."""
    g = launch.geometry
    assert isinstance(g, Geometry)
    count = g.N * g.P * g.Q
    named: dict[str, Any] = dict(operands)
    sized = {"pixels": count, "K": g.K, **start.constants}
    named |= {**numbers_of(launch), "K": g.K, "m": float(count), "momentum": launch.momentum}
    if launch.kind == "output_gradient":
        arguments = tuple(named.get(name) for name in gradients.GRADIENTS[launch.gradient][2])
        tensors = {"dz": named["dz"], "y": named.get("y"), "dshortcut": named.get("dshortcut"), "dy": outputs["dy"]}
        return {**tensors, "gradient_args": arguments, **sized}
    named |= {"counters": space.counters, "partials": space.partials, "before": space.before}
    group = start.group if start.counters else None
    if launch.kind in ("conv_end", "statistics"):
        named |= {role: tensor for role, tensor in outputs.items() if role != "y"}
        after = epilogues.AFTERS.get(_epilogue(launch))
        untouched = _epilogue(launch) == "stats" and "bias" not in operands
        return {
            "raw": named["x" if launch.kind == "statistics" else "raw"],
            "y": None if untouched else outputs["y"],
            "epilogue_args": tuple(named.get(name) for name in epilogues.EPILOGUES[_epilogue(launch)][1]),
            "slope": named["slope"],
            "group": group,
            "after_args": tuple(named.get(name) for name in after[1]) if after else (),
            **sized,
        }
    return {
        "raw": named["raw"],
        "dx": outputs["dx"],
        "outputs": tuple(outputs[role] for role, _ in launch.outputs[1:]),
        "epilogue_args": tuple(named.get(name) for name in gradients.EPILOGUES[launch.epilogue][1]),
        "counters": space.counters,
        "partials": space.partials,
        "group": group,
        **sized,
    }


def run_strip(
    launch: Launch,
    operands: Mapping[str, Tensor],
    shared: Shared | None,
    strip: Strip | None = None,
    out: Mapping[str, Tensor] | None = None,
    wide: bool | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Run one of the kinds that stand by themselves; arguments and results are those of :func:`.triton.run`."""
    made = _strip(launch, operands, out, shared, strip, wide)
    results = tuple(made[role] for role, _ in launch.outputs)
    return results if len(results) > 1 else results[0]


def _strip(
    launch: Launch,
    operands: Mapping[str, Tensor],
    out: Mapping[str, Tensor] | None,
    shared: Shared | None,
    strip: Strip | None = None,
    wide: bool | None = None,
) -> dict[str, Tensor]:
    """Run one of :data:`KINDS`."""
    device = next(iter(operands.values())).device
    outputs = dict(out or outputs_of(launch, device))
    if emptiness(launch)[0]:  # a rank without images
        return {role: tensor.zero_() for role, tensor in outputs.items()}
    operands = channels_last(operands, "x", "dz", "dshortcut")  # these may come from outside as they are
    if launch.kind == "conv_end" and launch.epilogue == "stats" and "bias" not in operands:
        # Nothing is added: what the convolution wrote is the result.
        outputs["y"] = out["y"].copy_(operands["raw"]) if out else operands["raw"]
    start = plan_start(launch, arch_of(device), strip, wide)
    start_on(start, operands, outputs, device, shared)
    return outputs
