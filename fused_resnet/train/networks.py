"""Networks by name, fused or eager."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import backends, importing, models
from ..blocks import Fused
from ..describe import check_memory
from ..models import NAMES
from ..specimens import torchvision_models
from ..swap import fuse, unfuse
from .errors import UsageError


def make(name: str, classes: int, backend: str = "auto", memory: str = "default", **arguments: Any) -> nn.Module:
    """The network ``name`` with ``classes`` outputs and random weights from PyTorch's generator.

    Args:
        name: of :func:`fused_resnet.models.build`, one of torchvision's, or ``module:function`` or
            ``file.py:function``, which is called with ``num_classes`` and ``arguments`` and returns an nn.Module, fused or not.
        classes: outputs.
        backend: ``eager`` for the unfused network, ``auto`` or a backend for the fused one.
        memory: see :func:`fused_resnet.fuse`.
        **arguments: for the builder.

    Raises:
        UsageError: no such network, or arguments it does not take.
    """
    build = _builder(name)
    try:
        model = build(num_classes=classes, **arguments)
        check_memory(memory)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error) if name in str(error) else f"model {name}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {name}: returned a {type(model).__name__}, expected an nn.Module")
    fused = any(isinstance(module, Fused) for module in model.modules())
    if backend == "eager":
        return unfuse(model) if fused else model
    if not fused:
        fuse(model)
    for module in model.modules():
        if isinstance(module, Fused):
            module.fused_backend = None if backend == "auto" else backend
            module.fused_memory = memory
    return model


def _builder(name: str) -> Callable[..., Any]:
    if ":" in name:
        try:
            build = importing.load(name)
        except ValueError as error:
            raise UsageError(f"model {name}: {error}") from error
        if not callable(build):
            raise UsageError(f"model {name}: is a {type(build).__name__}, expected a function that returns an nn.Module")
        return build
    vision = torchvision_models()
    if name not in NAMES and vision is not None and name in vision.list_models(module=vision):
        return partial(vision.get_model, name, weights=None)
    return partial(models.build, name)


def check_backend(backend: str, device: torch.device) -> None:
    """A backend can run on ``device``.

    Raises:
        UsageError: it cannot: why.
    """
    if backend == "eager":
        return
    try:
        backends.resolve(None if backend == "auto" else backend, device)
    except (RuntimeError, ValueError) as error:
        raise UsageError(str(error).splitlines()[0]) from error
