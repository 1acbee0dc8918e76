"""Random changes of training images: of whole batches in memory, or of one decoded image.

Each is a name with arguments in a recipe. ``pad_crop`` and ``flip`` are defined for batches, and for single images too; the
others need an image of any size and give one of a fixed size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..specimens import unknown
from .errors import UsageError

#: Steps that make an image of any size one of a fixed size.
SIZED = ("scale_crop", "resized_crop")
NAMES = ("pad_crop", "flip", *SIZED, "colour")


def check(steps: Sequence[dict[str, Any]], names: Sequence[str], what: str) -> None:
    """Steps are among ``names``.

    Raises:
        UsageError: one is not, or has no name.
    """
    for step in steps:
        name = step.get("name")
        if name not in names:
            known = f"{name!r} is not for {what}" if name in NAMES else str(unknown("step", str(name), list(NAMES)))
            raise UsageError(f"augment: {known}; for {what} there are {', '.join(names)}")


def pad_crop(x: Tensor, generator: torch.Generator, padding: int) -> Tensor:
    """He et al. 2016, section 4.2: ``padding`` zeros on each side, then a crop of the old size, of its own for each image.

    Args:
        x: [N, C, H, W], normalised, so that a zero is the mean image.
    """
    n, _, h, w = x.shape
    rows = torch.randint(2 * padding + 1, (n, 1), generator=generator) + torch.arange(h)
    columns = torch.randint(2 * padding + 1, (n, 1), generator=generator) + torch.arange(w)
    padded = F.pad(x, (padding,) * 4)
    return padded.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability one half; x: [N, C, H, W]."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, x.flip(3), x)


_BATCHED: dict[str, Callable[..., Tensor]] = {"pad_crop": pad_crop, "flip": flip}


def batch(x: Tensor, steps: Sequence[dict[str, Any]], generator: torch.Generator) -> Tensor:
    """A batch through the steps; x: [N, C, H, W]."""
    for step in steps:
        arguments = {key: value for key, value in step.items() if key != "name"}
        try:
            x = _BATCHED[step["name"]](x, generator, **arguments)
        except TypeError as error:
            raise UsageError(f"augment: {step}: {error}") from error
    return x
