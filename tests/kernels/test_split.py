"""Tiles whose sum several programs share (split-K): conv and dgrad against float64, the same bits whoever is last."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gradient_launches as gradient
import pytest
import test_conv
import test_dgrad
import test_stats
import torch
from launches import DEVICE, conv, operands_of, run_all, run_poisoned
from tolerances import assert_close

from fused_resnet.backends import triton, triton_gradients
from fused_resnet.backends.triton_start import arch_of, shared_by
from fused_resnet.launch import DGRAD_EPILOGUES, EPILOGUES, GRADIENTS, Launch
from fused_resnet.tuning import Tile

#: Loaders with a product of matrices within one group: the others are computed whole.
SHARED = ("box", "pointwise", "box, chunk past C", "parity", "gather", "flat", "grouped, whole")
SHARED_DGRAD = ("box", "pointwise", "tile past C", "stride 2, even", "stride 2, odd", "stride 2, 1x1", "unaligned")


def programs(launch: Launch, tile: Tile) -> int:
    plan = triton if launch.kind == "conv" else triton_gradients
    return plan.plan_start(launch, arch_of(DEVICE), tile).programs


@pytest.mark.parametrize(("name", "splits"), [(name, 2 + 3 * (i % 2)) for i, name in enumerate(SHARED)])
def test_every_loader(name: str, splits: int) -> None:
    """Shares of equal and of unequal length, that start in the middle of the taps."""
    _, make, tile = test_conv.CLASSES[name]
    launch = make(epilogue="affine_add", activation="relu")
    split = replace(tile, splits=splits)
    assert programs(launch, split) == splits * programs(launch, tile)
    test_conv.check(launch, split)


@pytest.mark.parametrize("splits", [3, 9, 11])
def test_more_shares_than_steps(splits: int) -> None:
    """Two steps; the shares without one add nothing. More shares than are read at once."""
    test_conv.check(conv(1, 3, 5, 32, 16, 1, 1, epilogue="bias"), Tile(1, 1, 16, 16, 16, splits=splits))
    test_dgrad.check(gradient.dgrad(1, 3, 5, 16, 32, 1, 1), Tile(1, 1, 16, 16, 16, splits=splits))


@pytest.mark.parametrize(
    ("epilogue", "dtype"),
    [
        (epilogue, test_conv.DTYPES[i % 3])
        for i, epilogue in enumerate(epilogue for epilogue in EPILOGUES if epilogue != "stats")
    ],
    ids=str,
)
def test_every_epilogue(epilogue: str, dtype: torch.dtype) -> None:
    launch = conv(1, 5, 6, 32, 24, 3, 3, padding=(1, 1), dtype=dtype, epilogue=epilogue, activation="relu")
    test_conv.check(launch, Tile(1, 4, 8, 16, 16, splits=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics(dtype: torch.dtype) -> None:
    """Two reductions in one launch: of a tile's shares, then over the tiles, of which there are two levels."""
    launch = conv(2, 5, 17, 32, 24, 1, 1, prologue="bn_relu", epilogue="stats", dtype=dtype)
    test_stats.check(launch, Tile(1, 1, 16, 16, 16, splits=2))


@pytest.mark.parametrize(("name", "splits"), [(name, 2 + 3 * (i % 2)) for i, name in enumerate(SHARED_DGRAD)])
def test_every_class_of_dgrad(name: str, splits: int) -> None:
    """With stride 2 the classes have different numbers of steps, and some none."""
    _, make, tile = test_dgrad.CLASSES[name]
    launch = make(**test_dgrad.TRAINING)
    split = replace(tile, splits=splits)
    assert programs(launch, split) == splits * programs(launch, tile)
    test_dgrad.check(launch, split)


@pytest.mark.parametrize(
    ("on_load", "epilogue", "dtype"),
    [
        (on_load, epilogue, torch.bfloat16 if i == j else torch.float32)
        for i, on_load in enumerate(GRADIENTS)
        for j, epilogue in enumerate(DGRAD_EPILOGUES)
    ],
    ids=str,
)
def test_every_gradient_and_epilogue(on_load: str, epilogue: str, dtype: torch.dtype) -> None:
    kinds: dict[str, Any] = {"dtype": dtype, "gradient": on_load, "epilogue": epilogue, "activation": "relu"}
    kinds["without"] = ("z_previous",)
    test_dgrad.check(gradient.dgrad(1, 5, 6, 16, 40, 3, 3, padding=(1, 1), **kinds), Tile(1, 4, 8, 16, 16, splits=4))


@pytest.mark.parametrize("name", ["grouped", "depthwise"])
def test_grouped_tiles_are_not_shared(name: str) -> None:
    """A tile across groups may have to be computed again, and a depthwise one has no steps worth sharing."""
    for cases, ends in ((test_conv.CLASSES, {}), (test_dgrad.CLASSES, test_dgrad.TRAINING)):
        _, make, tile = cases[name]
        launch = make(**ends)
        assert programs(launch, replace(tile, splits=4)) == programs(launch, tile)
        (test_conv if launch.kind == "conv" else test_dgrad).check(launch, replace(tile, splits=4))


def test_the_same_bits_whoever_is_last() -> None:
    conv_launch = conv(
        1, 7, 7, 48, 40, 3, 3, padding=(1, 1), epilogue="stats", without=("running_mean", "running_var", "batches")
    )
    dgrad_launch = gradient.dgrad(1, 7, 7, 40, 48, 3, 3, padding=(1, 1), **test_dgrad.TRAINING)
    for launch, made, run in (
        (conv_launch, operands_of(conv_launch), run_all),
        (dgrad_launch, gradient.operands_of(dgrad_launch), gradient.run_poisoned),
    ):
        tile = Tile(1, 8, 8, 16, 16, splits=7)
        first, again = (run(launch, made, tile) for _ in range(2))
        with gradient.last_program_first():
            reversed_ = run(launch, made, tile)
        for role, tensor in first.items():
            assert torch.equal(tensor, again[role]) and torch.equal(tensor, reversed_[role]), role


@pytest.mark.parametrize("wide", [False, True])
def test_wide_offsets(wide: bool) -> None:
    test_conv.check(conv(1, 5, 6, 32, 24, 3, 3, padding=(1, 1)), Tile(1, 4, 4, 16, 16, splits=3), wide=wide)
    test_dgrad.check(gradient.dgrad(1, 5, 6, 24, 32, 3, 3, padding=(1, 1)), Tile(1, 4, 4, 16, 16, splits=3), wide=wide)


def test_a_nan_in_one_share_reaches_what_it_reaches_in_eager() -> None:
    launch = conv(1, 6, 7, 64, 16, 1, 1, activation="relu")
    operands = operands_of(launch)
    operands["x"][0, 50, 2, 3] = torch.nan
    actual = run_poisoned(launch, operands, Tile(1, 1, 16, 16, 16, splits=4)).cpu()
    clean = torch.ones(6, 7, dtype=torch.bool)
    clean[2, 3] = False
    assert actual[0, :, 2, 3].isnan().all() and actual[0, :, clean].isfinite().all()


def test_it_is_one_launch_and_its_memory_is_the_shares() -> None:
    launch = conv(1, 7, 7, 64, 48, 3, 3, padding=(1, 1), epilogue="affine")
    tile = Tile(1, 4, 8, 16, 16, splits=4)
    start = triton.plan_start(launch, arch_of(DEVICE), tile)
    assert start.partials == 4 * 6 * 32 * 16 and start.counters == 2 * 3
    whole = triton.plan_start(launch, arch_of(DEVICE), replace(tile, splits=1))
    assert whole.partials == 0 and whole.counters == 0
    assert {key: value for key, value in start.constants.items()} == dict(whole.constants)
    assert_close(run_poisoned(launch, made := operands_of(launch), tile), test_conv.expected(launch, made), 9 * 64)


def test_the_shares_memory_starts_at_a_whole_line() -> None:
    """Kernels are compiled ahead for pointers at multiples of 16 bytes, behind however many counters there are."""
    launch = test_stats.conv(2, 13, 11, 16, 24, 3, 3, epilogue="stats")
    start = triton.plan_start(launch, arch_of(DEVICE), Tile(1, 4, 4, 16, 16, splits=2))
    space = start.workspace(DEVICE)
    memory = shared_by(start, space)["memory"]
    assert memory is not None and space.counters is not None and space.partials is not None
    offsets = [behind.storage_offset() for behind in (memory.counters, memory.partials)]
    assert all(offset > 0 and offset % 32 == 0 for offset in offsets) and offsets == [
        start.counters_behind, start.partials_behind,
    ]  # fmt: skip
    assert offsets[0] + start.numbers["tiles"] <= start.counters <= space.counters.numel()
