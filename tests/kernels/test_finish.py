"""Reductions over tiles that the last program finishes, alone: levels, order, counters, and far means."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from launches import DEVICE
from torch import Tensor

from fused_resnet.backends import workspace
from fused_resnet.kernels import finish


@triton.jit
def reduce_tiles(
    values, sums, squares, mean, m2, partials, counts, counters, pixels, width, group, M: tl.constexpr, K: tl.constexpr
):
    """values [pixels, width]: sum, sum of squares, and (mean, M2) of each column."""
    m = tl.program_id(0) * M + tl.arange(0, M)
    k = tl.arange(0, K)
    inside, exists = m < pixels, k < width
    tiles = tl.num_programs(0)
    tile = tl.program_id(0)
    v = tl.load(values + m[:, None] * width + k[None, :], mask=inside[:, None] & exists[None, :], other=0.0)
    column = finish.Column(partials, counters, tile, tiles, group, k, exists, width)
    finish.finish_sums(column, (tl.sum(v, axis=0), tl.sum(v * v, axis=0)), (sums, squares))
    behind = tl.cdiv(tiles, group) + 1
    column = finish.Column(partials + 2 * tiles * width, counters + behind, tile, tiles, group, k, exists, width)
    count, mean_k, m2_k = finish.moments(v, inside)
    last, count, mean_k, m2_k = finish.finish_moments(column, counts, count, mean_k, m2_k)
    if last:
        tl.store(mean + k, mean_k, mask=exists)
        tl.store(m2 + k, m2_k, mask=exists)


def reduce(values: Tensor, tile: int = 16, group: int | None = None) -> tuple[Tensor, ...]:
    pixels, width = values.shape
    tiles = -(-pixels // tile)
    group = group or workspace.group_of(tiles)
    out = [torch.full((width,), torch.nan, device=DEVICE) for _ in range(4)]
    partials = torch.full((4 * tiles * width,), torch.nan, device=DEVICE)
    counts = torch.full((tiles,), torch.nan, device=DEVICE)
    counters = workspace.counters(DEVICE, 2 * (-(-tiles // group) + 1))
    assert not counters.any()
    K = triton.next_power_of_2(width)
    reduce_tiles[(tiles,)](values, *out, partials, counts, counters, pixels, width, group, tile, K)
    assert not counters.any(), "a counter was not reset"
    return tuple(out)


def test_a_large_tile_is_added_in_a_tree() -> None:
    """As a GPU does. Row to row, as the interpreter adds by itself, 512 rows are 5 roundings off."""
    values = torch.randn(512, 16, device=DEVICE)
    m2 = reduce(values, tile=512)[3].double()
    exact = (values.double() - values.double().mean(0)).square().sum(0)
    assert (m2 / exact - 1).square().mean().sqrt() < 2 * 2**-24


@pytest.mark.parametrize("group", [None, 1, 3, 17, 100])
@pytest.mark.parametrize(("pixels", "width"), [(1, 5), (16, 8), (17, 3), (530, 20)])
def test_values(pixels: int, width: int, group: int | None) -> None:
    """One tile, whole tiles, a rim; more rows than are loaded at once; one level or two."""
    values = torch.randn(pixels, width, device=DEVICE) + 3
    sums, squares, mean, m2 = (t.double() for t in reduce(values, group=group))
    exact = values.double()
    torch.testing.assert_close(sums, exact.sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(squares, exact.square().sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(mean, exact.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(m2, (exact - exact.mean(0)).square().sum(0), rtol=1e-5, atol=1e-9)


def test_a_mean_far_from_zero_does_not_cancel() -> None:
    values = 1000 + torch.randn(700, 8, device=DEVICE)
    *_, mean, m2 = reduce(values)
    exact = values.double()
    assert ((mean.double() - exact.mean(0)).abs() <= 1000 * 2**-23).all()  # two units in the last place
    torch.testing.assert_close(m2.double(), (exact - exact.mean(0)).square().sum(0), rtol=1e-5, atol=0)


def test_bitwise_equal_on_every_run() -> None:
    values = torch.randn(700, 8, device=DEVICE)
    for first, second in zip(reduce(values), reduce(values), strict=True):
        assert torch.equal(first, second)


def test_nan_stays_in_its_channel() -> None:
    values = torch.randn(100, 8, device=DEVICE)
    values[70, 3] = torch.nan
    values[20, 5] = torch.inf
    for result in reduce(values):
        assert not result[[3, 5]].isfinite().any()
        assert result[[0, 1, 2, 4, 6, 7]].isfinite().all()


@pytest.mark.parametrize("tiles", [1, 7, 8, 9, 64, 65, 6272, 100_000])
def test_the_two_levels_are_about_as_long(tiles: int) -> None:
    group = workspace.group_of(tiles)
    assert workspace.counters_of(tiles) == -(-tiles // group) + 1
    assert group >= 8 and (group - 1) ** 2 <= max(tiles, 64) and -(-tiles // group) <= group


def test_counters_grow_and_stay_zero() -> None:
    small = workspace.counters(DEVICE, 1)
    assert workspace.counters(DEVICE, small.numel()) is small
    large = workspace.counters(DEVICE, small.numel() + 1)
    assert large.numel() > small.numel() and large.dtype == torch.int32 and not large.any()
    workspace.forget()
