"""Models and images to try things on: by name, with random BatchNorm state, nothing downloaded."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from types import ModuleType

import torch
from torch import Tensor, nn

from .models import NAMES, build
from .swap import unfuse

#: Names of element types on the command line.
DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}


def torchvision_models() -> ModuleType | None:
    """``torchvision.models``, or None where torchvision is not installed."""
    try:
        import torchvision.models
    except ImportError:
        return None
    return torchvision.models


def unknown(what: str, name: str, choices: list[str]) -> ValueError:
    """The error for a name that is not among ``choices``: the near ones, or all of a short list."""
    near = get_close_matches(name, choices, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    if not near and len(choices) <= 40:
        hint = f": expected one of {', '.join(choices)}"
    return ValueError(f"unknown {what} {name!r}{hint}")


def classifiers() -> list[str]:
    """Names of torchvision's models that classify images; none where it is not installed."""
    vision = torchvision_models()
    return [] if vision is None else list(vision.list_models(module=vision))


def classifier(name: str) -> nn.Module:
    """One of :func:`classifiers`, on the meta device where that is possible: for its sizes, not its values."""
    vision = torchvision_models()
    assert vision is not None, "names come from classifiers()"
    builder = vision.get_model_builder(name)
    # GoogLeNet and Inception initialise for minutes otherwise, and warn of it.
    plain = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module
    try:
        with torch.device("meta"):
            model = builder(weights=None, **plain)
    except NotImplementedError:  # RegNets compute their widths with tensors
        model = builder(weights=None, **plain)
    return model


def unknown_network(name: str, error: ValueError) -> ValueError:
    """What :func:`build` raised for ``name``; where it knows no such network, with what torchvision has as well."""
    if not str(error).startswith("unknown model"):  # a depth that is not 6n + 2
        return error
    theirs = classifiers()
    if not theirs:
        return ValueError(f"{error}; torchvision, whose classifiers are known too, is not installed")
    found = unknown("model", name, list(dict.fromkeys([*NAMES, *theirs])))  # a name of both is suggested once
    return found if "did you mean" in str(found) else error  # which lists ours: all of both are too many


def eager_model(name: str) -> nn.Module:
    """The eager model ``name`` with random weights, in eval mode: torchvision's, or our own plain one where it has none.

    Args:
        name: ``resnet50``; ``timm/resnet50d`` for a model of timm.

    Raises:
        ValueError: no such model.
    """
    if name.startswith("timm/"):
        return _timm_model(name.removeprefix("timm/"))
    vision = torchvision_models()
    if vision is not None:
        names: list[str] = vision.list_models()
        if name in names:
            builder = vision.get_model_builder(name)
            # Models for detection and segmentation would download the weights of their backbone.
            backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
            model: nn.Module = builder(weights=None, **backbone)
            return model.eval()
        if not name.startswith(("cifar_", "plain", "highway")):
            raise unknown("model", name, names)
    return unfuse(build(name)).eval()


def timm_names(pattern: str = "*") -> list[str]:
    """Names of timm's models that match a pattern of the shell.

    Raises:
        ValueError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError("timm is not installed: pip install 'fused_resnet[zoo]'") from error
    names: list[str] = timm.list_models(pattern)
    return names


def _timm_model(name: str) -> nn.Module:
    names = timm_names()
    if name not in names:
        raise unknown("timm model", name, names)
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False)
    return model.eval()


def images(batch: int, size: int, channels: int = 3, *, seed: int = 0) -> Tensor:
    """Random images [N, C, H, W], fp32, contiguous, on the CPU; the same for the same seed."""
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The BatchNorms of a model that keep running statistics."""
    found = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in found if norm.running_mean is not None]


def randomise(model: nn.Module, *, seed: int = 0) -> None:
    """Give every BatchNorm a random gamma in [0.5, 1.5) and a random beta in [-0.2, 0.2), where it has them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in norms(model):
            for parameter, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -0.2, 0.2)):
                if parameter is not None:
                    parameter.copy_(torch.empty(parameter.shape).uniform_(low, high, generator=generator))


def untouched(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Running statistics as the constructor leaves them: mean 0, variance 1."""
    mean, var = norm.running_mean, norm.running_var
    return mean is not None and var is not None and not mean.any() and bool((var == 1).all())


def calibrate(model: nn.Module, x: Tensor) -> int:
    """Fill BatchNorms whose running statistics are :func:`untouched`, from ``x`` on its way through the model.

    With mean 0 and variance 1 a BatchNorm in eval mode is the identity: activations would grow from block to block, past what
    fp16 can hold, and an error in the statistics would not show. The mean is half the true one and the variance the mean
    square: random images differ so little from each other deep in a network that the true ones would blow rounding errors up.

    Returns:
        How many BatchNorms were filled.
    """
    fresh = [norm for norm in norms(model) if untouched(norm)]
    if not fresh:
        return 0
    momenta = [norm.momentum for norm in fresh]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for norm in fresh:
            norm.momentum = 1.0
            norm.train()
        with torch.no_grad():
            model(x)
            for norm in fresh:
                assert norm.running_mean is not None and norm.running_var is not None
                norm.running_var += norm.running_mean.square()
                norm.running_mean *= 0.5
    finally:
        for norm, momentum in zip(fresh, momenta):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return len(fresh)
