"""The networks as they are trained here, and the responses of their layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models import build


def make(num_classes: int, network: str, pool: int = 1, **arguments: Any) -> nn.Module:
    """The network of that name, behind an average over squares of ``pool`` pixels where that is above 1."""
    model = build(network, num_classes, **arguments)
    return model if pool == 1 else nn.Sequential(nn.AvgPool2d(pool), model)


def responses(model: nn.Module, x: Tensor) -> list[float]:
    """Standard deviation of each layer's response to ``x``, in order: behind the BatchNorm, in front of ReLU and sum.

    Figure 7 of the paper. BatchNorms of projection shortcuts are left out. In eval mode; while it is watched each block runs
    its modules one by one.
    """
    found: list[float] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: found.append(float(output.float().std())))
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and "downsample" not in name
    ]
    before = model.training
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        model.train(before)
        for hook in hooks:
            hook.remove()
    return found
