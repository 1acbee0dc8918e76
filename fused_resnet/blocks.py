"""Drop-in modules whose forward is one chain: ConvBNReLU, BasicBlock, Bottleneck, Stem.

Each is a class of :mod:`fused_resnet.plain` (or of the model at hand, see :mod:`fused_resnet.swap`) with a fused forward in
front. What runs is decided at each call: the chain, where :func:`fused_resnet.describe.read` finds one; else the forward of
the class behind, in plain PyTorch (a hook on a child). What was read is remembered while every module stays as it is
(:mod:`.watch`). :func:`fused_resnet.explain` tells which, and why.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from . import backends, checks, plain, plain_paper, plain_rows, whole
from .describe import (
    SHARING,
    Entry,
    Parts,
    Reading,
    WeightLayer,
    activation_of,
    follows,
    hooked,
    hooks_everywhere,
    is_activation,
    is_convolution,
    is_norm,
    pools,
    read,
)
from .fused import Fused


def _projection(downsample: nn.Module) -> tuple[WeightLayer | None, str | None]:
    """The weight layer of a projection shortcut, or why it is none."""
    if type(downsample).forward not in (nn.Sequential.forward, FusedSequential.forward):
        return None, f"the shortcut is a {type(downsample).__name__}, not a Sequential of a convolution and a BatchNorm"
    children = list(downsample.children())
    if not 1 <= len(children) <= 2:
        return None, f"the shortcut has {len(children)} modules, not a convolution and a BatchNorm"
    return WeightLayer("downsample", children[0], *children[1:]), None


def residual_parts(block: Any) -> Parts:
    """The modules of a residual block with children conv1 (or linear1), bn1, ..., relu and downsample."""
    layers = []
    kind = "conv" if hasattr(block, "conv1") else "linear"
    for index in range(1, 4):
        conv = getattr(block, f"{kind}{index}", None)
        if conv is None:
            break
        layers.append(WeightLayer(f"{kind}{index}", conv, getattr(block, f"bn{index}"), block.relu))
    if block.downsample is None:
        return Parts(layers, residual=True)
    if type(block.downsample) is plain.ZeroPad:
        return Parts(layers, True, WeightLayer("downsample", block.downsample))
    projection, reason = _projection(block.downsample)
    return Parts(layers, True, projection, containers=(block.downsample,), reason=reason)


def stem_parts(module: Any) -> Parts:
    """The modules of a stem with children conv1, bn1, relu and maxpool."""
    return Parts([WeightLayer("conv1", module.conv1, module.bn1, module.relu)], pool=module.maxpool)


def cifar_stem_parts(module: Any) -> Parts:
    """The modules of a stem with children conv1, bn1 and relu."""
    return Parts([WeightLayer("conv1", module.conv1, module.bn1, module.relu)])


def highway_parts(block: Any) -> Parts:
    """The modules of a block whose shortcut is gated: those of a residual one and ``gate``."""
    return replace(residual_parts(block), gate=WeightLayer("gate", block.gate))


class FusedResidual(Fused):
    """A residual block: children conv1, bn1, conv2, bn2, ... with one ``relu`` behind each and behind the shortcut."""

    @staticmethod
    def parts_of(block: Any) -> Parts:
        """The modules of the block's chain."""
        return residual_parts(block)

    @classmethod
    def chains_of(cls, module: Any) -> list[tuple[str, Parts]]:
        return [("", cls.parts_of(module))]

    def forward(self, x: Tensor) -> Tensor:
        if self.small(x):
            return super().forward(x)
        return self.run(self.parts_of, x, super().forward)

    def step(self, x: Tensor, donate: bool, drop: bool = False) -> tuple[Tensor, bool]:
        """As ``forward``; see :meth:`run_owned`. With ``donate`` the sum with the shortcut may be made in ``x``'s memory; with
        ``drop`` the result is not kept for the backward but made again there.
        """
        if self.small(x):
            return super().forward(x), False
        return self.run_owned(self.parts_of, x, super().forward, donate, drop)


class FusedHighway(FusedResidual):
    """A residual block whose shortcut and branch are mixed by a gate, child ``gate``."""

    @staticmethod
    def parts_of(block: Any) -> Parts:
        return highway_parts(block)


def watched(block: nn.Module) -> bool:
    """Whether a call of ``block`` does more than its class's forward: hooks, a forward of its own, a compiled one."""
    replaced = "forward" in block.__dict__ or block._compiled_call_impl is not None
    replaced = replaced or type(block).__call__ is not nn.Module.__call__
    return replaced or hooked(block) or hooks_everywhere()


class FusedStage(Fused):
    """A Sequential of residual blocks. What one block hands to the next is nobody else's, so the next may write over it.

    Nor has it to be kept for the backward: where ``fused_memory`` of a block is not ``default`` every second is made again.
    """

    def forward(self, input: Tensor) -> Tensor:  # nn.Sequential's name for it
        done = whole.once(self, input)
        if done is not None:
            out: Tensor = done[0]
            return out
        x, ours = input, False  # whether x was made by a block of this stage, and nobody saw it
        blocks: Any = list(self._modules.values())
        ready = [isinstance(block, FusedResidual) and not watched(block) for block in blocks]
        dropped = False
        for block, fused, next_fused in zip(blocks, ready, [*ready[1:], False]):
            if fused:
                dropped = not dropped and next_fused and block.fused_memory != "default"
                x, ours = block.step(x, ours, dropped)
            else:
                x, ours, dropped = block(x), False, False
        return x


class FusedStem(Fused):
    """A stem: children conv1, bn1, relu, maxpool."""

    @classmethod
    def chains_of(cls, module: Any) -> list[tuple[str, Parts]]:
        return [("", stem_parts(module))]

    def forward(self, x: Tensor) -> Tensor:
        return self.run(stem_parts, x, super().forward)


class FusedResNet(Fused):
    """A whole ResNet whose stem, a handful of its own children, is a chain; the blocks are fused on their own."""

    @classmethod
    def chains_of(cls, module: Any) -> list[tuple[str, Parts]]:
        return [("stem", stem_parts(module))]

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        if "_forward_impl" in module.__dict__:  # torchvision's forward is a call of it
            out: Tensor = super().forward(x)
            return out
        done = whole.once(self, x)
        if done is not None:
            return done[0]
        x = self.run(stem_parts, x, lambda x: _one_by_one(stem_parts(self), x))
        x = module.layer4(module.layer3(module.layer2(module.layer1(x))))
        return module.fc(torch.flatten(module.avgpool(x), 1))


class FusedCifarResNet(Fused):
    """A whole network for CIFAR whose first layer, some of its own children, is a chain."""

    @classmethod
    def chains_of(cls, module: Any) -> list[tuple[str, Parts]]:
        return [("stem", cifar_stem_parts(module))]

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        done = whole.once(self, x)
        if done is not None:
            return done[0]
        x = self.run(cifar_stem_parts, x, lambda x: _one_by_one(cifar_stem_parts(self), x))
        x = module.layer3(module.layer2(module.layer1(x)))
        return module.fc(torch.flatten(module.avgpool(x), 1))


_GLOBAL_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)


def _worth_it(parts: Parts) -> bool:
    """Whether something can be fused with the products of layers in a row."""
    return len(parts.norms) > 0 or any(_ends(layer) and type(layer.conv) is not nn.Linear for layer in parts.layers)


def _ends(layer: WeightLayer) -> bool:
    """Whether a bias or an activation comes behind a convolution: on a GPU each is a kernel of its own."""
    conv: Any = layer.conv
    return conv.bias is not None or _activates(layer)


def _activates(layer: WeightLayer) -> bool:
    return type(layer.activation) not in (type(None), nn.Identity)


def _written(children: list[tuple[str, nn.Module]]) -> bool:
    """Whether the first of these modules writes into what it is given: what a backward reads may not be that."""
    for _, module in children:
        if type(module) not in SHARING:
            return getattr(module, "inplace", False) is True
    return False


def _weight_layer(children: list[tuple[str, nn.Module]], index: int) -> tuple[WeightLayer, int]:
    """The convolution at ``index`` with the BatchNorm and the activation behind it, and the index of what follows."""
    layer = WeightLayer(*children[index])
    index += 1
    if index < len(children) and is_norm(children[index][1]) and follows(layer.conv, children[index][1]):
        layer.norm = children[index][1]
        index += 1
    own = activation_of(layer.norm)
    if own is not None and type(own) is not nn.Identity:
        layer.activation = own
    elif index < len(children) and is_activation(children[index][1]):
        layer.activation = children[index][1]
        index += 1
    return layer, index


def _entry(children: list[tuple[str, nn.Module]], index: int) -> tuple[Entry | None, int]:
    """The BatchNorm at ``index`` with its activation, if a convolution follows, and the index of that."""
    name, norm = children[index]
    if not is_norm(norm):
        return None, index
    behind, activation = index + 1, activation_of(norm)
    if type(activation) in (type(None), nn.Identity) and behind < len(children) and is_activation(children[behind][1]):
        activation, behind = children[behind][1], behind + 1
    if behind == len(children) or not is_convolution(children[behind][1]) or not follows(children[behind][1], norm):
        return None, index
    return Entry(name, norm, activation), behind


def segments(children: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, Parts | nn.Module]]:
    """Cut the children of a Sequential into chains and modules that run on their own.

    A chain is as many ``Conv2d [BatchNorm2d] [activation]`` as follow each other, with ``BatchNorm2d [activation]`` in front of
    them and a MaxPool2d behind them if there are such; likewise Conv1d with BatchNorm1d and MaxPool1d, and Linear with
    BatchNorm1d. (Behind an activation a pooling whose result the next module writes into stays by itself: the chain's backward
    would read the result.) A convolution alone, without a bias, has nothing to be fused with, nor has a Linear without a
    BatchNorm1d, nor any without one behind a global pooling, on one pixel.
    """
    index = 0
    pooled = False
    while index < len(children):
        name = children[index][0]
        start = index
        pooled = pooled or isinstance(children[index][1], _GLOBAL_POOLS)
        entry, index = _entry(children, index)
        layers: list[WeightLayer] = []
        while index < len(children) and is_convolution(children[index][1]):
            if layers and type(children[index][1]) is not type(layers[0].conv):
                break
            layer, behind = _weight_layer(children, index)
            if layer.norm is not None and any(layer.norm is before for before in Parts(layers, entry=entry).norms):
                break  # a chain moves the statistics of a BatchNorm once
            layers.append(layer)
            index = behind
        parts = Parts(layers, entry=entry)
        if layers and _worth_it(parts) and not (pooled and not parts.norms):
            pooling = index < len(children) and pools(layers[0].conv, children[index][1])
            if pooling and not (_activates(layers[-1]) and _written(children[index + 1 :])):
                parts.pool = children[index][1]
                index += 1
            yield name, parts
            continue
        for name, module in children[start : max(index, start + 1)]:
            yield name, module
        index = max(index, start + 1)


class FusedSequential(Fused):
    """A Sequential in which runs of convolutions, BatchNorms and activations are chains."""

    gives_contiguous: ClassVar[bool] = False  # not channels_last, for those who view the result

    @classmethod
    def chains_of(cls, module: Any) -> list[tuple[str, Parts]]:
        return [(name, part) for name, part in segments(list(module._modules.items())) if isinstance(part, Parts)]

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)  # type: ignore[misc]  # nn.Sequential's, which makes another for a slice
        if isinstance(index, slice):
            part.fused_backend, part.fused_memory = self.fused_backend, self.fused_memory
        return part

    def forward(self, input: Tensor) -> Tensor:  # nn.Sequential's name for it
        x = self.again(_single, input)
        done = whole.once(self, input) if x is None and not self.remembers(_single) else None
        if done is not None:
            x = done[0]
        elif x is None:
            x = input
            if issubclass(type(x), torch.fx.Proxy) or self.small(x):
                x = super().forward(x)
            else:
                found = self.recall("segments", _segments)
                for part, reading in found:
                    x = part(x) if reading is None else self.run_reading(reading, x, partial(_one_by_one, part))[0]
                if len(found) == 1 and found[0][1] is not None and self.remembers("segments"):
                    self.recall(_single, _single)
        return x.contiguous() if self.gives_contiguous else x


def _segments(module: FusedSequential) -> tuple[list[tuple[Any, Reading | None]], Iterable[nn.Module] | None]:
    """The chains of a Sequential and the modules between them, and what all of it was read off."""
    found: list[tuple[Any, Reading | None]] = []
    watched: list[nn.Module] = []
    for _, part in segments(list(module._modules.items())):  # type: ignore[arg-type]
        reading = read(part, module.fused_memory) if isinstance(part, Parts) else None
        found.append((part, reading))
        watched += part.watched if isinstance(part, Parts) else []
    lasts = all(reading.lasts for _, reading in found if reading is not None)
    return found, watched if lasts else None


def _single(module: FusedSequential) -> tuple[Reading | None, Iterable[nn.Module] | None]:
    """The chain that is all of a Sequential, as it is remembered, and what it was read off."""
    found = module.recall("segments", _segments)
    reading = found[0][1] if len(found) == 1 else None  # another thread may have added a layer
    return reading, found[0][0].watched if reading is not None and reading.lasts else None


def _one_by_one(parts: Parts, x: Tensor) -> Tensor:
    """``x`` through the modules of layers in a row, called as such: an activation that its BatchNorm calls is left to that."""
    modules = [part for layer in parts.in_a_row for part in layer.modules if part is not activation_of(layer.norm)]
    for module in (*modules, *([] if parts.pool is None else [parts.pool])):
        x = cast(nn.Module, module)(x)
    return x


class BasicBlock(FusedResidual, plain.BasicBlock):
    """Two 3x3 weight layers and a shortcut, fused: 2 launches in eval mode, 3 with a projection.

    ``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``, He et al. 2016, figure 5 (left). Constructor, children and
    state_dict are torchvision's.

    Args:
        inplanes, planes: channels of the input, filters of both layers.
        stride: of the first layer and the projection.
        downsample: ``Sequential`` of a 1x1 convolution and a BatchNorm, or None for the identity shortcut.
        groups, base_width, dilation: 1, 64 and 1 (others are the Bottleneck's).
        norm_layer: constructor of the BatchNorms.
    """

    unfused_class = plain.BasicBlock


class Bottleneck(FusedResidual, plain.Bottleneck):
    """1x1, 3x3 and 1x1 weight layers and a shortcut, fused: 3 launches in eval mode, 4 with a projection.

    He et al. 2016, figure 5 (right), with the stride on the 3x3 layer unless told otherwise. Constructor, children and
    state_dict are torchvision's.

    Args:
        inplanes, planes: channels of the input, a quarter of the channels of the output.
        stride: of the 3x3 layer and the projection.
        downsample: ``Sequential`` of a 1x1 convolution and a BatchNorm, or None for the identity shortcut.
        groups, base_width, dilation: of the 3x3 layer; its width is ``planes * base_width / 64 * groups``.
        norm_layer: constructor of the BatchNorms.
        stride_in: ``"3x3"``, or ``"1x1"`` for the stride in the first layer, where the paper has it.
    """

    unfused_class = plain.Bottleneck


class ResidualMLP(FusedResidual, plain_rows.ResidualMLP):
    """Two Linears with BatchNorms and a shortcut for rows [N, C], fused: 2 launches in eval mode, 3 with a projection.

    ``act(bn2(linear2(act(bn1(linear1(x))))) + shortcut(x))``. Constructor, children and state_dict are
    :class:`fused_resnet.plain_rows.ResidualMLP`'s.
    """

    unfused_class = plain_rows.ResidualMLP


class HighwayBlock(FusedHighway, plain_paper.HighwayBlock):
    """Two 3x3 weight layers and a gated shortcut, fused: 4 launches in eval mode, the sum by one kernel.

    ``T * H(x) + (1 - T) * shortcut(x)``; constructor and children are :class:`fused_resnet.plain_paper.HighwayBlock`'s.
    """

    unfused_class = plain_paper.HighwayBlock


class HighwayBottleneck(FusedHighway, plain_paper.HighwayBottleneck):
    """1x1, 3x3 and 1x1 weight layers and a gated shortcut, fused: 5 launches in eval mode, the sum by one kernel.

    Constructor and children are :class:`fused_resnet.plain_paper.HighwayBottleneck`'s.
    """

    unfused_class = plain_paper.HighwayBottleneck


class Stem(FusedStem, plain.Stem):
    """7x7 convolution, BatchNorm, ReLU and 3x3 max-pooling, both with stride 2, in 2 launches.

    Args:
        channels, filters: of the convolution.
        norm_layer: constructor of the BatchNorm.
    """

    unfused_class = plain.Stem


class ConvBNReLU(FusedSequential, nn.Sequential):
    """Convolution, BatchNorm and ReLU in one launch: ``relu(bn(conv(x)))``; children 0, 1 and 2, as in a Sequential.

    Args:
        channels, filters, kernel_size, stride, padding, dilation, groups, bias: as :class:`torch.nn.Conv2d`'s; the default
            padding keeps the size at stride 1 for odd kernels, the default bias is none.
        relu: False leaves the ReLU out.
        backend: see :func:`fused_resnet.backend`.

    Raises:
        TypeError: an argument that is no number.
        RuntimeError: a kernel_size, stride or dilation below 1.
        ValueError: groups that do not divide channels and filters.
    """

    unfused_class = nn.Sequential

    def __init__(
        self,
        channels: int,
        filters: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        relu: bool = True,
        backend: str | None = None,
    ) -> None:
        for name, value in (("channels", channels), ("filters", filters)):
            checks.whole(name, value, 0)
        checks.whole("groups", groups)
        kernel = checks.pair("kernel_size", kernel_size, 1, single=False)
        spread = checks.pair("dilation", dilation, 1)
        checks.pair("stride", stride, 1)
        if padding is None:
            padding = (spread[0] * (kernel[0] - 1) // 2, spread[1] * (kernel[1] - 1) // 2)
        conv = nn.Conv2d(channels, filters, kernel_size, stride, padding, dilation, groups, bias)
        super().__init__(conv, nn.BatchNorm2d(filters), *([nn.ReLU(inplace=True)] if relu else []))
        if backend is not None:
            self.fused_backend = backends.check_name(backend)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):  # a part is no ConvBNReLU
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


class Stage(FusedStage, nn.Sequential):
    """The blocks of one resolution."""

    unfused_class = nn.Sequential


class Layers(FusedSequential, nn.Sequential):
    """The layers of one resolution in a network without shortcuts."""

    unfused_class = nn.Sequential


class ResNet(FusedResNet, plain.ResNet):
    """A ResNet with fused stem and blocks; arguments as :class:`fused_resnet.plain.ResNet`, which are torchvision's and two."""

    unfused_class = plain.ResNet
    stage_class = Stage
    layers_class = Layers


class CifarResNet(FusedCifarResNet, plain_paper.CifarResNet):
    """A network for CIFAR with fused layers and blocks; arguments as :class:`fused_resnet.plain_paper.CifarResNet`."""

    unfused_class = plain_paper.CifarResNet
    stage_class = Stage
    layers_class = Layers
