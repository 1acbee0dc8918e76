"""Runs launches as Triton kernels: on a GPU, or on CPU tensors through Triton's interpreter.

A launch becomes a :class:`Start` once (which kernel, which loaders, which tile, how many programs; cached), and a start becomes
a kernel's arguments on every call (which tensors). :mod:`.triton_compile` gives the same ones to the compiler, ahead of time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, prod
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels import boxes, conv, epilogues, pool, prologues
from ..launch import Geometry, Launch, PoolGeometry
from ..tuning import Tile, choose_tile
from . import record_kernel
from .derived import channels_last_filters

_KINDS = ("conv", "max_pool")
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


def supports(launch: Launch) -> str | None:
    """None, or why there is no kernel for the launch."""
    if launch.kind not in _KINDS:
        return f"no Triton kernel for {launch.kind!r} yet"
    if launch.dtype not in _DTYPES:
        return f"the Triton kernels compute in fp32, fp16 and bf16, not in {str(launch.dtype).removeprefix('torch.')}"
    if launch.kind == "conv":
        known = launch.prologue in prologues.PROLOGUES and launch.epilogue in epilogues.EPILOGUES
        if not known or launch.activation not in epilogues.ACTIVATIONS:
            return f"no Triton kernel for {launch.prologue} + conv + {launch.epilogue} + {launch.activation} yet"
    return None


def run(
    launch: Launch,
    operands: Mapping[str, Tensor],
    donated: Collection[str] = (),
    *,
    tile: Tile | None = None,
    out: Tensor | None = None,
    wide: bool | None = None,
) -> Tensor:
    """Run a launch: one kernel, no other allocation than the output, no synchronisation.

    Args:
        launch: of kind ``conv`` or ``max_pool``.
        operands: tensors by role. ``x`` and ``shortcut`` are channels_last, ``w`` is contiguous as [K, R, S, C / groups].
        donated: roles whose memory nobody reads afterwards (not used: a kernel never overwrites what it reads).
        tile: instead of the analytical rule's (tests, tuning).
        out: channels_last tensor to write, instead of a new one.
        wide: force 64-bit or 32-bit offsets (tests), instead of what the sizes need.

    Returns:
        [N, K, P, Q], channels_last, of the launch's type.
    """
    x = operands["x"]
    if "w" in operands:
        operands = {**operands, "w": channels_last_filters(operands["w"])}
    if out is None:
        out = torch.empty(launch.geometry.y_shape, dtype=launch.dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    aligned = all(operands[role].data_ptr() % 16 == 0 for role in ("x", "w") if role in operands)
    start = plan_start(launch, arch_of(x.device), tile, aligned, tf32_allowed(launch.dtype, x.device), wide)
    arguments = bind(start, launch, operands, out)
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            _start(start, arguments)
    else:
        _start(start, arguments)
    return out


@dataclass(frozen=True)
class Start:
    """All of a kernel start that does not change from call to call.

    Attributes:
        kernel: the ``@triton.jit`` function.
        programs: size of the grid.
        constants: its compile-time arguments.
        sizes: extents as the kernel sees them (a pointwise convolution has one long row).
        x_view, w_view: shape, strides and block of the descriptors of x and w; None for plain pointers.
        num_warps, num_stages: for the compiler.
    """

    kernel: Any
    programs: int
    constants: Mapping[str, Any]
    sizes: Any
    x_view: View | None
    w_view: View | None
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class View:
    """A tensor as a descriptor sees it: extents and strides in elements, slowest first, and the block loaded at once."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]

    def of(self, base: Tensor) -> Any:
        """The descriptor of ``base``."""
        return TensorDescriptor(base, list(self.shape), list(self.strides), list(self.block))


def _start(start: Start, arguments: dict[str, Any]) -> None:
    """Where every kernel is started."""
    start.kernel[(start.programs,)](**arguments, num_warps=start.num_warps, num_stages=start.num_stages)
    record_kernel(start.kernel.__name__)


@lru_cache(maxsize=64)
def arch_of(device: torch.device) -> str:
    """``sm_90``, ``gfx942`` ... or ``interpreter``: what tiles are chosen for."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def tf32_allowed(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch's settings let cuDNN convolutions of fp32 tensors round their operands to tf32.

    ``torch.backends.cudnn.conv.fp32_precision`` is what both the older ``torch.backends.cudnn.allow_tf32`` and the settings
    above it end in; reading the older one raises once somebody has used the newer ones.
    """
    if dtype != torch.float32 or device.type != "cuda" or torch.version.hip:
        return False
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def needs_wide_offsets(*shapes: tuple[int, ...]) -> bool:
    """Whether any tensor has 2^31 elements or more."""
    return any(prod(shape) >= 1 << 31 for shape in shapes)


@lru_cache(maxsize=4096)
def plan_start(
    launch: Launch, arch: str, tile: Tile | None = None, aligned: bool = True, tf32: bool = False, wide: bool | None = None
) -> Start:
    """How a launch is started on ``arch``. ``aligned``: x and w start at a multiple of 16 bytes."""
    if launch.kind == "max_pool":
        return _plan_pool(launch, arch, wide)
    return _plan_conv(launch, tile or choose_tile(launch, arch, tf32), aligned and has_tma(arch), tf32, wide)


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
    if not g.pointwise or pixels >= 1 << 31:
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
    if pixels == "box":
        x_view = View((N, H, W, C), (H * W * C, W * C, C, 1), (tile.images, tile.rows, tile.columns, tile.channels))
    elif pixels == "parity":
        x_view = View(
            (N, H // 2, 2, W // 2, 2 * C),
            (H * W * C, 2 * W * C, W * C, 2 * C, 1),
            (tile.images, tile.rows, 1, tile.columns, tile.channels),
        )
    if filters == "matrix":
        length = g.R * g.S * (C // g.groups)
        w_view = View((g.K, length), (length, 1), (tile.filters, tile.channels))
    constants = {
        "PROLOGUE": prologues.PROLOGUES[launch.prologue][0],
        "EPILOGUE": epilogues.EPILOGUES[launch.epilogue][0],
        "ACTIVATION": epilogues.ACTIVATIONS[launch.activation],
        "PIXELS": boxes.PIXELS[pixels] if pixels else None,
        "FILTERS": boxes.FILTERS[filters] if filters else None,
        "TAPS": boxes.Taps(g.R, g.S, *g.stride, *g.padding, *g.dilation, *per_group),
        "TILE": tile,
        "PIXELS_FIRST": launch.prologue != "identity",
        "FLAT": pixels == "flat",
        "SPANS": filters == "block_diagonal",
        "PRECISION": "tf32" if tf32 else "ieee",
        "WIDE": needs_wide_offsets(g.x_shape, g.w_shape, g.y_shape) if wide is None else wide,
    }
    sizes = boxes.Sizes(N, H, W, C, g.K, g.P, g.Q)
    return Start(conv.conv_forward, tile.programs(g), constants, sizes, x_view, w_view, tile.num_warps, tile.num_stages)


def _plan_pool(launch: Launch, arch: str, wide: bool | None) -> Start:
    g = launch.geometry
    assert isinstance(g, PoolGeometry)
    channels = min(64, 1 << (g.C - 1).bit_length())
    pixels = (16384 if arch == "interpreter" else 2048) // channels
    constants = {
        "TAPS": boxes.Taps(*g.kernel, *g.stride, *g.padding, *g.dilation),
        "PIXELS": pixels,
        "CHANNELS": channels,
        "WIDE": needs_wide_offsets(g.x_shape, g.y_shape) if wide is None else wide,
    }
    programs = ceil(g.N * g.P * g.Q / pixels) * ceil(g.C / channels)
    sizes = boxes.Sizes(g.N, g.H, g.W, g.C, g.C, g.P, g.Q)
    return Start(pool.max_pool, programs, constants, sizes, None, None, 4, 1)


def bind(start: Start, launch: Launch, operands: Mapping[str, Tensor], out: Tensor) -> dict[str, Any]:
    """A kernel's arguments by name, in the kernel's order."""
    x = operands["x"]
    if launch.kind == "max_pool":
        return {"x": x, "y": out, "sizes": start.sizes, **start.constants}
    w = operands["w"]
    named: dict[str, Any] = {role: tensor.contiguous() if tensor.dim() == 1 else tensor for role, tensor in operands.items()}
    named |= {"eps": launch.eps, "C": start.sizes.C}
    constants = start.constants
    return {
        "x": x if start.x_view is None else start.x_view.of(x),
        "w": w if start.w_view is None else start.w_view.of(w),
        "y": out,
        "sizes": start.sizes,
        "exact": (x, w) if constants["SPANS"] or constants["PIXELS"] is None else None,
        "prologue_args": tuple(named.get(name) for name in prologues.PROLOGUES[launch.prologue][1]),
        "epilogue_args": tuple(named.get(name) for name in epilogues.EPILOGUES[launch.epilogue][1]),
        **constants,
    }
