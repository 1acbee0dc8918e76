"""Convolutions of a training step on the CPU, and their gradients: by which of PyTorch's operators, and in which layout.

Activations are channels_last, and oneDNN's convolutions as fast on them as on its own blocks of channels, but where filters are
larger than what they are applied to. Then most of the time goes into the filters' layout: in channels_last PyTorch copies them
into it at each call, oneDNN copies them once more, and their gradient takes both ways back. So such layers are given contiguous
tensors (:func:`is_blocked`): the activations, which are the smaller part, are copied there and back. Those kernels also add up
in shorter parts: 512 filters of 3x3 on 512 channels are 2.3e-7 from float64, 1.1e-6 in channels_last (of the norm, PyTorch
2.14.1, AVX-512, 2026-11-29).

1x1 filters on few pixels are matrix products, whose filters nobody lays out (:func:`is_product`); so is all of a Linear.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from ..launch import Geometry
from . import cpu_wgrad, reference

_backward = torch.ops.aten.convolution_backward.default

#: How many times as large as input and output together filters are from which tensors are contiguous, if filters are that or
#: channels_last; and the elements they have at least. *Measured* on 2 threads of an AMD EPYC with AVX-512, PyTorch 2.14.1,
#: 2026-11-29, medians of forward plus both gradients, channels_last against contiguous, with filters that are contiguous. 3x3,
#: 512 on 512 channels, 2 images of 2x2 22.7, 4.0 ms; 1 of 7x7 (47 times as large) 18.8, 6.7; 8 of 7x7 (5.9) 40.5, 34.8; 1 of
#: 28x28 (2.9) 64.3, 63.1; 512 on 256 of stride 2, 8 of 14x14 (2.0) 25.5, 21.4; 256 on 256, 8 of 7x7 (2.9) 9.9, 8.8, of 14x14
#: (0.7) 26.1, 29.2; 128 on 128, 8 of 4x4 (4.5) 0.82, 0.87. Channels_last filters: 512 on 512, 1 of 7x7 14.3, 6.7; 8 of 7x7
#: 38.3, 34.8, but for copies of filters and gradient.
LARGER, LARGER_IN_CHANNELS_LAST, LEAST_FILTERS = 2, 10, 2**18
#: Pixels of a batch up to which 1x1 filters are matrix products. *Measured* likewise, oneDNN's, the products': 512 on 2048
#: channels, 2 images of 2x2 4.1, 1.0 ms; 2 of 7x7 6.9, 4.2; 8 of 7x7 15.9, 14.0; 2048 on 512 2.0, 0.7; 4.6, 3.7; 16.1, 15.6;
#: 256 on 1024 1.5, 0.6; 2.3, 1.6; 4.8, 4.4; 8 of 14x14 12.6, 13.0; 64 on 256 0.21, 0.08; 0.25, 0.17; 0.41, 0.32. Of one image
#: oneDNN's kernels are others: 512 on 2048 of 7x7 5.6, 2.9, but 256 on 1024 of 14x14 2.2, 2.3, 64 on 256 of 7x7 0.09, 0.12.
#: Another such processor, 2026-12-01, has convolutions of twice the speed and products, which MKL makes without AVX-512 there,
#: of the same: 512 on 2048 channels, 2 images of 7x7 7.5, 3.7 ms; 4 8.7, 6.6; 8 12.2, 13.0; 2048 on 512 2.5, 3.5; 3.9, 6.7;
#: 6.9, 12.9; 256 on 1024 0.92, 1.04; 1.27, 1.82; 2.0, 3.4; 64 on 256 0.14, 0.08; 0.17, 0.13; 0.21, 0.23. So with AVX-512 only
#: of fewer pixels, though the first would gain a few percent with more.
MOST_PIXELS, MOST_PIXELS_WITH_AVX512 = 512, 128


def is_rows(g: Geometry, dtype: torch.dtype) -> bool:
    """Whether a convolution is a Linear's, of one pixel by one tap, which is a matrix product. (Not in fp16 and bf16, whose sum
    with a shortcut would be rounded twice.)

    PyTorch's convolution took 3 to 14 times as long: seen once, 16 to 512 channels, on a busy machine, which is no measurement.
    """
    pixels = g.H == g.W == g.R == g.S == 1 and g.padding == (0, 0)
    return pixels and g.groups == 1 and dtype == torch.float32


@cache
def _most_pixels() -> int:
    return MOST_PIXELS_WITH_AVX512 if torch.backends.cpu.get_cpu_capability() == "AVX512" else MOST_PIXELS


def is_product(g: Geometry, dtype: torch.dtype) -> bool:
    """Whether it is trained as a matrix product: a Linear, or 1x1 filters on few pixels of several images."""
    if is_rows(g, dtype):
        return True
    one_tap = g.R == g.S == 1 and g.padding == (0, 0) and g.groups == 1 and dtype == torch.float32
    pixels = g.N * g.P * g.Q
    few = g.N != 1 and pixels <= _most_pixels()
    # Products may be allowed to round their factors; that is not said of convolutions.
    return one_tap and few and torch.get_float32_matmul_precision() == "highest"


def is_blocked(g: Geometry, dtype: torch.dtype, contiguous: bool) -> bool:
    """Whether tensors are given to oneDNN contiguous, for it to use its own layout; ``contiguous``: that is the filters'."""
    filters = g.K * g.C * g.R * g.S
    if g.R == g.S == 1 or g.groups != 1 or dtype != torch.float32 or filters < LEAST_FILTERS:
        return False
    return filters > (LARGER if contiguous else LARGER_IN_CHANNELS_LAST) * g.N * (g.C * g.H * g.W + g.K * g.P * g.Q)


@lru_cache(maxsize=4096)
def _is_plain(g: Geometry, dtype: torch.dtype, contiguous: bool) -> bool:
    """Whether no other way than oneDNN's own, in channels_last, is taken by either function below, whatever settings say."""
    one_tap = g.R == g.S == 1
    return not (one_tap or is_blocked(g, dtype, contiguous) or cpu_wgrad.suits(g, dtype))


def rows(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N H W, C]; a view where it is channels_last."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n * h * w, c)


def new(x: Tensor, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """A channels_last tensor like x, and a view of it as :func:`rows` has it: what a product writes is no view of a matrix.

    Where gradients are recorded nobody may write to a view that was made where they are not.
    """
    made = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return made, rows(made)


def _read(g: Geometry, x: Tensor) -> Tensor:
    """The pixels that 1x1 filters of this stride read, [N, C, P, Q]; a view."""
    return x[:, :, :: g.stride[0], :: g.stride[1]]


def _product(g: Geometry, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    y, out = new(x, g.y_shape)
    if bias is None:
        torch.mm(rows(_read(g, x)), w.flatten(1).t(), out=out)
    else:
        torch.addmm(bias, rows(_read(g, x)), w.flatten(1).t(), out=out)
    return y


def _gradients_of_product(g: Geometry, dy: Tensor, x: Tensor | None, w: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    given, dx, dw = rows(dy), None, None
    if w is not None:
        dx, out = new(dy, (g.N, g.C, g.P, g.Q))
        torch.mm(given, w.flatten(1), out=out)
        if g.stride != (1, 1):
            read, (dx, _) = dx, new(dy, g.x_shape)
            _read(g, dx.zero_()).copy_(read)
    if x is not None:
        dw = dy.new_empty(g.w_shape)
        torch.mm(given.t(), rows(_read(g, x)), out=dw.view(g.K, g.C))
    return dx, dw


def forward(g: Geometry, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Run a convolution.

    Args:
        g: the convolution.
        x: [N, C, H, W], channels_last.
        w: [K, C / groups, R, S], in any layout.
        bias: [K] or None.

    Returns:
        [N, K, P, Q], channels_last.
    """
    if _is_plain(g, x.dtype, w.is_contiguous()):
        y = torch.conv2d(x, w, bias, g.stride, g.padding, g.dilation, g.groups)
        return y.contiguous(memory_format=torch.channels_last)
    if is_product(g, x.dtype):
        return _product(g, x, w, bias)
    if is_blocked(g, x.dtype, w.is_contiguous()):
        x, w = x.contiguous(), w.contiguous()
    y = torch.conv2d(x, w, bias, g.stride, g.padding, g.dilation, g.groups)
    return y.contiguous(memory_format=torch.channels_last)


def gradients(g: Geometry, dy: Tensor, x: Tensor | None, w: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """``(dx, dw)`` of a convolution: dx where its filters are given, dw where its input is. oneDNN makes both in one call.

    Args:
        g: the convolution.
        dy: [N, K, P, Q], channels_last.
        x: [N, C, H, W], channels_last, or None.
        w: [K, C / groups, R, S], in any layout, or None.

    Returns:
        [N, C, H, W], channels_last, or None; [K, C / groups, R, S], or None.
    """
    if x is not None and w is not None and _is_plain(g, dy.dtype, w.is_contiguous()):
        w = w.contiguous(memory_format=torch.channels_last)
        dx, dw, _ = _backward(dy, x, w, None, g.stride, g.padding, g.dilation, False, [0, 0], g.groups, [True, True, False])
        return dx.contiguous(memory_format=torch.channels_last), dw
    if is_product(g, dy.dtype):
        return _gradients_of_product(g, dy, x, w)
    dw = None
    if x is not None and cpu_wgrad.suits(g, dy.dtype):
        dw, x = cpu_wgrad.wgrad(g, dy, x), None
    elif x is not None and reference.skips_pixels(g):
        read = _read(g, x).contiguous(memory_format=torch.channels_last)
        dw, x = gradients(replace(g, H=g.P, W=g.Q, stride=(1, 1)), dy, read, None)[1], None
    if x is None and w is None:
        return None, dw
    blocked = is_blocked(g, dy.dtype, w is None or w.is_contiguous())
    layout = torch.contiguous_format if blocked else torch.channels_last
    wanted = [w is not None, x is not None, False]
    tensors = []
    for tensor, shape in ((dy, g.y_shape), (x, g.x_shape), (w, g.w_shape)):
        if tensor is None:  # of what is not wanted only shape and layout matter
            tensors.append(torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=layout))
        else:
            tensors.append(tensor.contiguous(memory_format=layout))
    made = _backward(*tensors, None, g.stride, g.padding, g.dilation, False, [0, 0], g.groups, wanted)
    dx = None if made[0] is None else made[0].contiguous(memory_format=torch.channels_last)
    return dx, made[1] if x is not None else dw
