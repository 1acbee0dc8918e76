"""An exponential moving average of a model's parameters and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .distributed import part


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, the objects themselves."""
    return dict(model.state_dict(keep_vars=True))


class Average:
    """``average = decay * average + (1 - decay) * value`` after each step, of every floating point tensor of the state_dict.

    Counts of batches are copied. At first it is the model as it is; ``decay`` grows to its value over the first steps, as
    ``(1 + step) / (10 + step)``, so that a short run does not end near its start (TensorFlow's rule).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in tensors(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the model as it is after ``step`` steps."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        floating, now = [], []
        for name, value in tensors(model).items():
            if value.is_floating_point():
                floating.append(part(self.values[name]))
                now.append(part(value.detach()))
            else:
                self.values[name].copy_(value)
        torch._foreach_lerp_(floating, now, weight)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """The model computes with the average inside this context."""
        own = {name: value.detach().clone() for name, value in tensors(model).items()}
        _write(model, self.values)
        try:
            yield
        finally:
            _write(model, own)


@torch.no_grad()
def _write(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in tensors(model).items():
        value.copy_(values[name])
