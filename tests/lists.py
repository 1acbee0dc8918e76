"""Modules that take tensors in lists, tuples and dicts, and what they are compared by."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from tolerances import CLOSE, relative_error
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fused_resnet import count_launches, explain, fuse


class Base(nn.Module):
    """A tower of its own, and a convolution with a bias behind it that a loop calls."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.logits = nn.Conv2d(4, 6, 1)
        self.flag = False


class Head(Base):
    """As RetinaNet's heads: a loop over levels, the results in one tensor."""

    def forward(self, levels: list[Tensor]) -> Tensor:
        found = []
        for x in levels:
            y = self.logits(F.relu(self.bn(self.conv(self.tower(x)))))
            N, _, H, W = y.shape
            found.append(y.view(N, -1, 2, H, W).permute(0, 3, 4, 1, 2).reshape(N, -1, 2))
        return torch.cat(found, dim=1)


class Lists(Base):
    """As a region proposal network's: what a tower makes is read twice, the result is a tuple of lists."""

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        first, second = [], []
        for x in levels:
            y = self.tower(x)
            first.append(self.logits(y))
            second.append(self.bn(self.conv(y)))
        return first, second


class Named(Base):
    """A dict in, a dict with a list and a number in it out, the values looped over twice and counted."""

    def forward(self, levels: dict[str, Tensor]) -> dict[str, Any]:
        assert len(levels) > 0
        names, means = list(levels.keys()), [x.mean() for x in levels.values()]
        made = OrderedDict((f"{name}!", F.relu(self.bn(self.conv(x)))) for name, x in zip(names, levels.values()))
        return {**made, "means": means, "first": self.logits(levels[names[0]]), "count": len(levels)}


class Neck(Base):
    """Sums from the last level to the first, in front of what is made of another tensor."""

    def forward(self, x: Tensor, levels: tuple[Tensor, ...]) -> OrderedDict[str, Tensor]:
        last = self.bn(self.conv(levels[-1]))
        made = [last]
        for index in range(len(levels) - 2, -1, -1):
            last = self.bn(self.conv(levels[index])) + F.interpolate(last, size=levels[index].shape[-2:])
            made.insert(0, last)
        made.append(self.logits(x))
        return OrderedDict((str(index), y) for index, y in enumerate(made))


class OnFlag(Base):
    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [F.relu(self.bn(self.conv(x))) if self.flag else self.bn(self.conv(x)) for x in levels]


class Outer(Base):
    """A child that takes the same list, between layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Head()

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [*(F.relu(self.logits(x)) for x in levels), self.head(levels), self.head([levels[0]])]


def levels(n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 4, 9 - 2 * index, 7 + index, generator=generator) for index in range(n)]


def given(kind: type[Base], n: int = 3) -> tuple[Any, ...]:
    parts = levels(n)
    if kind is Named:
        return ({f"level{index}": x for index, x in enumerate(parts)},)
    return (torch.ones(2, 4, 5, 5) * parts[0].mean(), tuple(parts)) if kind is Neck else (parts,)


def rebuilt(value: Any, change: Any) -> Any:
    """The same containers of other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((key, rebuilt(part, change)) for key, part in value.items())
    return type(value)(rebuilt(part, change) for part in value) if isinstance(value, (list, tuple)) else value


def step(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, list[Tensor]]:
    """The result, and the gradients of all inputs and parameters."""
    args = rebuilt(args, lambda x: x.detach().clone().requires_grad_())
    inputs = tree_leaves(args)
    model.zero_grad()
    result = model(*args)
    generator = torch.Generator().manual_seed(5)
    made = [y for y in tree_leaves(result) if isinstance(y, Tensor)]
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in made]
    sum((y * weight).sum() for y, weight in zip(made, weights)).backward()
    return result, [x.grad if x.grad is not None else torch.zeros_like(x) for x in (*inputs, *model.parameters())]


def same(found: Any, wanted: Any, bound: float = CLOSE) -> None:
    """Equal containers, near tensors."""
    assert type(found) is type(wanted)
    if isinstance(wanted, Tensor):
        assert relative_error(found, wanted) < bound
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        same(list(found.values()), list(wanted.values()), bound)
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted):
            same(one, other, bound)
    else:
        assert found == wanted


def before_and_behind_a_call(plain: nn.Module, args: Any) -> Iterator[tuple[nn.Module, bool]]:
    """A fused copy that has not been called, and one that has, so that it is traced; and whether it has."""
    for called in (False, True):
        fused = fuse(copy.deepcopy(plain))
        if called:
            fused(args)
        yield fused, called


def launches(model: nn.Module, *args: Any) -> int:
    """Of one call, without gradients."""
    with count_launches() as log, torch.no_grad():
        model(*args)
    return len(log)


def own_chains(model: nn.Module) -> list[str]:
    """The convolutions of chains that the model itself runs."""
    return [row.name for row in explain(model, show=False).rows if row.fused and not row.name.startswith(("tower", "head"))]


#: Class -> launches of three levels, in eval mode and in training.
KINDS: dict[type[Base], tuple[int, int]] = {
    Head: (9, 9), Lists: (9, 12), Named: (4, 7), Neck: (4, 7), OnFlag: (3, 6), Outer: (15, 15),
}  # fmt: skip
