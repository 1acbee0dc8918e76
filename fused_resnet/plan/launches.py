"""What plans are made of: launches in order, what each reads and how, and the sizes of a chain's layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..chain import UPDATED, Chain, Layer, Pool
from ..launch import Geometry, HashedOnce, Launch, Pair, PoolGeometry, index_dtype, tensor_bytes

#: ``(role, slot)``: what a launch calls a tensor, what the plan calls it.
Named = tuple[str, str]


@dataclass(frozen=True)
class Plan(HashedOnce):
    """Launches in order, the slot that holds the result, and the slots that must outlive the plan.

    Attributes:
        launches: what runs.
        results: slots handed back (``out``, or gradients).
        keep: further slots that stay alive (saved for the backward).
        donated: slots read that the caller gives up: they may be written over after their last use.
        aliases: ``(result, slot)``: results that are what a launch calls otherwise (dbeta is the sum of dz).
    """

    launches: tuple[Launch, ...]
    results: tuple[str, ...]
    keep: tuple[str, ...] = ()
    donated: tuple[str, ...] = ()
    aliases: tuple[Named, ...] = ()

    def __hash__(self) -> int:
        return self.hash

    @property
    def flops(self) -> int:
        """Floating-point operations of all launches."""
        return sum(launch.flops for launch in self.launches)

    @property
    def bytes(self) -> int:
        """Algorithmic bytes of all launches (each operand read once, each output written once)."""
        return sum(launch.bytes for launch in self.launches)

    @cached_property
    def dead_after(self) -> tuple[frozenset[str], ...]:
        """For each launch the slots made here, or donated, that nothing reads afterwards: their memory may be written over."""
        live = {*self.results, *self.keep, *(slot for _, slot in self.aliases)}
        made = {slot for launch in self.launches for _, slot in launch.outputs}.union(self.donated)
        dead: list[frozenset[str]] = []
        for launch in reversed(self.launches):
            read = {slot for _, slot in launch.operands}
            dead.append(frozenset((read & made) - live))
            live |= read
        return tuple(reversed(dead))

    @cached_property
    def last_read(self) -> tuple[frozenset[str], ...]:
        """For each launch the slots that nothing reads afterwards."""
        later: set[str] = set()
        found: list[frozenset[str]] = []
        for launch in reversed(self.launches):
            read = {slot for _, slot in launch.operands}
            found.append(frozenset(read - later))
            later |= read
        return tuple(reversed(found))

    @cached_property
    def updated(self) -> tuple[str, ...]:
        """Slots read that the launches update in place: running statistics."""
        return tuple(slot for launch in self.launches for role, slot in launch.operands if role in UPDATED)

    def reads(self) -> tuple[str, ...]:
        """Slots the plan reads and does not make, in order of first use."""
        made = {slot for launch in self.launches for _, slot in launch.outputs}
        return tuple(dict.fromkeys(slot for launch in self.launches for _, slot in launch.operands if slot not in made))


_LIKE_INPUT = frozenset(("x", "dx", "a_previous", "z_previous", "dshortcut"))
_LIKE_OUTPUT = frozenset(("y", "shortcut", "dz", "out", "dout", "dy", "t", "dt", "dside"))


def _operand_bytes(role: str, geometry: Geometry | PoolGeometry, dtype: torch.dtype) -> int:
    """Bytes of an operand or result by its role. Per-filter and per-channel vectors are counted in fp32."""
    if role in _LIKE_INPUT:
        return tensor_bytes(geometry.x_shape, dtype)
    if role in _LIKE_OUTPUT:
        return tensor_bytes(geometry.y_shape, dtype)
    if role == "indices" and isinstance(geometry, PoolGeometry):
        return tensor_bytes(geometry.y_shape, index_dtype(geometry.kernel))
    if role in ("batches", "count"):
        return 8
    if role in ("w", "dw") and isinstance(geometry, Geometry):
        return tensor_bytes(geometry.w_shape, dtype)
    of_input = role.startswith("x_") or role.endswith("_previous")
    return tensor_bytes((geometry.x_shape[1] if of_input else geometry.y_shape[1],), torch.float32)


def new_launch(
    kind: str,
    name: str,
    geometry: Geometry | PoolGeometry,
    dtype: torch.dtype,
    operands: Sequence[Named],
    outputs: Sequence[Named],
    *,
    prologue: str = "identity",
    gradient: str = "identity",
    epilogue: str = "store",
    activation: str = "identity",
    eps: float = 0.0,
    momentum: float | None = 0.0,
    group: str = "",
    slope: float = 0.0,
    x_slope: float = 0.0,
    x_eps: float = 0.0,
) -> Launch:
    sizes = tuple((role, _operand_bytes(role, geometry, dtype)) for role, _ in (*operands, *outputs))
    ends = (prologue, gradient, epilogue, activation, eps, momentum, group, slope, x_slope, x_eps, sizes)
    return Launch(kind, name, geometry, dtype, tuple(operands), tuple(outputs), *ends)


def parameters_of(layer: Layer, *roles: str) -> list[Named]:
    """Those of a layer's parameters and buffers that have one of the ``roles``."""
    return [(role, layer.slot(role)) for role in layer.parameter_roles if role in roles]


def statistics_of(layer: Layer, prefix: str) -> list[Named]:
    """The four vectors of BatchNorm; of one with given statistics ``var`` is one of them, in the place of ``invstd``."""
    of_batch = [("mean", layer.slot("batch_mean")), ("invstd", layer.slot("invstd"))]
    named = [*(of_batch if layer.batch else parameters_of(layer, "mean", "var")), *parameters_of(layer, "gamma", "beta")]
    return [(prefix + role, slot) for role, slot in named]


def normalisation(layer: Layer) -> str:
    """The prologue that makes a layer's activation from its convolution's output."""
    return "bn" if layer.activation == "identity" else f"bn_{layer.activation}"


@dataclass(frozen=True)
class Input:
    """How a launch reads the input of ``chain.layers[index]``: the slot, and what is applied to it on load."""

    slot: str
    prologue: str = "identity"
    vectors: tuple[Named, ...] = ()
    x_slope: float = 0.0
    x_eps: float = 0.0

    @staticmethod
    def behind(layer: Layer, y: str) -> Input:
        """What a layer's BatchNorm and activation make of ``y``, on load."""
        x_eps = 0.0 if layer.batch else layer.eps
        return Input(y, normalisation(layer), tuple(statistics_of(layer, "x_")), layer.slope, x_eps)

    @staticmethod
    def of_projection(chain: Chain) -> Input:
        """Likewise of ``chain.projection``."""
        return Input.of(chain, 0) if chain.projects_entry else Input(chain.start)

    @staticmethod
    def of(chain: Chain, index: int, keep: Collection[str] | None = None) -> Input:
        """``keep``: slots that a forward keeps; None in a backward, which has all it reads."""
        before = chain.before(index)
        if before is None:
            return Input("x")
        if before is chain.entry:
            return Input.behind(before, "x")
        if before.batch:
            return Input.behind(before, chain.output_slot(index - 1))
        z = chain.pre_activation(index - 1)
        if z is not None and (keep is None or z in keep):
            return Input(z, before.activation, (), before.slope)
        return Input(chain.output_slot(index - 1))

    @property
    def operands(self) -> list[Named]:
        return [("x", self.slot), *self.vectors]

    @property
    def how(self) -> dict[str, Any]:
        """What a launch is told of it."""
        return {"prologue": self.prologue, "x_slope": self.x_slope, "x_eps": self.x_eps}


def geometries(chain: Chain, n: int, h: int, w: int, skip: Pair | None = None) -> dict[str, Geometry]:
    """The geometry of each weight layer by its name, given the chain's input size; ``skip``: rows and columns of its second."""
    sizes = {}
    rows, columns = h, w
    if chain.entry is not None:
        sizes[chain.entry.name] = chain.entry.geometry(n, h, w)
    for layer in chain.layers:
        sizes[layer.name] = layer.geometry(n, rows, columns)
        rows, columns = sizes[layer.name].P, sizes[layer.name].Q
    if chain.gate is not None:
        sizes[chain.gate.name] = chain.gate.geometry(n, h, w)
    side = chain.projection
    if side is not None:
        start = (skip or smallest((rows, columns), side)) if chain.skip else (h, w)
        sizes[side.name] = side.geometry(n, *start)
    return sizes


def smallest(sides: Pair, window: Layer | Pool) -> Pair:
    """Rows and columns of the smallest input of a convolution or pooling whose output has these."""
    ends = zip(sides, window.kernel, window.stride, window.padding, window.dilation, strict=True)
    rows, columns = [max((side - 1) * s + d * (k - 1) + 1 - 2 * pad, 1) for side, k, s, pad, d in ends]
    return rows, columns
