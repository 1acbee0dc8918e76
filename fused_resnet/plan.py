"""Chain -> launches, as data: what runs, in which order, what is kept for the backward.

Forward of a layer with given statistics, and of one with the batch's (design: docs/fusion.md, docs/training.md)::

    a_l = act(affine_l(conv_l(a_(l-1))))                     one launch, epilogue affine
    y_l = conv_l(act(bn_(l-1)(y_(l-1))))                     one launch, prologue bn_relu, epilogue stats: a_l is never written
    out = act(affine_L(conv_L(a_(L-1))) + shortcut)          the shortcut is added in conv_L's epilogue,
    out = act(bn_L(y_L) + shortcut)                          or, where statistics must be known first, by bn_add_relu
    out = T * act(bn_L(y_L)) + (1 - T) * shortcut            with a gate, T = sigmoid(conv_gate(x)): by gate

A BatchNorm in front of the first convolution, the chain's entry, is a layer 0 whose y_0 is x::

    y_1 = conv_1(act(bn_0(x)))                               the prologue, with given statistics or the batch's;
                                                             the batch's are made by a launch that reads x: statistics

A backward that wants z_l, in front of an activation behind given statistics (:meth:`.Chain.pre_activation`)::

    z_l = affine_l(conv_l(act(z_(l-1))))                     kept in the place of a_l: the next launch applies act on load
    out = act(z_L)                                           by bn_add_relu, z_L with the shortcut in it

Backward, given ``dout`` (``dz_l`` is the gradient behind the activation's mask, ``dy_l`` that behind the BatchNorm)::

    dz_L, sums   = bn_add_relu_backward(dout, out, y_L)
    dw_l         = wgrad(dy_l, a_(l-1))                      dy_l from dz_l, a_(l-1) from y_(l-1), both on load
    dz_(l-1)     = dgrad(dy_l, w_l) * act'                   and its sums, in the epilogue
    dx           = dgrad(dy_1, w_1) + shortcut's gradient

or, behind an entry, whose dz_0 and sums the dgrad of conv_1 makes as any other::

    dx           = output_gradient(dz_0, x) + shortcut's gradient

With a gate the first is ``dz_L, dt, dside, sums = gate_backward(dout, y_L, t, shortcut)``, and the gradient of the gate's
convolution is added to the shortcut's by its dgrad.

What is kept for the backward is not written down anywhere: it is what the backward's launches read and do not make.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from .chain import BUFFERS, UPDATED, Chain, Layer, Pool
from .launch import Geometry, HashedOnce, Launch, Pair, PoolGeometry, index_dtype, tensor_bytes

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


def _launch(
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


# --------------------------------------------------------------------------------------------------- what launches read


def _parameters(layer: Layer, *roles: str) -> list[Named]:
    """Those of a layer's parameters and buffers that have one of the ``roles``."""
    return [(role, layer.slot(role)) for role in layer.parameter_roles if role in roles]


def _statistics(layer: Layer, prefix: str) -> list[Named]:
    """The four vectors of BatchNorm; of one with given statistics ``var`` is one of them, in the place of ``invstd``."""
    of_batch = [("mean", layer.slot("batch_mean")), ("invstd", layer.slot("invstd"))]
    named = [*(of_batch if layer.batch else _parameters(layer, "mean", "var")), *_parameters(layer, "gamma", "beta")]
    return [(prefix + role, slot) for role, slot in named]


def _normalisation(layer: Layer) -> str:
    """The prologue that makes a layer's activation from its convolution's output."""
    return "bn" if layer.activation == "identity" else f"bn_{layer.activation}"


@dataclass(frozen=True)
class _Input:
    """How a launch reads the input of ``chain.layers[index]``: the slot, and what is applied to it on load."""

    slot: str
    prologue: str = "identity"
    vectors: tuple[Named, ...] = ()
    x_slope: float = 0.0
    x_eps: float = 0.0

    @staticmethod
    def behind(layer: Layer, y: str) -> _Input:
        """What a layer's BatchNorm and activation make of ``y``, on load."""
        x_eps = 0.0 if layer.batch else layer.eps
        return _Input(y, _normalisation(layer), tuple(_statistics(layer, "x_")), layer.slope, x_eps)

    @staticmethod
    def of_projection(chain: Chain) -> _Input:
        """Likewise of ``chain.projection``."""
        return _Input.of(chain, 0) if chain.projects_entry else _Input(chain.start)

    @staticmethod
    def of(chain: Chain, index: int, keep: Collection[str] | None = None) -> _Input:
        """``keep``: slots that a forward keeps; None in a backward, which has all it reads."""
        before = chain.before(index)
        if before is None:
            return _Input("x")
        if before is chain.entry:
            return _Input.behind(before, "x")
        if before.batch:
            return _Input.behind(before, chain.output_slot(index - 1))
        z = chain.pre_activation(index - 1)
        if z is not None and (keep is None or z in keep):
            return _Input(z, before.activation, (), before.slope)
        return _Input(chain.output_slot(index - 1))

    @property
    def operands(self) -> list[Named]:
        return [("x", self.slot), *self.vectors]

    @property
    def how(self) -> dict[str, Any]:
        """What a launch is told of it."""
        return {"prologue": self.prologue, "x_slope": self.x_slope, "x_eps": self.x_eps}


def _geometries(chain: Chain, n: int, h: int, w: int, skip: Pair | None = None) -> dict[str, Geometry]:
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
        start = (skip or _smallest((rows, columns), side)) if chain.skip else (h, w)
        sizes[side.name] = side.geometry(n, *start)
    return sizes


def _smallest(sides: Pair, window: Layer | Pool) -> Pair:
    """Rows and columns of the smallest input of a convolution or pooling whose output has these."""
    ends = zip(sides, window.kernel, window.stride, window.padding, window.dilation, strict=True)
    rows, columns = [max((side - 1) * s + d * (k - 1) + 1 - 2 * pad, 1) for side, k, s, pad, d in ends]
    return rows, columns


def _check(chain: Chain, sizes: dict[str, Geometry]) -> None:
    """Raise what PyTorch raises: where a layer's channels are not those it is given, or a batch has no variance; and where the
    shortcut does not fit (PyTorch would broadcast, or raise as well).
    """
    x_shape = sizes[chain.layers[0].name].x_shape
    given = [x_shape, *[sizes[layer.name].y_shape for layer in chain.layers[:-1]]]
    if chain.entry is not None:
        given.insert(0, x_shape)
    if chain.projection is not None:  # of the second input, where there is one
        given.append(sizes[chain.projection.name].x_shape if chain.skip else x_shape)
    for layer, shape in zip(chain.weight_layers, (*given, x_shape)):
        if layer.channels != shape[1]:
            raise RuntimeError(
                f"{layer.name}: given groups={layer.groups} and weight of size {list(sizes[layer.name].w_shape)}, expected "
                f"input of size {list(shape)} to have {layer.channels} channels, but got {shape[1]} channels instead"
            )
    for layer in chain.weight_layers:
        shape = sizes[layer.name].y_shape
        if layer.batch and not layer.group and shape[0] * shape[2] * shape[3] == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)} "
                f"in the BatchNorm behind {layer.name}"
            )
    if not chain.residual or (chain.skip and chain.projection is None):  # whose shape inputs.check has seen
        return
    side = x_shape if chain.projection is None else sizes[chain.projection.name].y_shape
    shape = sizes[chain.layers[-1].name].y_shape
    sides = {"shortcut": side} if chain.gate is None else {"shortcut": side, "gate": sizes[chain.gate.name].y_shape}
    for name, side in sides.items():
        if side != shape:
            raise RuntimeError(
                f"the {name} of shape {list(side)} does not match the block's output {list(shape)}: "
                "they meet element by element and must have the same shape"
            )


# --------------------------------------------------------------------------------------------------------------- forward


def _conv(
    layer: Layer,
    geometry: Geometry,
    dtype: torch.dtype,
    x: _Input,
    y: str,
    shortcut: str | None = None,
    activated: bool = False,
) -> list[Launch]:
    """A convolution; behind it, where ranks share the batch, the exchange of their statistics. Or the padding in its place.

    ``activated``: with the layer's activation, which statistics of the batch come in front of.
    """
    if not layer.weights:
        return [_launch("zero_pad", layer.name, geometry, dtype, x.operands, [("y", y)])]
    operands = [*x.operands, *((role, layer.slot(role)) for role in layer.parameter_roles if not layer.batch or role == "w")]
    epilogue = layer.epilogue
    if shortcut is not None:
        operands.append(("shortcut", shortcut))
        epilogue = "add" if epilogue == "store" else f"{epilogue}_add"
    how: dict[str, Any] = {**x.how, "eps": layer.eps}
    if not layer.batch:
        how |= {"epilogue": epilogue}
        how |= {"activation": layer.activation, "slope": layer.slope} if activated else {}
        return [_launch("conv", layer.name, geometry, dtype, operands, [("y", y)], **how)]
    operands += _parameters(layer, "bias")
    return _with_statistics("conv", layer, geometry, dtype, operands, [("y", y)], **how, epilogue="stats")


def _with_statistics(
    kind: str, layer: Layer, geometry: Geometry, dtype: torch.dtype, operands: list[Named], outputs: list[Named], **how: Any
) -> list[Launch]:
    """A launch that makes the batch's statistics of a layer besides; behind it, where ranks share the batch, their exchange."""
    running = _parameters(layer, *UPDATED)
    made = [("mean", layer.slot("batch_mean")), ("invstd", layer.slot("invstd"))]
    if not layer.group:
        how |= {"momentum": layer.momentum}
        return [_launch(kind, layer.name, geometry, dtype, [*operands, *running], [*outputs, *made], **how)]
    local = [("mean", layer.slot("local_mean")), ("var", layer.slot("local_var"))]
    own = _launch(kind, layer.name, geometry, dtype, operands, [*outputs, *local], **how)
    made.append(("count", layer.slot("count")))
    ends: dict[str, Any] = {"eps": layer.eps, "momentum": layer.momentum, "group": layer.group}
    return [own, _launch("sync_statistics", layer.name, geometry, dtype, [*local, *running], made, **ends)]


def _entry(chain: Chain, sizes: dict[str, Geometry], dtype: torch.dtype) -> list[Launch]:
    """The batch's statistics of the chain's own input, where a BatchNorm reads it that wants them."""
    layer = chain.entry
    if layer is None or not layer.batch:
        return []
    return _with_statistics("statistics", layer, sizes[layer.name], dtype, [("x", "x")], [], eps=layer.eps)


def _end_operands(chain: Chain, z: str | None = None) -> list[Named]:
    """What a launch at a block's end reads: the last convolution's output, the shortcut, and the statistics of both.

    ``z``: what is in front of the last activation, if it was kept; the shortcut is in it, unless a gate mixes it in.
    """
    last, side = chain.layers[-1], chain.projection
    operands = [("y", z or chain.output_slot(len(chain.layers) - 1))]
    if z is not None and chain.gate is None:
        return operands
    if last.batch:
        operands += _statistics(last, "")
    if chain.residual:
        operands.append(("shortcut", chain.shortcut_slot))
        if side is not None and side.batch:
            operands += _statistics(side, "shortcut_")
    return operands


def _gate(chain: Chain, geometry: Geometry, dtype: torch.dtype, z: str | None) -> Launch:
    """The end of a highway block. Behind given statistics the convolution has applied its activation, unless z is kept."""
    last = chain.layers[-1]
    how: dict[str, Any] = {"activation": last.activation, "slope": last.slope} if last.batch or z is not None else {}
    operands = [*_end_operands(chain, z), ("t", "t")]
    return _launch("gate", last.name, geometry, dtype, operands, [("out", "out")], **how)


def _bn_add_relu(chain: Chain, geometry: Geometry, dtype: torch.dtype, out: str) -> Launch:
    last = chain.layers[-1]
    how: dict[str, Any] = {"activation": last.activation, "slope": last.slope}
    return _launch(
        "bn_add_relu", last.name, geometry, dtype, _end_operands(chain, chain.pre_activation(-1)), [("out", out)], **how
    )


def _max_pool(chain: Chain, last: Geometry, dtype: torch.dtype, keep: tuple[str, ...]) -> Launch:
    assert chain.pool is not None
    layer, z = chain.layers[-1], chain.pre_activation(-1)
    geometry = chain.pool.geometry(last.N, last.P, last.Q, last.K)
    operands, outputs, prologue = [("x", chain.pooled_slot)], [("y", "out")], "identity"
    if chain.normalised_in_pool:
        prologue = _normalisation(layer)
        operands += _statistics(layer, "x_")
    elif z is not None and z in keep:
        prologue, operands = layer.activation, [("x", z)]
    if chain.normalised_in_pool or "indices" in keep:
        outputs.append(("indices", "indices"))
    x_slope = layer.slope if prologue != "identity" else 0.0
    return _launch("max_pool", "pool", geometry, dtype, operands, outputs, prologue=prologue, x_slope=x_slope)


@lru_cache(maxsize=4096)
def forward_plan(
    chain: Chain,
    n: int,
    h: int,
    w: int,
    dtype: torch.dtype,
    keep: tuple[str, ...] = (),
    donated: tuple[str, ...] = (),
    skip: Pair | None = None,
) -> Plan:
    """Launches of a chain's forward.

    Args:
        chain: what to compute.
        n, h, w: images, rows and columns of the input.
        dtype: element type of activations and filters.
        keep: slots that the backward will read.
        donated: inputs that may be written over.
        skip: rows and columns of the second input, of a chain that has one; by default the smallest that fit.

    Raises:
        RuntimeError: a layer's output would be empty, its channels are not those it is given, or the shortcut does not fit.
        ValueError: a BatchNorm in training has one value a channel.
    """
    sizes = _geometries(chain, n, h, w, skip)
    _check(chain, sizes)
    launches = _entry(chain, sizes, dtype)
    side = chain.projection
    for index, layer in enumerate(chain.layers):
        shortcut = None
        late = index == len(chain.layers) - 1 and chain.normalised_late
        if index == len(chain.layers) - 1 and chain.residual:
            shortcut = None if late or chain.gate is not None else chain.shortcut_slot
            if side is not None:
                launches += _conv(side, sizes[side.name], dtype, _Input.of_projection(chain), "yd")
        z = chain.pre_activation(index)
        held = z is not None and z in keep
        y = z if z is not None and held else chain.output_slot(index)
        x = _Input.of(chain, index, keep)
        launches += _conv(layer, sizes[layer.name], dtype, x, y, shortcut, activated=not late and not held)
    last = sizes[chain.layers[-1].name]
    if chain.gate is not None:
        launches += _conv(chain.gate, sizes[chain.gate.name], dtype, _Input("x"), "t")
        launches.append(_gate(chain, last, dtype, z if held else None))
    elif chain.normalised_late or (held and chain.pool is None):
        launches.append(_bn_add_relu(chain, last, dtype, "out" if chain.pool is None else chain.pooled_slot))
    if chain.pool is not None:
        launches.append(_max_pool(chain, last, dtype, keep))
    return Plan(tuple(launches), ("out",), keep, donated)


def droppable(chain: Chain) -> bool:
    """Whether ``out`` can be made again by its last launch alone, from what the backward keeps besides."""
    return chain.residual and chain.pool is None and (chain.normalised_late or chain.gate is not None)


@lru_cache(maxsize=4096)
def rebuild_plan(chain: Chain, n: int, h: int, w: int, dtype: torch.dtype, skip: Pair | None = None) -> Plan:
    """Launches that make ``out`` again, of a chain that is :func:`droppable`; with what they read that was not kept either.

    What the backward reads of it is kept too, so that nothing is computed a third time.
    """
    sizes = _geometries(chain, n, h, w, skip)
    launches = _again(chain, sizes, dtype)
    side, last = chain.projection, sizes[chain.layers[-1].name]
    if side is not None and not side.weights:
        launches += _conv(side, sizes[side.name], dtype, _Input(chain.start), "yd")
    gated = chain.gate is not None
    launches.append(_gate(chain, last, dtype, chain.pre_activation(-1)) if gated else _bn_add_relu(chain, last, dtype, "out"))
    made = tuple(slot for launch in launches for _, slot in launch.outputs if slot != "out")
    return Plan(tuple(launches), ("out",), made)


# -------------------------------------------------------------------------------------------------------------- backward


def _gradient(layer: Layer, y: str, total: str) -> tuple[str, list[Named]]:
    """How the gradient behind a layer's convolution follows from dz: a key of ``GRADIENTS``, and what is read for it."""
    if not layer.norm:
        return "identity", []
    if not layer.batch:
        return "scale", _parameters(layer, "gamma", "var")
    operands = [("y", y), ("mean", layer.slot("batch_mean")), ("invstd", layer.slot("invstd")), *_parameters(layer, "gamma")]
    if not layer.group:
        return "bn_backward", [*operands, ("sum", total), ("dot", layer.slot("dot"))]
    shared = [("sum", layer.slot("all_sum")), ("dot", layer.slot("all_dot")), ("count", layer.slot("count"))]
    return "bn_backward", [*operands, *shared]


def _sync_sums(layer: Layer, geometry: Geometry, dtype: torch.dtype, total: str) -> list[Launch]:
    """Where ranks share the batch: the exchange of the sums that the gradient behind the BatchNorm depends on."""
    if not layer.group:
        return []
    operands = [("sum", total), ("dot", layer.slot("dot"))]
    outputs = [("sum", layer.slot("all_sum")), ("dot", layer.slot("all_dot"))]
    return [_launch("sync_sums", layer.name, geometry, dtype, operands, outputs, group=layer.group)]


def _wgrad(
    layer: Layer, geometry: Geometry, dtype: torch.dtype, x: _Input, y: str, dz: str, total: str, needs: frozenset[str]
) -> list[Launch]:
    """Gradients of a layer's parameters, those that are needed and that no other launch makes."""
    made = ("w", "bias") if layer.batch else ("w", "bias", "gamma", "beta")
    wanted = [role for role in made if layer.slot(role) in needs]
    if not wanted:
        return []
    gradient, vectors = _gradient(layer, y, total)
    contracts = "w" in wanted or "gamma" in wanted
    operands = [("dz", dz)]
    if contracts:
        operands += x.operands
    if layer.batch:
        operands += vectors if contracts else []
    else:
        operands += [("sum", total)] if layer.norm or layer.bias else []
        operands += [("w", layer.slot("w"))] if contracts else []
        operands += _parameters(layer, "bias", "gamma", "mean", "var")
    outputs = [(f"d{role}", f"d.{layer.slot(role)}") for role in wanted]
    ends: dict[str, Any] = {**(x.how if contracts else {}), "gradient": gradient, "eps": layer.eps}
    return [_launch("wgrad", layer.name, geometry, dtype, operands, outputs, **ends)]


def _dgrad(
    layer: Layer,
    geometry: Geometry,
    dtype: torch.dtype,
    y: str,
    dz: str,
    total: str,
    result: str,
    before: Layer | None = None,
    x: _Input | None = None,
    shortcut_gradient: str | None = None,
) -> Launch:
    """Gradient of a layer's input; where there is a layer ``before``, in front of its activation, with the sums."""
    if not layer.weights:
        return _launch("zero_pad_backward", layer.name, geometry, dtype, [("dz", dz)], [("dx", result)])
    gradient, vectors = _gradient(layer, y, total)
    operands = [("dz", dz), ("w", layer.slot("w")), *vectors]
    outputs = [("dx", result)]
    epilogue, activation, slope, x_eps = "store", "identity", 0.0, 0.0
    if before is not None and x is not None:
        activation, slope, x_eps = before.activation, before.slope, x.x_eps
        outputs.append(("sum_previous", f"{result}.sum"))
        if x.vectors:
            epilogue = "bn_mask"
            operands += x.operands
            outputs.append(("dot_previous", before.slot("dot")))
        else:
            epilogue = "mask"
            operands.append(("a_previous" if before.masked_by_output else "z_previous", x.slot))
    if shortcut_gradient is not None:
        operands.append(("dshortcut", shortcut_gradient))
    ends: dict[str, Any] = {"gradient": gradient, "epilogue": epilogue, "eps": layer.eps}
    ends |= {"activation": activation, "slope": slope, "x_eps": x_eps}
    return _launch("dgrad", layer.name, geometry, dtype, operands, outputs, **ends)


def _behind_pool(chain: Chain, last: Geometry, dtype: torch.dtype) -> Launch:
    """Gradient of the pooling; where the activation was in its prologue, in front of that, with the sums."""
    assert chain.pool is not None
    layer, z = chain.layers[-1], chain.pre_activation(-1)
    geometry = chain.pool.geometry(last.N, last.P, last.Q, last.K)
    if not chain.activated_in_pool:
        operands = [("dy", "dout"), ("x", chain.pooled_slot)]
        return _launch("max_pool_backward", "pool", geometry, dtype, operands, [("dx", "d.pool")])
    operands = [("dy", "dout"), ("x", chain.pooled_slot if z is None else z), ("indices", "indices")]
    outputs = [("dx", "dz"), ("sum", "dz.sum")]
    if layer.batch:
        operands += _statistics(layer, "x_")
        outputs.append(("dot", layer.slot("dot")))
    if layer.activation != "identity" and layer.masked_by_output:
        operands.append(("out", "out"))  # of what the pooling chose: its mask without normalising all of x again
    ends: dict[str, Any] = {"activation": layer.activation, "slope": layer.slope}
    return _launch("max_pool_backward", "pool", geometry, dtype, operands, outputs, **ends)


def _bn_add_relu_backward(chain: Chain, geometry: Geometry, dtype: torch.dtype, dout: str, out: str) -> Launch:
    """The gradient in front of the last activation, and its sums. Without an activation it is ``dout`` itself.

    From the activation's output where that suffices, else from its input, added up again.
    gamma is for executors that make the gradient behind the BatchNorm on the way.
    """
    last, side = chain.layers[-1], chain.projection
    operands, outputs = [("dout", dout)], []
    if last.activation != "identity":
        outputs.append(("dz", "dz"))
        operands += [("out", out)] if last.masked_by_output else _end_operands(chain, chain.pre_activation(-1))
    outputs.append(("sum", "dz.sum"))
    if last.batch:
        if last.masked_by_output:
            operands += [("y", chain.output_slot(len(chain.layers) - 1)), *_statistics(last, "")[:3]]
        outputs.append(("dot", last.slot("dot")))
    if side is not None and side.batch:
        if last.masked_by_output:
            operands += [("shortcut", "yd"), *_statistics(side, "shortcut_")[:3]]
        outputs.append(("shortcut_dot", side.slot("dot")))
    ends: dict[str, Any] = {"activation": last.activation, "slope": last.slope}
    return _launch("bn_add_relu_backward", last.name, geometry, dtype, operands, outputs, **ends)


def _gate_backward(chain: Chain, geometry: Geometry, dtype: torch.dtype) -> Launch:
    """Gradients in front of the last activation, of the gate in front of its sigmoid, and of the shortcut; their sums."""
    last, side = chain.layers[-1], chain.projection
    outputs = [("dz", "dz"), ("sum", "dz.sum"), ("dt", "dt"), ("dt_sum", "dt.sum"), ("dside", "dside")]
    if last.batch:
        outputs.append(("dot", last.slot("dot")))
    if side is not None and side.weights:
        outputs.append(("dside_sum", "dside.sum"))
        if side.batch:
            outputs.append(("shortcut_dot", side.slot("dot")))
    operands = [("dout", "dout"), *_end_operands(chain, chain.pre_activation(-1)), ("t", "t")]
    ends: dict[str, Any] = {"activation": last.activation, "slope": last.slope}
    return _launch("gate_backward", last.name, geometry, dtype, operands, outputs, **ends)


def _again(chain: Chain, sizes: dict[str, Geometry], dtype: torch.dtype) -> list[Launch]:
    """With ``memory="low"``: the convolutions whose outputs were not kept."""
    if chain.memory != "low":
        return []
    index, side = len(chain.layers) - 1, chain.projection
    last = chain.layers[-1]

    def conv(layer: Layer, x: _Input, y: str, shortcut: str | None = None) -> list[Launch]:
        if not layer.batch:  # only where the last activation is differentiated at its input
            return [] if last.masked_by_output else _conv(layer, sizes[layer.name], dtype, x, y, shortcut)
        operands = [*x.operands, *_parameters(layer, "w", "bias")]
        ends: dict[str, Any] = {**x.how, "epilogue": "bias" if layer.bias else "store"}
        return [_launch("conv", layer.name, sizes[layer.name], dtype, operands, [("y", y)], **ends)]

    launches = [] if side is None else conv(side, _Input.of_projection(chain), "yd")
    shortcut = None
    if chain.residual and not chain.normalised_late and chain.gate is None:
        shortcut = chain.shortcut_slot
    launches += conv(last, _Input.of(chain, index), chain.pre_activation(index) or chain.output_slot(index), shortcut)
    if chain.gate is not None:
        launches += _conv(chain.gate, sizes[chain.gate.name], dtype, _Input("x"), "t")
    return launches


def _wanted(chain: Chain, index: int, needs: frozenset[str]) -> bool:
    """Whether a gradient is wanted of what ``layers[index]`` reads, or of what that is made of."""
    earlier = [layer for layer in (chain.entry, *chain.layers[:index]) if layer is not None]
    return "x" in needs or any(layer.slot(role) in needs for layer in earlier for role in layer.parameter_roles)


def _through_entry(
    entry: Layer,
    geometry: Geometry,
    dtype: torch.dtype,
    dz: str,
    total: str,
    needs: frozenset[str],
    shortcut_gradient: str | None,
) -> list[Launch]:
    """From the gradient behind the BatchNorm of a chain's entry to that of the chain's input, with the shortcut's."""
    launches = _sync_sums(entry, geometry, dtype, total)
    if "x" not in needs:
        return launches
    gradient, vectors = _gradient(entry, "x", total)
    operands = [("dz", dz), *vectors, *([("dshortcut", shortcut_gradient)] if shortcut_gradient is not None else [])]
    ends: dict[str, Any] = {"gradient": gradient, "eps": entry.eps}
    return [*launches, _launch("output_gradient", entry.name, geometry, dtype, operands, [("dy", "d.x")], **ends)]


@lru_cache(maxsize=4096)
def backward_plan(
    chain: Chain, n: int, h: int, w: int, dtype: torch.dtype, needs: frozenset[str], skip: Pair | None = None
) -> Plan:
    """Launches of a chain's backward.

    Args:
        needs: slots (inputs and parameters) whose gradient is wanted; nothing else is computed.
        skip: as :func:`forward_plan`'s.

    Reads ``dout`` and what the forward kept; the gradient of slot ``s`` is in slot ``d.s``.
    """
    sizes = _geometries(chain, n, h, w, skip)
    launches = _again(chain, sizes, dtype)
    last, side = chain.layers[-1], chain.projection
    geometry = sizes[last.name]
    dz, total, behind, out = "dz", "dz.sum", "dout", "out"
    if chain.pool is not None:
        launches.append(_behind_pool(chain, geometry, dtype))
        behind, out = "d.pool", chain.pooled_slot
    if chain.gate is not None:
        launches.append(_gate_backward(chain, geometry, dtype))
    elif not chain.activated_in_pool:
        summed = [layer for layer in (last, side) if layer is not None and (layer.norm or layer.bias)]
        if last.activation != "identity" or summed:  # else dz is what comes in, and nobody wants its sum
            launches.append(_bn_add_relu_backward(chain, geometry, dtype, behind, out))
        dz = "dz" if last.activation != "identity" else behind

    aliases: list[Named] = []

    def sums_of(layer: Layer, total: str) -> None:
        """BatchNorm's own gradients are the sums: dgamma = sum(dz * xhat), dbeta = sum(dz)."""
        aliases.extend((f"d.{layer.slot('gamma')}", layer.slot("dot")) for _ in range(layer.slot("gamma") in needs))
        aliases.extend((f"d.{layer.slot('beta')}", total) for _ in range(layer.slot("beta") in needs))

    side_gradient: str | None = dz if chain.residual else None
    side_total = total
    if chain.gate is not None:
        side_gradient, side_total = "dside", "dside.sum"
    if side is not None and side_gradient is not None:
        g, behind_side = sizes[side.name], side_gradient
        if side.batch:
            sums_of(side, side_total)
            launches += _sync_sums(side, g, dtype, side_total)
        launches += _wgrad(side, g, dtype, _Input.of_projection(chain), "yd", behind_side, side_total, needs)
        if chain.start in needs or (chain.projects_entry and _wanted(chain, 0, needs)):
            side_gradient = "d.shortcut"
            launches.append(_dgrad(side, g, dtype, "yd", behind_side, side_total, side_gradient))
    if chain.skip:  # a gradient by itself, not a part of that of x
        aliases.extend(("d.skip", slot) for slot in (side_gradient,) if slot is not None and "skip" in needs)
        side_gradient = None
    if chain.gate is not None:
        g = sizes[chain.gate.name]
        launches += _wgrad(chain.gate, g, dtype, _Input("x"), "t", "dt", "dt.sum", needs)
        if "x" in needs:
            launches.append(_dgrad(chain.gate, g, dtype, "t", "dt", "dt.sum", "d.gate", shortcut_gradient=side_gradient))
            side_gradient = "d.gate"

    for index in range(len(chain.layers) - 1, -1, -1):
        layer, g = chain.layers[index], sizes[chain.layers[index].name]
        x, y = _Input.of(chain, index), chain.output_slot(index)
        if layer.batch:
            sums_of(layer, total)
            launches += _sync_sums(layer, g, dtype, total)
        launches += _wgrad(layer, g, dtype, x, y, dz, total, needs)
        before = chain.before(index)
        if not _wanted(chain, index, needs):
            break
        if before is None:
            launches.append(_dgrad(layer, g, dtype, y, dz, total, "d.x", shortcut_gradient=side_gradient))
            break
        result = f"dz{index}"
        beside = side_gradient if index == 0 and chain.projects_entry else None
        launches.append(_dgrad(layer, g, dtype, y, dz, total, result, before, x, beside))
        dz, total = result, f"{result}.sum"
        if before is chain.entry:
            sums_of(before, total)
            launches += _through_entry(before, sizes[before.name], dtype, dz, total, needs, None if beside else side_gradient)
    results = tuple(f"d.{slot}" for slot in ("x", *chain.operand_slots) if slot in needs)
    return Plan(tuple(launches), results, aliases=tuple(aliases))


# ------------------------------------------------------------------------------------------------------- what is kept


@lru_cache(maxsize=1024)
def nominal_size(chain: Chain) -> tuple[int, int, int]:
    """``(n, h, w)`` of a small image that the chain accepts: for what does not depend on sizes."""
    sides = (8, 8)
    windows: list[Layer | Pool] = [*chain.layers, *([] if chain.pool is None else [chain.pool])]
    for window in reversed(windows):
        sides = _smallest(sides, window)
    return 1, *sides


@lru_cache(maxsize=4096)
def saved_slots(chain: Chain, needs: frozenset[str]) -> tuple[str, ...]:
    """Slots that must outlive the forward so that :func:`backward_plan` can run: all it reads, except ``dout``."""
    plan = backward_plan(chain, *nominal_size(chain), torch.float32, needs)
    return tuple(slot for slot in plan.reads() if slot != "dout")


@lru_cache(maxsize=4096)
def remembered_slots(chain: Chain, needs: frozenset[str], drop: bool) -> tuple[str, ...]:
    """:func:`saved_slots`; or, to ``drop`` the output, what the backward and :func:`rebuild_plan` read without it."""
    saved = saved_slots(chain, needs)
    if not drop:
        return saved
    reads = rebuild_plan(chain, *nominal_size(chain), torch.float32).reads()
    return tuple(slot for slot in dict.fromkeys((*saved, *reads)) if slot != "out")


@lru_cache(maxsize=4096)
def kept_slots(chain: Chain, needs: frozenset[str], drop: bool = False) -> tuple[str, ...]:
    """The part of :func:`remembered_slots` that the forward makes on its way to ``out``."""
    inputs = {"x", "out", *chain.operand_slots}
    return tuple(slot for slot in remembered_slots(chain, needs, drop) if slot not in inputs)


def trainable_slots(chain: Chain) -> frozenset[str]:
    """The inputs and all parameters: what gradients can be wanted of."""
    return frozenset(
        (
            *chain.inputs,
            *(layer.slot(role) for layer in chain.weight_layers for role in layer.parameter_roles if role not in BUFFERS),
        )
    )
