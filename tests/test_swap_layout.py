"""Forwards that count on contiguous memory: fused blocks give channels_last, and the answer is still right."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
from nets import launches, randomise
from tolerances import CLOSE, relative_error
from torch import Tensor, nn
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads
from torchvision.models.resnet import BasicBlock

from fused_resnet import explain, fuse, unfuse


def features(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), *more)


class Classifier(nn.Module):
    """As many people write it: several pixels an image are viewed as a row."""

    def __init__(self, *more: nn.Module) -> None:
        super().__init__()
        self.features, self.fc = features(*more), nn.Linear(8 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.fc(x.view(x.size(0), -1))


class Known(Classifier):
    """The last to touch it is a block of a class that is known."""

    def __init__(self) -> None:
        super().__init__(BasicBlock(8, 8))


class Own(Classifier):
    """The root has a chain of its own, and views by a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(self.features(x))))
        return self.fc(x.view((x.shape[0], -1)))


class Flatten(nn.Module):
    """As people wrote it before there was an nn.Flatten."""

    def forward(self, input: Tensor) -> Tensor:
        return input.view(input.size(0), -1)


class Flattened(nn.Sequential):
    """Nothing but a Sequential, whose forward is known."""

    def __init__(self) -> None:
        super().__init__(*features(BasicBlock(8, 8)), Flatten(), nn.Linear(8 * 36, 5))


class Bits(Classifier):
    """A view of another kind: of the type."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.fc(x.view(torch.int32).view(torch.float32).flatten(1))


class Written(Classifier):
    """What is written into the view must be seen in what was viewed; view must not become a copy."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x) * 1
        x.view(x.size(0), 2, 4, x.size(2), x.size(3)).transpose(1, 2).mul_(2)
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", [Classifier, Known, Own, Flattened, Bits, Written])
def test_views_of_what_chains_give(kind: Callable[[], nn.Module], training: bool) -> None:
    plain = randomise(kind()).train(training)
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 3, 14, 14)
    first, second = x.clone().requires_grad_(kind is not Bits), x.clone().requires_grad_(kind is not Bits)
    expected, actual = plain(first), fused(second)
    assert relative_error(actual, expected) < CLOSE
    if kind is not Bits:
        weights = torch.randn_like(expected)
        (expected * weights).sum().backward(), (actual * weights).sum().backward()
        assert relative_error(second.grad, first.grad) < 1e-4
    assert launches(fused, x) > 1 and not explain(fused, show=False).left_alone
    assert all(type(module) is type(other) for module, other in zip(unfuse(fused).modules(), plain.modules(), strict=True))


def test_a_module_that_views_is_one_as_before() -> None:
    model = Flattened().eval()
    fused = pickle.loads(pickle.dumps(copy.deepcopy(fuse(copy.deepcopy(model)))))
    x, flatten = torch.randn(1, 3, 14, 14), fused[5]
    assert isinstance(flatten, Flatten) and inspect.signature(flatten.forward) == inspect.signature(model[5].forward)
    assert relative_error(fused(x), model(x)) < CLOSE
    assert relative_error(torch.fx.symbolic_trace(fused)(x), model(x)) < CLOSE
    assert type(unfuse(fused)[5]) is Flatten
    with pytest.warns(UserWarning, match="unchanged"):
        assert type(fuse(nn.Sequential(Flatten()))[0]) is Flatten, "without a chain there is nothing to look after"


def test_the_keypoint_head_gives_what_its_loss_can_view() -> None:
    plain = KeypointRCNNHeads(4, (6, 5)).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(3, 4, 14, 14)
    assert fused(x).is_contiguous() and relative_error(fused(x), plain(x)) < CLOSE and launches(fused, x) == 2


def test_what_is_viewed_is_contiguous_at_each_call() -> None:
    """In a network that would be looked at as a whole too."""
    net = fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), KeypointRCNNHeads(4, (4, 4))).eval())
    with torch.no_grad():
        for _ in range(6):
            y = net(torch.randn(2, 3, 9, 7))
            assert y.is_contiguous() and not y.is_contiguous(memory_format=torch.channels_last)
