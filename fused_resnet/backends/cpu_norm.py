"""BatchNorm of a training step on the CPU: statistics, normalisation and gradients of channels_last activations.

PyTorch's operators take the pixels of a channels_last tensor one after another, whatever the number of channels. Taken in
groups, neighbours for channels of their own (:func:`_shared_out`), the same operators' sums are vectorised where channels are
few, and shorter: what a channel's sum loses in fp32 is a tenth. What is left is one factor or two per channel and a shift, in
elementwise operators, which may write over what they read. *Measured* on 2 threads of an AMD EPYC with AVX-512, PyTorch 2.14.1,
2026-11-29, medians, us, PyTorch's BatchNorm, this, alone with tensors in the cache (in a whole step memory decides, and no
difference was seen beside the noise):

=================  ===========  ===========
images             forward      backward
=================  ===========  ===========
128 x 16 x 32x32   344, 181     1068, 863
128 x 32 x 16x16   150, 68      409, 313
128 x 64 x 8x8     77, 36       148, 129
8 x 64 x 56x56     388, 168     436, 335
8 x 128 x 28x28    111, 46      254, 213
8 x 512 x 7x7      39, 16       94, 89
=================  ===========  ===========
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..launch import Launch
from . import reference

Operands = dict[str, Tensor]

#: Standard deviations that a mean is large from.
LARGE_MEAN = 32
#: Values of neighbouring pixels that are taken for one: of statistics, and of the two sums of the backward, which read twice as
#: much. *Measured* likewise: twice the values cost statistics a third more (they no longer stay in the first cache); 512 of the
#: backward take 227 us for 128 images of 16 x 32x32, 2048 458.
TOGETHER, TOGETHER_BACKWARD = 2048, 512
#: The most parts that all of these are added up in, each of so many at least, which costs nothing that can be seen.
PARTS, LEAST_IN_PART = 8, 256
#: Elements from which sums and gradient are made apart, and pixels that do not divide are added up by themselves.
LEAST_APART = 2**18


def _fp32(vector: Tensor) -> Tensor:
    return vector if vector.dtype == torch.float32 else vector.to(torch.float32)


def _vector(operands: Operands, role: str) -> Tensor | None:
    vector = operands.get(role)
    return None if vector is None else _fp32(vector)


@lru_cache(maxsize=1024)
def _shared_out(pixels: int, channels: int, values: int) -> tuple[int, int, int]:
    """How many neighbouring pixels are taken for one, in how many parts these are added up, and how many pixels are left over.

    Of small tensors none is: what divides is short enough.
    """
    together = max(values // channels, 1)
    if pixels * channels < LEAST_APART:
        together = max(count for count in range(1, together + 1) if pixels % count == 0)
        whole = [count for count in range(1, PARTS + 1) if pixels // together % count == 0]
        return together, max((count for count in whole if pixels // together // count >= LEAST_IN_PART), default=1), 0
    together = min(together, pixels)
    rows = pixels // together
    most = min(max(rows // LEAST_IN_PART, 1), PARTS)
    fitting = max(count for count in range(1, most + 1) if rows % count == 0)
    parts = fitting if 2 * fitting > most else most
    return together, parts, pixels % (together * parts)


def _groups(y: Tensor, shares: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """[N, C, H, W] as [parts, pixels, together * C, 1, 1], neighbours as channels of their own; the rest [pixels, C, 1, 1]."""
    together, parts, rest = shares
    n, c, h, w = y.shape
    rows = y.permute(0, 2, 3, 1).reshape(n * h * w, c)
    main = rows[: len(rows) - rest] if rest else rows
    return main.view(parts, -1, together * c, 1, 1), rows[len(rows) - rest :, :, None, None]


def normalised(x: Tensor, operands: Operands, prefix: str, eps: float = 0.0) -> Tensor:
    """BatchNorm by what is at hand, a variance or the batch's ``invstd``: a new tensor.

    Args:
        x: [N, C, H, W], channels_last.
        operands: ``mean``, ``var`` or ``invstd``, ``gamma`` and ``beta`` where there are any, each [C], behind ``prefix``.
        prefix: of their roles.
        eps: added to a variance.
    """
    mean, var = _fp32(operands[f"{prefix}mean"]), _vector(operands, f"{prefix}var")
    gamma, beta = _vector(operands, f"{prefix}gamma"), _vector(operands, f"{prefix}beta")
    if x.dtype == torch.float32:
        scale = operands[f"{prefix}invstd"] if var is None else var.add(eps).rsqrt_()
        scale = scale if gamma is None else scale * gamma
        shift = (mean * scale).neg_() if beta is None else torch.addcmul(beta, mean, scale, value=-1)
        return torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1)).contiguous(memory_format=torch.channels_last)
    if var is None:
        var, eps = operands[f"{prefix}invstd"].pow(-2), 0.0
    if gamma is None:  # PyTorch takes vectors in fp32 for fp16 and bf16 only together
        gamma, beta = torch.ones_like(mean), torch.zeros_like(mean)
    # Not torch.nn.functional.batch_norm, which refuses an eps of 0 (PyTorch 2.11).
    return torch.batch_norm(x, gamma, beta, mean, var, False, 0.0, eps, False)


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, fp32, each [C], of [N, C, H, W], channels_last.

    PyTorch's operator adds up the pixels of a channels_last tensor one after another, in fp32 (those of a contiguous one in
    fp64): an error of 1e-5 in the variance of 8 images of 112x112 (PyTorch 2.14), which deep networks multiply by a hundred.
    Taken in groups of pixels, each with its own sums, merged by Chan's formula, it is 2e-7.

    But what groups differ by is small beside the rounding of means that are large: at 1000 standard deviations the merged
    variance was 5e-5 off where PyTorch's is 3e-6. Where there are such channels both are taken of what is left of y behind the
    mean.
    """
    mean, var = _grouped_moments(y)
    if bool((var * LARGE_MEAN**2 < mean * mean).any()):
        rest, var = _grouped_moments(y - mean.view(1, -1, 1, 1))
        mean = mean + rest
    return mean, var


def _grouped_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    channels = y.shape[1]
    pixels = y.numel() // channels
    together, parts, rest = shares = _shared_out(pixels, channels, TOGETHER)
    groups, left = _groups(y, shares)
    made = [_moments_of(group) for group in groups]
    if parts == together == 1:
        mean, var = made[0]
    else:
        columns = made[0] if parts == 1 else (torch.stack(values) for values in zip(*made, strict=True))
        means, variances = (values.view(-1, channels) for values in columns)
        mean = means.mean(0)
        between = (means - mean).square_()  # not var_mean, which takes ten times as long down the columns of so small a matrix
        var = between.add_(variances).mean(0)
    if rest:
        others_mean, others = _moments_of(left)
        share, apart = rest / pixels, others_mean.sub_(mean)
        mean = mean.add(apart, alpha=share)
        var = var.lerp_(others, share).add_(apart.square_(), alpha=share * (1 - share))
    return mean, var


def _moments_of(y: Tensor) -> tuple[Tensor, Tensor]:
    running: tuple[Tensor | None, ...] = (None, None)
    if y.dtype != torch.float32:  # in fp32 for fp16 and bf16 too, if running statistics are there in fp32
        running = tuple(torch.zeros(y.shape[1], dtype=torch.float32, device=y.device) for _ in range(2))
    return torch.ops.aten.batch_norm_update_stats(y, *running, 0.0)


def statistics(launch: Launch, operands: Operands, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and invstd of y; the running statistics are updated on the way."""
    mean, var = moments(y)
    reference.update_running(operands, mean, var, y.numel() // y.shape[1], launch.momentum)
    return mean, var.add_(launch.eps).rsqrt_()


def sums(dz: Tensor, y: Tensor, operands: Operands, prefix: str, eps: float = 0.0) -> tuple[Tensor | None, Tensor, Tensor]:
    """``(dy, dot, sum)``: ``sum`` of dz and ``dot`` of its product with the normalised y, each [C], fp32.

    Of small tensors dy comes along, as :func:`gradient` has it: by PyTorch's operator, whose one call is most of its cost.

    Args:
        dz: [N, C, H, W], channels_last, behind a BatchNorm.
        y: [N, C, H, W], channels_last, in front of it.
        operands: ``mean``, ``var`` or ``invstd``, ``gamma`` where there is one, each [C], behind ``prefix``.
        prefix: of their roles.
        eps: added to a variance.
    """
    mean, given = _fp32(operands[f"{prefix}mean"]), _vector(operands, f"{prefix}var")
    if dz.numel() == 0:  # PyTorch's operator divides by the number of pixels, and ends the process
        return None, torch.zeros_like(mean), torch.zeros_like(mean)
    invstd = operands[f"{prefix}invstd"] if given is None else given.add(eps).rsqrt_()
    if given is None and (dz.numel() < LEAST_APART or dz.dtype != torch.float32):
        return _in_one(dz, y, mean, invstd, _vector(operands, f"{prefix}gamma"))
    channels = len(mean)
    together, _, rest = shares = _shared_out(dz.numel() // channels, channels, TOGETHER_BACKWARD)
    (dz_groups, dz_left), (y_groups, y_left) = _groups(dz, shares), _groups(y, shares)
    vectors = (mean, invstd) if together == 1 else (mean.repeat(together), invstd.repeat(together))
    made = [_sums_of(*pair, *vectors) for pair in zip(dz_groups, y_groups, strict=True)]
    dot, total = (sum(values).view(together, channels).sum(0) for values in zip(*made, strict=True))
    if rest:
        others_dot, others = _sums_of(dz_left, y_left, mean, invstd)
        dot, total = dot.add_(others_dot), total.add_(others)
    return None, dot, total


def _sums_of(dz: Tensor, y: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    gamma = None if dz.dtype == torch.float32 else torch.ones_like(mean)
    made = torch.ops.aten.native_batch_norm_backward(dz, y, gamma, None, None, mean, invstd, True, 0.0, [False, True, True])
    return made[1], made[2]


def _in_one(dz: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if gamma is None and dz.dtype != torch.float32:
        gamma = torch.ones_like(mean)
    return torch.ops.aten.native_batch_norm_backward(dz, y, gamma, None, None, mean, invstd, True, 0.0, [True, True, True])


def gradient(dz: Tensor, y: Tensor, operands: Operands, in_place: bool) -> Tensor:
    """In front of a BatchNorm by the batch's statistics,

        dy = gamma * invstd * (dz - sum / n - dot / n * (y - mean) * invstd)

    which is, per channel, a factor of dz, one of y and a shift (docs/training.md).

    Args:
        dz: [N, C, H, W], channels_last, behind it.
        y: [N, C, H, W], channels_last, in front of it.
        operands: ``mean``, ``invstd``, ``dot`` and ``sum``, ``gamma`` where there is one, each [C].
        in_place: nobody reads dz afterwards, the result is to be where it is.
    """
    mean, invstd, gamma = operands["mean"], operands["invstd"], operands.get("gamma")
    # Of a large mean factor and shift cancel, and what they are rounded by stays.
    if dz.dtype != torch.float32 or bool(((mean * invstd).abs_() > LARGE_MEAN).any()):
        return _in_one(dz, y, mean, invstd, _vector(operands, "gamma"))[0]
    pixels = max(dz.numel() // len(mean), 1)
    of_dz = invstd if gamma is None else invstd * gamma
    of_y = (of_dz * invstd).mul_(operands["dot"]).mul_(-1 / pixels)
    shift = torch.addcmul((of_dz * operands["sum"]).mul_(-1 / pixels), of_y, mean, value=-1)
    of_dz, of_y, shift = (vector.view(1, -1, 1, 1) for vector in (of_dz, of_y, shift))
    if in_place:
        return dz.mul_(of_dz).addcmul_(y, of_y).add_(shift)
    return torch.addcmul(shift, y, of_y).contiguous(memory_format=torch.channels_last).addcmul_(dz, of_dz)
