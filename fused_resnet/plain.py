"""The modules that the fused ones stand on: residual blocks, the stem and the whole ResNet, written with torch.nn alone.

He et al. 2016 (arXiv 1512.03385), table 1 and figure 5; the stride sits on the 3x3 convolution of a Bottleneck, or where the
paper has it, on the first. Children, their order and their initialisation are those of torchvision's models, so that a
state_dict moves between the two key for key, and the same seed gives the same weights. :mod:`fused_resnet.blocks` puts a fused
forward in front of each. :mod:`fused_resnet.plain_paper` has the paper's other networks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]

#: Shortcuts (section 3.3 and table 3 of the paper). ``A``: the identity everywhere, padded with zeros where channels are added;
#: ``B``: a projection there, the identity elsewhere (torchvision's); ``C``: projections everywhere.
SHORTCUTS = ("A", "B", "C")
#: Which convolution of a Bottleneck has the stride: the paper's first, or the later networks' 3x3 (torchvision's).
STRIDE_IN = ("1x1", "3x3")


def conv3x3(channels: int, filters: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the size at stride 1, without a bias."""
    return nn.Conv2d(channels, filters, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def conv1x1(channels: int, filters: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without a bias."""
    return nn.Conv2d(channels, filters, 1, stride, bias=False)


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of the choices.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


class ZeroPad(nn.Module):
    """The shortcut without parameters: every ``stride``-th pixel, and channels of zeros behind those there are (option A).

    Args:
        channels, filters: of the input and the output.
        stride: of the block.

    Raises:
        ValueError: fewer filters than channels.
    """

    def __init__(self, channels: int, filters: int, stride: int = 1) -> None:
        super().__init__()
        if filters < channels:
            raise ValueError(f"filters must be at least channels ({channels}) for a shortcut that adds zeros, got {filters}")
        self.channels, self.filters, self.stride = channels, filters, stride

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.filters}, stride={self.stride}"

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, H / stride, W / stride], rounded up."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.filters - self.channels))


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
    """1x1, 3x3 and 1x1 layers and a shortcut; the 3x3 has the groups, the dilation, and the stride (see :data:`STRIDE_IN`)."""

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
        stride_in: str = "3x3",
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        first, second = (stride, 1) if check_choice("stride_in", stride_in, STRIDE_IN) == "1x1" else (1, stride)
        self.conv1 = conv1x1(inplanes, width, first)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, second, groups, dilation)
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


class Stages(nn.Module):
    """What the networks share: stages of blocks or of plain layers, and how their parameters start.

    Attributes:
        stage_class: of a stage of blocks.
        layers_class: of a stage without shortcuts.
    """

    stage_class: ClassVar[type[nn.Sequential]] = nn.Sequential
    layers_class: ClassVar[type[nn.Sequential]] = nn.Sequential

    def _prepare(self, inplanes: int, norm_layer: NormLayer | None, shortcut: str = "B", **block: Any) -> None:
        """What :meth:`_stage` starts from: channels, and what every block is given."""
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self._shortcut = check_choice("shortcut", shortcut, SHORTCUTS)
        self._block = block
        self.inplanes = inplanes
        self.dilation = 1

    def _downsample(self, filters: int, stride: int) -> nn.Module | None:
        """The shortcut of the next block, None where it is the identity."""
        fits = stride == 1 and self.inplanes == filters
        if fits and self._shortcut != "C":
            return None
        if self._shortcut == "A":
            return ZeroPad(self.inplanes, filters, stride)
        return nn.Sequential(conv1x1(self.inplanes, filters, stride), self._norm_layer(filters))

    def _stage(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        if block is None:
            return self._layers(planes, 2 * blocks, stride)
        before = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        filters = planes * block.expansion
        made = []
        for index in range(blocks):
            downsample = self._downsample(filters, stride if index == 0 else 1)
            given = {**self._block, "dilation": before if index == 0 else self.dilation, "norm_layer": self._norm_layer}
            made.append(block(self.inplanes, planes, stride if index == 0 else 1, downsample, **given))
            self.inplanes = filters
        return self.stage_class(*made)

    def _layers(self, planes: int, count: int, stride: int) -> nn.Sequential:
        """``count`` times a 3x3 convolution, BatchNorm and ReLU: a stage of a plain network, the paper's figure 3 (middle)."""
        children: OrderedDict[str, nn.Module] = OrderedDict()
        for index in range(1, count + 1):
            children[f"conv{index}"] = conv3x3(self.inplanes, planes, stride if index == 1 else 1)
            children[f"bn{index}"] = self._norm_layer(planes)
            children[f"relu{index}"] = nn.ReLU(inplace=True)
            self.inplanes = planes
        return self.layers_class(children)

    def _initialise(self, zero_init_residual: bool = False) -> None:
        if next(self.parameters()).is_meta:  # nothing to fill, and PyTorch's random operators are slow there
            return
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


class ResNet(Stages):
    """A ResNet of four stages, with torchvision's arguments, children and state_dict.

    Args:
        block: class of the residual blocks; None for a plain network, two layers in place of each block.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the classifier.
        zero_init_residual: start each residual branch at zero (gamma of its last BatchNorm), Goyal et al. 2017, section 5.1.
        groups: groups of the 3x3 convolutions (ResNeXt, Xie et al. 2017).
        width_per_group: their width, 64 in the paper's networks.
        replace_stride_with_dilation: for stages 2 to 4, keep the resolution and dilate instead (segmentation).
        norm_layer: constructor of the normalisation, ``nn.BatchNorm2d`` by default.
        shortcut: one of :data:`SHORTCUTS`.
        stride_in: one of :data:`STRIDE_IN`, for Bottlenecks.

    Raises:
        ValueError: ``replace_stride_with_dilation`` is not a sequence of three, or a block takes no such width or groups; an
            unknown ``shortcut`` or ``stride_in``.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck] | None,
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        shortcut: str = "B",
        stride_in: str = "3x3",
    ) -> None:
        super().__init__()
        dilate = [False, False, False] if replace_stride_with_dilation is None else list(replace_stride_with_dilation)
        if len(dilate) != 3:
            raise ValueError(
                f"replace_stride_with_dilation should be None or a 3-element tuple, got {replace_stride_with_dilation}"
            )
        given: dict[str, Any] = {"groups": groups, "base_width": width_per_group}
        if check_choice("stride_in", stride_in, STRIDE_IN) != "3x3":
            if block is None or not issubclass(block, Bottleneck):
                raise ValueError(f"stride_in={stride_in!r} is for networks of Bottlenecks, which have a 1x1 convolution first")
            given["stride_in"] = stride_in
        self._prepare(64, norm_layer, shortcut, **given)
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
        self.fc = nn.Linear(self.inplanes, num_classes)
        self._initialise(zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, num_classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))
