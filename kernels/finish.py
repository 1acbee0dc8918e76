"""How the programs of one launch finish a reduction over pixels together: no second launch, no atomics on values.

Every program stores what it found over its own tile, its *partials*, and arrives at a counter. Who arrives last knows that
all partials are there, reads them in the order of their index and writes the result: the same bits in every run, whoever was
last. Reductions over thousands of tiles take two levels, so that the last program reads hundreds of rows and not thousands::

    tiles      0 1 2 3 | 4 5 6 7 | 8 9        `group` neighbouring tiles: the last of a group merges its rows into its first row
    groups        0    |    1    |  2         the last of the groups merges those rows, and writes the result

Counters are zero when a launch starts and when it has ended: the last to arrive resets its counter. They and the partials come
from :mod:`fused_resnet.backends.workspace`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import is_hip

from .numerics import INTERPRETED, column_sums

#: Rows of partials that a program has in flight at once: loads take long, and nobody else works by then.
ROWS = tl.constexpr(16)

#: Likewise, parts of an output tile: as many as the registers hold beside the sum.
AT_ONCE = tl.constexpr(4)


class Column(NamedTuple):
    """A program's place among the tiles that are reduced together, and the channels (filters) it reduces.

    Attributes:
        partials: pointer to fp32 memory for ``values * tiles * width`` numbers: rows of ``width``, one a tile, for each value.
        counters: pointer to ``cdiv(tiles, group) + 1`` zeros, int32, of these tiles alone.
        tile, tiles: index among the tiles of the reduction, and how many there are.
        group: how many of them the first level merges.
        channels: [K] indices within a row.
        exists: [K] which of them are channels.
        width: channels in a row.
    """

    partials: Any
    counters: Any
    tile: Any
    tiles: Any
    group: Any
    channels: Any
    exists: Any
    width: Any


@triton.jit
def drain():
    """Wait for this thread's own stores, where the compiler's barrier does not: on AMD it orders shared memory only."""
    if not INTERPRETED:
        if is_hip():
            tl.inline_asm_elementwise(
                "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v", [tl.full((1,), 0, tl.int32)], tl.int32, is_pure=False, pack=1
            )


@triton.jit
def arrive(counter, programs):
    """Whether this program is the last of ``programs`` to arrive at ``counter`` (zero before the first and after the last).

    What any of them stored before it arrived is there for the last one to load, past the L1 (``cache_modifier=".cg"``). The
    barrier joins the stores of all threads to those of the one that does the atomic.
    """
    drain()
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.store(counter, 0, mask=last)
    return last


@triton.jit
def part_offsets(ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """Offsets [ROWS, COLUMNS] of a tile's accumulators in a workspace, ``STRIDE`` a row: dense, all known to the compiler.

    In the output's own layout they took 30 to 60 registers a thread more (compiled, sm_90).
    """
    return tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def ordered_sum(partials, rows, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """``sum over i < rows of partials[i * stride]``, parts of a tile, in the order of i, fp32 [ROWS, COLUMNS].

    :data:`AT_ONCE` parts are on their way together. ``STRIDE``: of a row of a part.
    """
    offsets = part_offsets(ROWS, COLUMNS, STRIDE)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    start = partials
    for row in range(0, rows, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            if i == 0:
                total += tl.load(start + offsets, cache_modifier=".cg")
            else:
                total += tl.load(start + offsets, mask=row + i < rows, other=0.0, cache_modifier=".cg")
            start += stride
    return total


#: Arguments that say how programs meet; they differ from batch to batch, as those of :data:`.boxes.EXTENTS`.
MEETING = ("shares", "tiles", "group", "counters_of")


class Memory(NamedTuple):
    """Where programs meet: pointers of :class:`Shares`."""

    partials: Any
    counters: Any


class Shares(NamedTuple):
    """How the sum of an output tile is shared between programs (split-K), and the memory they meet in.

    Attributes:
        shares: programs of a tile.
        tiles: tiles of the output. Program ``share * tiles + tile`` makes a share of a tile.
        partials: pointer to fp32 [tiles, shares, a tile's accumulators].
        counters: pointer to ``tiles`` zeros, int32.
    """

    shares: Any
    tiles: Any
    partials: Any
    counters: Any


@triton.jit
def own_share(shares, steps):
    """The steps of the main loop that are this program's: first one, one past the last. All of them without shares."""
    if shares is None:
        return 0, steps
    else:
        each = tl.cdiv(steps, shares.shares)
        first = tl.program_id(0) // shares.tiles * each
        return first, tl.minimum(first + each, steps)


@triton.jit
def own_program(shares):
    """Which tile of the output this program works on, in the order of programs without shares."""
    if shares is None:
        return tl.program_id(0)
    else:
        return tl.program_id(0) % shares.tiles


@triton.jit
def parts_of_tile(shares, SIZE: tl.constexpr):
    """Where the parts of this program's tile lie, ``SIZE`` numbers each."""
    return shares.partials + own_program(shares).to(tl.int64) * (shares.shares * SIZE)


@triton.jit
def leave_share(acc, shares):
    """Put this program's part of a tile where the last one finds it. Returns whether this program is the last."""
    SIZE: tl.constexpr = acc.shape[0] * acc.shape[1]
    own = parts_of_tile(shares, SIZE) + tl.program_id(0) // shares.tiles * SIZE
    tl.store(own + part_offsets(acc.shape[0], acc.shape[1], acc.shape[1]), acc)
    return arrive(shares.counters + own_program(shares), shares.shares)


@triton.jit
def joined_shares(shares, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of all programs' parts [ROWS, COLUMNS], in the order of the shares: the same bits whoever was last."""
    SIZE: tl.constexpr = ROWS * COLUMNS
    return ordered_sum(parts_of_tile(shares, SIZE), shares.shares, SIZE, ROWS, COLUMNS, COLUMNS)


@triton.jit
def row_pointers(column, value, rows):
    """Pointers [rows, K] to rows of the partials. (32 bits do: a row stands for at least 16 pixels.)"""
    return column.partials + ((value * column.tiles + rows) * column.width)[:, None] + column.channels[None, :]


@triton.jit
def store_row(column, value, row, vector):
    """Put [K] into a row of the partials of ``value``."""
    rows = row + tl.zeros((1,), dtype=tl.int32)
    tl.store(row_pointers(column, value, rows), vector[None, :], mask=column.exists[None, :])


@triton.jit
def sum_rows(column, value, first, end, step):
    """Sum [K] of the rows ``first, first + step, ... < end`` of ``value``, in a fixed order."""
    lanes = tl.arange(0, ROWS) * step
    total = tl.zeros((ROWS, column.channels.shape[0]), dtype=tl.float32)
    for start in range(first, end, step * ROWS):
        mask = (start + lanes < end)[:, None] & column.exists[None, :]
        total += tl.load(row_pointers(column, value, start + lanes), mask=mask, other=0.0, cache_modifier=".cg")
    return column_sums(total)


@triton.jit
def finish_sums(column, values, outputs):
    """Sums over all tiles: ``outputs[i][channels] = sum of every tile's values[i]``, written by the last program to come here.

    Args:
        column: :class:`Column`.
        values: tuple of fp32 [K], this tile's sums.
        outputs: tuple of as many pointers to fp32 [width]; values without one (None) are left out.
    """
    for i in tl.static_range(len(values)):
        if outputs[i] is not None:
            store_row(column, i, column.tile, values[i])
    own = column.tile // column.group
    first = own * column.group
    end = tl.minimum(first + column.group, column.tiles)
    groups = tl.cdiv(column.tiles, column.group)
    if arrive(column.counters + own, end - first):
        for i in tl.static_range(len(values)):
            if outputs[i] is not None:
                total = sum_rows(column, i, first, end, 1)
                tl.debug_barrier()  # no thread still reads the row that is written over
                store_row(column, i, first, total)
        if arrive(column.counters + groups, groups):
            for i in tl.static_range(len(values)):
                if outputs[i] is not None:
                    total = sum_rows(column, i, 0, column.tiles, column.group)
                    tl.store(outputs[i] + column.channels, total, mask=column.exists)


@triton.jit
def chan(count, mean, m2, count_b, mean_b, m2_b):
    """Two sets' (count, mean, sum of squared deviations) as one's (Chan, Golub and LeVeque 1979). Sets may be empty."""
    total = count + count_b
    part = count_b / tl.maximum(total, 1.0)
    delta = mean_b - mean
    return total, mean + delta * part, m2 + m2_b + delta * delta * (count * part)


@triton.jit
def merge_rows(column, counts, first, end, step):
    """(count, mean [K], M2 [K]) of the rows ``first, first + step, ... < end``, in a fixed order.

    Args:
        column: its partials' value 0 is the mean, value 1 is M2.
        counts: pointer to fp32, the number of pixels of each row.
    """
    K: tl.constexpr = column.channels.shape[0]
    lanes = tl.arange(0, ROWS)
    count = tl.zeros((ROWS, 1), dtype=tl.float32)
    mean = tl.zeros((ROWS, K), dtype=tl.float32)
    m2 = tl.zeros((ROWS, K), dtype=tl.float32)
    for start in range(first, end, step * ROWS):
        rows = start + lanes * step
        mask = (rows < end)[:, None] & column.exists[None, :]
        count_b = tl.load(counts + rows, mask=rows < end, other=0.0, cache_modifier=".cg")[:, None]
        mean_b = tl.load(row_pointers(column, 0, rows), mask=mask, other=0.0, cache_modifier=".cg")
        m2_b = tl.load(row_pointers(column, 1, rows), mask=mask, other=0.0, cache_modifier=".cg")
        count, mean, m2 = chan(count, mean, m2, count_b, mean_b, m2_b)
    # The lanes among themselves, as one set of sets around the first lane's mean, which is near all of them.
    total = tl.sum(tl.sum(count, axis=0), axis=0)
    about = tl.sum(tl.where((lanes == 0)[:, None], mean, 0.0), axis=0)
    distance = mean - about[None, :]
    shift = column_sums(count * distance) / total
    distance -= shift[None, :]
    return total, about + shift, column_sums(m2 + count * distance * distance)


@triton.jit
def moments(values, inside):
    """(count, mean [K], M2 [K]) of the pixels ``inside`` [M] of fp32 ``values`` [M, K].

    Two passes over registers; the second also takes back what rounding did to the first one's mean.
    """
    there = inside[:, None]
    count = tl.sum(inside.to(tl.float32), axis=0)
    mean = column_sums(tl.where(there, values, 0.0)) / count
    distance = tl.where(there, values - mean[None, :], 0.0)
    rest = column_sums(distance)
    m2 = column_sums(distance * distance) - rest * rest / count
    return count, mean + rest / count, m2


@triton.jit
def finish_moments(column, counts, count, mean, m2):
    """Merge every tile's (count, mean [K], M2 [K]); returns whether this program is the last, and the result if it is.

    ``counts``: pointer to fp32 [tiles] of this column. What the others get is of no use.
    """
    store_row(column, 0, column.tile, mean)
    store_row(column, 1, column.tile, m2)
    tl.store(counts + column.tile, count)
    own = column.tile // column.group
    first = own * column.group
    end = tl.minimum(first + column.group, column.tiles)
    groups = tl.cdiv(column.tiles, column.group)
    last = False
    if arrive(column.counters + own, end - first):
        count, mean, m2 = merge_rows(column, counts, first, end, 1)
        tl.debug_barrier()  # no thread still reads the row that is written over
        store_row(column, 0, first, mean)
        store_row(column, 1, first, m2)
        tl.store(counts + first, count)
        last = arrive(column.counters + groups, groups)
        if last:
            count, mean, m2 = merge_rows(column, counts, 0, column.tiles, column.group)
    return last, count, mean, m2
