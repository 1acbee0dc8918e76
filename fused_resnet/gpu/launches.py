"""Stage ``launches``: every launch of ResNet-50 by itself: its time, its part of the roofline, and cuDNN's convolution beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import networks, operands
from .machine import roofline_seconds
from .results import Results, Row, Time
from .stage import Stage
from .timing import Call, interleaved, rotating, touched

FUSED, VENDOR = "fused", "convolution of PyTorch"


def timed(stage: Stage) -> list[tuple[str, networks.Use]]:
    """The launches of the scope's networks, with network and mode."""
    scope = stage.scope
    found = []
    for network, mode in scope.layers:
        for use in networks.uses(network, scope.batch, scope.size, torch.bfloat16, mode):
            found.append((f"{network} {mode}", use))
    return found


def key_of(entry: tuple[str, networks.Use]) -> str:
    """Network, mode and signature: a launch that two networks share has a row in each."""
    return f"{entry[0]}: {entry[1].launch.signature}"


def run(stage: Stage) -> None:
    """A row for each."""
    torch.backends.cudnn.benchmark = True  # the vendor's best algorithm

    def row(entry: tuple[str, networks.Use]) -> Row:
        where, use = entry
        times = times_of(use, stage)
        return {"status": "ok", "where": where, **facts(use, stage.results), "measured": not stage.dry, "times": times}

    stage.each("launches", timed(stage), key_of, row)


def facts(use: networks.Use, results: Results) -> dict[str, Any]:
    """What is known of a launch without timing it."""
    launch = use.launch
    return {
        "signature": launch.signature,
        "kind": launch.kind,
        "layer": use.layers[0],
        "uses": use.times,
        "flops": launch.flops,
        "bytes": launch.bytes,
        "roofline": roofline_seconds(results.data, launch.flops, launch.bytes, launch.dtype),
    }


def times_of(use: networks.Use, stage: Stage, more: dict[str, Callable[[operands.Operands], Call]] | None = None) -> dict[str, Time | None]:
    """The launch and PyTorch's convolution, interleaved; ``more`` makes further contenders of operands."""
    from ..backends import triton

    launch, device = use.launch, stage.device
    sets: dict[int, operands.Operands] = {}

    def given(number: int) -> operands.Operands:
        if number not in sets:
            sets[number] = operands.random_operands(launch, device, number)
        return sets[number]

    def fused(number: int) -> Call:
        operands_here = given(number)
        return lambda: triton.run(launch, operands_here)

    def vendor(number: int) -> Call:
        call: Call = operands.vendor_convolution(launch, given(number))
        return call

    moved = launch.bytes if stage.dry else max(launch.bytes, touched(*given(0).values()))
    contenders = {FUSED: rotating(fused, moved, device)}
    if launch.kind in ("conv", "dgrad", "wgrad"):
        contenders[VENDOR] = rotating(vendor, moved, device)
    for name, make in (more or {}).items():
        contenders[name] = rotating(lambda number, make=make: make(given(number)), moved, device)  # type: ignore[misc]
    with torch.no_grad():
        return interleaved(contenders, device)
