"""Which fused class goes in front of which class.

A class is known by the ``forward`` it runs, not by its name: a subclass that keeps the forward of a class we know is known too,
one that overrides it is not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
from torch import nn

from .. import blocks, plain, plain_paper, plain_rows
from ..describe import Parts, is_norm, refusal
from ..fused import Fused
from .analysis import Analysis
from .functions import calls_layers
from .quantised import quantised
from .region import FusedRegion, Later, Region
from .tracing import has_layers

#: How the reasons of :mod:`.tracing` begin that are about what a forward does; Dynamo follows more of that than torch.fx.
ABOUT_A_FORWARD = ("its forward ", "the forward of its ", "the control flow of its forward ")
#: The attribute that marks the compiled call of a module as made by :func:`fused_resnet.fuse`.
OURS = "fused_resnet"
#: Classes of torchvision.models.resnet -> the fused forward in front of them.
_TORCHVISION = {"BasicBlock": blocks.FusedResidual, "Bottleneck": blocks.FusedResidual, "ResNet": blocks.FusedResNet}
_PLAIN: dict[type[nn.Module], type[Fused]] = {
    plain_paper.HighwayBlock: blocks.FusedHighway,  # in front of the classes they are made from
    plain_paper.HighwayBottleneck: blocks.FusedHighway,
    plain.BasicBlock: blocks.FusedResidual,
    plain.Bottleneck: blocks.FusedResidual,
    plain_rows.ResidualMLP: blocks.FusedResidual,
    plain.Stem: blocks.FusedStem,
    plain.ResNet: blocks.FusedResNet,
    plain_paper.CifarResNet: blocks.FusedCifarResNet,
}


def _known_classes() -> dict[type[nn.Module], type[Fused]]:
    known = dict(_PLAIN)
    resnet = sys.modules.get("torchvision.models.resnet")  # a model of torchvision's can only exist if it was imported
    if resnet is not None:
        known.update({getattr(resnet, name): fused for name, fused in _TORCHVISION.items()})
    return known


_FORWARDS = ("forward", "_forward_impl")


def _same_forward(kind: type[Any], known: type[Any]) -> bool:
    """Whether a class runs the forward that a class we know was written with, which itself may have got another one since."""
    names = [name for name in _FORWARDS if hasattr(known, name)]
    functions = [getattr(known, name) for name in names]
    written = all(
        isinstance(function, FunctionType)
        and function.__globals__ is vars(sys.modules[known.__module__])
        and function.__code__.co_name == name
        for name, function in zip(names, functions)
    )
    return written and all(getattr(kind, name) is function for name, function in zip(names, functions))


def _is_stage(module: nn.Sequential) -> bool:
    """Two residual blocks in a row."""
    kinds = [type(child) if isinstance(child, Fused) else known_forward(child)[0] for child in module]
    residual = [kind is not None and issubclass(kind, blocks.FusedResidual) for kind in kinds]
    return any(first and second for first, second in pairwise(residual))


def analysis() -> Analysis:
    """What traced regions are found with, for one look at a model."""
    return Analysis(known_forward)


def fused_forward(module: nn.Module, traced: Analysis | None = None) -> tuple[type[Fused] | None, str | None]:
    """The fused forward for a module: that of its class where it is known, else the traced one, if chains are found in it.

    Args:
        traced: what the modules of the same model were found to be, see :func:`analysis`.

    Returns:
        As :func:`known_forward`.
    """
    if (prepared := quantised(module)) is not None:
        return None, prepared
    fused, reason = known_forward(module)
    if fused is not None or not (list(module.children()) or calls_layers(module)):
        return fused, reason
    if isinstance(module, torch.jit.ScriptModule) or is_norm(module) or not has_layers(module):
        return None, reason
    region = (traced or analysis()).region(module)
    if isinstance(region, Region) or (isinstance(region, Later) and any(layers_of(module))):
        why = taken(module, FusedRegion)
        return (None, why) if why else (FusedRegion, None)
    return None, region.reason if isinstance(region, Later) else region or reason


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled by :func:`fused_resnet.fuse`; its copies are not."""
    return getattr(module._compiled_call_impl, OURS, False)


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """The convolutions and normalisations that a module calls itself, as its children or in lists of them."""
    for child in module.children():
        if isinstance(child, (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)):
            yield child
        elif type(child) in (nn.ModuleList, nn.ModuleDict, nn.Sequential):
            yield from layers_of(child)


def known_forward(module: nn.Module) -> tuple[type[Fused] | None, str | None]:
    """The fused forward for a module of a class we know, and why there is none where one could be expected.

    Returns:
        ``(class, None)`` for a module that can be swapped, ``(None, reason)`` for one that looks like a block but is left
        alone, ``(None, None)`` for all others.
    """
    fused, reason = _known_forward(module)
    why = None if fused is None else taken(module, fused)
    return (None, why) if why else (fused, reason)


def _own_names(fused: type[Fused]) -> frozenset[str]:
    """What a fused module has besides what all modules have."""
    names = {name for cls in fused.__mro__ if issubclass(cls, Fused) for name in vars(cls) if not name.startswith("__")}
    return frozenset({*names, "fused_region"}.difference(dir(nn.Module), _FORWARDS))


def taken(module: nn.Module, fused: type[Fused]) -> str | None:
    """Why a module cannot become a fused one: it has something of a name of ours, where each would look for its own."""
    classes = [cls for cls in type(module).__mro__ if cls is not object and cls not in nn.Module.__mro__]
    theirs = {name for space in (module.__dict__, module._modules, module._parameters, module._buffers) for name in space}
    names = _own_names(fused).intersection(theirs.union(*map(vars, classes)))
    return f"it has {min(names)!r}, which is a name of fused modules" if names else None


def _known_forward(module: nn.Module) -> tuple[type[Fused] | None, str | None]:
    kind = type(module)
    if isinstance(module, nn.Sequential):
        parts = [part for _, part in blocks.segments(list(module._modules.items())) if isinstance(part, Parts)]
        if (not parts and not _is_stage(module)) or any(map(calls_layers, module.children())):
            return None, None
        if kind.forward is not nn.Sequential.forward:
            return None, f"{kind.__name__} overrides Sequential's forward"
        if not parts:
            return blocks.FusedStage, None
        reasons = [refusal(part, structure_only=True) for part in parts]
        return (None, reasons[0]) if all(reasons) else (blocks.FusedSequential, None)
    for known, fused in _known_classes().items():
        if not isinstance(module, known):
            continue
        if not _same_forward(kind, known):
            return None, f"{kind.__name__} overrides the forward of {known.__name__}"
        if any(name in module.__dict__ for name in _FORWARDS):
            return None, f"forward was replaced on this {kind.__name__}"
        reason = next((refusal(part, structure_only=True) for _, part in fused.chains_of(module)), None)
        return (None, reason) if reason else (fused, None)
    return None, None
