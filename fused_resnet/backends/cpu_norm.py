"""BatchNorm of a training step on the CPU: statistics, normalisation and gradients of channels_last activations.

PyTorch's operators take the pixels of a channels_last tensor one after another, whatever the number of channels. Taken in
groups, neighbours for channels of their own (:func:`_shared_out`), the same operators' sums are vectorised where channels are
few, and shorter: what a channel's sum loses in fp32 is a tenth. Statistics are made so; the gradient in front of a BatchNorm
of small tensors comes with its sums from PyTorch's one call (:data:`LEAST_APART`).

In a step two things decide that do not show alone. Each thread ought to read what it has written: behind sums in eight parts,
all threads in each, the next elementwise operator on 128 images of 16 x 32x32 took 950 us, behind sums by one call 140, and the
sums 1312, not 602. And operators on vectors ought to be few: behind a convolution, which has emptied the caches of their code,
each takes 10 to 20 us. (*Measured* on 2 threads of an AMD EPYC with AVX-512, PyTorch 2.14.1, 2026-11-29, medians; the two cores
share no cache that is fast.)
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from ..chain import UPDATED
from ..launch import Launch
from . import reference
from .derived import Entry, entry_of

Operands = dict[str, Tensor]
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
_update_stats = torch.ops.aten.batch_norm_update_stats.default

#: Standard deviations that a mean is large from.
LARGE_MEAN = 32
#: Values of neighbouring pixels that are taken for one: of statistics, and of the two sums of the backward, which read twice as
#: much. *Measured* likewise: twice the values cost statistics a third more (they no longer stay in the first cache); 512 of the
#: backward take 227 us for 128 images of 16 x 32x32, 2048 458; 1024 are as exact as many channels of few pixels need.
TOGETHER, TOGETHER_BACKWARD = 2048, 1024
#: Elements from which pixels that do not divide are added up by themselves (of fewer, what divides is enough); and from which
#: sums are taken in groups and a gradient is written over what it is made of. Of fewer PyTorch's one call makes all.
LEAST_WITH_REST = LEAST_APART = 2**18
#: Elements from which sums are made in so many parts, which is exacter: they are in no cache behind them anyway.
LARGE, PARTS = 2**22, 8


def _fp32(vector: Tensor) -> Tensor:
    return vector if vector.dtype == torch.float32 else vector.to(torch.float32)


def _vector(operands: Operands, role: str) -> Tensor | None:
    vector = operands.get(role)
    return None if vector is None else _fp32(vector)


@lru_cache(maxsize=1024)
def _shared_out(pixels: int, channels: int, values: int) -> tuple[int, int]:
    """How many neighbouring pixels are taken for one, and how many are left over. Of small tensors none is."""
    together = max(min(values // channels, pixels), 1)
    if pixels * channels < LEAST_WITH_REST:
        together = max(count for count in range(1, together + 1) if pixels % count == 0)
    return together, pixels % together


def _groups(y: Tensor, together: int, parts: int = 1) -> tuple[Tensor, ...]:
    """[N, C, H, W] in parts of [pixels, together * C, 1, 1], neighbours as channels of their own, but for those left over.

    Where there is one part each thread reads what elementwise operators give it before and behind. In more, of a tensor that
    fits the caches, it would be handed over from the other processors': up to nine times as long.
    """
    values = together * y.shape[1]
    pixels = y.numel() // (values * parts)
    return y.as_strided((parts, pixels, values, 1, 1), (pixels * values, values, 1, values, values)).unbind()


def _left(y: Tensor, rest: int) -> Tensor:
    """The last pixels, [rest, C, 1, 1]."""
    channels = y.shape[1]
    return y.as_strided((rest, channels, 1, 1), (channels, 1, 1, 1), y.storage_offset() + y.numel() - rest * channels)


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
        return scaled(x, *_folded(scale, mean, gamma, beta))
    if var is None:
        var, eps = operands[f"{prefix}invstd"].pow(-2), 0.0
    if gamma is None:  # PyTorch takes vectors in fp32 for fp16 and bf16 only together
        gamma, beta = torch.ones_like(mean), torch.zeros_like(mean)
    # Not torch.nn.functional.batch_norm, which refuses an eps of 0 (PyTorch 2.11).
    return torch.batch_norm(x, gamma, beta, mean, var, False, 0.0, eps, False)


def _folded(invstd: Tensor, mean: Tensor, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """A BatchNorm as scale and shift, each [1, C, 1, 1], fp32."""
    scale = invstd if gamma is None else invstd * gamma
    shift = (mean * scale).neg_() if beta is None else torch.addcmul(beta, mean, scale, value=-1)
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)


def scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale x + shift``, fp32, in a new tensor, channels_last."""
    return torch.addcmul(shift, x, scale).contiguous(memory_format=torch.channels_last)


def given(operands: Operands, prefix: str, eps: float) -> Entry:
    """Scale and shift of a BatchNorm with given statistics, kept while its vectors are as they are: those of
    :func:`normalised`, whose four small operators take as long as a layer of a small network.
    """
    roles = [role for role in (f"{prefix}{name}" for name in ("mean", "var", "gamma", "beta")) if role in operands]

    def build() -> tuple[Tensor, Tensor]:
        mean, var = _fp32(operands[f"{prefix}mean"]), cast(Tensor, _vector(operands, f"{prefix}var"))
        invstd = var.detach().add(eps).rsqrt_()
        return _folded(invstd, mean.detach(), _vector(operands, f"{prefix}gamma"), _vector(operands, f"{prefix}beta"))

    return entry_of(("scale and shift", eps, *roles), [operands[role] for role in roles], build)


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, fp32, each [C], of [N, C, H, W], channels_last.

    PyTorch's operator adds up the pixels of a channels_last tensor one after another, in fp32 (those of a contiguous one in
    fp64): an error of 1e-5 in the variance of 8 images of 112x112 (PyTorch 2.14), which deep networks multiply by a hundred.
    Taken in groups of pixels, each with its own sums, merged by Chan's formula, it is a few 1e-7.

    But what groups differ by is small beside the rounding of means that are large: at 1000 standard deviations the merged
    variance was 5e-5 off where PyTorch's is 3e-6. Where there are such channels both are taken of what is left of y behind the
    mean.
    """
    mean, var = _grouped_moments(y)
    if float(torch.addcmul(var, mean, mean, value=-1 / LARGE_MEAN**2).amin()) < 0:
        rest, var = _grouped_moments(y - mean.view(1, -1, 1, 1))
        mean = mean + rest
    return mean, var


def _grouped_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    channels = y.shape[1]
    pixels = y.numel() // channels
    together, rest = _shared_out(pixels, channels, TOGETHER)
    if together == 1:
        return _moments_of(y)
    means, variances = (values.view(-1, channels) for values in _moments_of(*_groups(y, together)))
    mean = means.mean(0)
    between = (means - mean).square_()  # not var_mean, which takes ten times as long down the columns of so small a matrix
    var = between.add_(variances).mean(0)
    if rest:
        others_mean, others = _moments_of(_left(y, rest))
        share, apart = rest / pixels, others_mean.sub_(mean)
        mean = mean.add(apart, alpha=share)
        var = var.lerp_(others, share).add_(apart.square_(), alpha=share * (1 - share))
    return mean, var


def _moments_of(y: Tensor) -> tuple[Tensor, Tensor]:
    if y.dtype == torch.float32:
        return _update_stats(y, None, None, 0.0)
    # In fp32 for fp16 and bf16 too, if running statistics are there in fp32.
    running = (torch.zeros(y.shape[1], dtype=torch.float32, device=y.device) for _ in range(2))
    return _update_stats(y, *running, 0.0)


#: Where launches leave ``(running statistics, mean, var, count, momentum)`` for :func:`update_running`; no slot is named so.
UPDATES = "updates of running statistics"


def statistics(launch: Launch, operands: Operands, y: Tensor, shared: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and invstd of y; what the running statistics become of them is left for :func:`update_running`."""
    mean, var = moments(y)
    running = {role: operands[role] for role in UPDATED if role in operands}  # not the images, which are to be freed
    if running:
        shared.setdefault(UPDATES, []).append((running, mean, var, y.numel() // y.shape[1], launch.momentum))
    return mean, (var + launch.eps).rsqrt_()


def update_running(shared: dict[str, Any]) -> None:
    """Bring the running statistics of all launches of a plan up to date: all of them, or none where something is raised.

    Together: a vector's own five operators took a tenth of what a step's BatchNorms do.
    """
    updates = shared.pop(UPDATES, None)
    if not updates:
        return
    olds: list[Tensor] = []
    batches: list[Tensor] = []
    values: list[Tensor] = []
    factors: list[float] = []
    alike = True  # what this is written for, in place of PyTorch's rules for any types
    for operands, mean, var, count, momentum in updates:
        if "batches" in operands:
            batches.append(operands["batches"])
        if "running_mean" in operands:
            olds += (operands["running_mean"], operands["running_var"])
            values += (mean, var)
            alike = alike and momentum is not None and olds[-2].dtype == olds[-1].dtype == mean.dtype
            if alike:
                factors += (momentum, momentum * (count / (count - 1)))
    # As in eager PyTorch autograd does not see it: a BatchNorm that ran by itself before has saved them for the backward.
    olds = [old.data for old in olds]
    updated = [*olds, *batches]
    if alike and len({tensor.data_ptr() for tensor in updated}) == len(updated):  # (else one is updated twice)
        news: list[Tensor] = []
        if olds:  # not lerp, which makes NaN of an infinity
            news = list(torch._foreach_mul(olds, [1 - factors[place & ~1] for place in range(len(factors))]))
            torch._foreach_add_(news, torch._foreach_mul(values, factors))
        news += torch._foreach_add(batches, 1) if batches else ()
        torch._foreach_copy_(updated, news)
        return
    before = [tensor.clone() for tensor in updated]
    try:
        for update in updates:
            reference.update_running(*update)
    except BaseException:
        torch._foreach_copy_(updated, before)
        raise


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
    elements, channels = dz.numel(), mean.shape[0]
    if given is None and (elements < LEAST_APART or dz.dtype != torch.float32):
        return _in_one(dz, y, mean, invstd, _vector(operands, f"{prefix}gamma"))
    pixels = elements // channels
    together, _ = _shared_out(pixels, channels, TOGETHER_BACKWARD)
    parts = PARTS if elements >= LARGE and pixels >= PARTS * together else 1
    rest = pixels % (together * parts)
    vectors = (mean, invstd) if together == 1 else (torch.cat((mean,) * together), torch.cat((invstd,) * together))
    pairs = zip(_groups(dz, together, parts), _groups(y, together, parts), strict=True)
    made = zip(*[_sums_of(*pair, *vectors) for pair in pairs], strict=True)
    dot, total = (torch.cat(values).view(-1, channels).sum(0) for values in made)
    if rest:
        others_dot, others = _sums_of(_left(dz, rest), _left(y, rest), mean, invstd)
        dot, total = dot.add_(others_dot), total.add_(others)
    return None, dot, total


def _sums_of(dz: Tensor, y: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    gamma = None if dz.dtype == torch.float32 else torch.ones_like(mean)
    made = _batch_norm_backward(dz, y, gamma, None, None, mean, invstd, True, 0.0, [False, True, True])
    return made[1], made[2]


def _in_one(dz: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if gamma is None and dz.dtype != torch.float32:
        gamma = torch.ones_like(mean)
    return _batch_norm_backward(dz, y, gamma, None, None, mean, invstd, True, 0.0, [True, True, True])


def gradient(dz: Tensor, y: Tensor, operands: Operands, in_place: bool) -> Tensor:
    """In front of a BatchNorm by the batch's statistics,

        dy = gamma * invstd * (dz - sum / n - dot / n * (y - mean) * invstd)

    which is, per channel, a factor of y and a shift, added to dz, times a factor (docs/training.md).

    Args:
        dz: [N, C, H, W], channels_last, behind it.
        y: [N, C, H, W], channels_last, in front of it.
        operands: ``mean``, ``invstd``, ``dot`` and ``sum``, ``gamma`` where there is one, each [C].
        in_place: nobody reads dz afterwards, the result is to be where it is.
    """
    mean, invstd, gamma = operands["mean"], operands["invstd"], operands.get("gamma")
    # Of a large mean factor and shift cancel, and what they are rounded by stays.
    if dz.dtype != torch.float32 or float(torch.linalg.vector_norm(mean * invstd, math.inf)) > LARGE_MEAN:
        return _in_one(dz, y, mean, invstd, _vector(operands, "gamma"))[0]
    per_pixel = -1 / max(dz.numel() // mean.shape[0], 1)
    of_y = (operands["dot"] * invstd).mul_(per_pixel)
    shift = torch.addcmul(operands["sum"] * per_pixel, of_y, mean, value=-1)
    scale = invstd if gamma is None else invstd * gamma
    of_y, shift, scale = (vector.view(1, -1, 1, 1) for vector in (of_y, shift.mul_(scale), scale))
    dy = dz.addcmul_(y, of_y) if in_place else torch.addcmul(dz, y, of_y)
    return torch.addcmul(shift, dy, scale, out=dy)
