"""The modules that the fused ones stand on: residual blocks, the stem and the whole ResNet, written with torch.nn alone.

He et al. 2016 (arXiv 1512.03385), table 1 and figure 5; the stride sits on the 3x3 convolution of a Bottleneck. Children, their
order and their initialisation are those of torchvision's models, so that a state_dict moves between the two key for key, and
the same seed gives the same weights. :mod:`fused_resnet.blocks` puts a fused forward in front of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]


def conv3x3(channels: int, filters: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the size at stride 1, without a bias."""
    return nn.Conv2d(channels, filters, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def conv1x1(channels: int, filters: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without a bias."""
    return nn.Conv2d(channels, filters, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 layers and a shortcut: ``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``."""

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicBlock takes groups=1 and base_width=64, got groups={groups} and base_width={base_width}")
        if dilation != 1:
            raise NotImplementedError(f"BasicBlock takes dilation=1, got {dilation}")
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 layers and a shortcut; the 3x3 has the stride, the groups and the dilation."""

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + shortcut)


class Stem(nn.Module):
    """7x7 convolution with stride 2, BatchNorm, ReLU and 3x3 max-pooling with stride 2: the start of every ImageNet ResNet."""

    def __init__(self, channels: int = 3, filters: int = 64, norm_layer: NormLayer | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 7, 2, padding=3, bias=False)
        self.bn1 = (norm_layer or nn.BatchNorm2d)(filters)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, H / 4, W / 4], rounded up."""
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


class ResNet(nn.Module):
    """A ResNet of four stages, with torchvision's arguments, children and state_dict.

    Args:
        block: class of the residual blocks.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the classifier.
        zero_init_residual: start each residual branch at zero (gamma of its last BatchNorm), Goyal et al. 2017, section 5.1.
        groups: groups of the 3x3 convolutions (ResNeXt, Xie et al. 2017).
        width_per_group: their width, 64 in the paper's networks.
        replace_stride_with_dilation: for stages 2 to 4, keep the resolution and dilate instead (segmentation).
        norm_layer: constructor of the normalisation, ``nn.BatchNorm2d`` by default.

    Raises:
        ValueError: ``replace_stride_with_dilation`` is not a sequence of three, or a block takes no such width or groups.
    """

    stage_class: ClassVar[type[nn.Sequential]] = nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        dilate = [False, False, False] if replace_stride_with_dilation is None else list(replace_stride_with_dilation)
        if len(dilate) != 3:
            raise ValueError(
                f"replace_stride_with_dilation should be None or a 3-element tuple, got {replace_stride_with_dilation}"
            )
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, 2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = self._stage(block, 64, layers[0])
        self.layer2 = self._stage(block, 128, layers[1], 2, dilate[0])
        self.layer3 = self._stage(block, 256, layers[2], 2, dilate[1])
        self.layer4 = self._stage(block, 512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    def _stage(
        self, block: type[BasicBlock] | type[Bottleneck], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        before = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        downsample = None
        if stride != 1 or self.inplanes != planes * block.expansion:
            filters = planes * block.expansion
            downsample = nn.Sequential(conv1x1(self.inplanes, filters, stride), self._norm_layer(filters))
        first = block(self.inplanes, planes, stride, downsample, self.groups, self.base_width, before, self._norm_layer)
        self.inplanes = planes * block.expansion
        rest = [
            block(self.inplanes, planes, 1, None, self.groups, self.base_width, self.dilation, self._norm_layer)
            for _ in range(1, blocks)
        ]
        return self.stage_class(first, *rest)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.constant_(module.weight, 1)
                nn.init.constant_(module.bias, 0)
        if not zero_init_residual:
            return
        for module in self.modules():
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2 if isinstance(module, BasicBlock) else None
            if last is not None and isinstance(last.weight, Tensor):
                nn.init.constant_(last.weight, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, num_classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))
