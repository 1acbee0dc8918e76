"""Whole networks, in inference."""

from __future__ import annotations

from cases import model_case
from contenders import Bench


def test_model(bench: Bench, model_name: str, batch: int, size: int, dtype_name: str, contender: str) -> None:
    """A forward pass in eval mode."""
    bench(contender, model_case(model_name, batch, size, dtype_name))
