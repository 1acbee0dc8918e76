"""Whole networks, in inference."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from contenders import Bench, Case
from torch import nn

from fused_resnet import specimens


@lru_cache(maxsize=1)
def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    try:
        model = specimens.eager_model(name)
    except ValueError as error:
        raise pytest.UsageError(f"--model: {error}") from error
    specimens.randomise(model)
    specimens.calibrate(model, specimens.images(2, 64, seed=1))
    return model


def test_model(bench: Bench, model_name: str, batch: int, size: int, dtype_name: str, contender: str) -> None:
    """A forward pass in eval mode."""
    bench(contender, Case(model_name, _model(model_name), 3, batch, size, dtype_name))
