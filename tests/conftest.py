"""Set-up shared by all tests: the interpreter where there is no GPU, and a seed for each test of its own."""

from __future__ import annotations

import os
import zlib

import torch

if not torch.cuda.is_available():
    # Read when triton is imported: without a GPU its kernels run in the interpreter, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> int:
    """Random numbers depend on the test's name alone, not on which tests ran before it or in which process."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    return seed


@pytest.fixture(autouse=True)
def default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A FUSED_RESNET_BACKEND of the person who runs the tests does not change what they test."""
    monkeypatch.delenv("FUSED_RESNET_BACKEND", raising=False)
