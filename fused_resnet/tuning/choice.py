"""How a launch runs: which tile, and whether as one kernel at all. The one place that decides.

1. What was measured on this GPU (:mod:`.measured`).
2. Else the model (:mod:`.model`) ranks the tiles that compile without a spill (:mod:`.classes`), and the ways a launch can be
   taken apart, by predicted time. Nothing is tried out at a first call.
3. Kinds of launches without compiles, unknown devices and the interpreter take the tile of the rule in :mod:`.tile`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, prod
from typing import TYPE_CHECKING

import torch

from ..launch import Geometry, Launch
from . import measured, model
from .classes import registers_of
from .devices import Device, limits, typical
from .pieces import pieces
from .tile import Strip, Tile, choose_gradient_tile, choose_strip, choose_tile, shaped

if TYPE_CHECKING:
    from ..counts import Kernel

#: A launch is taken apart only where the model sees this much in it: it is not that exact.
WORTH = 0.9

#: Tiles of pixels in a band (kernels/boxes.py) that are tried.
GROUPS = (1, 2, 4, 8, 16, 32, 64)

#: Shares of a tile's sum that are tried for conv and dgrad (kernels/finish.py), at least two steps each.
SPLITS = (2, 3, 4, 6, 8, 12, 16)
#: Accumulators a warp up to which a tile is shared: the parts on their way when they are joined are four times that. (Compiled,
#: sm_90: 72 registers a thread for 16 accumulators, 136 for 32.)
SHARED_AREA = 32 * 32


@dataclass(frozen=True)
class Choice:
    """How a launch runs.

    Attributes:
        how: one of :data:`.measured.HOW`.
        tile: of the fused kernel (how "fused"), else of the convolution that is left ("apart"), None for the vendor's.
        seconds: measured or predicted; None where the device is unknown.
        reason: who decided and why, for people.
    """

    how: str
    tile: Tile | Strip | None
    seconds: float | None
    reason: str


def by_rule(launch: Launch, arch: str, tf32: bool = False) -> Tile | Strip:
    """The tile of the rules that need no model."""
    if launch.kind == "conv":
        return choose_tile(launch, arch, tf32)
    if launch.kind in ("dgrad", "wgrad"):
        return choose_gradient_tile(launch, arch, tf32)
    return choose_strip(launch, arch)


def _splits(launch: Launch, tile: Tile, held: int, multiprocessors: int) -> list[int]:
    """Into how many shares the sum of a tile may go; ``held``: programs that a multiprocessor holds at once."""
    slots = max(held, 1) * multiprocessors
    g = launch.geometry
    assert isinstance(g, Geometry)
    if launch.kind == "wgrad":
        tiles = ceil(g.K / tile.filters) * g.R * g.S * ceil(g.C / tile.channels)
        extents, box = ((g.N, g.P, g.Q), (tile.images, tile.rows, tile.columns))
        if g.pointwise:
            extents, box = (1, 1, g.N * g.H * g.W), (1, 1, tile.pixels)
        steps = prod(ceil(n / m) for n, m in zip(extents, box, strict=True))
        wanted = {max(1, waves * slots // tiles) for waves in (1, 2, 3)} | {1}
        return sorted(min(share, max(1, steps // 4)) for share in wanted)
    # conv and dgrad: only where the tiles leave multiprocessors without work, and at most one wave.
    tiles = model.tiles_of(launch, tile)
    if tiles >= multiprocessors or g.groups > 1 or model.tile_area(launch, tile) > SHARED_AREA * tile.num_warps:
        return [1]
    steps = int(model.steps_of(launch, tile))
    return [1, *(share for share in SPLITS if share * tiles <= slots and 2 * share <= steps)]


def order_of_programs(launch: Launch, tile: Tile, device: Device, held: int) -> int:
    """The order of programs that reads least from memory twice; the tile's own where others do not better it."""
    return min((tile.group, *GROUPS), key=lambda group: model.refetched(launch, replace(tile, group=group), device, held))


def ranked(launch: Launch, device: Device, tf32: bool = False) -> list[tuple[float, Tile | Strip]]:
    """All tiles worth a try, with their predicted seconds, best first."""
    rule = by_rule(launch, device.arch, tf32)
    found: list[tuple[float, Tile | Strip]] = []
    limit = limits(device.arch)
    for (rows, columns, warps), registers in registers_of(launch, device.arch).items():
        tile = shaped(launch, rows, columns, warps, device.arch)
        if tile is None:
            continue
        shared = model.staged_bytes(launch, tile)
        # Fewer stages where that makes room for another program.
        depths = {tile.num_stages, *(stages for stages in (2, 3) if stages < tile.num_stages)}
        for stages in sorted(depths):
            held = max(1, model.resident(limit, registers, shared * stages + 1024, tile.num_warps)[0])
            for splits in _splits(launch, tile, held, device.multiprocessors):
                option = replace(tile, num_stages=stages, splits=splits)
                option = replace(option, group=order_of_programs(launch, option, device, held))
                predicted = model.predict(launch, option, device, registers=registers, tf32=tf32)
                found.append((predicted.seconds, option))
    if not found:
        options: list[Tile | Strip] = [rule]
        if isinstance(rule, Tile) and launch.kind in ("conv", "dgrad"):
            options = [replace(rule, splits=splits) for splits in _splits(launch, rule, 1, device.multiprocessors)]
        found = [(model.predict(launch, one, device, tf32=tf32).seconds, one) for one in options]
    best = min(seconds for seconds, _ in found)

    # Of tiles that should take the same time, to a hundredth, the one that has more loads on their way, then fewer shares.
    def order(pair: tuple[float, Tile | Strip]) -> tuple[float, int, int, float]:
        seconds, tile = pair
        return round(seconds / best, 2), -getattr(tile, "num_stages", 0), getattr(tile, "splits", 1), seconds

    return sorted(found, key=order)


def _device(arch: str, multiprocessors: int) -> Device | None:
    """The typical one, with as many multiprocessors as there are: some models have fewer, and so has a part of one."""
    device = typical(arch)
    return replace(device, multiprocessors=multiprocessors) if device is not None and multiprocessors else device


def candidates(launch: Launch, arch: str, tf32: bool = False, multiprocessors: int = 0) -> list[Tile | Strip]:
    """Tiles of a launch for ``arch``, best first by the model; the rule's own is among them. Arguments: as :func:`choose`."""
    device = _device(arch, multiprocessors)
    rule = by_rule(launch, arch, tf32)
    if device is None:
        return [rule]
    return list(dict.fromkeys([*(tile for _, tile in ranked(launch, device, tf32)), rule]))


@lru_cache(maxsize=8192)
def choose(
    launch: Launch, arch: str, tf32: bool = False, gpu: str = "", whole_only: bool = False, multiprocessors: int = 0
) -> Choice:
    """How a launch runs.

    Args:
        launch: any that has a kernel.
        arch: ``sm_90``, ``gfx942`` ... or ``interpreter``.
        tf32: whether fp32 may be multiplied as tf32.
        gpu: the device's name, to look for measurements.
        whole_only: the launch will run as one kernel: which tile?
        multiprocessors: how many the device has; 0 where no device is at hand: as the typical one of ``arch``.
    """
    entry = measured.find(launch, gpu, tf32)
    if entry is not None and not _runs(launch, entry):
        chosen = _by_model(launch, _device(arch, multiprocessors), arch, tf32, whole_only)
        return replace(chosen, reason=f"{chosen.reason}; what was measured on {gpu}, {entry.how}, does not run: tune again")
    if entry is not None and not (whole_only and entry.how != "fused"):
        others = "".join(f", {how} {seconds * 1e6:.1f} us" for how, seconds in entry.alternatives.items())
        return Choice(
            entry.how, entry.tile, entry.seconds, f"measured on {gpu}: {entry.how} {entry.seconds * 1e6:.1f} us{others}"
        )
    return _by_model(launch, _device(arch, multiprocessors), arch, tf32, whole_only)


def _runs(launch: Launch, entry: measured.Entry) -> bool:
    """Whether a measured choice can be followed: its file may be of a version that took other launches apart."""
    return isinstance(entry.tile, type(by_rule(launch, ""))) if entry.how == "fused" else pieces(launch, entry.how) is not None


def _by_model(launch: Launch, device: Device | None, arch: str, tf32: bool, whole_only: bool) -> Choice:
    """What is not measured: by the model, or the rule where that knows nothing of the device."""
    if device is None:
        return Choice("fused", by_rule(launch, arch, tf32), None, "by rule: no data about this device")
    best, tile = ranked(launch, device, tf32)[0]
    expected = model.predict(launch, tile, device, tf32=tf32)
    by, fused = f"by the model of {device.name}", f"fused {best * 1e6:.1f} us ({expected.bound})"
    if launch.kind in ("conv", "dgrad") and isinstance(tile, Tile) and tile.splits > 1:
        fused += f", {tile.splits} programs share a tile"
    pair = None if whole_only else in_pieces(launch, device, tf32)
    if pair is None:
        return Choice("fused", tile, best, f"{by}: {fused}")
    seconds, of_core = pair
    apart = f"apart {seconds * 1e6:.1f} us"
    if seconds < WORTH * best:
        return Choice("apart", of_core, seconds, f"{by}: {apart}, {fused}")
    return Choice("fused", tile, best, f"{by}: {fused}, {apart}")


def in_pieces(launch: Launch, device: Device, tf32: bool) -> tuple[float, Tile | Strip] | None:
    """Predicted seconds with the work on load in launches of its own, and the core's tile; None where there is none."""
    parts = pieces(launch, "apart")
    if parts is None:
        return None
    seconds = 0.0
    for first in parts.first:
        # dgrad and wgrad of a layer share what is made of dz.
        half = 0.5 if first.kind == "output_gradient" else 1.0
        seconds += half * model.predict(first, choose_strip(first, device.arch), device).seconds
    best, tile = ranked(parts.core, device, tf32)[0]
    return seconds + best, tile


def eager_seconds(kernel: Kernel, device: Device, dtype: torch.dtype, tf32: bool = False) -> float:
    """What an eager kernel takes by the same rules: convolutions by the model with the best plain tile, others at the roofline.

    BatchNorm's second reading of its operands counts (:attr:`.counts.Kernel.reread`).
    """
    if kernel.convolution is None:
        return model.roofline_seconds(kernel.flops, kernel.bytes + kernel.reread, device, dtype, tf32)
    kind, g = kernel.convolution
    return _plain_convolution(kind, g, dtype, kernel.bytes, device, tf32)


def forget() -> None:
    """Choose anew, by the files of what was measured as they are at the next question."""
    measured.forget()
    choose.cache_clear()


@lru_cache(maxsize=4096)
def _plain_convolution(kind: str, g: Geometry, dtype: torch.dtype, moved: int, device: Device, tf32: bool) -> float:
    roles = {"conv": (("x", "w"), ("y",)), "dgrad": (("dz", "w"), ("dx",)), "wgrad": (("dz", "x"), ("dw",))}[kind]
    operands, outputs = (tuple((role, role) for role in names) for names in roles)
    launch = Launch(kind, "eager", g, dtype, operands, outputs, sizes=(("all", moved),))
    if kind == "conv":
        launch = replace(launch, epilogue="affine")  # the kind that is compiled; its vectors cost next to nothing
    return ranked(launch, device, tf32)[0][0]
