"""Max-pooling against PyTorch, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launches import expected, max_pool, operands_of, run_poisoned

from fused_resnet.backends import triton as executor

SHAPES = [
    ((2, 11, 12, 64), {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}),
    ((1, 9, 7, 70), {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1)}),
    ((3, 8, 9, 5), {"kernel": (2, 3), "stride": (2, 1)}),
    ((1, 9, 11, 3), {"kernel": (3, 3), "stride": (2, 3), "padding": (1, 1), "dilation": (2, 2)}),
    ((1, 4, 4, 1), {"kernel": (4, 4), "stride": (4, 4)}),
    ((2, 30, 31, 16), {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sizes", "how"), SHAPES, ids=str)
def test_values(sizes: tuple[int, ...], how: dict[str, Any], dtype: torch.dtype) -> None:
    launch = max_pool(*sizes, dtype=dtype, **how)
    operands = operands_of(launch)
    operands["x"].sub_(3)  # mostly negative: a padding of zeros would show
    assert torch.equal(run_poisoned(launch, operands).double().cpu(), expected(launch, operands))


def test_wide_offsets() -> None:
    launch = max_pool(2, 11, 12, 64, kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    operands = operands_of(launch)
    assert torch.equal(run_poisoned(launch, operands, wide=True).double().cpu(), expected(launch, operands))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite(bad: float) -> None:
    launch = max_pool(1, 11, 12, 8, kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    operands = operands_of(launch)
    operands["x"][0, 2, 5, 6] = bad
    operands["x"][0, 3] = bad
    actual = run_poisoned(launch, operands).double().cpu()
    assert torch.allclose(actual, expected(launch, operands), rtol=0, atol=0, equal_nan=True)


def test_no_images() -> None:
    launch = max_pool(0, 11, 12, 8, kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    assert executor.run(launch, operands_of(launch)).shape == (0, 8, 6, 6)
