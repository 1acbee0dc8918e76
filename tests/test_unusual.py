"""What people do to modules that fuse must not undo: forwards that switch modes or set data, forwards that were replaced,
attributes set afterwards, shortcuts that broadcast, tracing, our own blocks in somebody's network.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import copies, randomise
from tolerances import relative_error
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock, ResNet

import fused_resnet
from fused_resnet import fuse, unfuse


def _eval(self: nn.Module) -> None:
    self.bn.eval()


def _flag(self: nn.Module) -> None:
    self.bn.training = False


def _momentum(self: nn.Module) -> None:
    self.bn.momentum = 0.5


def _norm(self: nn.Module) -> None:
    self.conv.weight.data = F.normalize(self.conv.weight.data, dim=1)


class Does(nn.Module):
    """A convolution, BatchNorm and ReLU, whose forward does something else first."""

    def __init__(self, first: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.conv, self.bn, self.first = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), first

    def forward(self, x: Tensor) -> Tensor:
        self.first(self)
        return F.relu(self.bn(self.conv(x)))


@pytest.mark.parametrize("first", [_eval, _flag, _momentum, _norm])
def test_a_forward_that_changes_its_modules_is_left_alone(first: Callable[[nn.Module], None]) -> None:
    """Partial freezing and weight constraints inside a forward; explain says what it is."""
    plain = randomise(Does(first).double()).train()
    net = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match="the model is unchanged"):
        fuse(net)
    assert not isinstance(net, fused_resnet.fused.Fused)
    assert net.bn.training and net.bn.momentum == 0.1, "tracing has put back what it changed"
    text = str(fused_resnet.explain(net, show=False))
    assert "sets" in text
    for step in range(3):
        x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
        assert torch.equal(net(x), plain(x)), step
        with torch.no_grad():
            for one, other in zip(net.parameters(), plain.parameters(), strict=True):
                one.mul_(1.5)
                other.mul_(1.5)


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), BasicBlock(8, 8), BasicBlock(8, 8)]
    return randomise(nn.Sequential(*layers).double()).eval()


def test_a_class_whose_forward_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class we know is known by the forward that it was written with."""
    forward = BasicBlock.forward
    monkeypatch.setattr(BasicBlock, "forward", lambda self, x: forward(self, x) * 0.5)
    plain, fused = copies(network())
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    assert relative_error(fused(x), plain(x)) < 1e-12


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_instance_whose_forward_impl_was_replaced(when: str) -> None:
    plain = randomise(ResNet(BasicBlock, [1, 1, 1, 1]).double()).eval()
    net = copy.deepcopy(plain)

    def features(self: nn.Module, x: Tensor) -> Tensor:
        return self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))

    for model in (plain, net):
        if model is net and when == "after":
            fuse(net)
        model._forward_impl = types.MethodType(features, model)
    if when == "before":
        fuse(net)
    x = torch.randn(1, 3, 33, 32, dtype=torch.float64)
    assert relative_error(net(x), plain(x)) < 1e-12


class Halved(BasicBlock):
    """Computes in its ``__call__``."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 0.5


def test_a_call_of_its_own_is_called_in_a_stage() -> None:
    plain, fused = copies(randomise(nn.Sequential(Halved(8, 8), Halved(8, 8)).double()).eval())
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    assert relative_error(fused(x), plain(x)) < 1e-12


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("attributes", "kind"),
    [({"stride": 2}, "2d"), ({"stride": [1, 2], "padding": [1]}, "2d"), ({"dilation": 2, "padding": 2}, "2d"),
     ({"padding": "same", "dilation": 2}, "2d"), ({"stride": 2}, "1d")],
)  # fmt: skip
def test_numbers_and_lists_set_afterwards(attributes: dict[str, object], kind: str, when: str) -> None:
    """PyTorch takes ``conv.stride = 2``; so does explain."""
    layers = (nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)) if kind == "2d" else (nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8))
    plain = randomise(nn.Sequential(*layers, nn.ReLU()).double()).eval()
    net = copy.deepcopy(plain)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64) if kind == "2d" else torch.randn(2, 4, 17, dtype=torch.float64)
    if when == "after":
        fuse(net)(x)
    for model in (plain, net):
        for name, value in attributes.items():
            setattr(model[0], name, value)
    if when == "before":
        fuse(net)
    assert relative_error(net(x), plain(x)) < 1e-12
    assert fused_resnet.explain(net, show=False).rows[0].launches == 1
    assert relative_error(net.train()(x), plain.train()(x)) < 1e-12


class Sum(nn.Module):
    """A shortcut of one channel around a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + x)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("make", [lambda: BasicBlock(1, 4), Sum], ids=["block", "region"])
def test_a_shortcut_that_broadcasts_runs_unfused(make: Callable[[], nn.Module], train: bool) -> None:
    plain, fused = copies(randomise(make().double()).train(train))
    x = torch.randn(2, 1, 6, 5, dtype=torch.float64)
    assert relative_error(fused(x), plain(x)) < 1e-12
    with pytest.raises(RuntimeError, match="channels"):
        fused(x.expand(2, 3, 6, 5))


def test_an_eps_that_pytorch_refuses() -> None:
    fused = fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.0), nn.ReLU()).eval())
    x = torch.randn(2, 3, 5, 5)
    assert torch.isfinite(fused(x)).all() and not fused_resnet.explain(fused, show=False).left_alone
    with pytest.raises(ValueError, match="eps must be positive"):
        fused.train()(x)
    assert "eps=0.0" in fused_resnet.explain(fused, show=False).left_alone[0].note
    fused[1].eps = -1e-5
    with pytest.raises(ValueError, match=r"eps must be (non-negative|positive)"):
        fused.eval()(x)


@pytest.mark.parametrize("called", [False, True])
def test_traced_by_torch_jit(called: bool) -> None:
    """Into PyTorch's own operators."""
    plain, fused = copies(randomise(ResNet(BasicBlock, [1, 1, 1, 1])).eval())
    x = torch.randn(1, 3, 33, 32)
    with torch.no_grad():
        if called:
            fused(x)
        traced = torch.jit.trace(fused, x)
        other = torch.randn(2, 3, 40, 33)
        assert relative_error(traced(other), plain(other).double()) < 1e-5
        assert "fused_resnet" not in str(traced.inlined_graph)


class Network(nn.Module):
    """One of our own blocks, and layers of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = fused_resnet.ConvBNReLU(3, 8, kernel_size=3)
        self.conv, self.bn = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(self.stem(x))))


def test_our_own_blocks_in_a_network() -> None:
    """The rest is fused, they stay as they are; to fuse all of it once more is an error."""
    net = randomise(Network().double()).eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    expected = net(x)
    stem = type(net.stem)
    fuse(net)
    assert type(net.stem) is stem and isinstance(net, fused_resnet.fused.Fused)
    assert relative_error(net(x), expected) < 1e-12
    with pytest.raises(RuntimeError, match="already fused"):
        fuse(net)
    part = network()
    fuse(part[3])
    fuse(part)
    assert isinstance(part, fused_resnet.fused.Fused) and isinstance(part[4], fused_resnet.fused.Fused)


class Keyed:
    """A class that cannot be derived from without a word."""

    def __init_subclass__(cls, *, key: str, **options: object) -> None:
        super().__init_subclass__(**options)


class Locked(Keyed, BasicBlock, key="mine"):
    pass


def test_a_fuse_that_fails_leaves_the_model_as_it_was() -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), Locked(8, 8))
    with pytest.raises(TypeError):
        fuse(net)
    assert not any(isinstance(module, fused_resnet.fused.Fused) for module in net.modules())
    with pytest.raises(RuntimeError, match="not fused"):
        unfuse(net)


def test_a_sequential_takes_its_input_by_name() -> None:
    plain, fused = copies(network())
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    assert relative_error(fused(input=x), plain(input=x)) < 1e-12
    stage = copies(randomise(nn.Sequential(BasicBlock(3, 3), BasicBlock(3, 3)).double()).eval())
    assert relative_error(stage[1](input=x), stage[0](input=x)) < 1e-12


def test_the_classes_we_know_are_known() -> None:
    """By the functions that they were written with."""
    net = fuse(resnet.resnet18().eval())
    assert all(isinstance(module, fused_resnet.fused.Fused) for module in net.modules() if isinstance(module, BasicBlock))
