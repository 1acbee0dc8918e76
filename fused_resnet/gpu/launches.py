"""Stage ``launches``: every launch of ResNet-50 by itself, its part of the roofline, cuDNN's convolution beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..network import Use
from . import networks, operands
from .machine import roofline_seconds
from .results import Results, Row, Time
from .stage import Stage
from .timing import Call, interleaved, rotating, touched

FUSED, VENDOR = "fused", "convolution of PyTorch"


def arch_of(device: torch.device) -> str | None:
    """What kernels are compiled for; None where they are interpreted."""
    if device.type != "cuda":
        return None
    from ..backends.triton_start import arch_of as of

    return of(device)


def multiprocessors_of(device: torch.device) -> int:
    """How many the GPU has, for choices; 0 where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    from ..backends.triton_start import multiprocessors_of as of

    return of(device)


def timed(stage: Stage) -> list[tuple[str, Use]]:
    """The launches of the scope's networks, with network and mode."""
    scope = stage.scope
    found = []
    for network, mode in scope.layers:
        for use in networks.uses(network, scope.batch, scope.size, scope.dtype, mode):
            found.append((f"{network} {mode}", use))
    return found


def key_of(entry: tuple[str, Use]) -> str:
    """Network, mode and signature: a launch that two networks share has a row in each."""
    return f"{entry[0]}: {entry[1].launch.signature}"


def run(stage: Stage) -> None:
    """A row for each."""
    torch.backends.cudnn.benchmark = True  # the vendor's best algorithm

    def row(entry: tuple[str, Use]) -> Row:
        where, use = entry
        times = times_of(use, stage)
        return {"status": "ok", "where": where, **facts(use, stage.results), "measured": not stage.dry, "times": times}

    entries = timed(stage)
    stage.each("launches", one_of_each(entries) if stage.dry else entries, key_of, row)


def one_of_each(entries: Iterable[tuple[str, Use]]) -> list[tuple[str, Use]]:
    """The first launch of each kind, of convolutions with each end: all that the dry run takes the time for."""
    first: dict[tuple[str, str], tuple[str, Use]] = {}
    for entry in entries:
        launch = entry[1].launch
        first.setdefault((launch.kind, launch.epilogue), entry)
    return list(first.values())


def facts(use: Use, results: Results) -> dict[str, Any]:
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


def times_of(use: Use, stage: Stage) -> dict[str, Time | None]:
    """The launch as it is chosen, and PyTorch's convolution, interleaved."""
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
    with torch.no_grad():
        return interleaved(contenders, device)
