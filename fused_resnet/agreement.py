"""How near a fused model has to come to eager in a step of training: one rule, of the tests and of ``fuse-check``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

#: How far running statistics may be from float64 in any case; else three times as far as eager's, in deep networks.
STATE = 1e-4
#: How many times eager's own distance from float64 outputs, gradients and statistics may have, and what is allowed in any
#: case. Eager's own in gradients is the larger of two memory formats: fused blocks run in channels_last, where PyTorch's CPU
#: BatchNorm adds up pixel after pixel.
TIMES, FLOOR = 3.0, 1e-5
#: Further inputs that are looked at where gradients are further away: the median of these and the first decides.
FURTHER = 4
#: Why a model without results is not compared.
NOTHING = "it gives no floating-point tensors"


def outputs(made: Any) -> list[Tensor]:
    """The floating-point tensors of any result."""
    values = made.values() if isinstance(made, dict) else made
    leaves = tree_leaves(dict(values=list(values)) if isinstance(made, dict) else made)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def far(actual: Tensor, truth: Tensor) -> float:
    """The distance of the two over the norm of ``truth``, in float64."""
    difference, scale = (actual.detach().double() - truth.detach().double()).norm(), truth.detach().double().norm()
    return float(difference / scale) if scale > 0 else float(difference)


def step(model: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients by name, of one forward and backward; the same random numbers in each."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(11)
    out = outputs(model(x))
    generator = torch.Generator().manual_seed(3)
    total = sum(
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)).sum() for y in out if y.requires_grad
    )
    if isinstance(total, Tensor):
        total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out, gradients if x.grad is None else {"x": x.grad, **gradients}


def gradients_far(gradients: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Root mean square over the parameters of their relative errors, without those whose gradients cancel to nothing."""
    scale = max((float(gradient.norm()) for gradient in truth.values()), default=0.0)
    found = [far(gradients[key], t) ** 2 for key, t in truth.items() if float(t.norm()) > 1e-6 * scale]
    return float(torch.tensor(found, dtype=torch.float64).mean().sqrt()) if found else 0.0


def times_eager(plain: nn.Module, fused: nn.Module, x: Tensor) -> float:
    """How many times eager's distance from float64 gradients ours have on one input; 1 where both are within the rounding.

    Args:
        plain: the eager model, of which copies are run.
        fused: the same one, fused; it is run.
    """
    wanted = step(copy.deepcopy(plain).double(), x.double())[1]
    layouts = (torch.contiguous_format, torch.channels_last) if x.dim() == 4 else (torch.contiguous_format,)
    eager = [
        gradients_far(step(copy.deepcopy(plain).to(memory_format=layout), x.contiguous(memory_format=layout))[1], wanted)
        for layout in layouts
    ]
    ours = gradients_far(step(fused, x)[1], wanted)
    return 1.0 if ours <= FLOOR else ours / max(eager) if max(eager) > 0 else float("inf")


def median_times(plain: nn.Module, fused: nn.Module, x: Tensor) -> float:
    """:func:`times_eager` in the middle of ``x`` and :data:`FURTHER` random inputs like it.

    A ReLU whose input falls to the other side of zero decides by chance over one input.
    """
    parts = [x, *(torch.randn_like(x) for _ in range(FURTHER))]
    times = sorted(times_eager(plain, copy.deepcopy(fused), part) for part in parts)
    return times[len(times) // 2]


@dataclass(frozen=True)
class Distance:
    """How far eager's and the fused model's values are from float64, and how far the latter may be."""

    eager: float
    fused: float
    allowed: float
    #: :func:`median_times`, where one input alone would not do.
    median: float | None = None

    @property
    def ok(self) -> bool:
        """Near enough (False for NaN)."""
        return self.fused <= self.allowed or (self.median is not None and self.median <= TIMES)


def _worst(distances: list[Distance]) -> Distance:
    """That which comes nearest to what it may have, or goes furthest beyond; NaN is further than all."""
    worst = max(distances, key=lambda one: one.fused / one.allowed if one.fused == one.fused else float("inf"), default=None)
    return Distance(0.0, 0.0, FLOOR) if worst is None else worst


class Uncomparable(Exception):
    """Eager itself has no result to compare with; the text says why."""


def _exact(plain: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, gradients and buffers of a step in float64, and nothing that is infinite or NaN."""
    model = copy.deepcopy(plain).double()
    made, gradients = step(model, x.double())
    if not all(t.isfinite().all() for t in (*made, *gradients.values())):
        raise Uncomparable("the model overflows even in fp64")
    return made, gradients, dict(model.named_buffers())


def in_training(plain: nn.Module, fused: nn.Module, x: Tensor) -> dict[str, Distance]:
    """Outputs, gradients and running statistics of one forward and backward of both, each compared with float64.

    Args:
        plain: the eager model in training mode and in the element type of ``x``; copies are run.
        fused: the same one, fused; copies are run.

    Returns:
        The worst :class:`Distance` of ``"output"``, ``"gradients"`` and ``"statistics"``.

    Raises:
        Uncomparable: eager does not run, or overflows.
        Exception: whatever the fused model raises where eager runs.
    """
    own, ours = copy.deepcopy(plain), copy.deepcopy(fused)
    try:
        made, gradients = step(own, x)
        truth, wanted, moved = _exact(plain, x)
    except Exception as error:  # the code of others: whatever it raises
        if isinstance(error, Uncomparable):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Uncomparable(f"eager does not run in it here ({said})") from error
    if not made:
        raise Uncomparable(NOTHING)
    if not all(t.isfinite().all() for t in (*made, *gradients.values())):
        raise Uncomparable("eager itself overflows in it")
    found, got = step(ours, x)
    if [y.shape for y in found] != [y.shape for y in made]:
        raise RuntimeError(f"outputs of shapes {[list(y.shape) for y in found]}, eager's are {[list(y.shape) for y in made]}")
    if got.keys() != gradients.keys():
        raise RuntimeError(f"gradients of other parameters than eager's: {', '.join(sorted(got.keys() ^ gradients.keys()))}")
    near = [Distance(far(e, t), far(y, t), max(TIMES * far(e, t), FLOOR)) for y, e, t in zip(found, made, truth, strict=True)]
    eager = gradients_far(gradients, wanted)
    gradient = Distance(eager, gradients_far(got, wanted), max(TIMES * eager, FLOOR))
    if not gradient.ok:
        gradient = replace(gradient, median=median_times(plain, fused, x))
    after, before = dict(ours.named_buffers()), dict(own.named_buffers())
    statistics = []
    for name, t in moved.items():
        theirs = far(before[name], t)
        statistics.append(Distance(theirs, far(after[name], t), max(TIMES * theirs, STATE)))
    return {"output": _worst(near), "gradients": gradient, "statistics": _worst(statistics)}
