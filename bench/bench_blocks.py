"""Blocks of ResNet-18 and ResNet-50 at the size they have in layer 2 (or the stem's), in inference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contenders import Bench, Case
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


@pytest.mark.parametrize("block", BLOCKS)
def test_block(bench: Bench, block: str, last_batch: int, size: int, dtype_name: str, contender: str) -> None:
    """One block; ``--size`` is the network's image, the block gets the part of it that its stage sees."""
    channels, part, build = BLOCKS[block]
    torch.manual_seed(0)
    module = build().eval()
    specimens.randomise(module)
    side = max(1, size // part)
    specimens.calibrate(module, specimens.images(2, side, channels, seed=1))
    bench(contender, Case(block, module, channels, last_batch, side, dtype_name))
