"""Sums with what is not the chain's input: which of them are fused, and that all of them compute what they did."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import launches, randomise
from tolerances import relative_error
from torch import Tensor, nn

from fused_resnet import count_launches, explain, fuse


class Base(nn.Module):
    """Three convolutions, one of them with a bias, and their BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.randn(1, 4, 1, 1))

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Pyramid(Base):
    """As in a feature pyramid: the sum with what comes from above is made in the size of what it is added to."""

    def forward(self, x: Tensor) -> Tensor:
        top = F.avg_pool2d(self.branch(x), 2)
        lateral = self.conv3(x)
        return lateral + F.interpolate(top, size=lateral.shape[-2:], mode="nearest")


class Size(Base):
    """The size is asked in another way, and of the sum's second term."""

    def forward(self, x: Tensor) -> Tensor:
        lateral = self.bn3(self.conv3(x))
        top = F.interpolate(x.mean((2, 3), keepdim=True), (lateral.size(2), lateral.size()[3]))
        return F.relu(top + lateral)


class AveragePool(Base):
    """A block of a resnet-d."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.bn3(self.conv3(F.avg_pool2d(x, 3, 1, 1))))


class PreActivation(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))) + x


class Branches(Base):
    """Two branches, the second with an activation in place."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn1(self.conv1(x))
        second = F.relu(self.bn2(self.conv2(F.avg_pool2d(x, 3, 1, 1))), inplace=True)
        return first + second


class IntoSide(Base):
    """The sum is made in the other tensor: nobody else's memory."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        side = x * 2
        view = side.view(-1)
        side += self.branch(x)
        return side, view


class WrittenBetween(Base):
    """What is read in front of the sum changes before it."""

    def forward(self, x: Tensor) -> Tensor:
        side = x * 2
        y = self.bn1(self.conv1(side))
        side.mul_(3)
        return F.relu(y + side)


class NormBetween(Base):
    """One live BatchNorm behind two convolutions: its statistics move in the order of the calls."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn2(self.conv1(x))
        return F.relu(first + self.bn2(self.conv2(x + 1)).flip(3))


class NormByAnotherName(NormBetween):
    def __init__(self) -> None:
        super().__init__()
        self.same = self.bn2

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn2(self.conv1(x))
        return F.relu(first + self.same(self.conv2(x + 1)).flip(3))


class WrittenByReLU(Base):
    """The chain's input is what a BatchNorm made, and an activation writes into it before the sum."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.bn3(self.conv3(x))
        y = self.bn1(self.conv1(z))
        return y + F.relu(z, inplace=True)


class WrittenByView(Base):
    """An activation writes into a part of the chain's input before the sum."""

    def forward(self, x: Tensor) -> Tensor:
        z = x * 2
        y = self.bn1(self.conv1(z))
        part = z[:, :]
        return y + F.relu(part, inplace=True)


class Broadcast(Base):
    """One value a channel and image: seen to be, since it comes from a pooling."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + F.adaptive_avg_pool2d(x, 1).sigmoid())


class BroadcastUnseen(Base):
    """One channel for all: seen only when it runs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + x[:, :1])


class Promoted(Base):
    """The sum is of a wider type."""

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x.to(torch.float64)


class Learned(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.scale


class Number(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x.shape[2]


class Lists(Base):
    """A child that is given tensors in a list, and gives such back."""

    class Last(nn.Module):
        def forward(self, x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
            return [*x, F.max_pool2d(x[-1], 1, 2)], [*names, "pool"]

    def __init__(self) -> None:
        super().__init__()
        self.last = self.Last()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made, names = self.last([self.bn3(self.conv3(x)) + F.avg_pool2d(x, 3, 1, 1)], ["a"])
        return tuple(made) if names == ["a", "pool"] else ()


#: Class -> launches in eval mode and in training, of one call.
MODULES = {
    Pyramid: (3, 4), Size: (1, 2), AveragePool: (3, 4), PreActivation: (2, 2), Branches: (2, 4), IntoSide: (2, 3),
    WrittenBetween: (1, 2), WrittenByReLU: (2, 4), WrittenByView: (1, 2), Broadcast: (2, 3), BroadcastUnseen: (0, 0),
    Promoted: (0, 0), Learned: (2, 3), Number: (0, 0), Lists: (1, 2), NormBetween: (2, 4),
    NormByAnotherName: (2, 4),
}  # fmt: skip


def _step(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients."""
    x = x.clone().requires_grad_()
    made = model(x)
    made = list(made) if isinstance(made, tuple) else [made]
    weights = [torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype) for y in made]
    if isinstance(model, (WrittenBetween, WrittenByReLU, WrittenByView)):  # which eager PyTorch cannot differentiate either
        return made, []
    sum((y * weight).sum() for y, weight in zip(made, weights)).backward()  # type: ignore[union-attr]
    return made, [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def _far(actual: list[Tensor], truth: list[Tensor]) -> float:
    """The largest error, of each tensor by itself; biases in front of a BatchNorm have noise for a gradient."""
    assert [a.shape for a in actual] == [t.shape for t in truth]
    scale = max((t.detach().abs().max().item() for t in truth), default=1.0)
    return max((relative_error(a, t) for a, t in zip(actual, truth) if t.abs().max() > 1e-6 * scale), default=0.0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_it_computes_what_it_did(kind: type[Base], backend: str) -> None:
    for training, expected in zip((False, True), MODULES[kind]):
        plain = randomise(kind()).train(training)
        fused = fuse(copy.deepcopy(plain), backend=backend)
        x = torch.randn(3, 4, 7, 9)
        truth = _step(copy.deepcopy(plain).double(), x.double())
        fused64 = _step(fuse(copy.deepcopy(plain).double(), backend=backend), x.double())
        for which, wanted in zip(fused64, truth):
            assert _far(which, wanted) < 1e-11
        with count_launches() as log:
            results = _step(fused, x)
        assert sum(launch.kind in FORWARD for _, launch in log.launches) == expected
        for which, own, wanted in zip(results, _step(plain, x), truth):
            assert [a.dtype for a in which] == [e.dtype for e in own]
            assert _far(which, wanted) < max(3 * _far(own, wanted), 1e-5)
        for (key, a), (_, b) in zip(plain.named_buffers(), fused.named_buffers(), strict=True):
            assert relative_error(b.double(), a.double()) < 1e-5, key


FORWARD = ("conv", "bn_add_relu")


@pytest.mark.parametrize("kind", [Pyramid, AveragePool, PreActivation], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_through_the_interpreted_kernels(kind: type[Base], training: bool) -> None:
    plain = randomise(kind()).train(training)
    x = torch.randn(2, 4, 6, 5)
    truth = _step(copy.deepcopy(plain).double(), x.double())
    with count_launches() as log:
        results = _step(fuse(copy.deepcopy(plain), backend="triton"), x)
    assert {runner for runner, _ in log.launches} == {"triton"}
    for which, own, wanted in zip(results, _step(plain, x), truth):
        assert _far(which, wanted) < max(3 * _far(own, wanted), 1e-5)


def test_types_that_are_not_those_of_the_sum() -> None:
    """Under autocast the second tensor may be wider than the convolution's output: the sum is as in eager PyTorch."""
    plain = randomise(PreActivation()).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            expected, actual = plain(given), fused(given)
            assert actual.dtype == expected.dtype and relative_error(actual.float(), expected.float()) < 0.05
    with pytest.raises(
        RuntimeError, match=r"shortcut of shape \[2, 4, 6, 6\] does not match the block's output \[2, 4, 3, 3\]"
    ):
        fused.conv2.stride = (2, 2)
        fused(x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", [Pyramid, AveragePool], ids=lambda kind: kind.__name__)
def test_under_the_compiler(kind: type[Base], training: bool) -> None:
    """One graph for all batch sizes; exported, the operators are PyTorch's own."""
    torch._dynamo.reset()
    plain = randomise(kind()).double().train(training)
    fused = fuse(copy.deepcopy(plain))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for n in (2, 3, 5):
        x = torch.randn(n, 4, 6, 8, dtype=torch.float64)
        plain.zero_grad(), fused.zero_grad()
        for which, wanted in zip(_step(compiled, x), _step(plain, x)):
            assert _far(which, wanted) < 1e-11
    if not training:
        program = torch.export.export(fused, (x,))
        assert not any("fused" in str(node.target) for node in program.graph.nodes)
        assert relative_error(program.module()(x), plain(x)) < 1e-12


def test_explain_tells_of_the_sum() -> None:
    rows = {row.name: row for row in explain(fuse(randomise(Pyramid()).eval()), show=False).rows}
    assert "conv + bias_add" in rows["conv3"].note and rows["conv3"].fused


def test_hooks_and_copies() -> None:
    plain = randomise(Pyramid()).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 4, 6, 7)
    seen: list[Tensor] = []
    handle = fused.conv3.register_forward_hook(lambda m, a, y: seen.append(y))
    assert relative_error(fused(x), plain(x)) < 1e-5 and len(seen) == 1
    handle.remove()
    assert launches(copy.deepcopy(fused), x) == launches(fused, x) == 3
