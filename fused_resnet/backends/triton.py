"""Runs launches as Triton kernels: on a GPU, or on CPU tensors through Triton's interpreter.

A launch becomes a :class:`Start` once (which kernel, which loaders, which tile, how many programs; cached), and a start becomes
a kernel's arguments on every call (which tensors). :mod:`.triton_compile` gives the same ones to the compiler, ahead of time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache, lru_cache
from math import ceil
from typing import Any

import torch
import triton
from torch import Tensor

from ..kernels import activations, boxes, conv, epilogues, prologues
from ..launch import Geometry, Launch
from ..tuning import Choice, Tile, choose
from ..tuning.pieces import dy_slot
from ..tuning.tile import Strip
from . import triton_elementwise, workspace
from .triton_arguments import View
from .triton_start import (
    Meeting,
    Space,
    Start,
    arch_of,
    channels_last,
    emptiness,
    gpu_of,
    multiprocessors_of,
    needs_wide_offsets,
    numbers_of,
    outputs_of,
    shared_by,
    sized,
    start_on,
    updates,
)

#: Launches of a plan leave tensors for each other, see :mod:`fused_resnet.backends`.
shares = True

#: Kinds that :mod:`.triton_gradients` runs, and that :mod:`.triton_apart` runs whole.
GRADIENTS, STRIPS = ("dgrad", "wgrad"), ("statistics", "output_gradient")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_available(device: torch.device) -> None:
    """Raise where Triton cannot run on tensors of ``device``.

    Raises:
        RuntimeError: Triton has nothing to run on there.
    """
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"backend='triton' runs on GPU tensors, got tensors on {str(device)!r}; move the model and its input to a GPU, "
            "choose backend='cpu', or set TRITON_INTERPRET=1 before Triton is imported to interpret the kernels (slow)"
        )
    if torch.version.hip and (arch := arch_of(device)).startswith("gfx") and not arch.startswith("gfx9"):
        raise RuntimeError(
            f"backend='triton' runs on AMD's CDNA (gfx9), got {arch}: programs that finish together wait for their stores by "
            "an instruction that does not do so there; choose backend='reference'"
        )


def supports(launch: Launch) -> str | None:
    """None, or why there is no kernel for the launch."""
    if launch.kind not in ("conv", *triton_elementwise.KINDS, *GRADIENTS, *STRIPS):
        return f"no Triton kernel for {launch.kind!r}"
    if launch.dtype not in _DTYPES:
        return f"the Triton kernels compute in fp32, fp16 and bf16, not in {str(launch.dtype).removeprefix('torch.')}"
    if launch.kind in GRADIENTS:
        return _gradients().supports(launch)
    if launch.kind in triton_elementwise.KINDS:
        return triton_elementwise.supports(launch)
    if launch.kind in STRIPS:
        return None
    known = launch.prologue in prologues.PROLOGUES and launch.epilogue in epilogues.EPILOGUES
    if not known or launch.activation not in activations.ACTIVATIONS:
        return f"no Triton kernel for {launch.prologue} + conv + {launch.epilogue} + {launch.activation} yet"
    return None


@cache
def _gradients() -> Any:
    """Imported when first needed: inference needs no backward."""
    from . import triton_gradients

    return triton_gradients


@cache
def _apart() -> Any:
    """Imported when first needed: it imports this module."""
    from . import triton_apart

    return triton_apart


def run(
    launch: Launch,
    operands: Mapping[str, Tensor],
    donated: Collection[str] = (),
    shared: dict[str, Tensor] | None = None,
    *,
    tile: Tile | Strip | None = None,
    out: Mapping[str, Tensor] | None = None,
    wide: bool | None = None,
    how: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Run a launch: one kernel, no other allocation than outputs and partial results, no synchronisation.

    Where :func:`fused_resnet.tuning.choice.choose` takes it apart it is several kernels, see :mod:`.triton_apart`.

    Args:
        launch: of a kind that has kernels, see :func:`supports`.
        operands: tensors by role. Activations are channels_last, ``w`` is contiguous as [K, R, S, C / groups].
        donated: roles whose memory nobody reads afterwards (not used: a kernel never overwrites what it reads).
        shared: what launches of the same plan leave for each other.
        tile: instead of the chosen one (tests, tuning).
        out: tensors to write by role, instead of new ones.
        wide: force 64-bit or 32-bit offsets (tests), instead of what the sizes need.
        how: "fused", "apart" or "vendor" (tests, tuning), instead of what is chosen.

    Returns:
        The outputs in the launch's order, a tuple if there are several. Activations are channels_last.
    """
    result: Tensor | tuple[Tensor, ...]
    device = next(iter(operands.values())).device
    if launch.kind in STRIPS:
        assert tile is None or isinstance(tile, Strip)
        result = _apart().run_strip(launch, operands, shared, tile, out, wide)
        return result
    nothing_read, nothing_made = emptiness(launch)
    if how is None:
        if tile is not None or nothing_read:
            how = "fused"
        elif shared and launch.kind == "dgrad" and "y" in operands and dy_slot(launch) in shared:
            how = "apart"  # its layer's wgrad has left the dy
        else:
            chosen = _chosen(launch, device)
            how, tile = chosen.how, chosen.tile
    if how != "fused":
        assert tile is None or isinstance(tile, Tile)
        result = _apart().run(launch, how, operands, shared, tile=tile, out=out)
        return result
    if launch.kind in GRADIENTS:
        result = _gradients().run(launch, operands, donated, tile=tile, out=out, wide=wide)
        return result
    operands = channels_last(operands, "w", "dout", "dy")  # these may come from outside as they are; the others are ours
    outputs = out or outputs_of(launch, device)
    if nothing_made:
        for tensor in outputs.values():
            tensor.zero_()
    else:
        aligned = all([operands[role].data_ptr() % 16 == 0 for role in ("x", "w") if role in operands])
        tile = tile or _chosen(launch, device, whole_only=True).tile
        start = plan_start(launch, arch_of(device), tile, aligned, tf32_allowed(launch.dtype, device), wide)
        start_on(start, operands, outputs, device, shared)
    results = tuple([outputs[role] for role, _ in launch.outputs])
    return results if len(results) > 1 else results[0]


def reason(launch: Launch, device: torch.device) -> str:
    """How a launch runs on ``device`` and why, for people; empty where nothing is chosen (the interpreter)."""
    if not gpu_of(device):
        return ""
    return _chosen(launch, device).reason


def _chosen(launch: Launch, device: torch.device, whole_only: bool = False) -> Choice:
    """:func:`choose` for ``device`` and PyTorch's settings now."""
    tf32, count = tf32_allowed(launch.dtype, device), multiprocessors_of(device)
    return choose(launch, arch_of(device), tf32, gpu_of(device), whole_only=whole_only, multiprocessors=count)


def tf32_allowed(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch's settings let cuDNN convolutions of fp32 tensors round their operands to tf32.

    ``torch.backends.cudnn.conv.fp32_precision`` is what both the older ``torch.backends.cudnn.allow_tf32`` and the settings
    above it end in; reading the older one raises once somebody has used the newer ones.
    """
    if dtype != torch.float32 or device.type != "cuda" or torch.version.hip:
        return False
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)
def plan_start(
    launch: Launch,
    arch: str,
    tile: Tile | Strip | None = None,
    aligned: bool = True,
    tf32: bool = False,
    wide: bool | None = None,
) -> Start:
    """How a launch is started on ``arch``. ``aligned``: x and w start at a multiple of 16 bytes."""
    if launch.kind in triton_elementwise.KINDS:
        assert tile is None or isinstance(tile, Strip)
        return triton_elementwise.plan_start(launch, arch, tile, wide)
    assert tile is None or isinstance(tile, Tile)
    chosen = tile or choose(launch, arch, tf32, whole_only=True).tile
    assert isinstance(chosen, Tile)
    return _plan_conv(launch, chosen, aligned and has_tma(arch), tf32, wide)


def has_tma(arch: str) -> bool:
    """Whether descriptors are hardware there (Hopper and later), or worth interpreting.

    Elsewhere the compiler turns a descriptor made on the host into pointers whose innermost stride it does not know to be 1:
    loads of 2 bytes, no cp.async (Triton 3.8, sm_80, gfx942). Pointers of our own are loaded 16 bytes at a time.
    """
    return arch == "interpreter" or (arch.startswith("sm_") and int(arch[3:]) >= 90)


def loads(g: Geometry, tile: Tile, itemsize: int, descriptors: bool) -> tuple[str | None, str | None]:
    """Names of the loaders of pixels and filters (see kernels/boxes.py); this is the only statement of the rule.

    Args:
        g: the convolution.
        tile: its tile.
        itemsize: bytes of an element.
        descriptors: x and w start at a multiple of 16 bytes, and the device has_tma.

    Channels not in whole 16 bytes
        An ungrouped convolution loads ``flat``, a grouped one gathers.
    Depthwise, up to 2 channels a group
        No product of matrices at all: (None, None).
    Pixels
        Stride 1: ``box``. Stride 2 both ways on even H and W, the chunk of channels dividing C: ``parity``. Others, and all
        without descriptors: ``gather``.
    Filters
        A tile within one group, the chunk dividing the group's channels: ``matrix``, or ``rows`` without descriptors. Ungrouped
        and not divided: ``matrix`` for one tap, else ``rows``. A tile across groups: ``block_diagonal``.
    """
    vectors = g.C * itemsize % 16 == 0
    descriptors = descriptors and vectors and min(g.H, g.W, g.C) > 0
    group_channels, group_filters = g.C // g.groups, g.K // g.groups
    divides = group_channels % tile.channels == 0
    if g.groups == 1:
        if not vectors:
            return "flat", "flat"
        filters = "matrix" if descriptors and (divides or g.R * g.S == 1) else "rows"
    elif group_channels <= 2:
        return None, None
    elif divides and group_filters % tile.filters == 0:
        filters = "matrix" if descriptors else "rows"
    else:
        filters = "block_diagonal"
    if descriptors and g.stride == (1, 1):
        return "box", filters
    if descriptors and g.stride == (2, 2) and g.H % 2 == 0 and g.W % 2 == 0 and g.C % tile.channels == 0:
        return "parity", filters
    return "gather", filters


def one_row(g: Geometry, tile: Tile) -> tuple[Geometry, Tile]:
    """A pointwise convolution as what it is, a product of matrices: all pixels of all images in one row."""
    pixels = g.N * g.H * g.W
    if not g.pointwise or pixels + tile.pixels > 1 << 31:  # the last tile's end is a number of 32 bits as well
        return g, tile
    return replace(g, N=1, H=1, W=pixels), replace(tile, images=1, rows=1, columns=tile.pixels)


def _plan_conv(launch: Launch, tile: Tile, descriptors: bool, tf32: bool, wide: bool | None) -> Start:
    g = launch.geometry
    assert isinstance(g, Geometry)
    g, tile = one_row(g, tile)
    pixels, filters = loads(g, tile, launch.dtype.itemsize, descriptors)
    per_group = (g.C // g.groups, g.K // g.groups) if g.groups > 1 else (0, 0)
    N, H, W, C = g.N, g.H, g.W, g.C
    x_view = w_view = None
    as_it_is = tf32 and launch.prologue == "identity"
    if pixels == "box":
        x_view = View((N, H, W, C), (H * W * C, W * C, C, 1), (tile.images, tile.rows, tile.columns, tile.channels), as_it_is)
    elif pixels == "parity":
        x_view = View(
            (N, H // 2, 2, W // 2, 2 * C),
            (H * W * C, 2 * W * C, W * C, 2 * C, 1),
            (tile.images, tile.rows, 1, tile.columns, tile.channels),
            as_it_is,
        )
    if filters == "matrix":
        length = g.R * g.S * (C // g.groups)
        w_view = View((g.K, length), (length, 1), (tile.filters, tile.channels), tf32)
    constants = {
        "PROLOGUE": prologues.PROLOGUES[launch.prologue][0],
        "EPILOGUE": epilogues.EPILOGUES[launch.epilogue][0],
        "ACTIVATION": activations.ACTIVATIONS[launch.activation][0],
        "AFTER": epilogues.AFTERS[launch.epilogue][0] if launch.epilogue in epilogues.AFTERS else None,
        "PIXELS": boxes.PIXELS[pixels] if pixels else None,
        "FILTERS": boxes.FILTERS[filters] if filters else None,
        "TAPS": boxes.Taps(g.R, g.S, *g.stride, *g.padding, *g.dilation, *per_group),
        "TILE": replace(tile, splits=1),  # not a constant: it changes with the batch
        "PIXELS_FIRST": launch.prologue != "identity",
        "FLAT": pixels == "flat",
        "SPANS": filters == "block_diagonal",
        "PRECISION": "tf32" if tf32 else "ieee",
        "WIDE": needs_wide_offsets(g.x_shape, g.w_shape, g.y_shape) if wide is None else wide,
    }
    sizes = boxes.Sizes(N, H, W, C, g.K, g.P, g.Q)
    filter_tiles = ceil(g.K / tile.filters)
    pixel_tiles = tile.programs(g) // filter_tiles
    # A grouped tile that may be computed again is computed by one program.
    meeting = Meeting(1 if pixels is None or constants["SPANS"] else tile.splits, tile.programs(g), tile.pixels * tile.filters)
    group = 0
    if launch.epilogue in epilogues.AFTERS:
        group = workspace.group_of(pixel_tiles)
        counters = filter_tiles * workspace.counters_of(pixel_tiles) + 1
        meeting = replace(meeting, counters=counters, partials=pixel_tiles * (2 * g.K + filter_tiles))
    return Start(
        conv.conv_forward,
        launch,
        bind,
        meeting.tiles * meeting.splits,
        constants,
        sizes,
        x_view,
        w_view,
        tile.num_warps,
        tile.num_stages,
        meeting.all_counters,
        meeting.all_partials,
        group,
        updates(launch),
        meeting.numbers(),
        meeting.counters_behind,
        meeting.partials_behind,
    )


def bind(
    start: Start,
    launch: Launch,
    operands: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    space: Space,
) -> dict[str, Any]:
    """A kernel's arguments by name. ``space``: of :meth:`.triton_start.Start.workspace`."""
    x, w = operands["x"], operands["w"]
    named: dict[str, Any] = {**operands, **{role: tensor for role, tensor in outputs.items() if role != "y"}}
    named |= {**numbers_of(launch), "C": start.sizes.C, "K": start.sizes.K, "momentum": launch.momentum}
    named |= {"counters": space.counters, "partials": space.partials, "before": space.before}
    constants = start.constants
    after = epilogues.AFTERS.get(launch.epilogue)
    return {
        "x": x if start.x_view is None else start.x_view.of(x),
        "w": w if start.w_view is None else start.w_view.of(w),
        "y": outputs["y"],
        **sized(start),
        "exact": (x, w) if constants["SPANS"] or constants["PIXELS"] is None else None,
        **shared_by(start, space),
        "group": start.group or None,
        "prologue_args": tuple(named.get(name) for name in prologues.PROLOGUES[launch.prologue][1]),
        "epilogue_args": tuple(named.get(name) for name in epilogues.EPILOGUES[launch.epilogue][1]),
        "slope": named["slope"],
        "after_args": tuple(named.get(name) for name in after[1]) if after else (),
        **constants,
    }
