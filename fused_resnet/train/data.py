"""Data sets: digits, which come with scikit-learn, CIFAR-10 and CIFAR-100 from disk, and folders of images.

A split gives batches for a list of draws. Small sets are whole in memory and augmented a batch at a time; folders are decoded
by worker processes (:mod:`fused_resnet.train.folder`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import augment
from .errors import UsageError
from .recipe import Recipe

#: Name -> what it is.
DATA = {
    "digits": "scikit-learn's handwritten digits, 1797 images of 8x8 made 32x32; nothing to bring",
    "cifar10": "CIFAR-10, the Python version, from disk",
    "cifar100": "CIFAR-100, the Python version, from disk",
    "folder": "a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, as ImageNet is kept",
}


@dataclass(frozen=True)
class Draw:
    """One batch to be made: which images, and the seed of what is random in them (None: nothing is)."""

    indices: list[int]
    seed: int | None = None


@dataclass(frozen=True)
class Batch:
    """Images x: [N, C, H, W], fp32 normalised or uint8; labels: [N] int64; files that could not be read."""

    x: Tensor
    labels: Tensor
    bad: tuple[str, ...] = ()


class Split(Protocol):
    """Training or test images."""

    def __len__(self) -> int: ...

    def batches(self, draws: Iterable[Draw], workers: int = 0) -> Iterator[Batch]:
        """A batch for each draw, in order."""


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        name: one of :data:`DATA`.
        classes: their names; a label is an index into them.
        mean, std: what images are normalised by, [C, H, W] or [C, 1, 1], in the unit of uint8.
        size: rows and columns that a network sees.
    """

    name: str
    classes: list[str]
    train: Split
    test: Split
    mean: Tensor
    std: Tensor
    size: int

    def normalise(self, x: Tensor) -> Tensor:
        """uint8 images as fp32, mean taken off and divided by the standard deviation; fp32 images as they are."""
        return normalise(x, self.mean, self.std) if x.dtype == torch.uint8 else x


def normalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``(x - mean) / std`` in fp32; x: uint8 [N, C, H, W]."""
    return (x.float() - mean.to(x.device)) / std.to(x.device)


class Pixels:
    """A split that is whole in memory; images: uint8 [N, C, H, W], labels: int64 [N]."""

    def __init__(self, images: Tensor, labels: Tensor, steps: Sequence[dict[str, Any]] = ()) -> None:
        self.images, self.labels, self.steps = images, labels, steps
        self.mean, self.std = torch.zeros(1), torch.ones(1)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, draws: Iterable[Draw], workers: int = 0) -> Iterator[Batch]:
        """A normalised batch for each draw, augmented where it has a seed. Nothing here is slow enough for workers."""
        for draw in draws:
            index = torch.tensor(draw.indices)
            x = normalise(self.images[index], self.mean, self.std)
            if draw.seed is not None:
                x = augment.batch(x, self.steps, torch.Generator().manual_seed(draw.seed))
            yield Batch(x, self.labels[index])


def in_memory(name: str, classes: list[str], train: Pixels, test: Pixels) -> Data:
    """The mean image and the standard deviation around it, of the training split, for both (He et al. 2016, section 4.2)."""
    pixels = train.images.float()
    mean = pixels.mean(0)
    std = (pixels - mean).square().mean().sqrt().reshape(1, 1, 1)
    for split in (train, test):
        split.mean, split.std = mean, std
    return Data(name, classes, train, test, mean, std, train.images.shape[-1])


def digits(recipe: Recipe) -> Data:
    """1437 training and 360 test images: of each class every fifth in a fixed random order is for the test.

    The set names no writers, so the same hand can be in both splits: an easy test, fit to tell a bug from a network.

    Raises:
        UsageError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("data 'digits' needs scikit-learn: pip install 'fused_resnet[train]'") from error
    raw = load_digits()
    small = torch.from_numpy(raw.images).float()[:, None] * (255 / 16)
    images = F.interpolate(small, size=(32, 32), mode="bilinear").round().clamp(0, 255).to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        test[order[labels[order] == label][::5]] = True
    splits = Pixels(images[~test], labels[~test], recipe.augment), Pixels(images[test], labels[test])
    return in_memory("digits", [str(label) for label in range(10)], *splits)


def load(name: str, folder: Path | None, recipe: Recipe, on_corrupt: str = "stop") -> Data:
    """A data set by name.

    Args:
        name: one of :data:`DATA`.
        folder: where it lies, for sets that have to be brought.
        recipe: its ``augment`` and ``normalise`` are used.
        on_corrupt: ``stop`` or ``skip``, for images that cannot be read.

    Raises:
        UsageError: it is not there: what to bring, and where to.
    """
    if name == "digits":
        augment.check(recipe.augment, ("pad_crop", "flip"), "digits")
        return digits(recipe)
    raise UsageError(f"data must be one of {', '.join(DATA)}, got {name!r}")
