"""fused_resnet: residual networks with convolution, BatchNorm, ReLU and shortcut fused into single launches.

``fused_resnet.fuse(model)`` swaps fused blocks into a model people already have; see the README.
"""

from .backends import backend, count_launches
from .blocks import BasicBlock, Bottleneck, ConvBNReLU, ResidualMLP, ResNet, Stem
from .graphs import Graphed, graphed
from .models import (
    cifar_highway,
    cifar_plain,
    cifar_resnet,
    plain18,
    plain34,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .swap import Explanation, explain, fuse, unfuse

__version__ = "0.1.0"

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvBNReLU",
    "Explanation",
    "Graphed",
    "ResNet",
    "ResidualMLP",
    "Stem",
    "backend",
    "cifar_highway",
    "cifar_plain",
    "cifar_resnet",
    "count_launches",
    "explain",
    "fuse",
    "graphed",
    "plain18",
    "plain34",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext50_32x4d",
    "unfuse",
    "wide_resnet101_2",
    "wide_resnet50_2",
]
