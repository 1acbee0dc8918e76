"""What is published about GPUs: the limits that tiles are chosen by and times predicted from. The data is in devices.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

_DATA = Path(__file__).with_name("devices.json")


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor (compute unit) of an architecture holds.

    Attributes:
        shared_per_program, shared_per_multiprocessor: KiB of shared memory; ``reserved`` KiB of it go with each program.
        registers: 32-bit registers; a warp gets them in steps of ``allocation``.
        warps, programs: most that are resident.
        warp: threads of a warp (wavefront).
    """

    shared_per_program: int
    shared_per_multiprocessor: int
    reserved: int
    registers: int
    warps: int
    programs: int
    warp: int
    allocation: int


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: ``H200``, ``MI300X`` ...
        arch: ``sm_90``, ``gfx942`` ...
        multiprocessors: streaming multiprocessors (compute units).
        clock: GHz under load.
        matrix: element type -> TFLOP/s of dense products with fp32 accumulation.
        vector: fp32 TFLOP/s without tensor cores.
        memory, l2: TB/s. ``l2_mib``: its size (of the last cache in front of the memory).
        sustained: part of the rates ``memory`` and ``matrix`` that a copy and a large product reach.
        measured: whether ``sustained`` was measured on such a device, or assumed.
        source: where the numbers are from.
    """

    name: str
    arch: str
    multiprocessors: int
    clock: float
    matrix: Mapping[str, float]
    vector: float
    memory: float
    l2: float
    l2_mib: int
    sustained: Mapping[str, float]
    measured: bool
    source: str

    def __hash__(self) -> int:
        return hash((self.name, self.arch, self.multiprocessors))

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a copy reaches."""
        return self.memory * 1e12 * self.sustained["memory"]

    def rate(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """FLOP/s that a large product of operands of ``dtype`` reaches; exact fp32 runs on the vector units."""
        if dtype == torch.float32 and not tf32:
            return self.vector * 1e12 * self.sustained["matrix"]
        name = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "tf32")
        return self.matrix[name] * 1e12 * self.sustained["matrix"]


@cache
def _read() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(_DATA.read_text(encoding="utf-8"))
    return data


@cache
def devices() -> dict[str, Device]:
    """All devices, by name."""
    return {entry["name"]: Device(**entry) for entry in _read()["devices"]}


def limits(arch: str) -> Limits:
    """The limits of an architecture; of an unknown one those of the smallest, which run anywhere."""
    archs = _read()["archs"]
    return Limits(**archs.get(arch, archs["sm_75"]))


@cache
def typical(arch: str) -> Device | None:
    """The device that stands for an architecture where nothing more is known: the last of it in the file; None if unknown."""
    return next((device for device in reversed(devices().values()) if device.arch == arch), None)


def find(name: str) -> Device:
    """The device called ``name``; spaces, dashes and case do not matter.

    Raises:
        ValueError: there is none; the message lists those there are.
    """

    def plain(text: str) -> str:
        return "".join(text.lower().split()).replace("-", "").replace("_", "")

    for device in devices().values():
        if plain(device.name) == plain(name):
            return device
    raise ValueError(f"unknown device {name!r}: expected one of {', '.join(devices())}")
