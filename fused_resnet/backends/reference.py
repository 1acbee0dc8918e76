"""Every launch in plain PyTorch: the twin that the other executors are held against, and the fallback on any device and dtype.

Each epilogue is a function of a few lines named as in the kernels; activations are in :mod:`..activations`. Arithmetic is in
fp32 for fp16 and bf16 (one rounding, at the store), else in the tensors' own precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS, from_output
from ..launch import Geometry, Launch, PoolGeometry, accumulation_dtype, index_dtype

Operands = dict[str, Tensor]


def check_available(device: torch.device) -> None:
    """Plain PyTorch runs everywhere."""


def supports(launch: Launch) -> str | None:
    """Everything."""
    return None


def per_filter(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """A per-filter vector, to be broadcast over a [N, K, P, Q] tensor."""
    return vector.to(dtype).view(1, -1, 1, 1)


def given_scale(operands: Operands, eps: float, dtype: torch.dtype) -> Tensor:
    """``gamma / sqrt(var + eps)``, the factor of BatchNorm with given statistics."""
    scale = (operands["var"].to(dtype) + eps).rsqrt()
    return scale * operands["gamma"].to(dtype) if "gamma" in operands else scale


def scale_and_shift(operands: Operands, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """BatchNorm with given statistics as ``scale * y + shift``, the convolution's bias included.

    ``scale = gamma / sqrt(var + eps)``, ``shift = beta + (bias - mean) * scale`` (Ioffe and Szegedy 2015, algorithm 2).
    """
    scale = given_scale(operands, eps, dtype)
    shift = -operands["mean"].to(dtype)
    if "bias" in operands:
        shift = shift + operands["bias"].to(dtype)
    shift = shift * scale
    if "beta" in operands:
        shift = shift + operands["beta"].to(dtype)
    return scale, shift


def store(acc: Tensor, operands: Operands, eps: float) -> Tensor:
    return acc


def bias(acc: Tensor, operands: Operands, eps: float) -> Tensor:
    return acc + per_filter(operands["bias"], acc.dtype)


def affine(acc: Tensor, operands: Operands, eps: float) -> Tensor:
    scale, shift = scale_and_shift(operands, eps, acc.dtype)
    return acc * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def add(acc: Tensor, operands: Operands, eps: float) -> Tensor:
    return acc + operands["shortcut"].to(acc.dtype)


def bias_add(acc: Tensor, operands: Operands, eps: float) -> Tensor:
    return add(bias(acc, operands, eps), operands, eps)


def affine_add(acc: Tensor, operands: Operands, eps: float) -> Tensor:
    return add(affine(acc, operands, eps), operands, eps)


def inverse_deviation(operands: Operands, prefix: str, eps: float, dtype: torch.dtype) -> Tensor:
    """``invstd`` of the batch's statistics, or of given ones."""
    if f"{prefix}var" in operands:
        return (operands[f"{prefix}var"].to(dtype) + eps).rsqrt()
    return operands[f"{prefix}invstd"].to(dtype)


def normalised(x: Tensor, operands: Operands, prefix: str = "", eps: float = 0.0) -> Tensor:
    """BatchNorm by what is at hand, the batch's statistics or given ones, ``(x - mean) * (invstd * gamma) + beta``.

    Not ``scale * x + shift``, whose two halves cancel where the mean is large against the standard deviation.
    """
    scale = inverse_deviation(operands, prefix, eps, x.dtype)
    if f"{prefix}gamma" in operands:
        scale = scale * operands[f"{prefix}gamma"].to(x.dtype)
    z = (x - per_filter(operands[f"{prefix}mean"], x.dtype)) * scale.view(1, -1, 1, 1)
    return z + per_filter(operands[f"{prefix}beta"], x.dtype) if f"{prefix}beta" in operands else z


def prologue(launch: Launch, operands: Operands) -> Tensor:
    """``activation(bn(x))``, either of which may be absent, rounded as a kernel that wrote it would, in the launch's type."""
    x = operands["x"]
    if launch.prologue == "identity":
        return x
    x = x.to(accumulation_dtype(launch.dtype))
    z = normalised(x, operands, "x_", launch.x_eps) if launch.prologue.startswith("bn") else x
    return ACTIVATIONS[launch.x_activation].function(z, launch.x_slope).to(launch.dtype)


def stats(acc: Tensor, operands: Operands, eps: float) -> Tensor:
    """What is stored; the statistics are made of it by :func:`batch_statistics`."""
    return bias(acc, operands, eps) if "bias" in operands else acc


EPILOGUES: dict[str, Callable[[Tensor, Operands, float], Tensor]] = {
    function.__name__: function for function in (store, bias, affine, add, bias_add, affine_add, stats)
}


def activated(launch: Launch, z: Tensor) -> Tensor:
    """What a launch stores of ``z``."""
    return ACTIVATIONS[launch.activation].function(z, launch.slope).to(launch.dtype)


def activation_backward(launch: Launch, gradient: Tensor, z: Tensor) -> Tensor:
    """Gradient in front of a launch's activation, from its input; or its output, where that suffices."""
    return ACTIVATIONS[launch.activation].backward(gradient, z.to(gradient.dtype), launch.slope, None)


def plain_strides(tensor: Tensor) -> Tensor:
    """The tensor itself; with one channel, whose memory is the same in all formats, with the strides of a contiguous one.

    oneDNN's convolution is silently wrong for one channel with channels_last strides where the output is one pixel wide and the
    two strides differ (2026-11-23, PyTorch 2.14: ``torch.conv2d(x, w, stride=(1, 2), padding=(0, 1))``, x [4, 1, 6, 2]).
    Pinned in tests/test_reference.py.
    """
    return tensor.squeeze(1).unsqueeze(1) if tensor.shape[1] == 1 else tensor


def conv(launch: Launch, operands: Operands) -> Tensor | tuple[Tensor, ...]:
    """``activation(epilogue(prologue(x) * w))``. The padding is of what the prologue gives."""
    g = launch.geometry
    assert isinstance(g, Geometry)
    dtype = accumulation_dtype(launch.dtype)
    x = prologue(launch, operands).to(dtype)
    w = plain_strides(operands["w"].to(dtype))
    acc = F.conv2d(plain_strides(x), w, None, g.stride, g.padding, g.dilation, g.groups)
    z = EPILOGUES[launch.epilogue](acc, operands, launch.eps)
    y = activated(launch, z)
    return y if launch.epilogue != "stats" else (y, *batch_statistics(launch, operands, y))


def batch_statistics(launch: Launch, operands: Operands, y: Tensor) -> tuple[Tensor, ...]:
    """Mean and invstd of each channel of the stored y (the biased variance where ranks share the batch)."""
    if y.numel() == 0 and launch.outputs[-1][0] == "var":  # a rank without images adds nothing to the others' statistics
        nothing = y.new_zeros(y.shape[1], dtype=accumulation_dtype(launch.dtype))
        return nothing, nothing.clone()
    var, mean = torch.var_mean(y.to(accumulation_dtype(launch.dtype)), (0, 2, 3), correction=0)
    if launch.outputs[-1][0] == "var":
        return mean, var
    update_running(operands, mean, var, y.numel() // y.shape[1], launch.momentum)
    return mean, (var + launch.eps).rsqrt()


def statistics(launch: Launch, operands: Operands) -> tuple[Tensor, ...]:
    """:func:`batch_statistics` of a tensor that no convolution of the chain has made."""
    return batch_statistics(launch, operands, operands["x"])


def update_running(operands: Operands, mean: Tensor, var: Tensor, count: int | Tensor, momentum: float | None) -> None:
    """Running statistics, in place: ``(1 - f) * old + f * new`` with the unbiased variance.

    As in eager PyTorch autograd does not see it: a BatchNorm that ran by itself before has saved them for the backward.
    ``f`` is the momentum, or one over the number of batches (the cumulative average) where there is none.
    """
    if "batches" in operands:
        operands["batches"].add_(1)
    if "running_mean" not in operands:
        return
    factor: float | Tensor = momentum if momentum is not None else 0.0
    if momentum is None and "batches" in operands:
        factor = 1.0 / operands["batches"].to(mean.dtype)
    for role, new, unbiased in (("running_mean", mean, 1.0), ("running_var", var, count / (count - 1))):
        old, share = operands[role].data, factor * unbiased
        if old.dtype == new.dtype and isinstance(factor, float) and isinstance(share, float):
            old.mul_(1 - factor).add_(new, alpha=share)  # not lerp_, which makes NaN of an infinity
        else:
            old.copy_((1 - factor) * old.to(new.dtype) + share * new)


def bn_add_relu(launch: Launch, operands: Operands) -> Tensor:
    """``activation(bn(y) + shortcut)``; the shortcut may be behind a BatchNorm too, or absent, and so may the BatchNorm."""
    return activated(launch, summed(launch, operands))


def summed(launch: Launch, operands: Operands) -> Tensor:
    """What a ``bn_add_relu`` gives its activation."""
    dtype = accumulation_dtype(launch.dtype)
    z = operands["y"].to(dtype)
    if "mean" in operands:
        z = normalised(z, operands)
    if "shortcut" in operands:
        shortcut = operands["shortcut"].to(dtype)
        z = z + (normalised(shortcut, operands, "shortcut_") if "shortcut_mean" in operands else shortcut)
    return z


def _gate_inputs(launch: Launch, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """What is mixed, behind their BatchNorms: the branch in front of its activation, and the shortcut; and the open gate."""
    dtype = accumulation_dtype(launch.dtype)
    z, side = operands["y"].to(dtype), operands["shortcut"].to(dtype)
    if "mean" in operands:
        z = normalised(z, operands)
    if "shortcut_mean" in operands:
        side = normalised(side, operands, "shortcut_")
    return z, side, torch.sigmoid(operands["t"].to(dtype))


def gate(launch: Launch, operands: Operands) -> Tensor:
    """``T * activation(bn(y)) + (1 - T) * shortcut``, ``T = sigmoid(t)``; the shortcut may be behind a BatchNorm too."""
    z, side, opened = _gate_inputs(launch, operands)
    h = ACTIVATIONS[launch.activation].function(z, launch.slope)
    return (opened * h + (1 - opened) * side).to(launch.dtype)


def gate_backward(launch: Launch, operands: Operands) -> tuple[Tensor, ...]:
    """Gradients of what :func:`gate` mixes, and sums over the pixels.

    ``dz`` in front of the activation, ``dt`` in front of the sigmoid, ``dside`` of the shortcut behind its BatchNorm. Without
    statistics of a batch ``y`` is what the activation gave; or what it was given, where its output does not tell the gradient.
    """
    dtype = accumulation_dtype(launch.dtype)
    z, side, opened = _gate_inputs(launch, operands)
    masked_by_output = from_output(launch.activation, launch.slope)
    h = z
    if "mean" in operands or not masked_by_output:
        h = ACTIVATIONS[launch.activation].function(z, launch.slope)
    dout = operands["dout"].to(dtype)
    dz = activation_backward(launch, dout * opened, h if masked_by_output else z).to(launch.dtype)
    dt = (dout * (h - side) * (opened * (1 - opened))).to(launch.dtype)
    dside = (dout * (1 - opened)).to(launch.dtype)
    made = {"dz": dz, "dt": dt, "dside": dside, "dt_sum": dt.to(dtype).sum((0, 2, 3))}
    sums = _sums(dz, [(operands["y"], "")] if "mean" in operands else [], operands, dtype)
    made.update(zip(("sum", "dot"), sums, strict=False))
    sums = _sums(dside, [(operands["shortcut"], "shortcut_")] if "shortcut_mean" in operands else [], operands, dtype)
    made.update(zip(("dside_sum", "shortcut_dot"), sums, strict=False))
    return tuple(made[role] for role, _ in launch.outputs)


def zero_pad(launch: Launch, operands: Operands) -> Tensor:
    """Every stride-th pixel of x, and channels of zeros behind those it has."""
    g, x = launch.geometry, operands["x"]
    assert isinstance(g, Geometry)
    y = torch.empty(g.y_shape, dtype=launch.dtype, device=x.device, memory_format=torch.channels_last).zero_()
    y[:, : g.C] = x[:, :, :: g.stride[0], :: g.stride[1]]
    return y


def zero_pad_backward(launch: Launch, operands: Operands) -> Tensor:
    """The gradient of the channels that were there, at the pixels that were taken."""
    g, dz = launch.geometry, operands["dz"]
    assert isinstance(g, Geometry)
    dx = torch.empty(g.x_shape, dtype=launch.dtype, device=dz.device, memory_format=torch.channels_last).zero_()
    dx[:, :, :: g.stride[0], :: g.stride[1]] = dz[:, : g.C]
    return dx


def max_pool(launch: Launch, operands: Operands) -> Tensor | tuple[Tensor, Tensor]:
    """Max-pooling, floor mode, of what the prologue gives; and which place of each window it is, ``r * S + s``."""
    g = launch.geometry
    assert isinstance(g, PoolGeometry)
    return pooled(launch, g, prologue(launch, operands))


def pooled(launch: Launch, g: PoolGeometry, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """What a ``max_pool`` writes, from what it reads behind its prologue."""
    if len(launch.outputs) == 1:
        return F.max_pool2d(x, g.kernel, g.stride, g.padding, g.dilation)
    y, flat = F.max_pool2d(x, g.kernel, g.stride, g.padding, g.dilation, return_indices=True)
    rows, columns = (starts.to(_within(g)) for starts in _window_starts(g, x.device))
    # Counted from the start of the window's first row: exact in few bits, since both wrap around alike.
    place, distance = flat.to(rows.dtype).sub_(rows), g.dilation[0] * g.W
    r = _steps(place, distance, g.kernel[0])
    if r is not None:
        place.sub_(r, alpha=distance)
    place.sub_(columns)
    if g.dilation[1] > 1:
        place = place // g.dilation[1]
    if r is not None:
        place.add_(r, alpha=g.kernel[1])
    return y, place.to(index_dtype(g.kernel))


def _within(g: PoolGeometry) -> torch.dtype:
    """For distances within the rows that a window meets, though not within an image."""
    return torch.int16 if ((g.kernel[0] - 1) * g.dilation[0] + 1) * g.W < 2**15 else torch.int32


def _window_starts(g: PoolGeometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat index of the start of each window's first row, as a column; its first column. Negative in the padding. int32."""
    rows = torch.arange(g.P, device=device, dtype=torch.int32) * g.stride[0] - g.padding[0]
    columns = torch.arange(g.Q, device=device, dtype=torch.int32) * g.stride[1] - g.padding[1]
    return rows.view(-1, 1) * g.W, columns


def _steps(index: Tensor, length: int, count: int) -> Tensor | None:
    """``index // length``, below ``count``; None for zeros. By clamps: a CPU takes long over division and comparison."""
    steps = None
    for start in range(length, count * length, length):
        step = index.clamp(start - 1, start).sub_(start - 1)
        steps = step if steps is None else steps.add_(step)
    return steps


def flat_places(g: PoolGeometry, indices: Tensor) -> Tensor:
    """Where in its plane each place of :func:`pooled` lies, as ``F.max_pool2d(return_indices=True)`` counts; int64."""
    rows, columns = _window_starts(g, indices.device)
    place, r = indices.to(_within(g)), _steps(indices, g.kernel[1], g.kernel[0])
    if g.dilation[1] > 1:
        place.mul_(g.dilation[1])
    if r is not None:  # indices is r * S + s
        place.add_(r, alpha=g.dilation[0] * g.W - g.dilation[1] * g.kernel[1])
    return place.to(torch.int32).add_(rows + columns).to(torch.int64, memory_format=torch.channels_last)


def scattered(g: PoolGeometry, dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Gradient of the pooling's input from the places of :func:`pooled`. Of ``x`` only shape and type matter."""
    flat = flat_places(g, indices)
    dy = dy.contiguous(memory_format=torch.channels_last)
    return torch.ops.aten.max_pool2d_with_indices_backward(dy, x, g.kernel, g.stride, g.padding, g.dilation, False, flat)


def max_pool_backward(launch: Launch, operands: Operands) -> Tensor | tuple[Tensor, ...]:
    """Gradient of max-pooling, to the element it chose; where its prologue did more, in front of that activation, with sums."""
    g = launch.geometry
    assert isinstance(g, PoolGeometry)
    x, dy = operands["x"], operands["dy"].contiguous(memory_format=torch.channels_last)
    if "indices" not in operands:
        window = (g.kernel, g.stride, g.padding, g.dilation)
        _, flat = F.max_pool2d(x, *window, return_indices=True)
        return torch.ops.aten.max_pool2d_with_indices_backward(dy, x, *window, False, flat)
    dtype = accumulation_dtype(launch.dtype)
    if "out" in operands:
        dy = activation_backward(launch, dy, operands["out"])
    dx = scattered(g, dy.to(dtype), x.to(dtype), operands["indices"])
    norm = "x_mean" in operands
    if "out" not in operands:
        dx = activation_backward(launch, dx, normalised(x.to(dtype), operands, "x_") if norm else x)
    dx = dx.to(launch.dtype)
    return dx, *_sums(dx, [(x, "x_")] if norm else [], operands, dtype)


def _sums(
    dz: Tensor, others: list[tuple[Tensor, str]], operands: Operands, dtype: torch.dtype, eps: float = 0.0
) -> list[Tensor]:
    """Per channel the sum of dz, and of dz times each of ``others``, normalised: dbeta, and dgamma of each."""
    dz = dz.to(dtype)
    sums = [dz.sum((0, 2, 3))]
    for y, prefix in others:
        centred = y.to(dtype) - per_filter(operands[f"{prefix}mean"], dtype)
        sums.append((dz * centred).sum((0, 2, 3)) * inverse_deviation(operands, prefix, eps, dtype))
    return sums


def bn_add_relu_backward(launch: Launch, operands: Operands) -> Tensor | tuple[Tensor, ...]:
    """``dz = dout * activation'``, its sum over the pixels, and the sums of its products with the normalised inputs."""
    dz = operands["dout"]
    if "out" in operands:
        dz = activation_backward(launch, dz, operands["out"])
    elif launch.activation != "identity":
        dz = activation_backward(launch, dz.to(accumulation_dtype(launch.dtype)), summed(launch, operands)).to(launch.dtype)
    made = {role for role, _ in launch.outputs}
    others = [(operands[role], prefix) for role, prefix in (("y", ""), ("shortcut", "shortcut_")) if f"{prefix}dot" in made]
    sums = _sums(dz, others, operands, accumulation_dtype(launch.dtype))
    return (dz, *sums) if launch.outputs[0][0] == "dz" else tuple(sums)


def convolution_output_gradient(launch: Launch, operands: Operands, dtype: torch.dtype) -> Tensor:
    """``dy`` from ``dz``: identity, or BatchNorm's backward (Ioffe and Szegedy 2015, section 3; docs/training.md)::

        dy = gamma * invstd * (dz - sum / m - (y - mean) * invstd * dot / m)

    For given statistics the factor is per filter, and is applied to the filters (dgrad) or to the result (wgrad) instead.
    """
    dz = operands["dz"].to(dtype)
    return _bn_backward(dz, operands).to(launch.dtype).to(dtype) if launch.gradient == "bn_backward" else dz


def _bn_backward(dz: Tensor, operands: Operands) -> Tensor:
    dtype = dz.dtype
    m = operands["count"].to(dtype) if "count" in operands else dz.numel() // dz.shape[1]
    invstd = operands["invstd"].to(dtype)
    scale = invstd * operands["gamma"].to(dtype) if "gamma" in operands else invstd
    centred = operands["y"].to(dtype) - per_filter(operands["mean"], dtype)
    inner = dz - (operands["sum"].to(dtype) / m).view(1, -1, 1, 1) - centred * (operands["dot"] * invstd / m).view(1, -1, 1, 1)
    return inner * scale.view(1, -1, 1, 1)


def output_gradient(launch: Launch, operands: Operands) -> Tensor:
    """The gradient in front of a BatchNorm from that behind it, plus the shortcut's."""
    dtype = accumulation_dtype(launch.dtype)
    dz = operands["dz"].to(dtype)
    if launch.gradient == "bn_backward":
        dy = _bn_backward(dz, operands)
    else:
        dy = dz * given_scale(operands, launch.eps, dtype).view(1, -1, 1, 1)
    return (dy + operands["dshortcut"].to(dtype) if "dshortcut" in operands else dy).to(launch.dtype)


def skips_pixels(g: Geometry) -> bool:
    """Whether a convolution is a 1x1 that reads every other pixel, say."""
    return (g.R, g.S, g.padding) == (1, 1, (0, 0)) and g.stride != (1, 1)


def only_read_pixels(x: Tensor, g: Geometry) -> tuple[Tensor, tuple[int, int]]:
    """For wgrad: the pixels of x that a strided 1x1 convolution reads, as the input of one of stride 1; and the stride left.

    oneDNN's weights' gradient of a strided 1x1 convolution writes where it must not (PyTorch 2.14.1, channels_last: 4 to 6
    channels without AVX-512, 8 channels and a stride of (2, 1) with it: the process ends).
    """
    if not skips_pixels(g) or x.device.type != "cpu":
        return x, g.stride
    return x[:, :, :: g.stride[0], :: g.stride[1]].contiguous(memory_format=torch.channels_last), (1, 1)


def _convolution_gradients(
    launch: Launch, dz: Tensor, x: Tensor | None, w: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    g = launch.geometry
    assert isinstance(g, Geometry)
    if x is None:  # its values are not needed for dx, only its shape
        x = torch.empty(g.x_shape, dtype=w.dtype, device=w.device, memory_format=torch.channels_last)
    stride = g.stride
    if not wanted[0]:
        x, stride = only_read_pixels(x, g)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dz, plain_strides(x), plain_strides(w), None, stride, g.padding, g.dilation, False, [0, 0], g.groups, [*wanted, False]
    )
    return dx, dw


def dgrad(launch: Launch, operands: Operands) -> Tensor | tuple[Tensor, ...]:
    """Gradient of a layer's input, plus the shortcut's; or in front of the previous layer's activation, with its sums."""
    dtype = accumulation_dtype(launch.dtype)
    dy, w = convolution_output_gradient(launch, operands, dtype), operands["w"].to(dtype)
    if launch.gradient == "scale":
        w = w * given_scale(operands, launch.eps, dtype).view(-1, 1, 1, 1)
    dx, _ = _convolution_gradients(launch, dy, None, w, (True, False))
    assert dx is not None
    if launch.epilogue == "store":
        return (dx + operands["dshortcut"].to(dtype) if "dshortcut" in operands else dx).to(launch.dtype)
    if launch.epilogue == "mask":
        seen = operands["a_previous" if "a_previous" in operands else "z_previous"]
        dx = activation_backward(launch, dx, seen).to(launch.dtype)
        return dx, *_sums(dx, [], operands, dtype)
    if "dshortcut" in operands:
        dx = dx + operands["dshortcut"].to(dtype)
    if launch.activation != "identity":
        dx = activation_backward(launch, dx, normalised(operands["x"].to(dtype), operands, "x_", launch.x_eps))
    dx = dx.to(launch.dtype)
    return dx, *_sums(dx, [(operands["x"], "x_")], operands, dtype, launch.x_eps)


def wgrad(launch: Launch, operands: Operands) -> Tensor | tuple[Tensor, ...]:
    """Gradients of a layer's parameters, those the launch lists.

    With the batch's statistics ``dw = wgrad(dy, x)``, and ``dbias`` is 0: BatchNorm subtracts what a bias adds. With given
    ones, ``G = wgrad(dz, x)`` and ``invstd = 1 / sqrt(var + eps)``: ``dw = gamma * invstd * G``, ``dbeta = sum(dz)``,
    ``dbias = gamma * invstd * sum(dz)``, and ``dgamma_k = invstd * (<w_k, G_k> + (bias - mean) * sum(dz))``, since the sum over
    the pixels of ``dz * conv(x, w)`` is ``<w_k, G_k>``: no convolution output is needed.
    """
    dtype = accumulation_dtype(launch.dtype)
    gradients: dict[str, Tensor] = {}
    invstd = scale = None
    if launch.gradient == "bn_backward":
        gradients["dbias"] = torch.zeros(launch.geometry.y_shape[1], dtype=dtype, device=operands["dz"].device)
    elif "sum" in operands:
        total = operands["sum"].to(dtype)
        gradients["dbeta"] = total
        if launch.gradient == "scale":
            invstd = (operands["var"].to(dtype) + launch.eps).rsqrt()
            scale = invstd * operands["gamma"].to(dtype) if "gamma" in operands else invstd
        gradients["dbias"] = total if scale is None else total * scale
    if "x" in operands:
        g = launch.geometry
        assert isinstance(g, Geometry)
        dy = convolution_output_gradient(launch, operands, dtype)
        x = prologue(launch, operands).to(dtype)
        _, raw = _convolution_gradients(launch, dy, x, dy.new_empty(1).expand(g.w_shape), (False, True))
        assert raw is not None
        gradients["dw"] = raw if scale is None else raw * scale.view(-1, 1, 1, 1)
        if invstd is not None and "w" in operands:
            offset = -operands["mean"].to(dtype)
            if "bias" in operands:
                offset = offset + operands["bias"].to(dtype)
            gradients["dgamma"] = invstd * ((operands["w"].to(dtype) * raw).sum((1, 2, 3)) + offset * total)
        gradients["dw"] = gradients["dw"].to(launch.dtype)
    made = tuple(gradients[role] for role, _ in launch.outputs)
    return made if len(made) > 1 else made[0]


def _group(launch: Launch) -> Any:
    from torch.distributed import distributed_c10d

    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return resolve(launch.group)


def sync_statistics(launch: Launch, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of the batch of all ranks from those of each (count, mean, var): merged by Chan's formula, in rank order."""
    import torch.distributed as dist

    group = _group(launch)
    mean, var = operands["mean"], operands["var"]
    n, _, p, q = launch.geometry.y_shape
    count = mean.new_full((1,), n * p * q)
    local = torch.cat([count, mean, var])
    ranks = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, local, group=group)
    gathered = torch.stack(ranks)
    counts = gathered[:, :1]
    means, variances = gathered[:, 1:].chunk(2, 1)
    total = counts.sum(0)
    mean = (means * counts).sum(0) / total
    var = ((variances + (means - mean).square()) * counts).sum(0) / total
    update_running(operands, mean, var, total, launch.momentum)
    return mean, (var + launch.eps).rsqrt(), total


def sync_sums(launch: Launch, operands: Operands) -> tuple[Tensor, Tensor]:
    """Sums over the batch of all ranks."""
    import torch.distributed as dist

    both = torch.stack([operands["sum"], operands["dot"]])
    dist.all_reduce(both, group=_group(launch))
    return both[0], both[1]


_KINDS: dict[str, Callable[[Launch, Operands], Tensor | tuple[Tensor, ...]]] = {
    function.__name__: function
    for function in (
        conv,
        statistics,
        output_gradient,
        bn_add_relu,
        gate,
        gate_backward,
        zero_pad,
        zero_pad_backward,
        max_pool,
        max_pool_backward,
        bn_add_relu_backward,
        dgrad,
        wgrad,
        sync_statistics,
        sync_sums,
    )
}


def run(launch: Launch, operands: Operands, donated: frozenset[str] = frozenset()) -> Tensor | tuple[Tensor, ...]:
    """Run one launch. Autocast is off inside: the plan has chosen the types."""
    device = next(iter(operands.values())).device
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return _KINDS[launch.kind](launch, operands)
    with torch.autocast(device.type, enabled=False):
        return _KINDS[launch.kind](launch, operands)
