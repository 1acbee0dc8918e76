"""What the kernels' programs do with memory that they share: see memory.py."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import gradient_launches
import launches
import pytest
import test_conv
import test_dgrad
import test_wgrad
import torch
import triton
import triton.language as tl
from gradient_launches import last_program_first
from launches import end_of_block, max_pool_backward
from memory import watched

from fused_resnet.kernels.finish import arrive
from fused_resnet.launch import Launch
from fused_resnet.tuning import Tile
from fused_resnet.tuning.tile import Strip

pytestmark = pytest.mark.skipif(launches.DEVICE.type != "cpu", reason="interpreted programs only")

_NORMS = ("y", "shortcut", "mean", "invstd", "shortcut_mean", "shortcut_invstd")
_STATISTICS: dict[str, Any] = {"prologue": "bn_relu", "epilogue": "stats"}
_SUMS = ("dz", "sum", "dot", "shortcut_dot")
_GATED = ("dz", "sum", "dot", "dt", "dt_sum", "dside", "dside_sum", "shortcut_dot")
_BEHIND_POOL = ("dy", "x", "indices", "x_mean", "x_invstd")
_OVERLAPPING: dict[str, Any] = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}

_TILES: dict[str, tuple[Any, tuple[str, ...], dict[str, Any], int]] = {
    "conv": (test_conv, ("box", "parity", "gather, chunk past C", "flat", "grouped"), _STATISTICS, 2),
    "dgrad": (test_dgrad, ("pointwise", "tile past C", "stride 2, odd", "grouped"), test_dgrad.TRAINING, 2),
    "wgrad": (test_wgrad, ("gather", "unaligned", "grouped"), test_wgrad.TRAINING, 3),
    "wgrad given": (test_wgrad, ("pointwise", "depthwise"), test_wgrad.GIVEN, 10),
}

#: Loaders with rims in every direction, two levels of merging (more than 8 tiles), shared sums; a launch and its tile each.
CASES: dict[str, tuple[Launch, Tile | Strip]] = {
    **{
        f"{kind} {name}": (module.CLASSES[name][1](**how), replace(module.CLASSES[name][2], splits=splits))
        for kind, (module, names, how, splits) in _TILES.items()
        for name in names
    },
    "end of a block": (end_of_block(3, 5, 7, 40, operands=("dout", "out", *_NORMS), outputs=_SUMS), Strip(4, 16, 2)),
    "gate": (
        end_of_block(3, 5, 7, 40, operands=("dout", "t", *_NORMS), outputs=_GATED, kind="gate_backward"),
        Strip(4, 16, 2),
    ),
    "max_pool": (
        max_pool_backward(2, 9, 7, 24, operands=_BEHIND_POOL, outputs=("dx", "sum", "dot"), **_OVERLAPPING),
        Strip(4, 16, 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_programs_stay_within_their_tensors_and_wait_for_each_other(name: str) -> None:
    launch, tile = CASES[name]
    of = gradient_launches if launch.kind in ("dgrad", "wgrad") else launches
    run: Any = gradient_launches.run_poisoned if of is gradient_launches else launches.run_all
    operands = of.operands_of(launch)
    # The other order is another run: another program is the last of each counter.
    with watched() as seen, last_program_first() if len(name) % 2 else nullcontext():
        run(launch, operands, tile)
    assert len(seen) == 1 and len(seen[0].now) > 1


@triton.jit
def _neighbour(values, counters, ORDERED: tl.constexpr, AHEAD: tl.constexpr):
    """Each of two programs stores a number; the last adds both up. ``AHEAD``: elements that it reads too far."""
    program = tl.program_id(0)
    tl.store(values + program, 1.0)
    last = program == 1
    if ORDERED:
        last = arrive(counters, 2)
    if last:
        both = tl.load(values + AHEAD + tl.arange(0, 2))
        tl.store(values + 2, tl.sum(both, axis=0))


@pytest.mark.parametrize(
    ("ordered", "ahead", "message"), [(True, 0, ""), (False, 0, "has not waited"), (True, 2, "outside of every tensor")]
)
def test_what_is_looked_for_is_found(ordered: bool, ahead: int, message: str) -> None:
    values, counters = torch.zeros(3), torch.zeros(1, dtype=torch.int32)
    with watched():
        if message:
            with pytest.raises(Exception, match=message):
                _neighbour[(2,)](values, counters, ordered, ahead)
        else:
            _neighbour[(2,)](values, counters, ordered, ahead)
            assert values[2] == 2
