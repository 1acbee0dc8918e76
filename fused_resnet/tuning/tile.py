"""The tile of a convolution launch, and the rule that chooses it. No Triton in here: a tile is data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, prod

import torch

from ..launch import Geometry, Launch


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
    """

    images: int
    rows: int
    columns: int
    filters: int
    channels: int
    num_warps: int = 4
    num_stages: int = 3
    group: int = 8

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


def power_of_two(size: int, low: int, high: int) -> int:
    """The smallest power of two that holds ``size``, between two powers of two."""
    return max(low, min(high, 1 << (max(size, 1) - 1).bit_length()))


def best_box(pixels: int, g: Geometry) -> tuple[int, int, int]:
    """Box (images, rows, columns) of ``pixels`` output pixels that covers the output of ``g`` at the least cost.

    Cost: pixels computed for each that exists (8x16 on 14x14 images computes 31% too much, on 28x28 too), plus an eighth of the
    input pixels read for each: a box of many images shares no halo between its taps, and the caches must do more. That gives
    2x8x8 for 56x56 and 7x7, 8x4x4 for 28x28 and 4x2x16 for 14x14.
    """

    def cost(box: tuple[int, int, int]) -> tuple[float, int]:
        images, rows, columns = box
        covered = ceil(g.N / images) * images * ceil(g.P / rows) * rows * ceil(g.Q / columns) * columns
        height = min((rows - 1) * g.stride[0] + (g.R - 1) * g.dilation[0] + 1, rows * g.R)  # a strided 1x1 skips rows
        width = min((columns - 1) * g.stride[1] + (g.S - 1) * g.dilation[1] + 1, columns * g.S)
        halo = height * width / (rows * columns * prod(g.stride))
        return covered / (g.N * g.P * g.Q) + halo / 8, -columns

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
       exact fp32 on NVIDIA, whose products run on the CUDA cores: with 128 bytes they spill (compiled, sm_80 to sm_100).
    2. 128 filters, fewer where there are fewer, by 128 pixels: each element loaded then takes part in 128 multiply-adds, which
       is what keeps the tensor cores busy from the L2. Half the filters for fp32, whose tiles are twice as large, and for
       grouped convolutions, where a wider tile only multiplies more zeros.
    3. While there are fewer programs than the device has multiprocessors, halve the larger side, down to 32 pixels and 64
       filters: the 7x7 layers at batch 1 have 49 pixels, and fewer than 64 rows (the filters) are no wgmma or tcgen05.
    4. The box with the least rim, see :func:`best_box`.
    5. Warps for 64 accumulators a thread, for 32 where other things want registers (fp32, addresses of flat loads, the exact
       branch of grouped tiles: all three spill otherwise). Stages as many as shared memory holds, at most 4.

    Depthwise convolutions have nothing to multiply matrices of: 64 pixels by 64 filters, so that loads are whole sectors.
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

    half = flat or (single and not tf32 and arch.startswith("sm_"))
    channels = power_of_two(_reduced_together(g, flat), 16, (512 if interpreted else 64 if half else 128) // itemsize)
    while not flat and channels > 32 and g.C % channels:
        channels //= 2
    filters = power_of_two(g.K, 16, 64 if g.groups > 1 or single else 128)
    pixels = power_of_two(g.N * g.P * g.Q, 16, 512 if interpreted else 64 if g.groups == g.C > 1 else 128)

    def tile() -> Tile:
        return Tile(*best_box(pixels, g), filters, channels)

    while tile().programs(g) < device.programs and (pixels > 32 or filters > 64):
        if pixels > 32 and (pixels >= filters or filters <= 64):
            pixels //= 2
        else:
            filters //= 2

    warps = power_of_two(pixels * filters // (32 * (32 if single or flat or g.groups > 1 else 64)), 4, 8)
    stages = max(2, min(4, device.shared * 1024 // tile().stage_bytes(launch.dtype)))
    return replace(tile(), num_warps=warps, num_stages=stages)


def _reduced_together(g: Geometry, flat: bool) -> int:
    """How many elements of the reduction a step could load at once."""
    if flat:
        return g.R * g.S * g.C
    return g.C if g.groups == 1 else max(g.C // g.groups, min(64, g.C))
