"""Which tiles an architecture can be given, from compiles: registers and spills of each kind of launch, tile by tile.

``registers.json`` is made by ``python tools/tile_registers.py`` (Triton's compiler, no GPU), for 16-bit operands of ungrouped
convolutions with aligned channels. Launches of other kinds keep the tile of the rule in :mod:`.tile`, which was compiled for
them one by one.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

from ..launch import Geometry, Launch

DATA = Path(__file__).with_name("registers.json")

#: Products of a program (pixels by filters; dgrad: pixels by channels; wgrad: filters by channels) and warps that are tried.
SHAPES: tuple[tuple[int, int, int], ...] = (
    (32, 64, 4),
    (64, 64, 4),
    (128, 64, 4),
    (64, 128, 4),
    (128, 64, 8),
    (64, 128, 8),
    (128, 128, 4),
    (128, 128, 8),
    (256, 64, 8),
    (64, 256, 8),
    (256, 128, 8),
    (128, 256, 8),
)

#: Architectures whose compiles stand for others of the same instructions, or nearly: sm_120 has TMA too, gfx950 longer MFMA.
STANDS_FOR = {"sm_86": "sm_80", "sm_87": "sm_80", "sm_89": "sm_80", "sm_103": "sm_100", "sm_120": "sm_80", "gfx950": "gfx942"}


def class_of(launch: Launch) -> str | None:
    """The kind of a launch as far as registers go; None where no compiles speak for it."""
    g = launch.geometry
    if not isinstance(g, Geometry) or g.groups != 1 or launch.dtype not in (torch.float16, torch.bfloat16):
        return None
    if g.C * launch.dtype.itemsize % 16 or g.K * launch.dtype.itemsize % 16:
        return None
    taps = "1x1" if g.R * g.S == 1 else "RxS"
    prologue = launch.prologue if launch.prologue in ("identity", "bn") else "bn_relu"  # stands for the other activations
    return f"{launch.kind} {prologue}/{launch.gradient}/{launch.epilogue} {taps}"


@cache
def _compiled() -> dict[str, dict[str, dict[str, list[int]]]]:
    if not DATA.exists():
        return {}
    data: dict[str, dict[str, dict[str, list[int]]]] = json.loads(DATA.read_text(encoding="utf-8"))["compiled"]
    return data


#: Registers up to which a tile is taken. What needs more is one constant or stage away from a spill (1x1 on sm_80, 128x256: 255
#: registers and 0 bytes with 3 stages, 8 bytes with 2).
MOST_REGISTERS = 240
#: CDNA gives a lane of four warps 512 registers (1x1 behind a BatchNorm with statistics: 284 and no spill with 4 warps, 256 and
#: 176 bytes with 8).
MOST_REGISTERS_CDNA = 480
#: Activations that need a handful of registers for each element they work on; the compiler takes several at a time.
EXPONENTIAL = frozenset(("silu", "gelu", "gelu_tanh"))
#: Accumulators a thread up to which a tile is taken where one of these is at the end of a convolution; half of it where it is
#: on load or differentiated. (Compiled: 1x1 with 1024 filters and SiLU at its end, 128 a thread, spills 56 bytes on sm_100;
#: with SiLU on load, 64 a thread, 32 bytes on sm_80; dgrad in front of one, 64 a thread, 16 on sm_90. ReLU has none there.)
MOST_BESIDE_EXPONENTIALS = 64


def registers_of(launch: Launch, arch: str) -> dict[tuple[int, int, int], int]:
    """(rows, columns, warps) of a product -> registers a thread, for the tiles that compiled with room to spare."""
    of_arch = _compiled().get(STANDS_FOR.get(arch, arch), {})
    rows = of_arch.get(class_of(launch) or "", {})
    registers_left = MOST_REGISTERS_CDNA if arch.startswith("gfx9") else MOST_REGISTERS
    found = {}
    most = 1 << 10
    if launch.x_activation in EXPONENTIAL or (launch.kind == "dgrad" and launch.activation in EXPONENTIAL):
        most = MOST_BESIDE_EXPONENTIALS // 2
    elif launch.activation in EXPONENTIAL:
        most = MOST_BESIDE_EXPONENTIALS
    for name, (registers, spills) in rows.items():
        if spills == 0 and registers <= registers_left:
            m, n, warps = (int(part) for part in name.split("x"))
            if m * n <= most * 32 * warps:
                found[m, n, warps] = registers
    return found
