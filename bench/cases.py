"""What is timed: blocks of ResNet-18 and ResNet-50 at the size they have in layer 2 (or the stem's), and whole networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from contenders import INFERENCE, Case
from torch import nn

from fused_resnet import plain, specimens


def _projection(channels: int, filters: int, stride: int) -> nn.Sequential:
    return nn.Sequential(plain.conv1x1(channels, filters, stride), nn.BatchNorm2d(filters))


#: Name -> input channels, part of the image's size that its input has, module.
BLOCKS: dict[str, tuple[int, int, Callable[[], nn.Module]]] = {
    "ConvBNReLU": (128, 8, lambda: nn.Sequential(plain.conv3x3(128, 128), nn.BatchNorm2d(128), nn.ReLU(inplace=True))),
    "BasicBlock": (128, 8, lambda: plain.BasicBlock(128, 128)),
    "BasicBlock with projection": (64, 4, lambda: plain.BasicBlock(64, 128, 2, _projection(64, 128, 2))),
    "Bottleneck": (512, 8, lambda: plain.Bottleneck(512, 128)),
    "Bottleneck with projection": (256, 4, lambda: plain.Bottleneck(256, 128, 2, _projection(256, 512, 2))),
    "Stem": (3, 1, plain.Stem),
}


def block_case(name: str, batch: int, size: int, dtype_name: str, work: str = INFERENCE) -> Case:
    """One block; ``size`` is the network's image, the block gets the part of it that its stage sees."""
    channels, part, build = BLOCKS[name]
    torch.manual_seed(0)
    module = build().eval()
    specimens.randomise(module)
    side = max(1, size // part)
    specimens.calibrate(module, specimens.images(2, side, channels, seed=1))
    return Case(name, module, channels, batch, side, dtype_name, work)


@lru_cache(maxsize=1)
def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    try:
        model = specimens.eager_model(name)
    except ValueError as error:
        raise pytest.UsageError(f"--model: {error}") from error
    specimens.randomise(model)
    specimens.calibrate(model, specimens.images(2, 64, seed=1))
    return model


def model_case(name: str, batch: int, size: int, dtype_name: str, work: str = INFERENCE) -> Case:
    """A whole network."""
    return Case(name, _model(name), 3, batch, size, dtype_name, work)
