"""On a GPU the kernels' tests mean exact fp32: PyTorch's default there is tf32, for convolutions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """What :func:`fused_resnet.backends.triton.tf32_allowed` reads; tests of tf32 set it themselves."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
