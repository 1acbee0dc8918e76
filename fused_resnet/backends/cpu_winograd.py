"""3x3 convolutions on the CPU with 16 products for four pixels instead of 36: Winograd's minimal filtering F(2x2, 3x3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), section 4.1: with d a 4x4 tile of the input, g the
filter and ``*`` the product element by element, 2x2 pixels are ``A' [(G g G') * (B' d B)] A``. The products, summed over the
channels, are one grouped 1x1 convolution of 16 groups by oneDNN (faster than PyTorch's batched matrix products); the rest is
sums, of part after part of the image, each small enough to stay in the cache.

A sum here has C terms where a direct convolution's has 9 C, so that the result is nearer to the exact one than oneDNN's in
channels_last: in fp32, 256 channels of 56x56, 5e-7 against 8e-7 (of contiguous images oneDNN has 2e-7). A pixel that is not
finite makes others of its tile NaN, one pixel farther than a convolution would. Why so:
docs/decisions/010-minimal-filtering-on-the-cpu.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil

import torch
from torch import Tensor

from ..launch import Geometry

#: Bytes of transformed tiles that one thread works on.
PART_BYTES = 7 * 2**18
#: Layouts of filters kept for sizes of images: the heads of a detector see several in turn.
LAYOUTS = 2
#: The fewest channels and filters, and multiplications of the convolution for each thread, and the most pixels of tiles to one
#: of the result, for which it is faster. *Measured* on 2 threads of an AMD EPYC with AVX-512, PyTorch 2.14.1, 2026-11-29, in
#: turn with oneDNN's direct convolution, 64 MiB written before each as a network's other layers would, medians of 15, its time
#: over this one's: one image, 96 channels of 112x112 0.95; 128 of 28x28 0.89, 112x112 0.97; 192 of 14x14 0.74, 28x28 (260 M)
#: 1.05, 56x56 1.24; 256 of 14x14 0.75, 20x20 (236 M) 1.08, 28x28 1.25, 56x56 1.30; 512 of 14x14 1.31, 28x28 1.55; two images,
#: 256 of 14x14 (231 M) 1.17; eight 1.30, but 512 of 7x7 1.06. Other numbers of threads were not measured.
LEAST_CHANNELS, LEAST_WORK, MOST_RIM = 192, 10**8, 1.2


def suits(g: Geometry, dtype: torch.dtype) -> bool:
    """Whether this is the faster way."""
    square = (g.R, g.S, g.stride, g.dilation, g.groups) == (3, 3, (1, 1), (1, 1), 1)
    if not square or dtype != torch.float32 or min(g.C, g.K) < LEAST_CHANNELS:
        return False
    pixels, tiles = g.N * g.P * g.Q, g.N * ceil(g.P / 2) * ceil(g.Q / 2)
    return 4 * tiles <= MOST_RIM * pixels and 9 * g.C * g.K * pixels >= LEAST_WORK * torch.get_num_threads()


@lru_cache(maxsize=1024)
def _part(g: Geometry, threads: int) -> tuple[int, int]:
    """Images, and rows of tiles of each, that are transformed together: as many as stay in the cache, all parts alike."""
    down, across = ceil(g.P / 2), ceil(g.Q / 2)
    most = max(1, threads * PART_BYTES // (16 * 4 * max(g.C, g.K)))
    images = min(g.N, max(1, most // (down * across)))
    rows = min(down, max(1, most // across))
    return ceil(g.N / ceil(g.N / images)), ceil(down / ceil(down / rows))


class Filters:
    """Filters as they are; transformed, as oneDNN lays them out; and the bias where it adds once to each pixel of a tile."""

    def __init__(self, weight: Tensor, g: Geometry, bias: Tensor | None) -> None:
        """
        Args:
            weight: [K, C, 3, 3], fp32.
            g: the convolution to lay them out for.
            bias: [K], fp32, or None.
        """
        self._weight = weight
        self._layouts: dict[int, Tensor] = {}
        self.bias: Tensor | None = None
        if bias is not None:
            added = bias.new_zeros(16, g.K)
            added[5] = bias  # product (1, 1) is a term of all four
            self.bias = added.view(-1)
        self.laid_out(g)

    def laid_out(self, g: Geometry) -> Tensor:
        """The filters for images of that size.

        Another number of tiles may want another layout, which oneDNN would make at each call, in 100 ms for 512 filters.
        """
        images, rows = _part(g, torch.get_num_threads())
        tiles = images * rows * ceil(g.Q / 2)
        found = self._layouts.get(tiles)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = torch.ops.mkldnn._reorder_convolution_weight(
                    self._transformed(g), [0, 0], [1, 1], [1, 1], 16, [1, 16 * g.C, tiles, 1]
                )
            latest = list(self._layouts.items())[1 - LAYOUTS :]
            self._layouts = dict([*latest, (tiles, found)])  # a new one: another thread may read the old
        return found

    def _transformed(self, g: Geometry) -> Tensor:
        half = self._weight.new_tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]])  # G
        both = torch.einsum("ai,bj->abij", half, half).view(16, 9)
        taps = self._weight.permute(2, 3, 0, 1).reshape(9, g.K * g.C)
        return torch.mm(both, taps).view(16 * g.K, g.C, 1, 1)


def convolve(g: Geometry, filters: Filters, x: Tensor) -> Tensor:
    """A convolution that :func:`suits`.

    Args:
        g: the convolution.
        filters: its own.
        x: [N, C, H, W], channels_last, fp32.

    Returns:
        [N, K, P, Q], channels_last.
    """
    down, across = ceil(g.P / 2), ceil(g.Q / 2)
    images, rows = _part(g, torch.get_num_threads())
    tiles = images * rows * across
    weight = filters.laid_out(g)
    top, left = g.padding
    padded = x.new_empty(g.N, 2 * down + 2, 2 * across + 2, g.C)
    padded[:, :top].zero_()
    padded[:, top + g.H :].zero_()
    padded[:, :, :left].zero_()
    padded[:, :, left + g.W :].zero_()
    padded[:, top : top + g.H, left : left + g.W] = x.permute(0, 2, 3, 1)
    y = x.new_empty(g.N, 2 * down, 2 * across, g.K)
    # Rows, then columns, of the tiles transformed: [images, rows, i, W, C] and [images, rows, columns, i, j, C].
    by_rows = x.new_empty(images, rows, 4, 2 * across + 2, g.C)
    transformed = x.new_empty(images, rows, across, 4, 4, g.C)
    halved = x.new_empty(images, rows, 2, across, 4, g.K)
    columns = [by_rows[:, :, :, start : start + 2 * across - 1 : 2].permute(0, 1, 3, 2, 4) for start in range(4)]
    for n in range(0, g.N, images):
        n = min(n, g.N - images)  # the last part overlaps the one before, so that all are of one size
        for first in range(0, down, rows):
            row = 2 * min(first, down - rows)
            d = padded[n : n + images, row : row + 2 * rows + 2]
            _inputs([d[:, start : start + 2 * rows - 1 : 2] for start in range(4)], by_rows.unbind(2))
            _inputs(columns, transformed.unbind(4))
            products = torch.ops.mkldnn._convolution_pointwise(
                transformed.view(1, tiles, 1, 16 * g.C).permute(0, 3, 1, 2),
                weight, filters.bias, [0, 0], [1, 1], [1, 1], 16, "none", [], "",
            )  # fmt: skip
            m = products.permute(0, 2, 3, 1).view(images, rows, across, 4, 4, g.K)
            _outputs(m.unbind(3), halved.unbind(2))
            pixels = y[n : n + images, row : row + 2 * rows].view(images, rows, 2, across, 2, g.K)
            _outputs(halved.unbind(4), pixels.unbind(4))
    if (2 * down, 2 * across) != (g.P, g.Q):
        y = y[:, : g.P, : g.Q].contiguous()
    return y.permute(0, 3, 1, 2)


def _inputs(d: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """B' along one axis."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _outputs(m: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """A' along one axis."""
    torch.add(m[1], m[2], out=out[0]).add_(m[0])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])
