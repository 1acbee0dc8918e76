"""A small network, a short recipe and runs of them, for tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from fused_resnet.train import Config, Recipe

HERE = Path(__file__).resolve()
#: The network's name, for a configuration.
SMALL = f"{HERE}:small"
OTHER = f"{HERE}:other"


def small(num_classes: int, width: int = 4, dropout: float = 0.25) -> nn.Sequential:
    """Two residual blocks, the first with a projection, and a dropout, which draws from PyTorch's own generator.

    The projection has no stride: eager's, of few channels, would write past its memory without AVX-512 (tests/nets.py).
    """
    projection = nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width))
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, width, 3, 4, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
        BasicBlock(width, 2 * width, 1, projection),
        BasicBlock(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(2 * width, num_classes),
    )


def other(num_classes: int) -> nn.Module:
    """Another network."""
    return small(num_classes, width=6)


def recipe(**changes: Any) -> Recipe:
    """Some steps of everything: warm-up, cosine, smoothing, an average of the weights, augmentation."""
    fields: dict[str, Any] = {
        "name": "test", "data": "digits", "model": SMALL, "batch": 16, "length": 24, "unit": "steps", "lr": 0.05,
        "nesterov": True, "schedule": "cosine", "label_smoothing": 0.1, "ema": 0.9,
        "augment": ({"name": "pad_crop", "padding": 2},),
    }  # fmt: skip
    return Recipe(**{**fields, **changes})


def config(out: Path, **changes: Any) -> Config:
    """A short run on digits, on the reference backend."""
    fields: dict[str, Any] = {
        "recipe": recipe(), "out": out, "device": "cpu", "backend": "reference", "quiet": True,
        "log_every": 5, "checkpoint_every": 3, "evaluate_every": 0,
    }  # fmt: skip
    return Config(**{**fields, **changes})


def tensors(value: Any, name: str = "") -> dict[str, Any]:
    """Nested data as leaves by name."""
    if isinstance(value, dict):
        return {path: leaf for key, part in value.items() for path, leaf in tensors(part, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {path: leaf for key, part in enumerate(value) for path, leaf in tensors(part, f"{name}/{key}").items()}
    return {name: value}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, in the order of its elements: NaN equals NaN, and 0 does not equal -0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(left: Any, right: Any) -> list[str]:
    """Where two pieces of nested data are not bit for bit the same."""
    a, b = tensors(left), tensors(right)
    differing = [name for name in a.keys() ^ b.keys()]
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        if isinstance(x, torch.Tensor):
            if (x.dtype, x.shape) != (y.dtype, y.shape) or not torch.equal(bits(x), bits(y)):
                differing.append(name)
        elif x != y:
            differing.append(name)
    return sorted(differing)
