"""A launch taken apart: what it does on load as launches of their own in front, its end as one behind.

``apart``: a prologue writes the activation, a BatchNorm's backward the convolution's dy; then our convolution reads them as
they are. It pays where a tile is read many times (3x3: nine taps) and the work on load costs more than the tensor cores' own.

``vendor``: the same, then PyTorch's convolution (cuDNN), then one launch for the epilogue, so that no layer need be slower than
the vendor's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ..launch import DGRAD_EPILOGUES, EPILOGUES, GRADIENTS, PROLOGUES, Geometry, Launch, tensor_bytes

#: Roles of what the launches in front make: the activation, and dy.
ACTIVATION, DY = "normalised", "dy"


@dataclass(frozen=True)
class Pieces:
    """The launches that stand for one.

    Attributes:
        first: launches in front; each writes one tensor, ``out`` in the place of ``x``, ``dy`` in the place of ``dz``.
        core: the convolution that is left.
        last: the launch behind it, which reads the convolution's result as ``raw``; None where nothing is left to do.
    """

    first: tuple[Launch, ...]
    core: Launch
    last: Launch | None = None


def _sized(launch: Launch, like: Geometry) -> Launch:
    """With the bytes of its activations, by role; vectors are not counted."""
    activations = {"y", "out", "dz", "dy", "shortcut", "dshortcut", "raw", "x", "dx"}
    whole = {role for role, _ in (*launch.operands, *launch.outputs)} & activations
    size = tensor_bytes(like.y_shape, launch.dtype)
    return replace(launch, sizes=tuple((role, size) for role in sorted(whole)))


def _flat(g: Geometry, channels: int, rows: int, columns: int) -> Geometry:
    """Geometry of an elementwise launch over [N, rows, columns, channels]."""
    return Geometry(g.N, rows, columns, channels, channels, 1, 1)


def _normalise(launch: Launch, g: Geometry) -> Launch:
    """bn_add_relu without a shortcut, over x."""
    flat = _flat(g, g.C, g.H, g.W)
    slots = dict(launch.operands)
    roles = [("y", slots["x"])] + [(role[2:], slots[role]) for role in PROLOGUES[launch.prologue] if role in slots]
    made = Launch(
        "bn_add_relu",
        launch.layer,
        flat,
        launch.dtype,
        tuple(roles),
        (("out", f"{slots['x']} {ACTIVATION}"),),
        activation=launch.x_activation,
        slope=launch.x_slope,
        eps=launch.x_eps,
    )
    return _sized(made, flat)


@lru_cache(maxsize=8192)
def dy_slot(launch: Launch) -> str:
    """What dy is called: by y. A block's last convolution and its projection read one dz, each behind a norm of its own."""
    return f"{dict(launch.operands)['y']} {DY}"


def _output_gradient(launch: Launch, g: Geometry) -> Launch:
    """dz and y to dy."""
    flat = _flat(g, g.K, g.P, g.Q)
    slots = dict(launch.operands)
    roles = tuple((role, slots[role]) for role in ("dz", *GRADIENTS["bn_backward"]) if role in slots)
    outputs = (("dy", dy_slot(launch)),)
    made = Launch("output_gradient", launch.layer, flat, launch.dtype, roles, outputs, gradient=launch.gradient)
    return _sized(made, flat)


@lru_cache(maxsize=8192)
def pieces(launch: Launch, how: str) -> Pieces | None:
    """The launches that stand for ``launch`` when it runs ``how`` ("apart" or "vendor"); None where that is not done."""
    g = launch.geometry
    if launch.kind not in ("conv", "dgrad", "wgrad") or not isinstance(g, Geometry):
        return None
    normalises, differentiates = launch.prologue != "identity", launch.gradient == "bn_backward"
    if launch.gradient == "scale" or (launch.kind == "wgrad" and "x" not in launch.roles):
        return None  # its vectors belong to the fused kernel's end
    if how == "apart" and not normalises and not differentiates:
        return None
    first: list[Launch] = []
    dropped: set[str] = set()
    operands = dict(launch.operands)
    if normalises:
        first.append(_normalise(launch, g))
        operands["x"] = first[-1].outputs[0][1]
        dropped |= set(PROLOGUES[launch.prologue])
    if differentiates:
        first.append(_output_gradient(launch, g))
        operands["dz"] = first[-1].outputs[0][1]
        dropped |= set(GRADIENTS["bn_backward"])
    kept = tuple((role, slot) for role, slot in operands.items() if role not in dropped)
    sizes = tuple((role, size) for role, size in launch.sizes if role not in dropped)
    # A bias in front of BatchNorm has no gradient: the executor writes the zeros, a plain wgrad would not.
    outputs = tuple((role, slot) for role, slot in launch.outputs if not (differentiates and role == "dbias"))
    plain: dict[str, Any] = {"prologue": "identity", "x_slope": 0.0, "gradient": "identity"}
    plain |= {"x_eps": 0.0} if normalises else {}
    core = replace(launch, operands=kept, outputs=outputs, sizes=sizes, **plain)
    if how == "apart":
        return Pieces(tuple(first), core)
    return Pieces(tuple(first), core, _end(core))


def _end(core: Launch) -> Launch | None:
    """What is left behind a plain convolution of the same operands."""
    g = core.geometry
    assert isinstance(g, Geometry)
    if core.kind == "wgrad":
        return None
    if core.kind == "conv":
        roles = [(role, slot) for role, slot in core.operands if role in EPILOGUES[core.epilogue]]
        flat = _flat(g, g.K, g.P, g.Q)
        if not roles and core.activation == "identity" and core.epilogue != "stats":
            return None
    else:
        roles = [(role, slot) for role, slot in core.operands if role in DGRAD_EPILOGUES[core.epilogue]]
        flat = _flat(g, g.C, g.H, g.W)
        if not roles:
            return None
    end = replace(core, kind=f"{core.kind}_end", geometry=flat, operands=(("raw", "raw"), *roles))
    return _sized(end, flat)
