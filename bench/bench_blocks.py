"""Blocks, in inference."""

from __future__ import annotations

import pytest
from cases import BLOCKS, block_case
from contenders import Bench


@pytest.mark.parametrize("block", BLOCKS)
def test_block(bench: Bench, block: str, last_batch: int, size: int, dtype_name: str, contender: str) -> None:
    """A forward pass in eval mode."""
    bench(contender, block_case(block, last_batch, size, dtype_name))
