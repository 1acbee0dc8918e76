"""Gradients of filters as matrix products, where oneDNN's own are slow.

The gradient of one tap ``(r, s)`` of the filters is a product over all pixels, ``dw[:, r, s] = dy^T x``, of dy with the part
of x that this tap meets. x is laid out so that these parts are matrices without a copy for each tap: the taps of one row next
to each other, rows of all images together::

    taps[h mod stride, h div stride, n, q, s, c] = x[n, h - padding, q * stride + s * dilation - padding, c]   (0 outside)

For a fixed r, the rows ``h = p * stride + r * dilation`` of all p are neighbours: ``dw[:, r] = dy^T taps[start : start + P]``
is one product of [K, P * n * Q] with [P * n * Q, S * C]; R of them are the gradient. A few images are taken at a time
(:data:`TAPS_BYTES`) and the products added up, so that the laid out x stays in the cache and needs little memory.

For 1x1 filters of stride 1 it is one product, without laying anything out.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..launch import Geometry

#: Memory of what is laid out at a time. From 1 to 8 MiB the time is the same; 1 GiB is up to a fifth slower (2026-11-25).
TAPS_BYTES = 2**22

#: Fewer channels make narrow products: the gradient of a stem with 3 channels takes twice oneDNN's time. 3x3 filters at a batch
#: of 64, least processor time of 15 rounds in turn, one thread of that processor, 2026-11-25: 16 channels at 32x32 take 7.7 ms
#: (oneDNN's way 4.7), 32 at 16x16 5.8 (4.8), 64 at 8x8 4.7 (4.7).
LEAST_CHANNELS = 128
#: So few only in large images: 64 channels, 2 threads, medians of 20 rounds in turn, that day: 8 images of 56x56 27 ms (35),
#: 32 of 16x16 10.0 (8.7), 128 of 8x8 7.1 (6.6).
LEAST_IN_LARGE, LARGE = 64, 1024


@cache
def _slow_there() -> bool:
    """Whether oneDNN's gradients of channels_last filters are slow on this processor, and matrix products fast.

    *Measured* on 2 threads of an AMD EPYC with AVX2, PyTorch 2.14.1, 2026-11-25, ResNet-50 at batch 8: its 3x3 filters 56 to 97
    GFLOP/s, 97 to 150 this way, where forward and dgrad have 130 to 160. Other processors were not measured.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.backends.mkl.is_available()


def suits(g: Geometry, dtype: torch.dtype) -> bool:
    """Whether :func:`wgrad` is the faster way."""
    least = LEAST_IN_LARGE if g.P * g.Q >= LARGE else LEAST_CHANNELS
    return g.groups == 1 and dtype == torch.float32 and min(g.C, g.K) >= least and _slow_there()


def _taps_of_rows(g: Geometry) -> dict[int, int]:
    """Remainder of a row by the stride -> its place in ``taps``; of rows that some tap meets."""
    return {remainder: place for place, remainder in enumerate(sorted({r * g.dilation[0] % g.stride[0] for r in range(g.R)}))}


def _lay_out(g: Geometry, x: Tensor, taps: Tensor, remainders: dict[int, int]) -> None:
    """Fill ``taps`` [remainders, rows, n, Q, S, C], zero where it is not written, from ``x`` [H, n, W, C]."""
    for remainder, place in remainders.items():
        low = max(0, -((remainder - g.padding[0]) // g.stride[0]))  # the first row inside the image
        rows = x[remainder + low * g.stride[0] - g.padding[0] :: g.stride[0]]
        count = min(rows.shape[0], taps.shape[1] - low)
        for s in range(g.S):
            offset = s * g.dilation[1] - g.padding[1]
            left = max(0, -(offset // g.stride[1]))
            columns = rows[:count, :, left * g.stride[1] + offset :: g.stride[1]]
            width = min(columns.shape[2], g.Q - left)
            if count > 0 and width > 0:
                taps[place, low : low + count, :, left : left + width, s].copy_(columns[:, :, :width])


def wgrad(g: Geometry, dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of the filters of a convolution without groups.

    Args:
        g: the convolution.
        dy: [N, K, P, Q], channels_last.
        x: [N, C, H, W], channels_last, of dy's dtype.

    Returns:
        [K, C, R, S], channels_last, of dy's dtype.
    """
    dw = dy.new_empty(g.K, g.R, g.S * g.C)
    if dy.numel() == 0:  # a rank without images
        dw.zero_()
        return dw.view(g.K, g.R, g.S, g.C).permute(0, 3, 1, 2)
    if g.pointwise:
        pixels = g.N * g.P * g.Q
        gradients = dy.permute(0, 2, 3, 1).reshape(pixels, g.K)
        torch.mm(gradients.t(), x.permute(0, 2, 3, 1).reshape(pixels, g.C), out=dw.view(g.K, g.C))
        return dw.view(g.K, g.R, g.S, g.C).permute(0, 3, 1, 2)
    remainders = _taps_of_rows(g)
    rows = g.P + (g.R - 1) * g.dilation[0] // g.stride[0]
    size = len(remainders) * rows * g.Q * g.S * g.C  # of one image
    together = min(g.N, max(1, TAPS_BYTES // (size * dy.element_size())))
    memory = dy.new_empty(together * size)
    x, dy = x.permute(2, 0, 3, 1), dy.permute(2, 0, 3, 1)
    for first in range(0, g.N, together):
        n = min(together, g.N - first)
        if first == 0 or n < together:  # what lies outside the image stays zero from one part of the batch to the next
            taps = memory[: n * size].zero_().view(len(remainders), rows, n, g.Q, g.S, g.C)
        _lay_out(g, x[:, first : first + n], taps, remainders)
        gradients = dy[:, first : first + n].reshape(-1, g.K).t()
        for r in range(g.R):
            start, remainder = divmod(r * g.dilation[0], g.stride[0])
            part = taps[remainders[remainder], start : start + g.P].view(-1, g.S * g.C)
            if first == 0:
                torch.mm(gradients, part, out=dw[:, r])
            else:
                dw[:, r].addmm_(gradients, part)
    return dw.view(g.K, g.R, g.S, g.C).permute(0, 3, 1, 2)
