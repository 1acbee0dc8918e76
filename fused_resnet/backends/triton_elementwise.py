"""Starts of the kernels that are no products of matrices: ends of blocks, max-pooling, padded shortcuts, and their backward."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from torch import Tensor

from ..activations import from_output
from ..kernels import activations, boxes, elementwise, gate, pad, pool, prologues
from ..launch import Geometry, Launch, PoolGeometry
from ..tuning.tile import Strip, choose_strip, covered
from . import workspace
from .triton_start import Space, Start, needs_wide_offsets, numbers_of, sized, slope_of

_PADS = ("zero_pad", "zero_pad_backward")
KINDS = ("bn_add_relu", "bn_add_relu_backward", "gate", "gate_backward", "max_pool", "max_pool_backward", *_PADS)
#: Kind -> how many sums its programs finish together, at most.
_SUMS = {"bn_add_relu_backward": 3, "gate_backward": 5, "max_pool_backward": 2}

#: The last arguments of ``batch_norm`` (kernels/prologues.py).
_VECTORS = ("mean", "invstd", "gamma", "beta", "var", "eps")


def supports(launch: Launch) -> str | None:
    """None, or why there is no kernel for the launch, which is of one of :data:`KINDS`."""
    if launch.activation not in activations.ACTIVATIONS or launch.prologue not in prologues.PROLOGUES:
        return f"no Triton kernel for {launch.prologue} + {launch.kind} + {launch.activation} yet"
    outputs = {role for role, _ in launch.outputs}
    if isinstance(launch.geometry, PoolGeometry) and "indices" in outputs | launch.roles:
        taps = launch.geometry.kernel[0] * launch.geometry.kernel[1]
        if taps > 256:
            return f"an index of a pooling window is one byte, its {taps} taps do not fit"
    if launch.kind == "max_pool_backward" and "x_mean" in launch.roles and "indices" not in launch.roles:
        return "max_pool_backward behind a BatchNorm needs the indices"
    return None


def plan_start(launch: Launch, arch: str, strip: Strip | None = None, wide: bool | None = None) -> Start:
    """How a launch is started on ``arch``."""
    g = launch.geometry
    strip = strip or choose_strip(launch, arch)
    constants: dict[str, Any] = {
        "PIXELS": strip.pixels,
        "CHANNELS": strip.channels,
        "WIDE": needs_wide_offsets(g.x_shape, g.y_shape) if wide is None else wide,
    }
    strips = ceil(covered(launch) / (strip.pixels * strip.steps))
    channel_tiles = ceil((g.C if launch.kind == "zero_pad_backward" else g.y_shape[1]) / strip.channels)
    counters = partials = group = 0
    sizes: Any = None
    if launch.kind in _PADS:
        assert isinstance(g, Geometry)
        constants |= {"STRIDE_H": g.stride[0], "STRIDE_W": g.stride[1]}
        sizes = boxes.Sizes(g.N, g.H, g.W, g.C, g.K, g.P, g.Q)
        programs = strips * channel_tiles
        return Start(
            getattr(pad, launch.kind), launch, bind, programs, constants, sizes, None, None, strip.num_warps, 1, 0, 0, 0
        )
    if launch.kind.endswith("backward"):
        constants["STEPS"] = strip.steps
        if any(role not in ("dz", "dx") for role, _ in launch.outputs):
            group = workspace.group_of(strips)
            counters = channel_tiles * workspace.counters_of(strips)
            partials = _SUMS[launch.kind] * strips * g.y_shape[1]
    if isinstance(g, PoolGeometry):
        sizes = boxes.Sizes(g.N, g.H, g.W, g.C, g.C, g.P, g.Q)
        constants["TAPS"] = boxes.Taps(*g.kernel, *g.stride, *g.padding, *g.dilation)
        constants["PROLOGUE"] = prologues.PROLOGUES[launch.prologue][0]
    if launch.kind == "max_pool_backward":
        constants["PROLOGUE"] = prologues.PROLOGUES["identity"][0]
    if launch.kind in ("bn_add_relu", "gate"):
        constants["ACTIVATION"] = activations.ACTIVATIONS[launch.activation][0]
    elif launch.kind.endswith("_backward"):
        constants["BACKWARD"] = activations.ACTIVATIONS[launch.activation][1]
    if launch.kind == "gate_backward":  # without statistics y is the activation's output, where that tells the gradient
        given = "mean" not in launch.roles and from_output(launch.activation, launch.slope)
        constants["ACTIVATION"] = None if given else activations.ACTIVATIONS[launch.activation][0]
    module = pool if isinstance(g, PoolGeometry) else gate if launch.kind.startswith("gate") else elementwise
    kernel = getattr(module, launch.kind)
    programs = strips * channel_tiles
    return Start(kernel, launch, bind, programs, constants, sizes, None, None, strip.num_warps, 1, counters, partials, group)


def vectors(named: Mapping[str, Any], names: tuple[str, ...], prefix: str = "") -> tuple[Any, ...]:
    """The pointers of one BatchNorm, the first None if it is not there. (Triton 3.6 cannot compare a tuple that holds None.)"""
    return tuple(named.get(prefix + name) for name in names)


def bind(
    start: Start,
    launch: Launch,
    operands: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    space: Space,
) -> dict[str, Any]:
    """A kernel's arguments by name."""
    g = launch.geometry
    named: dict[str, Any] = dict(operands)
    if launch.kind in _PADS:
        return {**named, **outputs, **sized(start), **start.constants}
    if "var" in named:
        named["eps"] = launch.eps
    group = start.group if start.counters else None
    meeting = {"group": group, "partials": space.partials, "counters": space.counters}
    if launch.kind == "max_pool":
        known = {**named, **numbers_of(launch), "C": start.sizes.C}
        arguments = tuple(known.get(name) for name in prologues.PROLOGUES[launch.prologue][1])
        return {
            "x": named["x"],
            "y": outputs["y"],
            "indices": outputs.get("indices"),
            **sized(start),
            "prologue_args": arguments,
            **start.constants,
        }
    if launch.kind == "max_pool_backward":
        return {
            "dy": named["dy"],
            "x": named["x"],
            "indices": named.get("indices"),
            "x_bn": vectors(named, _VECTORS, "x_"),
            "dx": outputs["dx"],
            "sums": (outputs.get("sum"), outputs.get("dot")) if start.counters else None,
            "slope": slope_of(launch),
            **sized(start),
            **meeting,
            **start.constants,
        }
    assert isinstance(g, Geometry)
    pixels = {"pixels": g.N * g.P * g.Q, "K": g.K}
    if launch.kind == "bn_add_relu":
        return {
            "y": named["y"],
            "y_bn": vectors(named, _VECTORS),
            "shortcut": named.get("shortcut"),
            "shortcut_bn": vectors(named, _VECTORS, "shortcut_"),
            "out": outputs["out"],
            "slope": slope_of(launch),
            **pixels,
            **start.constants,
        }
    if launch.kind.startswith("gate"):
        mixed = {
            "y": named["y"],
            "y_bn": vectors(named, _VECTORS),
            "shortcut": named["shortcut"],
            "shortcut_bn": vectors(named, _VECTORS, "shortcut_"),
            "t": named["t"],
            "slope": slope_of(launch),
            **pixels,
            **start.constants,
        }
        if launch.kind == "gate":
            return {**mixed, "out": outputs["out"]}
        sums = tuple(outputs.get(role) for role in ("sum", "dot", "dt_sum", "dside_sum", "shortcut_dot"))
        made = {role: outputs[role] for role in ("dz", "dt", "dside")}
        return {**mixed, "dout": named["dout"], **made, "sums": sums, **meeting}
    return {
        "dout": named["dout"],
        "out": named.get("out"),
        "y": named.get("y"),
        "y_bn": vectors(named, _VECTORS),
        "shortcut": named.get("shortcut"),
        "shortcut_bn": vectors(named, _VECTORS, "shortcut_"),
        "slope": slope_of(launch),
        "dz": outputs.get("dz"),
        "sums": tuple(outputs.get(role) for role in ("sum", "dot", "shortcut_dot")) if start.counters else None,
        **pixels,
        **meeting,
        **start.constants,
    }
