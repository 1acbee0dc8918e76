"""Builders of networks with fused blocks.

The ResNet family has torchvision's names, arguments and state_dicts. What He et al. 2016 compares it with is built by name:
``build("cifar_resnet56")``, ``build("cifar_plain56")``, ``build("resnet50", stride_in="1x1")``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from . import backends
from .blocks import BasicBlock, Bottleneck, CifarResNet, HighwayBlock, HighwayBottleneck, ResNet
from .describe import check_memory
from .fused import Fused

_Block = type[BasicBlock] | type[Bottleneck] | None


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
    model = _on(backend, ResNet(block, layers, **arguments))
    if weights is not None:
        model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model


def _on(backend: str | None, model: Any, memory: str = "default") -> Any:
    """The model, each of whose fused modules runs on ``backend`` and keeps what ``memory`` says."""
    if backend is not None:
        backends.check_name(backend)
    for module in model.modules():
        if isinstance(module, Fused):
            module.fused_backend = backend
            module.fused_memory = check_memory(memory)
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


# ------------------------------------------------------------------------------------------------- the paper's comparisons

#: Depths of the networks for CIFAR in the paper, section 4.2 and table 6.
CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)


def plain18(*, backend: str | None = None, **arguments: Any) -> ResNet:
    """The plain network of 18 layers: ResNet-18 without its shortcuts. Arguments as :func:`cifar_plain`'s, but the depth."""
    return _on(backend, ResNet(None, [2, 2, 2, 2], **arguments))


def plain34(*, backend: str | None = None, **arguments: Any) -> ResNet:
    """The plain network of 34 layers (He et al. 2016, figure 3, middle). Arguments as :func:`cifar_plain`'s, but the depth."""
    return _on(backend, ResNet(None, [3, 4, 6, 3], **arguments))


def highway18(*, backend: str | None = None, **arguments: Any) -> ResNet:
    """ResNet-18 with gated shortcuts. Arguments as :class:`fused_resnet.ResNet`'s."""
    return _on(backend, ResNet(HighwayBlock, [2, 2, 2, 2], **arguments))


def highway34(*, backend: str | None = None, **arguments: Any) -> ResNet:
    """ResNet-34 with gated shortcuts. Arguments as :class:`fused_resnet.ResNet`'s."""
    return _on(backend, ResNet(HighwayBlock, [3, 4, 6, 3], **arguments))


def highway50(*, backend: str | None = None, **arguments: Any) -> ResNet:
    """ResNet-50 with gated shortcuts. Arguments as :class:`fused_resnet.ResNet`'s."""
    return _on(backend, ResNet(HighwayBottleneck, [3, 4, 6, 3], **arguments))


def highway101(*, backend: str | None = None, **arguments: Any) -> ResNet:
    """ResNet-101 with gated shortcuts. Arguments as :class:`fused_resnet.ResNet`'s."""
    return _on(backend, ResNet(HighwayBottleneck, [3, 4, 23, 3], **arguments))


def highway152(*, backend: str | None = None, **arguments: Any) -> ResNet:
    """ResNet-152 with gated shortcuts. Arguments as :class:`fused_resnet.ResNet`'s."""
    return _on(backend, ResNet(HighwayBottleneck, [3, 8, 36, 3], **arguments))


#: Layers from which a network for CIFAR is built with ``memory="less"``: from there on memory is what counts.
VERY_DEEP = 110


def _memory(memory: str | None, depth: int) -> str:
    return memory or ("less" if depth >= VERY_DEEP else "default")


def cifar_resnet(
    depth: int, *, shortcut: str = "A", backend: str | None = None, memory: str | None = None, **arguments: Any
) -> CifarResNet:
    """A residual network of 6n + 2 layers for images of 32x32 (He et al. 2016, section 4.2), with fused blocks.

    Args:
        depth: 6n + 2.
        shortcut: ``"A"`` (the paper's: zeros where channels are added), ``"B"`` (projections there) or ``"C"`` (everywhere).
        backend: see :func:`fused_resnet.backend`.
        memory: see :func:`fused_resnet.fuse`; None for ``"less"`` from 110 layers on, else ``"default"``.
        **arguments: ``num_classes`` (10), ``norm_layer``.

    Raises:
        TypeError: a depth that is no whole number.
        ValueError: another depth, an unknown shortcut, backend or memory.
    """
    return _on(backend, CifarResNet(BasicBlock, depth, shortcut=shortcut, **arguments), _memory(memory, depth))


def cifar_plain(depth: int, *, backend: str | None = None, **arguments: Any) -> CifarResNet:
    """The same layers as :func:`cifar_resnet`'s without shortcuts; each stage is one chain of launches.

    Args:
        depth: 6n + 2.
        backend: see :func:`fused_resnet.backend`.
        **arguments: ``num_classes`` (10), ``norm_layer``.

    Raises:
        TypeError: a depth that is no whole number.
        ValueError: another depth, an unknown backend.
    """
    return _on(backend, CifarResNet(None, depth, **arguments))


def cifar_highway(
    depth: int, *, shortcut: str = "A", backend: str | None = None, memory: str | None = None, **arguments: Any
) -> CifarResNet:
    """The same layers as :func:`cifar_resnet`'s with gated shortcuts (:class:`fused_resnet.blocks.HighwayBlock`).

    Args:
        depth: 6n + 2; the gates are 1x1 convolutions beside them.
        shortcut: of what the gate lets past, see :func:`cifar_resnet`.
        backend, memory: as :func:`cifar_resnet`'s.
        **arguments: ``num_classes`` (10), ``norm_layer``, ``gate_bias`` (-2).

    Raises:
        TypeError: a depth that is no whole number.
        ValueError: another depth, an unknown shortcut, backend or memory.
    """
    return _on(backend, CifarResNet(HighwayBlock, depth, shortcut=shortcut, **arguments), _memory(memory, depth))


_CIFAR: dict[str, Callable[..., CifarResNet]] = {"resnet": cifar_resnet, "plain": cifar_plain, "highway": cifar_highway}
_OTHERS: dict[str, Callable[..., ResNet]] = {
    **MODELS,
    **{build.__name__: build for build in (plain18, plain34, highway18, highway34, highway50, highway101, highway152)},
}

#: Names that :func:`build` takes. (It also takes ``cifar_resnet<depth>`` of any depth 6n + 2, and an option behind a name.)
NAMES: tuple[str, ...] = (*_OTHERS, *(f"cifar_{kind}{depth}" for kind in _CIFAR for depth in CIFAR_DEPTHS))


def image_size(name: str) -> int:
    """Rows and columns of the images that the network ``name`` was made for."""
    return 32 if name.startswith("cifar_") else 299 if name == "inception_v3" else 224


def build(name: str, num_classes: int | None = None, **arguments: Any) -> nn.Module:
    """A network with fused blocks, by name.

    ``resnet50``, ``plain34``, ``highway18``, ``cifar_resnet56``, ``cifar_plain56``, ``cifar_highway56`` ... (:data:`NAMES`). An
    option of the shortcut may stand behind the name: ``cifar_resnet56_b``, ``resnet34_a``; so may the paper's own place of the
    stride in a Bottleneck, ``resnet50_1x1``.

    Args:
        name: which network.
        num_classes: outputs of the classifier; None for the network's own (1000, or 10 for CIFAR).
        **arguments: the builder's: ``shortcut``, ``stride_in``, ``backend``, ``weights`` ...

    Raises:
        TypeError: a name that is no str.
        ValueError: no such network or option; a depth that is not 6n + 2.
    """
    from .specimens import unknown

    if not isinstance(name, str):
        raise TypeError(f"name must be a str such as 'resnet50' or 'cifar_resnet56', got {name!r}")
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    base, option = name, ""
    if name not in _OTHERS and (found := re.fullmatch(r"(.+)_([abc]|1x1|3x3)", name)):
        base, option = found.groups()
    given = {"stride_in": option} if "x" in option else {"shortcut": option.upper()} if option else {}
    for key, value in given.items():
        if arguments.setdefault(key, value) != value:
            raise ValueError(f"{key} must be {value!r} for {name!r}, got {arguments[key]!r}")
    if "plain" in base and arguments.pop("shortcut", None) is not None:
        raise ValueError(f"{base!r} has no shortcuts: leave the option out, got {name!r}")
    cifar = re.fullmatch(rf"cifar_({'|'.join(_CIFAR)})(-?\d+)", base)
    if cifar:
        return _CIFAR[cifar[1]](int(cifar[2]), **arguments)
    if base not in _OTHERS:
        raise unknown("model", name, list(NAMES))
    return _OTHERS[base](**arguments)
