"""Compiles every kind of launch with every shape of tile; writes registers and spills to fused_resnet/tuning/registers.json.

``python tools/tile_registers.py [sm_90 ...] [--only "wgrad identity"]``: some architectures, all by default; about ten minutes
each on a core, less for only those kinds of launches that start so.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton

from fused_resnet.backends.triton_compile import compile_launch
from fused_resnet.launch import DGRAD_EPILOGUES, EPILOGUES, GRADIENTS, PROLOGUES, Geometry, Launch
from fused_resnet.tuning.classes import DATA, SHAPES, class_of
from fused_resnet.tuning.devices import limits
from fused_resnet.tuning.tile import shaped

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
#: An odd batch, so that there is a rim; sizes that are no multiples of the box.
_1x1 = Geometry(51, 14, 14, 256, 1024, 1, 1)
_3x3 = Geometry(51, 14, 14, 256, 256, 3, 3, padding=(1, 1))
#: In front of statistics also boxes of many images, and of large ones, which take other registers: what takes most counts.
_OTHERS: dict[Any, tuple[Geometry, ...]] = {
    _1x1: (Geometry(301, 28, 28, 512, 1024, 1, 1, stride=(2, 2)),),
    _3x3: (Geometry(301, 7, 7, 512, 512, 3, 3, padding=(1, 1)), Geometry(51, 56, 56, 64, 256, 3, 3, padding=(1, 1))),
}


def _launch(kind: str, g: Geometry, prologue: str, gradient: str, epilogue: str) -> Launch:
    ends = EPILOGUES if kind == "conv" else DGRAD_EPILOGUES
    roles = ["x", "w"] if kind == "conv" else ["dz", "w"] if kind == "dgrad" else ["dz", "x"]
    roles += [*PROLOGUES[prologue], *(GRADIENTS[gradient] if kind != "conv" else ())]
    if kind != "wgrad":
        roles += ends[epilogue]
    roles = [role for role in dict.fromkeys(roles) if role not in ("bias", "count")]
    outputs = {"conv": ["y"], "dgrad": ["dx"], "wgrad": ["dw"]}[kind]
    if epilogue == "stats":
        outputs += ["mean", "invstd"]
    if epilogue == "bn_mask":
        outputs += ["sum_previous", "dot_previous"]
    operands, made = (tuple((role, role) for role in names) for names in (roles, outputs))
    relu = "identity" if epilogue in ("stats", "store") else "relu"
    launch = Launch(kind, "layer", g, torch.bfloat16, operands, made, eps=1e-5, momentum=0.1)
    return replace(launch, prologue=prologue, gradient=gradient, epilogue=epilogue, activation=relu)


LAUNCHES = [
    _launch(kind, g, prologue, gradient, epilogue)
    for g in (_1x1, _3x3)
    for kind, prologue, gradient, epilogue in (
        ("conv", "identity", "identity", "affine"),
        ("conv", "identity", "identity", "affine_add"),
        ("conv", "identity", "identity", "stats"),
        ("conv", "bn_relu", "identity", "stats"),
        ("dgrad", "identity", "bn_backward", "bn_mask"),
        ("dgrad", "identity", "bn_backward", "store"),
        ("dgrad", "identity", "identity", "bn_mask"),
        ("dgrad", "identity", "identity", "store"),
        ("wgrad", "bn_relu", "bn_backward", "store"),
        ("wgrad", "identity", "bn_backward", "store"),
        ("wgrad", "identity", "identity", "store"),
    )
]


def write(data: dict[str, Any]) -> None:
    """The file, a line a tile."""
    text = json.dumps(data, indent=1, sort_keys=True)
    text = text.replace("[\n     ", "[").replace(",\n     ", ", ").replace("\n    ]", "]")
    DATA.write_text(text + "\n", encoding="utf-8")


def _sizes(launch: Launch) -> list[Launch]:
    """A launch of each geometry that its class is compiled for."""
    others = _OTHERS[launch.geometry] if launch.epilogue == "stats" else ()
    return [launch, *(replace(launch, geometry=other) for other in others)]


def _read(launch: Launch, m: int, n: int, warps: int, arch: str) -> tuple[int, int] | None:
    """Registers and spills with a tile of that shape, or None where there is none."""
    tile = shaped(launch, m, n, warps, arch)
    if tile is None:
        return None
    try:
        compiled = compile_launch(launch, arch, replace(tile, splits=2 if launch.kind == "wgrad" else 1))
    except triton.runtime.errors.OutOfResources:
        return None
    fits = compiled.shared <= limits(arch).shared_per_program * 1024
    return (compiled.registers, compiled.spills) if fits else None


def main(archs: list[str], only: str) -> None:
    """Compile, and write after every launch."""
    data = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {"compiled": {}}
    data["about"] = "rows x columns x warps of a product -> [registers a thread, bytes spilled]; compiled, bf16, ungrouped"
    data["triton"] = triton.__version__
    for arch in archs or ARCHS:
        for launch in (launch for launch in LAUNCHES if str(class_of(launch)).startswith(only)):
            rows: dict[str, list[int]] = {}
            for m, n, warps in SHAPES:
                found = [_read(one, m, n, warps, arch) for one in _sizes(launch)]
                read = [pair for pair in found if pair is not None]
                if len(read) == len(found):
                    rows[f"{m}x{n}x{warps}"] = [max(numbers) for numbers in zip(*read, strict=True)]
            data["compiled"].setdefault(arch, {})[str(class_of(launch))] = rows
            print(arch, class_of(launch), rows, flush=True)
            write(data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archs", nargs="*")
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    main(asked.archs, asked.only)
