"""How far a result may be from the truth, in one place: from the element type and the length of the sums.

Errors are relative to the largest magnitude of the expected tensor: an element that is small because large ones cancelled
carries their absolute error, and no algorithm avoids that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Logits of a whole network in fp32 against eager PyTorch (the issue's number).
NETWORK_FP32 = 1e-5

#: A handful of layers in fp32, values of the order of one.
CLOSE = 1e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; infinite where a NaN stands in one tensor only."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    if a.numel() == 0:
        return 0.0
    difference = (a - e).abs().max().item()
    if difference != difference:
        return float("inf")
    return difference / max(e.abs().max().item(), torch.finfo(torch.float64).tiny)


def bound(dtype: torch.dtype, length: int) -> float:
    """Largest relative error of a launch: sums of ``length`` products in fp32 (fp64), one rounding to nearest ``dtype``.

    Rounding errors of a sum grow like the square root of its length (Higham 2002, section 4.2, random signs); the factor covers
    the largest of thousands of elements, and the few further operations of an epilogue.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return 8 * torch.finfo(accumulator).eps * max(length, 16) ** 0.5 + torch.finfo(dtype).eps / 2


def assert_close(actual: Tensor, expected: Tensor, length: int, layers: int = 1, what: str = "result") -> None:
    """``actual`` is as near to ``expected`` as ``layers`` launches with sums of ``length`` products may come."""
    error, allowed = relative_error(actual, expected), layers * bound(actual.dtype, length)
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"


def distance(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Root mean square error over the root mean square of what is expected, of several ``(actual, expected)`` together.

    For gradients through ReLUs: a value next to zero may fall on the other side in another order of summation. That changes one
    element much and says nothing about rounding; it would decide over the largest error, and hardly counts here.
    """
    error = scale = 0.0
    for actual, expected in pairs:
        assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
        a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
        error, scale = error + (a - e).square().sum().item(), scale + e.square().sum().item()
    return float("inf") if error != error else (error / max(scale, torch.finfo(torch.float64).tiny)) ** 0.5


def assert_no_worse(error: float, eagers: float, what: str, floor: float = 1e-6) -> None:
    """An error against float64 is at most twice that of eager PyTorch in the same type."""
    assert error <= max(2 * eagers, floor), f"{what}: error {error:.2e}, eager's own {eagers:.2e}"
