"""The networks of a run by name: eager, with random state, and their launches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import network, plain, specimens
from ..network import Use
from ..swap import fuse
from .scope import TOY


class Toy(nn.Sequential):
    """A stem, a block and a classifier: launches of all kinds, in seconds of interpreting."""

    def __init__(self) -> None:
        super().__init__(plain.Stem(3, 16), plain.BasicBlock(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def check_name(name: str) -> None:
    """Raise ValueError for a network there is not."""
    if name != TOY:
        network.network(name)


def eager(name: str, device: torch.device, size: int) -> nn.Module:
    """The eager network, in eval mode, with random weights and BatchNorm state that keeps activations in range.

    Raises:
        ValueError: no such network.
    """
    torch.manual_seed(0)
    model = Toy().eval() if name == TOY else specimens.eager_model(name)
    specimens.randomise(model)
    model.to(device)
    specimens.calibrate(model, specimens.images(2, max(32, size // 2), seed=1).to(device))
    return model


def uses(name: str, batch: int, size: int, dtype: torch.dtype, mode: str, memory: str = "default") -> list[Use]:
    """The distinct launches of a network, see :func:`fused_resnet.network.uses`."""
    if name != TOY:
        return network.uses(name, batch, size, dtype, mode, memory)
    with torch.device("meta"):
        model = fuse(Toy(), memory=memory)
    return network.distinct(network.launches(model, batch, size, dtype, mode))


def images(batch: int, size: int, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Fresh random images."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.randn(batch, 3, size, size, device=device).to(dtype).contiguous(memory_format=layout)
