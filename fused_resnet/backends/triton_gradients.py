"""Runs the launches of kind ``dgrad`` and ``wgrad`` as Triton kernels: :mod:`.triton` for the convolution's two gradients.

As there, a launch becomes a :class:`GradientStart` once, and a start becomes a kernel's arguments on every call.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil, gcd, prod
from typing import Any

import torch
from torch import Tensor

from ..kernels import activations, boxes, dgrad, gradients, prologues, wgrad, wgrad_end
from ..launch import Geometry, Launch
from ..tuning import Tile, choose
from . import workspace
from .triton import has_tma, loads, one_row, tf32_allowed
from .triton_arguments import View
from .triton_start import (
    Meeting,
    Space,
    Start,
    arch_of,
    channels_last,
    gpu_of,
    multiprocessors_of,
    needs_wide_offsets,
    numbers_of,
    outputs_of,
    shared_by,
    sized,
    start_on,
    whole_lines,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Filters of a program that makes only the vectors.
_VECTOR = 256


def supports(launch: Launch) -> str | None:
    """None, or why there is no kernel for the launch."""
    if launch.kind not in ("dgrad", "wgrad"):
        return f"no Triton kernel for {launch.kind!r} yet"
    if launch.dtype not in _DTYPES:
        return f"the Triton kernels compute in fp32, fp16 and bf16, not in {str(launch.dtype).removeprefix('torch.')}"
    known = launch.gradient in gradients.GRADIENTS and launch.activation in activations.ACTIVATIONS
    if launch.kind == "dgrad":
        known = known and launch.epilogue in gradients.EPILOGUES
    else:
        known = known and launch.prologue in prologues.PROLOGUES
    if not known:
        return f"no Triton kernel for {launch} yet"
    return None


def run(
    launch: Launch,
    operands: Mapping[str, Tensor],
    donated: Collection[str] = (),
    *,
    tile: Tile | None = None,
    out: Mapping[str, Tensor] | None = None,
    wide: bool | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Run a launch: one kernel, no synchronisation.

    Args:
        launch: of kind ``dgrad`` or ``wgrad``.
        operands: tensors by role; activations are channels_last.
        donated: roles whose memory nobody reads afterwards (not used).
        tile: instead of the analytical rule's (tests, tuning).
        out: tensors to write, by role, instead of new ones.
        wide: force 64-bit or 32-bit offsets (tests), instead of what the sizes need.

    Returns:
        What the launch lists: dx channels_last, dw like [K, R, S, C / groups] in memory, vectors fp32.
    """
    g = launch.geometry
    assert isinstance(g, Geometry)
    dz = operands["dz"]
    operands = channels_last(operands, "w", "dz", "dshortcut")  # these may come from outside as they are; the others are ours
    outputs = out or outputs_of(launch, dz.device)
    made = tuple([outputs[role] for role, _ in launch.outputs])
    if dz.numel() == 0 or 0 in g.x_shape:
        for output in made:
            output.zero_()
        return made if len(made) > 1 else made[0]
    aligned = all([operands[role].data_ptr() % 16 == 0 for role in ("dz", "y", "x", "w") if role in operands])
    tf32 = tf32_allowed(launch.dtype, dz.device)
    if tile is None and not _vectors_only(launch):
        count = multiprocessors_of(dz.device)
        chosen = choose(launch, arch_of(dz.device), tf32, gpu_of(dz.device), whole_only=True, multiprocessors=count).tile
        assert isinstance(chosen, Tile)
        tile = chosen
    start = plan_start(launch, arch_of(dz.device), tile, aligned, tf32, wide)
    start_on(start, operands, outputs, dz.device)
    return made if len(made) > 1 else made[0]


@dataclass(frozen=True)
class GradientStart(Start):
    """A start of one of the gradients' kernels.

    Attributes:
        views: descriptors by role; what has none is a plain pointer.
    """

    views: Mapping[str, View] = field(default_factory=dict)


@lru_cache(maxsize=4096)
def plan_start(
    launch: Launch, arch: str, tile: Tile | None = None, aligned: bool = True, tf32: bool = False, wide: bool | None = None
) -> GradientStart:
    """How a launch is started on ``arch``. ``aligned``: dz, y, x and w start at a multiple of 16 bytes."""
    g = launch.geometry
    assert isinstance(g, Geometry)
    if _vectors_only(launch):
        return _plan_vectors(launch, g)
    chosen = tile or choose(launch, arch, tf32, whole_only=True).tile
    assert isinstance(chosen, Tile)
    tile = chosen
    wide = needs_wide_offsets(g.x_shape, g.w_shape, g.y_shape) if wide is None else wide
    g, tile = one_row(g, tile)
    coefficients, gradient, _ = gradients.GRADIENTS[_on_load(launch)]
    constants = {
        "COEFFICIENTS": coefficients,
        "GRADIENT": gradient,
        "TAPS": _taps(g),
        "PRECISION": "tf32" if tf32 else "ieee",
        "WIDE": wide,
    }
    plan = _plan_dgrad if launch.kind == "dgrad" else _plan_wgrad
    return plan(launch, g, tile, aligned and has_tma(arch), constants)


def _vectors_only(launch: Launch) -> bool:
    """Whether nobody wants the filters' own gradient."""
    return launch.kind == "wgrad" and "x" not in launch.roles


def _on_load(launch: Launch) -> str:
    """The gradient that is applied on load: with given statistics wgrad is made from dz, and the result is scaled."""
    return "identity" if (launch.kind, launch.gradient) == ("wgrad", "scale") else launch.gradient


def _taps(g: Geometry) -> boxes.Taps:
    per_group = (g.C // g.groups, g.K // g.groups) if g.groups > 1 else (0, 0)
    return boxes.Taps(g.R, g.S, *g.stride, *g.padding, *g.dilation, *per_group)


def _sizes(g: Geometry) -> boxes.Sizes:
    return boxes.Sizes(g.N, g.H, g.W, g.C, g.K, g.P, g.Q)


def _views_of_y(launch: Launch, g: Geometry, tile: Tile, tf32: bool) -> dict[str, View]:
    """dz and y, ``[N, P, Q, K]``."""
    strides = (g.P * g.Q * g.K, g.Q * g.K, g.K, 1)
    view = View((g.N, g.P, g.Q, g.K), strides, (tile.images, tile.rows, tile.columns, tile.filters))
    return {"dz": replace(view, rounded=tf32 and _on_load(launch) == "identity"), "y": view}


def dgrad_loads(g: Geometry, tile: Tile, itemsize: int, descriptors: bool) -> tuple[str | None, str | None]:
    """Names of the loaders of dz (kernels/gradients.py) and of filters (kernels/boxes.py); the only statement of the rule.

    Grouped, up to 2 filters a group
        No product of matrices at all: (None, None).
    dz
        ``box`` where K is in whole 16 bytes and there are descriptors, else ``gather``; any stride.
    Filters
        A tile of channels within one group, the chunk dividing the group's filters: ``matrix``, or ``rows`` without
        descriptors, where the tile does not divide C (a box would run into the next tap), or C is not in whole 16 bytes. A tile
        across groups: ``block_diagonal``.
    """
    group_channels, group_filters = g.C // g.groups, g.K // g.groups
    if g.groups > 1 and group_filters <= 2:
        return None, None
    load = "box" if descriptors and g.K * itemsize % 16 == 0 else "gather"
    divides = group_channels % tile.channels == 0
    if g.groups > 1 and not (divides and group_filters % tile.filters == 0):
        return load, "block_diagonal"
    matrix = descriptors and group_channels * itemsize % 16 == 0 and (divides or g.R * g.S == 1)
    return load, "matrix" if matrix else "rows"


def _plan_dgrad(launch: Launch, g: Geometry, tile: Tile, descriptors: bool, constants: dict[str, Any]) -> GradientStart:
    load, filters = dgrad_loads(g, tile, launch.dtype.itemsize, descriptors)
    views = {}
    tf32 = constants["PRECISION"] == "tf32"
    if load == "box":
        views = _views_of_y(launch, g, tile, tf32)
    if filters == "matrix":
        length = g.R * g.S * (g.C // g.groups)
        views["w"] = View((g.K, length), (length, 1), (tile.filters, tile.channels), tf32)
    boxes_of_class = (
        ceil(g.N / tile.images),
        ceil(ceil(g.H / g.stride[0]) / tile.rows),
        ceil(ceil(g.W / g.stride[1]) / tile.columns),
    )
    pixel_tiles = prod(g.stride) * prod(boxes_of_class)
    channel_tiles = ceil(g.C / tile.channels)
    constants |= {
        "EPILOGUE": gradients.EPILOGUES[launch.epilogue][0],
        "BACKWARD": activations.ACTIVATIONS[launch.activation][1],
        "LOAD": gradients.LOADS[load] if load else None,
        "FILTERS": boxes.FILTERS[filters] if filters else None,
        "TILE": replace(tile, splits=1),  # not a constant: it changes with the batch
        "PERIODS": tuple(stride // gcd(stride, dilation) for stride, dilation in zip(g.stride, g.dilation, strict=True)),
        "PIXELS_FIRST": launch.gradient != "identity",
        "SPANS": filters == "block_diagonal",
    }
    sums = len(launch.outputs) - 1
    numbers = {"counters_of": workspace.counters_of(pixel_tiles), "group": workspace.group_of(pixel_tiles)}
    # A grouped tile that may be computed again is computed by one program.
    meeting = Meeting(
        1 if load is None or constants["SPANS"] else tile.splits,
        pixel_tiles * channel_tiles,
        tile.pixels * tile.channels,
        channel_tiles * numbers["counters_of"] if sums else 0,
        sums * pixel_tiles * g.C,
    )
    return GradientStart(
        dgrad.dgrad,
        launch,
        bind,
        meeting.tiles * meeting.splits,
        constants,
        _sizes(g),
        None,
        None,
        tile.num_warps,
        tile.num_stages,
        counters=meeting.all_counters,
        partials=meeting.all_partials,
        numbers=numbers | meeting.numbers(),
        counters_behind=meeting.counters_behind,
        partials_behind=meeting.partials_behind,
        views=views,
    )


def _plan_wgrad(launch: Launch, g: Geometry, tile: Tile, descriptors: bool, constants: dict[str, Any]) -> GradientStart:
    itemsize = launch.dtype.itemsize
    pixels, filters = loads(g, tile, itemsize, descriptors)
    spans = filters == "block_diagonal"
    load = "box" if descriptors and g.K * itemsize % 16 == 0 else "gather"
    views = {}
    tf32 = constants["PRECISION"] == "tf32"
    if pixels and load == "box":
        views = _views_of_y(launch, g, tile, tf32)
    x_view = _view_of_x(g, tile, pixels)
    if x_view is not None:
        views["x"] = replace(x_view, rounded=tf32 and launch.prologue == "identity")
    rim = bool(g.N % tile.images or g.P % tile.rows or g.Q % tile.columns)
    constants |= {
        "PROLOGUE": prologues.PROLOGUES[launch.prologue][0],
        "LOAD": gradients.LOADS[load] if pixels else None,
        "PIXELS": boxes.PIXELS[pixels] if pixels else None,
        "TILE": replace(tile, splits=1),  # not a constant: it changes with the batch
        "FLAT": pixels == "flat",
        "SPANS": spans,
        "RIM": rim,
        "SHARED": tile.splits > 1,
        "SCALED": launch.gradient == "scale",
        "BATCH": launch.gradient == "bn_backward",
    }
    columns = _columns(g, tile, pixels, spans)
    rows = ceil(g.K / tile.filters)
    size = rows * columns * tile.filters * (tile.channels if pixels else 1)
    per_filter = _dgamma(launch)
    counters_of = workspace.counters_of(tile.splits) if tile.splits > 1 else 0
    numbers = {
        "columns": columns,
        "shares": tile.splits,
        "group": workspace.group_of(tile.splits),
        "counters_of": counters_of,
    }
    products = whole_lines(tile.splits * size) if tile.splits > 1 else 0
    return GradientStart(
        wgrad.wgrad,
        launch,
        bind,
        rows * columns * tile.splits,
        constants,
        _sizes(g),
        None,
        None,
        tile.num_warps,
        tile.num_stages,
        counters=rows * columns * counters_of + (rows if per_filter else 0),
        partials=products + (columns * g.K if per_filter else 0),
        numbers=numbers,
        partials_behind=products if per_filter else None,
        views=views,
    )


def _dgamma(launch: Launch) -> bool:
    return launch.gradient == "scale" and any(role == "dgamma" for role, _ in launch.outputs)


def _view_of_x(g: Geometry, tile: Tile, pixels: str | None) -> View | None:
    N, H, W, C = g.N, g.H, g.W, g.C
    if pixels == "box":
        return View((N, H, W, C), (H * W * C, W * C, C, 1), (tile.images, tile.rows, tile.columns, tile.channels))
    if pixels == "parity":
        return View(
            (N, H // 2, 2, W // 2, 2 * C),
            (H * W * C, 2 * W * C, W * C, 2 * C, 1),
            (tile.images, tile.rows, 1, tile.columns, tile.channels),
        )
    return None


def _columns(g: Geometry, tile: Tile, pixels: str | None, spans: bool) -> int:
    """Tiles of dw in a row: taps by chunks of the channels that a tile of filters needs."""
    group_channels, group_filters = g.C // g.groups, g.K // g.groups
    if pixels is None:
        return g.R * g.S * group_channels
    if pixels == "flat":
        return ceil(g.R * g.S * g.C / tile.channels)
    if g.groups == 1:
        return g.R * g.S * ceil(g.C / tile.channels)
    chunks = 0
    for k in range(0, g.K, tile.filters):
        first = k // group_filters * group_channels
        if spans:
            first = first // tile.channels * tile.channels
        end = ((min(k + tile.filters, g.K) - 1) // group_filters + 1) * group_channels
        chunks = max(chunks, ceil((end - first) / tile.channels))
    return g.R * g.S * chunks


def _plan_vectors(launch: Launch, g: Geometry) -> GradientStart:
    constants = {"FILTERS": _VECTOR, "SCALED": launch.gradient == "scale", "BATCH": launch.gradient == "bn_backward"}
    return GradientStart(wgrad_end.vectors_only, launch, bind, ceil(g.K / _VECTOR), constants, _sizes(g), None, None, 4, 1)


def bind(
    start: GradientStart,
    launch: Launch,
    operands: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    space: Space,
) -> dict[str, Any]:
    """A kernel's arguments by name, in the kernel's order. ``space``: of :meth:`.triton_start.Start.workspace`."""
    g = launch.geometry
    assert isinstance(g, Geometry)
    named: dict[str, Any] = {**operands, **numbers_of(launch), "C": start.sizes.C, "m": float(g.N * g.P * g.Q)}
    viewed = {
        role: start.views[role].of(named[role]) if role in start.views else named[role] for role in named if role in _VIEWED
    }
    counters, partials = space.counters, space.partials
    results = wgrad_end.Results(*(outputs.get(role) for role in wgrad_end.Results._fields))
    given = wgrad_end.Given(*(named.get(name) for name in wgrad_end.Given._fields))
    if start.kernel is wgrad_end.vectors_only:
        return {"depths": sized(start)["depths"], "results": results, "given": given, **start.constants}
    reads_y = launch.gradient == "bn_backward"
    common_arguments = {
        "gradient_args": tuple(named.get(name) for name in gradients.GRADIENTS[_on_load(launch)][2]),
        **start.constants,
    }
    numbers = start.numbers
    if launch.kind == "wgrad":
        return {
            "dz": viewed["dz"],
            "y": viewed["y"] if reads_y else None,
            "x": viewed["x"],
            **sized(start),
            "columns": numbers["columns"],
            "results": results,
            "given": given,
            "shares": numbers["shares"],
            "group": numbers["group"],
            "counters_of": numbers["counters_of"],
            "memory": wgrad.Memory(partials, counters, space.partials_behind),
            "prologue_args": tuple(named.get(name) for name in prologues.PROLOGUES[launch.prologue][1]),
            **common_arguments,
        }
    exact = (operands["dz"], operands["y"] if reads_y else None, operands["w"])
    constants, summed = start.constants, len(launch.outputs) > 1
    return {
        "dz": viewed["dz"],
        "y": viewed["y"] if reads_y else None,
        "w": viewed["w"],
        "dx": outputs["dx"],
        **sized(start),
        "exact": exact if constants["SPANS"] or constants["LOAD"] is None else None,
        **shared_by(start, space),
        "group": numbers["group"] if summed else None,
        "counters_of": numbers["counters_of"] if summed else None,
        "outputs": tuple(outputs[role] for role, _ in launch.outputs[1:]),
        "sums": dgrad.Sums(partials, counters) if summed else None,
        "epilogue_args": tuple(named.get(name) for name in gradients.EPILOGUES[launch.epilogue][1]),
        **common_arguments,
    }


#: Roles of which there may be a descriptor.
_VIEWED = ("dz", "y", "x", "w")
