"""How the two tiles of a step of the main loop are loaded.

A step of the implicit GEMM multiplies ``pixels [M, C]`` by ``filters [K, C]`` for one tap (r, s) and one chunk of channels::

      x[N, H, W, C]                               w[K, R, S, C / groups]
        +----------------+
        |   +-------+    |   the box of output         +---+---+---+
        |   | rows x|    |   pixels, moved by the      | k |   |   |  one tap of `filters` filters,
        |   |columns|    |   tap; what sticks out      +---+---+---+  `channels` channels each
        |   +-------+    |   of the image is zero      |   |   |   |
        +----------------+                             +---+---+---+
          x `images` images x `channels` channels

Loaders of pixels, ``PIXELS(x, place, lanes, step, sizes, TAPS, TILE) -> [M, C]``:

============  ==========================================================================================================
``box``       stride 1. A rank-4 descriptor; past the border it reads zero, which *is* the convolution's padding.
``parity``    stride 2, even H and W. The same through a rank-5 view ``[N, H/2, 2, W/2, 2C]``, in which each tap is dense.
``gather``    any stride: pointers and masks, channels contiguous.
``flat``      any channel count, ungrouped: pointers and masks over the flattened reduction index ``(r * S + s) * C + c``.
============  ==========================================================================================================

Loaders of filters, ``FILTERS(w, place, filters, step, sizes, TAPS, TILE) -> [K, C]``:

==================  ====================================================================================================
``matrix``          one group; a rank-2 descriptor ``[K, R * S * C]``. A box that ran past the last channel would be in the
                    next tap: the chunk must divide the channels, or there must be one tap.
``rows``            one group, pointers and masks.
``block_diagonal``  several groups in one tile of filters: zero wherever filter and channel are of different groups.
``flat``            pointers and masks over the flattened reduction index.
==================  ====================================================================================================

``step`` is a :class:`Step`. Every lane that is masked is zero on *both* sides: a stray NaN times zero would still be NaN. The
one exception, channels of another group under ``block_diagonal``, is what :func:`fused_resnet.kernels.conv.direct` is for.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

#: Arguments that differ from batch to batch, for ``do_not_specialize_on_alignment``: the compiler is not told whether they
#: divide by 16, so that all batches and images are one compiled kernel, but for extents of 1. (Triton asks so of an argument by
#: itself, not of the members of a tuple: 3.8.)
EXTENTS = ("N", "H", "W", "P", "Q")


class Depths(NamedTuple):
    """What a layer has in any batch. Of multiples of 16 the compiler makes wide loads."""

    C: int
    K: int


class Sizes(NamedTuple):
    """Extents known when the kernel starts, as in :class:`fused_resnet.launch.Geometry`."""

    N: int
    H: int
    W: int
    C: int
    K: int
    P: int
    Q: int


@dataclass(frozen=True)
class Taps:
    """What is known when the kernel is compiled: the filter's extent and how it walks.

    ``group_channels`` and ``group_filters`` (C / groups and K / groups) are 0 for an ungrouped convolution.
    """

    R: int
    S: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    group_channels: int = 0
    group_filters: int = 0


class Place(NamedTuple):
    """Start of a program's tile: image, output row and column, filter, first channel it reduces over, first one past them."""

    n: Any
    p: Any
    q: Any
    k: Any
    c: Any
    c_end: Any


class Lanes(NamedTuple):
    """Image, output row and output column of each of the M pixels of a tile, and whether it exists; all [M]."""

    n: Any
    p: Any
    q: Any
    inside: Any


@triton.jit
def in_bands(program, pixel_tiles, other_tiles, group):
    """Which tile of pixels and which of filters (channels) a program makes: the order of programs, stated here only.

    ``group`` neighbouring tiles of pixels are a band. A band goes through all tiles of filters before the next one starts::

                 pixel tiles 0 1 2 | 3 4 5 | 6
        filters 0            0 1 2   6 7 8   12
        filters 1            3 4 5   9 . .   13

    What runs at the same time then shares both operands in the L2. :func:`fused_resnet.tuning.model.refetched` says which
    ``group`` reads least from memory.
    """
    band = program // (group * other_tiles)
    height = tl.minimum(pixel_tiles - band * group, group)
    within = program % (group * other_tiles)
    return band * group + within % height, within // height


@triton.jit
def lanes_of(place, sizes, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Coordinates of the pixels of a box, in the order in which a box is flattened: images, rows, columns."""
    m = tl.arange(0, TILE.images * TILE.rows * TILE.columns)
    n = place.n + m // (TILE.rows * TILE.columns)
    p = place.p + m // TILE.columns % TILE.rows
    q = place.q + m % TILE.columns
    inside = (n < sizes.N) & (p < sizes.P) & (q < sizes.Q)
    if WIDE:
        n = n.to(tl.int64)
    return Lanes(n, p, q, inside)


class Step(NamedTuple):
    """Where the main loop is: tap (r, s), first channel (counted from ``Place.c``), and how many steps lie behind.

    The loop carries r, s and c along (:func:`next_tap`): divisions of a step's number cost twenty instructions a step
    (compiled, sm_90, 3x3).
    """

    r: Any
    s: Any
    c: Any
    index: Any


@triton.jit
def next_tap(r, s, c, rows, columns, by, ALONE: tl.constexpr):
    """The step behind (r, s, c), of ``rows * columns`` taps; ``by``: channels of a chunk. ALONE: there is one tap.

    The taps are the inner loop: a shifted box is still in the L2.
    """
    if ALONE:
        return r, s, c + by
    else:
        s += 1
        end_of_row = s == columns
        r += end_of_row.to(tl.int32)
        s = tl.where(end_of_row, 0, s)
        end_of_taps = r == rows
        c += tl.where(end_of_taps, by, 0)
        r = tl.where(end_of_taps, 0, r)
        return r, s, c


@triton.jit
def locate(lanes, r, s, sizes, TAPS: tl.constexpr):
    """Input pixel ``(n * H + h) * W + w`` under tap (r, s), and whether it exists. Shapes follow from the arguments'."""
    h = lanes.p * TAPS.stride_h + (r * TAPS.dilation_h - TAPS.padding_h)
    w = lanes.q * TAPS.stride_w + (s * TAPS.dilation_w - TAPS.padding_w)
    inside = lanes.inside & (h >= 0) & (h < sizes.H) & (w >= 0) & (w < sizes.W)
    return (lanes.n * sizes.H + h) * sizes.W + w, inside


@triton.jit
def box(x, place, lanes, step, sizes, TAPS: tl.constexpr, TILE: tl.constexpr):
    r, s, c, _ = step
    h = place.p + (r * TAPS.dilation_h - TAPS.padding_h)
    w = place.q + (s * TAPS.dilation_w - TAPS.padding_w)
    return x.load([place.n, h, w, place.c + c]).reshape(TILE.images * TILE.rows * TILE.columns, TILE.channels)


@triton.jit
def parity(x, place, lanes, step, sizes, TAPS: tl.constexpr, TILE: tl.constexpr):
    """Row 2h + (dr & 1) of the image is row h of parity dr & 1; columns likewise, their parity folded into the channels."""
    r, s, c, _ = step
    dr = r * TAPS.dilation_h - TAPS.padding_h
    ds = s * TAPS.dilation_w - TAPS.padding_w
    start = [place.n, place.p + (dr >> 1), dr & 1, place.q + (ds >> 1), (ds & 1) * sizes.C + place.c + c]
    return x.load(start).reshape(TILE.images * TILE.rows * TILE.columns, TILE.channels)


@triton.jit
def gather(x, place, lanes, step, sizes, TAPS: tl.constexpr, TILE: tl.constexpr):
    r, s, c, _ = step
    channels = place.c + c + tl.arange(0, TILE.channels)
    pixel, inside = locate(lanes, r, s, sizes, TAPS)
    mask = inside[:, None] & (channels < sizes.C)[None, :]
    return tl.load(x + (pixel * sizes.C)[:, None] + channels[None, :], mask=mask, other=0.0)


@triton.jit
def flat(x, place, lanes, step, sizes, TAPS: tl.constexpr, TILE: tl.constexpr):
    pixel, channels, inside = locate_flat(lanes, step, sizes, TAPS, TILE)
    return tl.load(x + pixel * sizes.C + channels[None, :], mask=inside, other=0.0)


@triton.jit
def locate_flat(lanes, step, sizes, TAPS: tl.constexpr, TILE: tl.constexpr):
    """As :func:`locate`, for a step of the flattened reduction: pixels [M, C], channels [C], whether they exist [M, C]."""
    reduction = step.index * TILE.channels + tl.arange(0, TILE.channels)
    tap = reduction // sizes.C
    columns = Lanes(lanes.n[:, None], lanes.p[:, None], lanes.q[:, None], lanes.inside[:, None])
    pixel, inside = locate(columns, (tap // TAPS.S)[None, :], (tap % TAPS.S)[None, :], sizes, TAPS)
    return pixel, reduction % sizes.C, inside & (tap < TAPS.R * TAPS.S)[None, :]


@triton.jit
def loaded(place, lanes, step, sizes, TAPS: tl.constexpr, TILE: tl.constexpr, FLAT: tl.constexpr):
    """What a prologue asks about a tile of pixels: the channels [C], and whether the tap is in the image, [M, 1 or C].

    Without a padding every tap of a pixel that exists is; a prologue need not ask, what becomes of others is stored nowhere.
    """
    if FLAT:
        _, channels, inside = locate_flat(lanes, step, sizes, TAPS, TILE)
        return channels, inside
    else:
        channels = place.c + step.c + tl.arange(0, TILE.channels)
        if TAPS.padding_h == 0 and TAPS.padding_w == 0:
            return channels, lanes.inside[:, None]
        else:
            _, inside = locate(lanes, step.r, step.s, sizes, TAPS)
            return channels, inside[:, None]


@triton.jit
def matrix(w, place, filters, step, sizes, TAPS: tl.constexpr, TILE: tl.constexpr):
    r, s, c, _ = step
    return w.load([place.k, (r * TAPS.S + s) * (place.c_end - place.c) + c])


@triton.jit
def rows(w, place, filters, step, sizes, TAPS: tl.constexpr, TILE: tl.constexpr):
    r, s, c, _ = step
    deep = place.c_end - place.c
    channels = c + tl.arange(0, TILE.channels)
    start = (filters * (TAPS.R * TAPS.S) + (r * TAPS.S + s)) * deep
    mask = (filters < sizes.K)[:, None] & (channels < deep)[None, :]
    return tl.load(w + start[:, None] + channels[None, :], mask=mask, other=0.0)


@triton.jit
def block_diagonal(w, place, filters, step, sizes, TAPS: tl.constexpr, TILE: tl.constexpr):
    """One tap of filters of several groups as a dense [K, C] tile, zero where filter and channel are of different groups."""
    r, s, c, _ = step
    channels = place.c + c + tl.arange(0, TILE.channels)
    own = (filters // TAPS.group_filters)[:, None] == (channels // TAPS.group_channels)[None, :]
    start = (filters * (TAPS.R * TAPS.S) + (r * TAPS.S + s)) * TAPS.group_channels
    return tl.load(
        w + start[:, None] + (channels % TAPS.group_channels)[None, :],
        mask=own & (filters < sizes.K)[:, None] & (channels < sizes.C)[None, :],
        other=0.0,
    )


@triton.jit
def flat_filters(w, place, filters, step, sizes, TAPS: tl.constexpr, TILE: tl.constexpr):
    reduction = step.index * TILE.channels + tl.arange(0, TILE.channels)
    length = TAPS.R * TAPS.S * sizes.C
    return tl.load(
        w + (filters * length)[:, None] + reduction[None, :],
        mask=(filters < sizes.K)[:, None] & (reduction < length)[None, :],
        other=0.0,
    )


PIXELS = {"box": box, "parity": parity, "gather": gather, "flat": flat}
FILTERS = {"matrix": matrix, "rows": rows, "block_diagonal": block_diagonal, "flat": flat_filters}
