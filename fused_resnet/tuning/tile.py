"""The tile of a convolution launch, and the rule that chooses it. No Triton in here: a tile is data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, prod

import torch

from ..launch import Geometry, Launch
from .classes import EXPONENTIAL


@dataclass(frozen=True)
class Tile:
    """What one program computes, and with what.

    Attributes:
        images, rows, columns: the box of output pixels; each a power of two, together M.
        filters: output channels, a power of two of at least 16.
        channels: input channels (or, for flat loads, elements of the reduction) a step, a power of two of at least 16.
        num_warps: warps (wavefronts on AMD) of a program.
        num_stages: steps whose loads are in flight at once.
        group: pixel tiles that go through all filters before the next ones start (what the L2 holds).
        splits: programs that share the sum of one tile: of a weights' gradient its pixels, else steps of the main loop.

    In the gradients (:func:`choose_gradient_tile`) the extents are of the same axes in other parts. dgrad: a box of *input*
    pixels (of one class, see kernels/dgrad.py) by ``channels``, ``filters`` a step. wgrad: ``filters`` by ``channels``, a box
    of output pixels a step.
    """

    images: int
    rows: int
    columns: int
    filters: int
    channels: int
    num_warps: int = 4
    num_stages: int = 3
    group: int = 8
    splits: int = 1

    @property
    def pixels(self) -> int:
        """Output pixels, the M of the product."""
        return self.images * self.rows * self.columns

    def programs(self, geometry: Geometry) -> int:
        """Programs that cover an output."""
        box = (self.images, self.rows, self.columns, self.filters)
        return prod(ceil(size / step) for size, step in zip((geometry.N, geometry.P, geometry.Q, geometry.K), box, strict=True))

    def stage_bytes(self, dtype: torch.dtype) -> int:
        """Shared memory of one step's two tiles."""
        return (self.pixels + self.filters) * self.channels * dtype.itemsize


@dataclass(frozen=True)
class Strip:
    """What one program computes: ``steps`` times ``pixels`` pixels by ``channels`` channels, with ``num_warps`` warps."""

    pixels: int
    channels: int
    steps: int = 1
    num_warps: int = 4


@dataclass(frozen=True)
class Arch:
    """What the rule knows of a device: shared memory a program may use, in KiB, and programs wanted to fill it."""

    shared: int
    programs: int


#: Vendors' data sheets; the programs are multiprocessors (compute units) of the family's largest common part.
ARCHS: dict[str, Arch] = {
    "sm_75": Arch(64, 72),
    "sm_80": Arch(163, 108),
    "sm_86": Arch(99, 84),
    "sm_87": Arch(163, 16),
    "sm_89": Arch(99, 128),
    "sm_90": Arch(227, 132),
    "sm_100": Arch(227, 148),
    "sm_103": Arch(227, 148),
    "sm_120": Arch(99, 170),
    "gfx90a": Arch(64, 104),
    "gfx942": Arch(64, 304),
    "gfx950": Arch(160, 256),
    "interpreter": Arch(1 << 20, 1),
}
_UNKNOWN = Arch(64, 64)
#: Shared memory in KiB that loads with work behind them may take on AMD: they wait in registers (compiled, gfx950: a 1x1 with a
#: BatchNorm in front spills 76 bytes with 80 KiB, none with 64).
WORKED_ON_AMD = 64
#: Loads by pointers with cp.async, products by mma.sync from registers.
AMPERE = ("sm_80", "sm_86", "sm_87", "sm_89")
#: Where a product is made by four warps together, 64 rows at least.
WARPGROUPS = ("sm_90", "sm_100", "sm_103")
BLACKWELL = ("sm_100", "sm_103", "sm_120")


def power_of_two(size: int, low: int, high: int) -> int:
    """The smallest power of two that holds ``size``, between two powers of two."""
    return max(low, min(high, 1 << (max(size, 1) - 1).bit_length()))


def best_box(pixels: int, g: Geometry) -> tuple[int, int, int]:
    """Box (images, rows, columns) of ``pixels`` output pixels that covers the output of ``g`` at the least cost.

    Cost: pixels computed for each that exists (8x16 on 14x14 images computes 31% too much, on 28x28 too). Each is loaded from
    the L2 anew for every tap, whatever the box, so what the taps of a box share decides only between boxes of about one cover:
    a 64th of the input pixels under them. That gives 2x8x8 for 56x56, 8x4x4 for 28x28, 32x2x2 for 14x14 and, in large batches,
    one pixel of 128 images for 7x7: it is loaded in rows of 128 bytes like any other.
    """

    def cost(box: tuple[int, int, int]) -> tuple[float, int]:
        images, rows, columns = box
        covered = ceil(g.N / images) * images * ceil(g.P / rows) * rows * ceil(g.Q / columns) * columns
        height = min((rows - 1) * g.stride[0] + (g.R - 1) * g.dilation[0] + 1, rows * g.R)  # a strided 1x1 skips rows
        width = min((columns - 1) * g.stride[1] + (g.S - 1) * g.dilation[1] + 1, columns * g.S)
        halo = height * width / (rows * columns * prod(g.stride))
        return covered / (g.N * g.P * g.Q) + halo / 64, -columns

    powers = [1 << i for i in range(pixels.bit_length())]
    return min(
        ((pixels // (rows * columns), rows, columns) for rows in powers for columns in powers if rows * columns <= pixels),
        key=cost,
    )


@lru_cache(maxsize=4096)
def choose_tile(launch: Launch, arch: str, tf32: bool = False) -> Tile:
    """The tile of a convolution.

    Args:
        launch: of kind ``conv``.
        arch: ``sm_90``, ``gfx942`` ... or ``interpreter``.
        tf32: whether fp32 may be multiplied as tf32.

    The rule, in its order:

    1. A step loads 128 bytes of channels (one swizzled row of shared memory), fewer where there are fewer channels, or where
       that makes the chunk divide them. Half of it for flat loads, whose every element has an address in registers, and for
       exact fp32 on NVIDIA, whose products run on the CUDA cores: with 128 bytes they spill (compiled, sm_80 to sm_100). So do
       (8 to 24 bytes) given statistics on load on Blackwell, and grouped tiles on sm_120. A quarter for flat loads of 16 bits
       in front of statistics on sm_80 and sm_120 (half: 16 and 8 bytes spilled).
    2. 128 filters, fewer where there are fewer, by 128 pixels: each element loaded then takes part in 128 multiply-adds, which
       is what keeps the tensor cores busy from the L2. Half the filters for fp32, whose tiles are twice as large, and for
       grouped convolutions, where a wider tile only multiplies more zeros.
    3. While there are fewer programs than the device has multiprocessors, halve the larger side, down to 32 pixels and 64
       filters: the 7x7 layers at batch 1 have 49 pixels, and fewer than 64 rows (the filters) are no wgmma or tcgen05.
    4. The box with the least rim, see :func:`best_box`.
    5. Warps for 64 accumulators a thread, for 32 where other things want registers (fp32, addresses of flat loads, the exact
       branch of grouped tiles: all three spill otherwise; a prologue: 128 registers instead of 204 to 255). But for 64 where
       statistics follow fp32 tiles that pointers load: with 8 warps the compiler stops at 128 registers and spills a few. For
       16 where they follow a depthwise convolution, and for grouped tiles with a prologue: 74 to 112 registers instead of 116
       to 166 (Triton 3.8), and with Triton 3.6 none of the 160 bytes that it spills on sm_80. (Not of exact fp32 on sm_120,
       which spills 8 bytes so.)
       Stages as many as shared memory holds, at most :func:`_most_stages`.

    Depthwise convolutions have nothing to multiply matrices of: 64 pixels by 64 filters, so that loads are whole sectors. That
    tile for grouped ones with a prologue too, whose exact branch has it twice. 64 pixels with an exponential on load
    (GELU, sm_80: 456 bytes spilled with 128), on AMD by 4 warps, each with up to 512 registers a lane (8: 832 bytes).
    The interpreter pays by the program and step, not by the element: larger tiles there.
    """
    g = launch.geometry
    assert isinstance(g, Geometry)
    device = ARCHS.get(arch, _UNKNOWN)
    interpreted = arch == "interpreter"
    itemsize = launch.dtype.itemsize
    single = itemsize == 4 and not interpreted
    flat = g.groups == 1 and g.C * itemsize % 16 != 0
    if g.pointwise:
        g = replace(g, N=1, H=1, W=g.N * g.H * g.W)

    given = arch in BLACKWELL and "x_var" in launch.roles
    grouped = arch == "sm_120" and 1 < g.groups < g.C
    half = flat or (single and not tf32 and arch.startswith("sm_")) or given or grouped
    quarter = flat and itemsize == 2 and launch.epilogue == "stats" and arch in ("sm_80", "sm_120")
    most = 512 if interpreted else 32 if quarter else 64 if half else 128
    channels = power_of_two(_reduced_together(g, flat), 16, most // itemsize)
    while not flat and channels > 32 and g.C % channels:
        channels //= 2
    filters = power_of_two(g.K, 16, 64 if g.groups > 1 or single else 128)
    exponential = launch.x_activation in EXPONENTIAL and not interpreted
    low = exponential or (g.groups > 1 and (g.groups == g.C or launch.prologue != "identity"))
    pixels = power_of_two(g.N * g.P * g.Q, 16, 512 if interpreted else 64 if low else 128)

    def tile() -> Tile:
        return Tile(*best_box(pixels, g), filters, channels)

    while tile().programs(g) < device.programs and (pixels > 32 or filters > 64):
        if pixels > 32 and (pixels >= filters or filters <= 64):
            pixels //= 2
        else:
            filters //= 2

    crowded = single or flat or g.groups > 1 or launch.prologue != "identity"
    if launch.epilogue == "stats" and single and g.groups == 1 and (tf32 if flat else arch in AMPERE):
        crowded = False
    each = 32 if crowded else 64
    branched = 1 < g.groups < g.C and launch.prologue != "identity" and not (single and not tf32 and arch == "sm_120")
    if branched or (launch.epilogue == "stats" and g.groups == g.C > 1):
        each = 16
    warps = 4 if exponential and arch.startswith("gfx") else power_of_two(pixels * filters // (32 * each), 4, 8)
    most = _most_stages(launch, arch, tf32)
    stages = max(2, min(most, _room(launch, arch) * 1024 // tile().stage_bytes(launch.dtype)))
    return replace(tile(), num_warps=warps, num_stages=stages)


def _most_stages(launch: Launch, arch: str, tf32: bool) -> int:
    """Steps whose loads are in flight at once, at most.

    Four; two where a gradient reads y on AMD, whose loads wait in registers, and of exact fp32 where a warpgroup multiplies:
    behind an exponential on load, and in 1x1 gradients that read y on Blackwell (8 bytes are spilled otherwise, compiled).
    """
    reads_y = launch.gradient == "bn_backward"
    if arch.startswith("gfx"):
        return 2 if reads_y else 4
    exact = launch.dtype == torch.float32 and not tf32 and arch in WARPGROUPS
    g = launch.geometry
    assert isinstance(g, Geometry)
    of_one_tap = reads_y and arch in BLACKWELL and g.R == g.S == 1
    return 2 if exact and (of_one_tap or (launch.kind == "conv" and launch.x_activation in EXPONENTIAL)) else 4


def _room(launch: Launch, arch: str) -> int:
    """Shared memory in KiB for the loads of a convolution."""
    shared = ARCHS.get(arch, _UNKNOWN).shared
    return min(shared, WORKED_ON_AMD) if arch.startswith("gfx") and launch.prologue != "identity" else shared


def _reduced_together(g: Geometry, flat: bool) -> int:
    """How many elements of the reduction a step could load at once."""
    if flat:
        return g.R * g.S * g.C
    return g.C if g.groups == 1 else max(g.C // g.groups, min(64, g.C))


@lru_cache(maxsize=4096)
def choose_gradient_tile(launch: Launch, arch: str, tf32: bool = False) -> Tile:
    """The tile of a ``dgrad`` or ``wgrad``; its arguments are those of :func:`choose_tile`.

    Both products are at most 128 by 128, 64 on the sides that :func:`choose_tile` halves, and for the same reasons.

    * dgrad: that rule with channels and filters exchanged, over the pixels of one class. Grouped ones with BatchNorm's backward
      on load: half the pixels, 16 accumulators a thread (86 to 128 registers instead of 143 to 188; Triton 3.6 spills 260 to
      420 bytes otherwise), and of tf32 on Ampere half the filters a step (8 bytes).
    * wgrad: 64 pixels a step, 32 of fp32 and where dy is made on load with addresses in registers (no descriptors). The pixels
      are split so that the programs fill the device once, each with at least 4 steps: what the last program adds up grows with
      the splits.
    * Exact fp32 on NVIDIA: half the pixels of dgrad (on sm_120 of tf32 with a stride, too), 16 accumulators a thread in wgrad,
      8 of half its channels where x has given statistics. On AMD, where loads in flight wait in registers, 2 stages where y is
      read too (:func:`_most_stages`). All of these spill otherwise (compiled).
    """
    g = launch.geometry
    assert isinstance(g, Geometry)
    device = ARCHS.get(arch, _UNKNOWN)
    interpreted = arch == "interpreter"
    itemsize = launch.dtype.itemsize
    single = itemsize == 4 and not interpreted
    wide = 64 if g.groups > 1 or single else 128
    reads_y = launch.gradient == "bn_backward"
    branched = launch.kind == "dgrad" and 1 < g.groups < g.C and reads_y
    exact = single and not tf32 and arch.startswith("sm_")
    descriptors = interpreted or (arch.startswith("sm_") and int(arch[3:]) >= 90)
    if g.pointwise:
        g = replace(g, N=1, H=1, W=g.N * g.H * g.W)
    if launch.kind == "wgrad":
        flat = g.groups == 1 and g.C * itemsize % 16 != 0
        filters = power_of_two(g.K, 16, wide)
        channels = power_of_two(
            _reduced_together(g, flat), 16, 32 if exact and "x_var" in launch.roles else 64 if flat else wide
        )
        while not flat and channels > 32 and g.C % channels:
            channels //= 2
        pixels = power_of_two(g.N * g.P * g.Q, 16, 512 if interpreted else 64)
        if single or (reads_y and not descriptors):
            pixels = min(pixels, 32)
        tile = Tile(*best_box(pixels, g), filters, channels)
        per_filter = g.R * g.S * (ceil(g.C // g.groups / channels) if not flat else 1)
        tiles = ceil(g.K / filters) * (ceil(g.R * g.S * g.C / channels) if flat else per_filter)
        steps = prod(ceil(n / m) for n, m in zip((g.N, g.P, g.Q), (tile.images, tile.rows, tile.columns), strict=True))
        splits = max(1, min(device.programs // tiles, steps // 4))
        staged = (filters * (1 + reads_y) + channels) * pixels * itemsize
        size = filters * channels
    else:
        together = g.K if g.groups == 1 else max(g.K // g.groups, min(64, g.K))
        half = exact or (branched and single and arch in AMPERE)
        filters = power_of_two(together, 16, (512 if interpreted else 64 if half else 128) // itemsize)
        while filters > 32 and g.K % filters:
            filters //= 2
        channels = power_of_two(g.C, 16, wide)
        rows, columns = (ceil(size / stride) for size, stride in zip((g.H, g.W), g.stride, strict=True))
        r, s = (ceil(size / stride) for size, stride in zip((g.R, g.S), g.stride, strict=True))
        # The pixels of one class as the output of a convolution of stride 1.
        one = Geometry(g.N, rows + r - 1, columns + s - 1, g.K, g.C, r, s)
        low = exact or branched or g.groups == g.C > 1 or (single and arch == "sm_120" and g.stride != (1, 1))
        pixels = power_of_two(g.N * rows * columns, 16, 512 if interpreted else 64 if low else 128)

        def programs() -> int:
            box = (*best_box(pixels, one), channels)
            return prod(g.stride) * prod(ceil(n / m) for n, m in zip((g.N, rows, columns, g.C), box, strict=True))

        while programs() < device.programs and (pixels > 32 or channels > 64):
            if pixels > 32 and (pixels >= channels or channels <= 64):
                pixels //= 2
            else:
                channels //= 2
        tile, splits = Tile(*best_box(pixels, one), filters, channels), 1
        staged = (pixels * (1 + reads_y) + channels) * filters * itemsize
        size = pixels * channels
    if exact and launch.kind == "wgrad":
        a_thread = 8 if "x_var" in launch.roles else 16
    elif branched:
        a_thread = 16
    else:
        a_thread = 32 if single or g.groups > 1 or reads_y else 64
    warps = power_of_two(size // (32 * a_thread), 4, 8)
    stages = max(2, min(_most_stages(launch, arch, tf32), device.shared * 1024 // staged))
    return replace(tile, num_warps=warps, num_stages=stages, splits=splits)


def shaped(launch: Launch, rows: int, columns: int, num_warps: int, arch: str) -> Tile | None:
    """A tile whose product is ``rows`` by ``columns``, of a 16-bit launch without groups: its box, its chunk, its stages.

    ``rows``: pixels (wgrad: filters). ``columns``: filters (dgrad, wgrad: channels). None where the operands' extents make no
    sense of it (more than twice what there is), shared memory does not hold two stages, or a whole warpgroup multiplies and the
    rows that come first are fewer than its 64: Triton then takes the instructions of older devices (compiled, sm_90, wgrad).

    On Blackwell always 8 warps with an exponential or given statistics on load: 64 by 64 (SiLU) spills 16 bytes with 4, 64 by
    128 (wgrad) 24 with Triton 3.6 (compiled; with Triton 3.8 they take 141 and 166 registers with 4, 80 and 125 with 8).
    """
    g = launch.geometry
    assert isinstance(g, Geometry)
    rows_first = launch.kind == "wgrad" or launch.prologue != "identity" or launch.gradient != "identity"
    if arch in WARPGROUPS and rows_first and rows < 64:
        return None
    if g.pointwise:
        g = replace(g, N=1, H=1, W=g.N * g.H * g.W)
    reads_y = launch.gradient == "bn_backward"

    def chunk(extent: int) -> int:
        size = power_of_two(extent, 16, 64)
        while size > 32 and extent % size:
            size //= 2
        return size

    if launch.kind == "wgrad":
        if rows >= 2 * g.K or columns >= 2 * g.C or (g.R * g.S > 1 and g.C % columns):
            return None
        tile = Tile(*best_box(64, g), rows, columns)
        staged = (rows * (1 + reads_y) + columns) * 64
    elif launch.kind == "dgrad":
        height, width = (ceil(size / stride) for size, stride in zip((g.H, g.W), g.stride, strict=True))
        r, s = (ceil(size / stride) for size, stride in zip((g.R, g.S), g.stride, strict=True))
        one = Geometry(g.N, height + r - 1, width + s - 1, g.K, g.C, r, s)
        if columns >= 2 * g.C or (g.R * g.S > 1 and g.C % columns):
            return None
        tile = Tile(*best_box(rows, one), chunk(g.K), columns)
        staged = (rows * (1 + reads_y) + columns) * tile.filters
    else:
        if columns >= 2 * g.K:
            return None
        tile = Tile(*best_box(rows, g), columns, chunk(g.C))
        staged = (rows + columns) * tile.channels
    stages = _room(launch, arch) * 1024 // (staged * launch.dtype.itemsize)
    if stages < 2:
        return None
    worked = launch.x_activation in EXPONENTIAL or "x_var" in launch.roles
    warps = 8 if arch in BLACKWELL and worked else num_warps
    return replace(tile, num_warps=warps, num_stages=min(stages, _most_stages(launch, arch, tf32=True)))


def choose_strip(launch: Launch, arch: str) -> Strip:
    """The strip of a launch.

    2048 elements a step, 1024 of fp32: 16 (8) a thread, loaded 16 bytes at a time; 1024, too, where a max-pooling applies an
    exponential to each tap (2048 spill 240 bytes, compiled), and in its backward (behind a BatchNorm 2048 spill 8 bytes on
    sm_90); 512 where the two meet (1024 spill 8 bytes on sm_80 and sm_120). Up to 256 channels, so that a row of a strip is
    whole sectors. Reductions take up to 16 steps, fewer while that would leave less than 16 programs a multiprocessor: each
    step but the first saves a row of partials. The interpreter pays by the program: all in one step there.
    """
    g = launch.geometry
    channels = power_of_two(g.y_shape[1], 1, 256)
    if arch == "interpreter":
        return Strip(max(1, 16384 // channels), channels)
    crowded = launch.kind == "max_pool_backward" or (launch.kind == "max_pool" and launch.x_activation in EXPONENTIAL)
    elements = 1024 if launch.dtype.itemsize == 4 or crowded else 2048
    if launch.kind == "max_pool_backward" and launch.activation in EXPONENTIAL:
        elements = 512
    if launch.kind in ("conv_end", "dgrad_end", "statistics") and len(launch.outputs) > 1:
        return Strip(4 * elements // channels, channels, num_warps=8)  # a row of partials for each strip: fewer, larger ones
    steps = 1
    if launch.kind.endswith("backward") and launch.kind != "zero_pad_backward":
        least = 16 * (ARCHS[arch].programs if arch in ARCHS else 64)
        steps = power_of_two(covered(launch) * g.y_shape[1] // (elements * least) // 2, 1, 16)
    return Strip(elements // channels, channels, steps)


def covered(launch: Launch) -> int:
    """Pixels that the programs of a launch share: of the output, or of the input where its gradient is all they make."""
    g = launch.geometry
    return g.N * g.H * g.W if launch.kind in ("max_pool_backward", "zero_pad_backward") else g.N * g.P * g.Q
