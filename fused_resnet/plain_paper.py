"""What the paper compares its networks with and by, written with torch.nn alone: highway blocks, and the networks for CIFAR.

He et al. 2016 (arXiv 1512.03385), section 4.2; Srivastava, Greff and Schmidhuber 2015 (arXiv 1505.00387).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .checks import whole
from .plain import BasicBlock, Bottleneck, NormLayer, Stages, conv3x3


class _Gated(nn.Module):
    """The gate of a :class:`HighwayBlock`, in front of the class of a residual block."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        gate_bias: float = -2.0,
        **given: Any,
    ) -> None:
        block: Any = super()
        block.__init__(inplanes, planes, stride, downsample, **given)
        filters = planes * type(self).expansion  # type: ignore[attr-defined]  # of the block
        self.gate = nn.Conv2d(inplanes, filters, 1, stride)
        assert self.gate.bias is not None
        nn.init.constant_(self.gate.bias, gate_bias)


class HighwayBlock(_Gated, BasicBlock):
    """Two 3x3 layers behind a gate: ``T * H(x) + (1 - T) * shortcut(x)`` with ``T = sigmoid(gate(x))``.

    ``H(x) = relu(bn2(conv2(relu(bn1(conv1(x))))))``; the gate is a 1x1 convolution with a bias (He et al. 2016, arXiv
    1603.05027, section 3.1), which starts at ``gate_bias``: nearly closed, so that a deep network starts as shortcuts
    (Srivastava et al. 2015, section 2.2). No ReLU stands behind the sum, a mean of two tensors that are not negative.

    Args:
        inplanes, planes, stride, downsample: as a BasicBlock's.
        gate_bias: what the gate's bias starts at.
        **given: the other arguments of a BasicBlock.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        gate = torch.sigmoid(self.gate(x))
        return gate * y + (1 - gate) * shortcut


class HighwayBottleneck(_Gated, Bottleneck):
    """1x1, 3x3 and 1x1 layers behind a gate, a Bottleneck's; otherwise as a :class:`HighwayBlock`."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.relu(self.bn3(self.conv3(y)))
        gate = torch.sigmoid(self.gate(x))
        return gate * y + (1 - gate) * shortcut


def blocks_of(depth: int) -> int:
    """``n`` of a network for CIFAR of ``depth = 6n + 2`` layers: blocks in each of its three stages.

    Raises:
        TypeError: no whole number.
        ValueError: another depth.
    """
    whole("depth", depth)
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth must be 6n + 2 with n of at least 1 (20, 32, 44, 56, 110, 1202 in the paper), got {depth}")
    return (depth - 2) // 6


class CifarResNet(Stages):
    """6n + 2 layers for images of 32x32: a 3x3 layer, three stages of n blocks with 16, 32 and 64 filters, a classifier.

    Args:
        block: class of the blocks (of two layers); None for the plain network.
        depth: 6n + 2.
        num_classes: outputs of the classifier.
        shortcut: one of :data:`fused_resnet.plain.SHORTCUTS`; the paper's is A.
        norm_layer: constructor of the normalisation, ``nn.BatchNorm2d`` by default.
        **given: further arguments of the block (``gate_bias``).

    Raises:
        TypeError: arguments that the block does not take; a plain network has no block. A depth that is no whole number.
        ValueError: ``depth`` is not 6n + 2, or ``shortcut`` unknown.
    """

    def __init__(
        self,
        block: type[BasicBlock] | None,
        depth: int,
        num_classes: int = 10,
        shortcut: str = "A",
        norm_layer: NormLayer | None = None,
        **given: Any,
    ) -> None:
        super().__init__()
        blocks = blocks_of(depth)
        if block is None and given:
            raise TypeError(f"a plain network has no blocks, got the unexpected argument {next(iter(given))!r} for one")
        self.depth = depth
        self._prepare(16, norm_layer, shortcut, **given)
        self.conv1 = conv3x3(3, 16)
        self.bn1 = self._norm_layer(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(block, 16, blocks)
        self.layer2 = self._stage(block, 32, blocks, 2)
        self.layer3 = self._stage(block, 64, blocks, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, num_classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))
