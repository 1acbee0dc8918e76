"""The launches of a backward, for the gradients that are wanted."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..chain import Chain, Layer
from ..launch import Geometry, Launch, Pair
from .forward import again, end_operands
from .launches import Input, Named, Plan, geometries, new_launch, parameters_of, statistics_of


def _gradient(layer: Layer, y: str, total: str) -> tuple[str, list[Named]]:
    """How the gradient behind a layer's convolution follows from dz: a key of ``GRADIENTS``, and what is read for it."""
    if not layer.norm:
        return "identity", []
    if not layer.batch:
        return "scale", parameters_of(layer, "gamma", "var")
    operands = [("y", y), ("mean", layer.slot("batch_mean")), ("invstd", layer.slot("invstd")), *parameters_of(layer, "gamma")]
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
    return [new_launch("sync_sums", layer.name, geometry, dtype, operands, outputs, group=layer.group)]


def _wgrad(
    layer: Layer, geometry: Geometry, dtype: torch.dtype, x: Input, y: str, dz: str, total: str, needs: frozenset[str]
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
        operands += parameters_of(layer, "bias", "gamma", "mean", "var")
    outputs = [(f"d{role}", f"d.{layer.slot(role)}") for role in wanted]
    ends: dict[str, Any] = {**(x.how if contracts else {}), "gradient": gradient, "eps": layer.eps}
    return [new_launch("wgrad", layer.name, geometry, dtype, operands, outputs, **ends)]


def _dgrad(
    layer: Layer,
    geometry: Geometry,
    dtype: torch.dtype,
    y: str,
    dz: str,
    total: str,
    result: str,
    before: Layer | None = None,
    x: Input | None = None,
    shortcut_gradient: str | None = None,
) -> Launch:
    """Gradient of a layer's input; where there is a layer ``before``, in front of its activation, with the sums."""
    if not layer.weights:
        return new_launch("zero_pad_backward", layer.name, geometry, dtype, [("dz", dz)], [("dx", result)])
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
    return new_launch("dgrad", layer.name, geometry, dtype, operands, outputs, **ends)


def _behind_pool(chain: Chain, last: Geometry, dtype: torch.dtype) -> Launch:
    """Gradient of the pooling; where the activation was in its prologue, in front of that, with the sums."""
    assert chain.pool is not None
    layer, z = chain.layers[-1], chain.pre_activation(-1)
    geometry = chain.pool.geometry(last.N, last.P, last.Q, last.K)
    if not chain.activated_in_pool:
        operands = [("dy", "dout"), ("x", chain.pooled_slot)]
        return new_launch("max_pool_backward", "pool", geometry, dtype, operands, [("dx", "d.pool")])
    operands = [("dy", "dout"), ("x", chain.pooled_slot if z is None else z), ("indices", "indices")]
    outputs = [("dx", "dz"), ("sum", "dz.sum")]
    if layer.batch:
        operands += statistics_of(layer, "x_")
        outputs.append(("dot", layer.slot("dot")))
    if layer.activation != "identity" and layer.masked_by_output:
        operands.append(("out", "out"))  # of what the pooling chose: its mask without normalising all of x again
    ends: dict[str, Any] = {"activation": layer.activation, "slope": layer.slope}
    return new_launch("max_pool_backward", "pool", geometry, dtype, operands, outputs, **ends)


def _bn_add_relu_backward(chain: Chain, geometry: Geometry, dtype: torch.dtype, dout: str, out: str) -> Launch:
    """The gradient in front of the last activation, and its sums. Without an activation it is ``dout`` itself.

    From the activation's output where that suffices, else from its input, added up again.
    gamma is for executors that make the gradient behind the BatchNorm on the way.
    """
    last, side = chain.layers[-1], chain.projection
    operands, outputs = [("dout", dout)], []
    if last.activation != "identity":
        outputs.append(("dz", "dz"))
        operands += [("out", out)] if chain.masked_by_output else end_operands(chain, chain.pre_activation(-1))
    outputs.append(("sum", "dz.sum"))
    if last.batch:
        if chain.masked_by_output:
            operands += [("y", chain.output_slot(len(chain.layers) - 1)), *statistics_of(last, "")[:3]]
        outputs.append(("dot", last.slot("dot")))
    if side is not None and side.batch:
        if chain.masked_by_output:
            operands += [("shortcut", "yd"), *statistics_of(side, "shortcut_")[:3]]
        outputs.append(("shortcut_dot", side.slot("dot")))
    ends: dict[str, Any] = {"activation": last.activation, "slope": last.slope}
    return new_launch("bn_add_relu_backward", last.name, geometry, dtype, operands, outputs, **ends)


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
    operands = [("dout", "dout"), *end_operands(chain, chain.pre_activation(-1)), ("t", "t")]
    ends: dict[str, Any] = {"activation": last.activation, "slope": last.slope}
    return new_launch("gate_backward", last.name, geometry, dtype, operands, outputs, **ends)


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
    return [*launches, new_launch("output_gradient", entry.name, geometry, dtype, operands, [("dy", "d.x")], **ends)]


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
    sizes = geometries(chain, n, h, w, skip)
    launches = again(chain, sizes, dtype)
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
        launches += _wgrad(side, g, dtype, Input.of_projection(chain), "yd", behind_side, side_total, needs)
        if chain.start in needs or (chain.projects_entry and _wanted(chain, 0, needs)):
            side_gradient = "d.shortcut"
            launches.append(_dgrad(side, g, dtype, "yd", behind_side, side_total, side_gradient))
    if chain.skip:  # a gradient by itself, not a part of that of x
        aliases.extend(("d.skip", slot) for slot in (side_gradient,) if slot is not None and "skip" in needs)
        side_gradient = None
    if chain.gate is not None:
        g = sizes[chain.gate.name]
        launches += _wgrad(chain.gate, g, dtype, Input("x"), "t", "dt", "dt.sum", needs)
        if "x" in needs:
            launches.append(_dgrad(chain.gate, g, dtype, "t", "dt", "dt.sum", "d.gate", shortcut_gradient=side_gradient))
            side_gradient = "d.gate"

    for index in range(len(chain.layers) - 1, -1, -1):
        layer, g = chain.layers[index], sizes[chain.layers[index].name]
        x, y = Input.of(chain, index), chain.output_slot(index)
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
