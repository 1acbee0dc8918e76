"""How long a launch should take: the analytical model that ranks tiles and makes the predictions.

A launch is programs, each a loop of steps between a start and an end. The model adds up what one program asks of four
resources of its multiprocessor, and of the memory all share:

==========  ======================================================================================================
matrix      FLOPs with all padding (rim of the box, filters past K, chunks past C), at the sustained matrix rate
l2          bytes a program loads and stores, each tap anew, at the multiprocessor's part of the L2 bandwidth
vector      operations of prologue, epilogue and statistics, at one instruction a lane and clock
latency     a step cannot start before its loads are there; ``stages - 1`` steps are on their way at once. Where programs
            share a tile, its last one waits for the others' parts, some at a time
memory      every operand once, and again what the L2 cannot hold (:func:`refetched`), partial results on top
==========  ======================================================================================================

One resident program does its phases one after the other; ``resident`` programs overlap, so a multiprocessor lies between the
sum of the phases and the most loaded resource, the nearer to the latter the more programs it holds. Whole waves are counted: a
last wave that fills a tenth of the machine costs a whole one. The result is at least the memory's time.

The constants below are assumptions, to be replaced by measurements; they rank tiles of one launch, and the predictions made
with them are called predictions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod
from typing import TYPE_CHECKING

import torch

from ..launch import Geometry, Launch, PoolGeometry
from .devices import Device, Limits, limits

if TYPE_CHECKING:
    from .tile import Strip, Tile

#: Cycles from a load's issue to its data (a bulk load through the L2), and what a program spends before its first step.
LOAD_CYCLES, START_CYCLES = 800, 1500
#: Part of the L2 that is counted on to hold operands: results pass through it too, and it is not managed by us.
L2_HOLDS = 0.5
#: Partial results of a tile that its last program has on their way at once (kernels/finish.py).
SHARES_AT_ONCE = 4
#: Seconds between two launches of one stream.
LAUNCH_SECONDS = 1.5e-6
#: Instructions an element: prologues and gradients on load (convert, normalise, clamp, mask, convert back), epilogues.
_ACTIVATION = {"relu": 1, "relu6": 2, "leaky_relu": 3, "silu": 8, "gelu": 24, "gelu_tanh": 12, "hardswish": 5}
_ON_LOAD = {"identity": 0, "bn": 5, "scale": 3, "bn_backward": 7}
_ON_LOAD |= {f"bn_{name}": 5 + count for name, count in _ACTIVATION.items()}
_ON_LOAD |= {name: 2 + count for name, count in _ACTIVATION.items()}
_AT_END = {"store": 2, "bias": 3, "affine": 4, "add": 4, "bias_add": 5, "affine_add": 6, "stats": 12, "mask": 5, "bn_mask": 14}


@dataclass(frozen=True)
class Prediction:
    """What the model expects of a launch.

    Attributes:
        seconds: time from one launch to the next.
        bound: the resource that decides: ``matrix``, ``l2``, ``vector``, ``latency``, ``memory`` or ``launch``.
        programs: size of the grid.
        resident: programs that a multiprocessor holds at once; ``limited_by`` what.
        waves: programs over what the device holds at once.
        tail: part of the last wave's places that stay empty.
        rim: multiply-adds done for each that is needed, less 1.
        flops: floating-point operations done, padding included.
        memory_bytes: each operand and result once, partial results too.
        l2_bytes: what the programs load and store.
        intensity: needed FLOPs for each byte of memory.
    """

    seconds: float
    bound: str
    programs: int
    resident: int
    limited_by: str
    waves: float
    tail: float
    rim: float
    flops: int
    memory_bytes: int
    l2_bytes: int
    intensity: float


@dataclass(frozen=True)
class _Work:
    """What one program does, and how many there are."""

    programs: int
    steps: float
    flops: float  # a step
    loaded: float  # bytes a step
    vector: float  # instructions a step
    end_bytes: float
    end_vector: float
    extra_bytes: float = 0.0  # of memory, all programs: partial results
    narrow: int = 128  # smaller side of the product
    joined_bytes: float = 0.0  # partial results that the last program of a tile reads
    joined_turns: int = 0  # how many times it waits for some of them, and for an atomic


def resident(limit: Limits, registers: int, shared: int, num_warps: int) -> tuple[int, str]:
    """Programs that a multiprocessor holds at once, and what limits them.

    Args:
        limit: of the architecture.
        registers: a thread's.
        shared: bytes a program.
        num_warps: of a program.
    """
    a_warp = ceil(max(registers, 1) * limit.warp / limit.allocation) * limit.allocation
    bounds = {
        "registers": limit.registers // a_warp // num_warps,
        "shared memory": int(limit.shared_per_multiprocessor * 1024 // (shared + limit.reserved * 1024)) if shared else 1 << 20,
        "warps": limit.warps // num_warps,
        "programs": limit.programs,
    }
    what = min(bounds, key=lambda name: bounds[name])
    return max(bounds[what], 0), what


def expected_registers(launch: Launch, tile: Tile, arch: str) -> int:
    """Registers a thread before anything is compiled: accumulators, and what compiled tiles of the kind needed besides."""
    size = tile.filters * tile.channels if launch.kind == "wgrad" else tile_area(launch, tile)
    accumulators = size // (32 * tile.num_warps)
    ends = launch.prologue != "identity" or launch.gradient != "identity"
    beside = 90 if ends else 60 if launch.epilogue == "stats" else 45
    if launch.gradient == "bn_backward":
        beside = 120
    tensor_memory = arch in ("sm_100", "sm_103")  # accumulators are not in registers while the loop runs
    return min(255, (accumulators // 2 if tensor_memory else accumulators) + beside)


def tile_area(launch: Launch, tile: Tile) -> int:
    """Accumulators of a program."""
    if launch.kind == "wgrad":
        return tile.filters * tile.channels
    return tile.pixels * (tile.channels if launch.kind == "dgrad" else tile.filters)


def staged_bytes(launch: Launch, tile: Tile) -> int:
    """Shared memory of one step's operands."""
    reads_y = launch.gradient == "bn_backward"
    if launch.kind == "wgrad":
        elements = tile.pixels * (tile.filters * (1 + reads_y) + tile.channels)
    elif launch.kind == "dgrad":
        elements = tile.filters * (tile.pixels * (1 + reads_y) + tile.channels)
    else:
        elements = tile.channels * (tile.pixels + tile.filters)
    return elements * launch.dtype.itemsize


def _covered(extents: tuple[int, ...], box: tuple[int, ...]) -> int:
    return prod(ceil(n / m) for n, m in zip(extents, box, strict=True))


def _chunks(g: Geometry, channels: int, filters: int) -> int:
    """Chunks of channels that a tile of ``filters`` reduces over."""
    if g.groups == 1:
        return ceil(g.C / channels)
    spanned = ceil(filters / (g.K // g.groups)) * (g.C // g.groups)
    return max(1, ceil(min(spanned, g.C) / channels))


def _shared(work: _Work, splits: int, result: float) -> _Work:
    """A tile's steps shared between ``splits`` programs, see :class:`..kernels.finish.Shares`. ``result``: elements of a tile.

    Every program writes its part in fp32; the last one of a tile waits for an atomic, then reads all parts, some at a time.
    """
    if splits == 1:
        return work
    part = 4 * result
    return replace(
        work,
        programs=work.programs * splits,
        steps=ceil(work.steps / splits),
        extra_bytes=2 * part * work.programs * splits,
        joined_bytes=part * (splits + 1),
        joined_turns=1 + ceil(splits / SHARES_AT_ONCE),
    )


def _product(launch: Launch, tile: Tile) -> _Work:
    g = launch.geometry
    assert isinstance(g, Geometry)
    size = launch.dtype.itemsize
    pointwise = g.pointwise
    box = (1, 1, tile.pixels) if pointwise else (tile.images, tile.rows, tile.columns)
    extents = (1, 1, g.N * g.H * g.W) if pointwise else (g.N, g.P, g.Q)
    on_load = _ON_LOAD[launch.prologue] + _ON_LOAD[launch.gradient]
    at_end = _AT_END[launch.epilogue]
    M = tile.pixels
    reads_y = launch.gradient == "bn_backward"
    if launch.kind == "conv":
        flat = g.groups == 1 and g.C * size % 16 != 0
        steps = ceil(g.R * g.S * g.C / tile.channels) if flat else g.R * g.S * _chunks(g, tile.channels, tile.filters)
        tiles = _covered(extents, box) * ceil(g.K / tile.filters)
        reads = 1 + ("shortcut" in launch.roles)
        work = _Work(
            tiles,
            steps,
            2 * M * tile.filters * tile.channels,
            (M + tile.filters) * tile.channels * size,
            M * tile.channels * (on_load + (8 if flat else 0)),
            M * tile.filters * size * reads,
            M * tile.filters * at_end,
            narrow=min(M, tile.filters),
        )
        return _shared(work, tile.splits, M * tile.filters)
    if launch.kind == "dgrad":
        classes = prod(g.stride)
        rows, columns = (ceil(n / s) for n, s in zip((g.H, g.W), g.stride, strict=True))
        extents = extents if pointwise else (g.N, rows, columns)
        walked = (
            g.R * g.S / classes * _chunks(Geometry(g.N, g.H, g.W, g.K, g.C, 1, 1, groups=g.groups), tile.filters, tile.channels)
        )
        tiles = classes * _covered(extents, box) * ceil(g.C / tile.channels)
        reads = 1 + ("dshortcut" in launch.roles) + (launch.epilogue in ("mask", "bn_mask"))
        work = _Work(
            tiles,
            walked,
            2 * M * tile.filters * tile.channels,
            (M * (1 + reads_y) + tile.channels) * tile.filters * size,
            M * tile.filters * on_load,
            M * tile.channels * size * reads,
            M * tile.channels * at_end,
            narrow=min(M, tile.channels),
        )
        return _shared(work, tile.splits, M * tile.channels)
    flat = g.groups == 1 and g.C * size % 16 != 0
    columns = ceil(g.R * g.S * g.C / tile.channels) if flat else g.R * g.S * _chunks(g, tile.channels, tile.filters)
    tiles = ceil(g.K / tile.filters) * columns
    boxes = _covered(extents, box)
    on_load = tile.channels * (_ON_LOAD[launch.prologue] + (8 if flat else 0)) + tile.filters * _ON_LOAD[launch.gradient]
    part = tile.filters * tile.channels * 4 if tile.splits > 1 else 0
    group = max(8, ceil(tile.splits**0.5))  # the two levels of kernels/finish.py
    levels = min(group, tile.splits), ceil(tile.splits / group)
    pieces = ceil(tile.filters * tile.channels / 4096)  # a tile is joined piece by piece
    return _Work(
        tiles * tile.splits,
        ceil(boxes / tile.splits),
        2 * M * tile.filters * tile.channels,
        M * (tile.filters * (1 + reads_y) + tile.channels) * size,
        M * on_load,
        part or tile.filters * tile.channels * size,
        tile.filters * tile.channels * 2,
        2 * part * tiles * tile.splits,
        min(tile.filters, tile.channels),
        part * (sum(levels) + 1),
        sum(1 + pieces * ceil(level / SHARES_AT_ONCE) for level in levels) if part else 0,
    )


def tiles_of(launch: Launch, tile: Tile) -> int:
    """Tiles of the output of a conv, dgrad or wgrad."""
    return _product(launch, replace(tile, splits=1)).programs


def steps_of(launch: Launch, tile: Tile) -> float:
    """Steps of the main loop that a tile takes, of a dgrad on average."""
    return _product(launch, replace(tile, splits=1)).steps


def refetched(launch: Launch, tile: Tile, device: Device, held: int) -> int:
    """Bytes that come from memory more than once, since the L2 has let go of them; ``held``: programs of a multiprocessor.

    conv, dgrad: programs run band by band (:func:`..kernels.boxes.in_bands`), ``tile.group`` tiles of pixels by all tiles of
    filters. A band's pixels are read once if the L2 holds them beside a tile of filters, else by every wave of the band. The
    filters are read once if it holds them beside the band's pixels and results, else by every band (every wave, if one takes
    several bands). wgrad: all tiles of a share run before the next share. If that is more than a wave, each wave reads the
    share's pixels, from the L2 if it holds them.
    """
    size = dict(launch.sizes)
    wave = device.multiprocessors * held
    holds = L2_HOLDS * device.l2_mib * 2**20
    tiles = tiles_of(launch, tile)
    if launch.kind == "wgrad":
        pixels = sum(size.get(role, 0) for role in ("dz", "x", *(("y",) if launch.gradient == "bn_backward" else ())))
        return 0 if pixels / tile.splits <= holds else pixels * (ceil(tiles / wave) - 1)
    g = launch.geometry
    assert isinstance(g, Geometry)
    columns = ceil(g.K / tile.filters) if launch.kind == "conv" else ceil(g.C / tile.channels)
    rows = tiles // columns
    part = min(tile.group / rows, 1.0)
    reads = ("x",) if launch.kind == "conv" else ("dz", "y") if launch.gradient == "bn_backward" else ("dz",)
    pixels, filters = sum(size.get(role, 0) for role in reads), size.get("w", 0)
    others = sum(size.values()) - pixels - filters
    waves_of_band = ceil(min(tile.group, rows) * columns / wave)
    again = 0
    if part * pixels + filters / columns > holds:
        again += pixels * (waves_of_band - 1)
    if part * (pixels + others) + filters > holds:
        again += filters * (min(ceil(rows / tile.group), ceil(tiles / wave)) - 1)
    return again


def _strip(launch: Launch, strip: Strip) -> _Work:
    g = launch.geometry
    pixels = g.N * g.H * g.W if launch.kind == "max_pool_backward" else g.N * g.P * g.Q
    channels = g.y_shape[1]
    each = strip.pixels * strip.channels
    programs = ceil(pixels / (strip.pixels * strip.steps)) * ceil(channels / strip.channels)
    moved = launch.bytes / max(pixels * channels, 1)
    taps = prod(g.kernel) if isinstance(g, PoolGeometry) else 1
    instructions = 12 * taps if isinstance(g, PoolGeometry) else 14 if launch.kind.endswith("backward") else 10
    return _Work(programs, strip.steps, 0, each * moved, each * instructions, 0, 0)


def _matrix_share(device: Device, launch: Launch, work: _Work, tf32: bool) -> float:
    """Part of the matrix rate that the shape of a product allows: on Hopper shared memory gives 128 bytes a clock."""
    if device.arch == "sm_90" and (launch.dtype.itemsize < 4 or tf32):
        return {16: 0.3, 32: 0.6}.get(work.narrow, 0.95 if work.narrow == 64 else 1.0)
    return min(1.0, work.narrow / 64) if work.narrow < 64 else 0.9 if work.narrow == 64 else 1.0


def predict(
    launch: Launch,
    tile: Tile | Strip,
    device: Device,
    *,
    registers: int | None = None,
    shared: int | None = None,
    tf32: bool = False,
) -> Prediction:
    """What ``launch`` should take with ``tile`` on ``device``; ``registers``, ``shared``: of a compile, if there was one."""
    from .tile import Tile

    limit = limits(device.arch)
    if isinstance(tile, Tile):
        work = _product(launch, tile)
        registers = expected_registers(launch, tile, device.arch) if registers is None else registers
        if tile.splits > 1 and launch.kind != "wgrad":
            a_thread = ceil(tile_area(launch, tile) / (limit.warp * tile.num_warps))
            registers = max(registers, SHARES_AT_ONCE * a_thread + 12)
        shared = staged_bytes(launch, tile) * tile.num_stages if shared is None else shared
        stages, num_warps = tile.num_stages, tile.num_warps
    else:
        work = _strip(launch, tile)
        registers, shared, stages, num_warps = registers or 64, shared or 0, 2, tile.num_warps
    held, limited_by = resident(limit, registers, shared, num_warps)
    held = max(held, 1)

    clock = device.clock * 1e9
    units = device.multiprocessors
    matrix = (
        work.flops / (device.rate(launch.dtype, tf32) / units * _matrix_share(device, launch, work, tf32))
        if work.flops
        else 0.0
    )
    l2_rate = device.l2 * 1e12 / units
    vector_rate = device.vector * 1e12 / 2 / units  # instructions
    l2, vector = work.loaded / l2_rate, work.vector / vector_rate
    end = {"l2": work.end_bytes / l2_rate, "vector": work.end_vector / vector_rate}

    waves = work.programs / (units * held)
    together = min(held, ceil(work.programs / units))  # programs that really share a multiprocessor
    # A product whose operand passes through registers hides its vector work behind other warps' products, not its own.
    own = max(matrix, vector, l2) + 0.5 * (min(matrix, vector) if launch.kind in ("conv", "dgrad", "wgrad") else 0.0)
    step = max(together * own, LOAD_CYCLES / clock / max(stages - 1, 1))
    serial = ceil(waves) * (START_CYCLES / clock + work.steps * step + together * (end["l2"] + end["vector"]))
    turns = ceil(work.programs / units)
    resources = {
        "matrix": turns * work.steps * matrix,
        "l2": turns * (work.steps * l2 + end["l2"]),
        "vector": turns * (work.steps * vector + end["vector"]),
    }
    busiest = max(resources, key=lambda name: resources[name])
    overlapped = max(resources[busiest], turns * work.steps * own)
    on_chip = max(overlapped, overlapped + (serial - overlapped) / together)
    # The last program of a tile works alone: nobody else is left to hide what it waits for.
    on_chip += max(work.joined_turns * LOAD_CYCLES / clock, work.joined_bytes / l2_rate)
    memory_bytes = launch.bytes + int(work.extra_bytes)
    if isinstance(tile, Tile):
        memory_bytes += refetched(launch, tile, device, held)
    memory = memory_bytes / device.bandwidth
    seconds = max(on_chip, memory) + LAUNCH_SECONDS
    if memory >= on_chip:
        bound = "memory"
    elif resources[busiest] > 0.6 * on_chip:
        bound = busiest
    else:
        bound = "latency"
    if max(on_chip, memory) < LAUNCH_SECONDS:
        bound = "launch"
    flops = int(work.programs * work.steps * work.flops)
    return Prediction(
        seconds=seconds,
        bound=bound,
        programs=work.programs,
        resident=held,
        limited_by=limited_by,
        waves=waves,
        tail=1 - waves / ceil(waves),
        rim=flops / launch.flops - 1 if launch.flops else 0.0,
        flops=flops,
        memory_bytes=memory_bytes,
        l2_bytes=int(work.programs * (work.steps * work.loaded + work.end_bytes)),
        intensity=launch.flops / max(memory_bytes, 1),
    )


def roofline_seconds(flops: int, moved: int, device: Device, dtype: torch.dtype, tf32: bool = False) -> float:
    """A kernel at the device's sustained rates: the larger of its FLOPs' and its bytes' time, and a launch."""
    return max(flops / device.rate(dtype, tf32), moved / device.bandwidth) + LAUNCH_SECONDS
