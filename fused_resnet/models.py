"""Builders of the ResNet family with fused blocks: torchvision's names, arguments and state_dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import backends
from .blocks import BasicBlock, Bottleneck, Fused, ResNet

_Block = type[BasicBlock] | type[Bottleneck]


def _verify(name: str, weights: Any) -> Any:
    """torchvision's weights entry for the network ``name``.

    Raises:
        ImportError: torchvision is missing.
        ValueError: no such entry.
        TypeError: the entry is another network's.
    """
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ImportError("weights=... needs torchvision: pip install 'fused_resnet[models]', or load a state_dict") from error
    entries = get_model_weights(name)
    if isinstance(weights, str):
        wanted = weights.rpartition(".")[2]
        if wanted not in entries.__members__:
            raise ValueError(f"weights must be one of {', '.join(entries.__members__)} for {name}, got {weights!r}")
        return entries[wanted]
    if not isinstance(weights, entries):
        raise TypeError(f"weights must be of type {entries.__name__} for {name}, got {type(weights).__name__}")
    return weights


def _build(
    name: str, block: _Block, layers: list[int], weights: Any, progress: bool, backend: str | None, **arguments: Any
) -> ResNet:
    if weights is not None:
        weights = _verify(name, weights)
        classes = len(weights.meta["categories"])
        if arguments.setdefault("num_classes", classes) != classes:
            raise ValueError(f"num_classes must be {classes} for weights={weights}, got {arguments['num_classes']}")
    model = ResNet(block, layers, **arguments)
    if backend is not None:
        backends.check_name(backend)
        for module in model.modules():
            if isinstance(module, Fused):
                module.fused_backend = backend
    if weights is not None:
        model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model


def _builder(name: str, block: _Block, layers: list[int], paper: str, **fixed: Any) -> Callable[..., ResNet]:
    def build(*, weights: Any = None, progress: bool = True, backend: str | None = None, **arguments: Any) -> ResNet:
        for key, value in fixed.items():
            if arguments.setdefault(key, value) != value:
                raise ValueError(f"{key} must be {value} for {name}, got {arguments[key]}")
        return _build(name, block, layers, weights, progress, backend, **arguments)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{name} ({paper}) with fused blocks.

    Args:
        weights: None, or torchvision's weights for this network (entry or its name; downloaded by torchvision).
        progress: show the download.
        backend: see :func:`fused_resnet.backend`.
        **arguments: of :class:`fused_resnet.ResNet`.

    Raises:
        TypeError: weights of another network.
        ValueError: unknown weights or backend, or a num_classes that is not the weights'.
    """
    return build


_HE = "He et al. 2016, table 1"
_WIDE = "Zagoruyko and Komodakis 2016"
_NEXT = "Xie et al. 2017, table 1"

resnet18 = _builder("resnet18", BasicBlock, [2, 2, 2, 2], _HE)
resnet34 = _builder("resnet34", BasicBlock, [3, 4, 6, 3], _HE)
resnet50 = _builder("resnet50", Bottleneck, [3, 4, 6, 3], _HE)
resnet101 = _builder("resnet101", Bottleneck, [3, 4, 23, 3], _HE)
resnet152 = _builder("resnet152", Bottleneck, [3, 8, 36, 3], _HE)
wide_resnet50_2 = _builder("wide_resnet50_2", Bottleneck, [3, 4, 6, 3], _WIDE, width_per_group=128)
wide_resnet101_2 = _builder("wide_resnet101_2", Bottleneck, [3, 4, 23, 3], _WIDE, width_per_group=128)
resnext50_32x4d = _builder("resnext50_32x4d", Bottleneck, [3, 4, 6, 3], _NEXT, groups=32, width_per_group=4)
resnext101_32x8d = _builder("resnext101_32x8d", Bottleneck, [3, 4, 23, 3], _NEXT, groups=32, width_per_group=8)
resnext101_64x4d = _builder("resnext101_64x4d", Bottleneck, [3, 4, 23, 3], _NEXT, groups=64, width_per_group=4)

#: Name -> builder.
MODELS: dict[str, Callable[..., ResNet]] = {
    build.__name__: build
    for build in (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        wide_resnet50_2,
        wide_resnet101_2,
        resnext50_32x4d,
        resnext101_32x8d,
        resnext101_64x4d,
    )
}
