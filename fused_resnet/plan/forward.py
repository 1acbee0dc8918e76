"""The launches of a forward, and those that make again what it did not keep."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..chain import UPDATED, Chain, Layer
from ..launch import Geometry, Launch, Pair
from .launches import Input, Named, Plan, geometries, new_launch, normalisation, parameters_of, statistics_of


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


def _conv(
    layer: Layer,
    geometry: Geometry,
    dtype: torch.dtype,
    x: Input,
    y: str,
    shortcut: str | None = None,
    activated: bool = False,
) -> list[Launch]:
    """A convolution; behind it, where ranks share the batch, the exchange of their statistics. Or the padding in its place.

    ``activated``: with the layer's activation, which statistics of the batch come in front of.
    """
    if not layer.weights:
        return [new_launch("zero_pad", layer.name, geometry, dtype, x.operands, [("y", y)])]
    operands = [*x.operands, *((role, layer.slot(role)) for role in layer.parameter_roles if not layer.batch or role == "w")]
    epilogue = layer.epilogue
    if shortcut is not None:
        operands.append(("shortcut", shortcut))
        epilogue = "add" if epilogue == "store" else f"{epilogue}_add"
    how: dict[str, Any] = {**x.how, "eps": layer.eps}
    if not layer.batch:
        how |= {"epilogue": epilogue}
        how |= {"activation": layer.activation, "slope": layer.slope} if activated else {}
        return [new_launch("conv", layer.name, geometry, dtype, operands, [("y", y)], **how)]
    operands += parameters_of(layer, "bias")
    return _with_statistics("conv", layer, geometry, dtype, operands, [("y", y)], **how, epilogue="stats")


def _with_statistics(
    kind: str, layer: Layer, geometry: Geometry, dtype: torch.dtype, operands: list[Named], outputs: list[Named], **how: Any
) -> list[Launch]:
    """A launch that makes the batch's statistics of a layer besides; behind it, where ranks share the batch, their exchange."""
    running = parameters_of(layer, *UPDATED)
    made = [("mean", layer.slot("batch_mean")), ("invstd", layer.slot("invstd"))]
    if not layer.group:
        how |= {"momentum": layer.momentum}
        return [new_launch(kind, layer.name, geometry, dtype, [*operands, *running], [*outputs, *made], **how)]
    local = [("mean", layer.slot("local_mean")), ("var", layer.slot("local_var"))]
    own = new_launch(kind, layer.name, geometry, dtype, operands, [*outputs, *local], **how)
    made.append(("count", layer.slot("count")))
    ends: dict[str, Any] = {"eps": layer.eps, "momentum": layer.momentum, "group": layer.group}
    return [own, new_launch("sync_statistics", layer.name, geometry, dtype, [*local, *running], made, **ends)]


def _entry(chain: Chain, sizes: dict[str, Geometry], dtype: torch.dtype) -> list[Launch]:
    """The batch's statistics of the chain's own input, where a BatchNorm reads it that wants them."""
    layer = chain.entry
    if layer is None or not layer.batch:
        return []
    return _with_statistics("statistics", layer, sizes[layer.name], dtype, [("x", "x")], [], eps=layer.eps)


def end_operands(chain: Chain, z: str | None = None) -> list[Named]:
    """What a launch at a block's end reads: the last convolution's output, the shortcut, and the statistics of both.

    ``z``: what is in front of the last activation, if it was kept; the shortcut is in it, unless a gate mixes it in.
    """
    last, side = chain.layers[-1], chain.projection
    operands = [("y", z or chain.output_slot(len(chain.layers) - 1))]
    if z is not None and chain.gate is None:
        return operands
    if last.batch:
        operands += statistics_of(last, "")
    if chain.residual:
        operands.append(("shortcut", chain.shortcut_slot))
        if side is not None and side.batch:
            operands += statistics_of(side, "shortcut_")
    return operands


def _gate(chain: Chain, geometry: Geometry, dtype: torch.dtype, z: str | None) -> Launch:
    """The end of a highway block. Behind given statistics the convolution has applied its activation, unless z is kept."""
    last = chain.layers[-1]
    how: dict[str, Any] = {"activation": last.activation, "slope": last.slope} if last.batch or z is not None else {}
    operands = [*end_operands(chain, z), ("t", "t")]
    return new_launch("gate", last.name, geometry, dtype, operands, [("out", "out")], **how)


def _bn_add_relu(chain: Chain, geometry: Geometry, dtype: torch.dtype, out: str) -> Launch:
    last = chain.layers[-1]
    how: dict[str, Any] = {"activation": last.activation, "slope": last.slope}
    return new_launch(
        "bn_add_relu", last.name, geometry, dtype, end_operands(chain, chain.pre_activation(-1)), [("out", out)], **how
    )


def _max_pool(chain: Chain, last: Geometry, dtype: torch.dtype, keep: tuple[str, ...]) -> Launch:
    assert chain.pool is not None
    layer, z = chain.layers[-1], chain.pre_activation(-1)
    geometry = chain.pool.geometry(last.N, last.P, last.Q, last.K)
    operands, outputs, prologue = [("x", chain.pooled_slot)], [("y", "out")], "identity"
    if chain.normalised_in_pool:
        prologue = normalisation(layer)
        operands += statistics_of(layer, "x_")
    elif z is not None and z in keep:
        prologue, operands = layer.activation, [("x", z)]
    if chain.normalised_in_pool or "indices" in keep:
        outputs.append(("indices", "indices"))
    x_slope = layer.slope if prologue != "identity" else 0.0
    return new_launch("max_pool", "pool", geometry, dtype, operands, outputs, prologue=prologue, x_slope=x_slope)


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
    sizes = geometries(chain, n, h, w, skip)
    _check(chain, sizes)
    launches = _entry(chain, sizes, dtype)
    side = chain.projection
    for index, layer in enumerate(chain.layers):
        shortcut = None
        late = index == len(chain.layers) - 1 and chain.normalised_late
        if index == len(chain.layers) - 1 and chain.residual:
            shortcut = None if late or chain.gate is not None else chain.shortcut_slot
            if side is not None:
                launches += _conv(side, sizes[side.name], dtype, Input.of_projection(chain), "yd")
        z = chain.pre_activation(index)
        held = z is not None and z in keep
        y = z if z is not None and held else chain.output_slot(index)
        x = Input.of(chain, index, keep)
        launches += _conv(layer, sizes[layer.name], dtype, x, y, shortcut, activated=not late and not held)
    last = sizes[chain.layers[-1].name]
    if chain.gate is not None:
        launches += _conv(chain.gate, sizes[chain.gate.name], dtype, Input("x"), "t")
        launches.append(_gate(chain, last, dtype, z if held else None))
    elif chain.normalised_late or (held and chain.pool is None):
        launches.append(_bn_add_relu(chain, last, dtype, "out" if chain.pool is None else chain.pooled_slot))
    if chain.pool is not None:
        launches.append(_max_pool(chain, last, dtype, keep))
    return Plan(tuple(launches), ("out",), keep, donated)


def again(chain: Chain, sizes: dict[str, Geometry], dtype: torch.dtype) -> list[Launch]:
    """With ``memory="low"``: the convolutions whose outputs were not kept."""
    if chain.memory != "low":
        return []
    index, side = len(chain.layers) - 1, chain.projection
    last = chain.layers[-1]

    def conv(layer: Layer, x: Input, y: str, shortcut: str | None = None) -> list[Launch]:
        if not layer.batch:  # only where the last activation is differentiated at its input
            return [] if chain.masked_by_output else _conv(layer, sizes[layer.name], dtype, x, y, shortcut)
        operands = [*x.operands, *parameters_of(layer, "w", "bias")]
        ends: dict[str, Any] = {**x.how, "epilogue": "bias" if layer.bias else "store"}
        return [new_launch("conv", layer.name, sizes[layer.name], dtype, operands, [("y", y)], **ends)]

    launches = [] if side is None else conv(side, Input.of_projection(chain), "yd")
    shortcut = None
    if chain.residual and not chain.normalised_late and chain.gate is None:
        shortcut = chain.shortcut_slot
    launches += conv(last, Input.of(chain, index), chain.pre_activation(index) or chain.output_slot(index), shortcut)
    if chain.gate is not None:
        launches += _conv(chain.gate, sizes[chain.gate.name], dtype, Input("x"), "t")
    return launches


def droppable(chain: Chain) -> bool:
    """Whether ``out`` can be made again by its last launch alone, from what the backward keeps besides."""
    return chain.residual and chain.pool is None and (chain.normalised_late or chain.gate is not None)


@lru_cache(maxsize=4096)
def rebuild_plan(chain: Chain, n: int, h: int, w: int, dtype: torch.dtype, skip: Pair | None = None) -> Plan:
    """Launches that make ``out`` again, of a chain that is :func:`droppable`; with what they read that was not kept either.

    What the backward reads of it is kept too, so that nothing is computed a third time.
    """
    sizes = geometries(chain, n, h, w, skip)
    launches = again(chain, sizes, dtype)
    side, last = chain.projection, sizes[chain.layers[-1].name]
    if side is not None and not side.weights:
        launches += _conv(side, sizes[side.name], dtype, Input(chain.start), "yd")
    gated = chain.gate is not None
    launches.append(_gate(chain, last, dtype, chain.pre_activation(-1)) if gated else _bn_add_relu(chain, last, dtype, "out"))
    made = tuple(slot for launch in launches for _, slot in launch.outputs if slot != "out")
    return Plan(tuple(launches), ("out",), made)
