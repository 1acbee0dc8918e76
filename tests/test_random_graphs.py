"""Forwards by chance: layers in any order, shared, summed, written over. Fused or not they compute the same, or both raise."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import randomise
from torch import Tensor, nn

from fused_resnet import count_launches, fuse


class Program(nn.Module):
    """A list of calls, each of values made before; what ``kind`` does is in :meth:`forward`.

    Convolutions and BatchNorms are mostly taken once each, in chains more often than chance would have them. With ``functions``
    half of their calls are of functions, with the modules' tensors.
    """

    def __init__(self, seed: int, functions: bool = False) -> None:
        super().__init__()
        dice = random.Random(seed)
        count = dice.randint(2, 5)
        self.convs = nn.ModuleList(
            nn.Conv2d(4, 4, size, padding=size // 2, bias=dice.random() < 0.3, groups=dice.choice([1, 1, 2]))
            for size in dice.choices([1, 3], k=count)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(4, momentum=momentum, affine=dice.random() < 0.8, track_running_stats=dice.random() < 0.9)
            for momentum in dice.choices([0.1, 0.3, None], k=count)
        )
        self.acts = nn.ModuleList(
            [nn.ReLU(dice.random() < 0.5), nn.SiLU(), nn.Identity(), nn.ReLU6(), nn.LeakyReLU(0.1, dice.random() < 0.5)]
        )
        unused = {"conv": dice.sample(range(count), count), "norm": dice.sample(range(count), count)}
        self.calls: list[tuple[str, int, int]] = []

        def call(kind: str, source: int, *other: int) -> int:
            """Add a call; returns where its value is."""
            if other:
                choice = other[0]
            elif kind in unused:
                choice = unused[kind].pop() if unused[kind] and dice.random() < 0.85 else dice.randrange(count)
            else:
                choice = dice.randrange(len(self.acts) if kind == "act" else len(self.calls) + 1)
            self.calls.append((kind, source, choice))
            return len(self.calls)

        def layer(source: int) -> int:
            out = call("norm", call("conv", source))
            return call("act", out) if dice.random() < 0.6 else out

        weights = {
            "conv": 5,
            "norm": 5,
            "act": 4,
            "layer": 3,
            "block": 3,
            "add": 4,
            "add into": 1,
            "gate": 1,
            "pool": 0.6,
            "relu": 1,
        }
        for _ in range(dice.randint(3, 10)):
            last = len(self.calls)
            source = max(0, last - int(dice.expovariate(1.0))) if dice.random() < 0.8 else dice.randrange(last + 1)
            (kind,) = dice.choices(list(weights), list(weights.values()))
            if kind == "layer":
                layer(source)
            elif kind == "block":  # one or two layers, and a shortcut with or without a projection
                main = call("norm", call("conv", layer(source) if dice.random() < 0.5 else source))
                side = call("norm", call("conv", source)) if dice.random() < 0.6 else source
                call("relu", call("add", *dice.sample([main, side], 2)))
            else:
                call(kind, source)
        self.others = [dice.randrange(len(self.calls) + 1)] if dice.random() < 0.3 else []
        self.as_function = [functions and dice.random() < 0.5 for _ in self.calls]

    def forward(self, x: Tensor) -> Tensor:
        values = [x * 1.0]
        for (kind, source, other), as_function in zip(self.calls, self.as_function, strict=True):
            y = values[source]
            if kind == "conv":
                y = convolved(self.convs[other], y) if as_function else self.convs[other](y)
            elif kind == "norm":
                y = normalised(self.norms[other], y) if as_function else self.norms[other](y)
            elif kind == "act":
                y = self.acts[other](y)
            elif kind == "add":
                y = y + values[other]
            elif kind == "add into":
                y += values[other]
            elif kind == "gate":
                y = y * torch.sigmoid(values[other])
            elif kind == "pool":
                y = F.max_pool2d(y, 3, 1, 1)
            else:
                y = F.relu(y)
            values.append(y)
        return sum((values[other] for other in self.others), values[-1])


def convolved(conv: Any, x: Tensor) -> Tensor:
    """As the module, by a function."""
    return F.conv2d(x, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)


def normalised(norm: Any, x: Tensor) -> Tensor:
    """As the module, by a function, which has no cumulative average."""
    if norm.momentum is None:
        result: Tensor = norm(x)
        return result
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    batch = norm.training or norm.running_mean is None
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, batch, norm.momentum, norm.eps)


def run(model: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor] | str:
    """The output, gradients and buffers of a step, then the output without gradients four times; or why there are none."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    try:
        out = model(x)
        (out * weights).sum().backward()
        found = {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
        with torch.no_grad():
            found |= {f"call {time}": model(x) for time in range(4)}
    except RuntimeError as error:
        return str(error)
    made = {**found, **{name: buffer.double() for name, buffer in model.named_buffers()}}
    return {name: value for name, value in made.items() if value is not None}


def check(seed: int, functions: bool = False) -> int:
    """Compare one program in both modes; returns the launches."""
    torch.manual_seed(seed)
    plain = randomise(Program(seed, functions)).double()
    x, weights = torch.randn(2, 3, 4, 7, 6, dtype=torch.float64)
    launches = 0
    for training in (False, True):
        expected = run(copy.deepcopy(plain).train(training), x, weights)
        fused = fuse(copy.deepcopy(plain).train(training), backend="reference" if seed % 2 else "cpu")
        with count_launches() as log:
            found = run(fused, x, weights)
        launches += len(log)
        assert isinstance(expected, str) == isinstance(found, str), (seed, training, plain.calls, expected, found)
        if isinstance(expected, str) or isinstance(found, str):
            continue
        assert expected.keys() == found.keys(), (seed, training, plain.calls)
        for name, value in expected.items():
            far = float((found[name] - value).norm())
            assert far <= 1e-8 * float(value.norm()) + 1e-9, (seed, training, name, far, plain.calls)
    return launches


@pytest.mark.filterwarnings("ignore:fuse found no")
@pytest.mark.parametrize("start", [0, *(pytest.param(100 * part, marks=pytest.mark.slow) for part in range(1, 30))])
def test_programs_by_chance(start: int) -> None:
    assert sum(check(seed) for seed in range(start, start + 100)) > 500


@pytest.mark.filterwarnings("ignore:fuse found no")
@pytest.mark.parametrize("start", [7300, *(pytest.param(5000 + 100 * part, marks=pytest.mark.slow) for part in range(10))])
def test_programs_with_functions_by_chance(start: int) -> None:
    assert sum(check(seed, functions=True) for seed in range(start, start + 100)) > 500
