"""Data sets: digits, which come with scikit-learn, CIFAR-10 and CIFAR-100 from disk, and folders of images.

A split gives batches for a list of draws. Small sets are whole in memory and augmented a batch at a time; folders are decoded
by worker processes (:mod:`fused_resnet.train.folder`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..specimens import unknown
from . import augment
from .errors import UsageError
from .recipe import Recipe

if TYPE_CHECKING:
    from .views import Views

#: Where data sets are looked for.
FOLDER = Path("data")

#: Name -> what it is.
DATA = {
    "digits": "scikit-learn's handwritten digits, 1797 images of 8x8 made 32x32; nothing to bring",
    "cifar10": "CIFAR-10, the Python version, from disk",
    "cifar100": "CIFAR-100, the Python version, from disk",
    "folder": "a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, as ImageNet is kept",
}


@dataclass(frozen=True)
class Draw:
    """One batch to be made: which images, and the seed of what is random in them (None: nothing is).

    The index -1 is some image with the label -1: all processes have to compute as often, and it is not counted.
    """

    indices: list[int]
    seed: int | None = None


@dataclass(frozen=True)
class Batch:
    """Images and labels.

    Attributes:
        x: [N, C, H, W]; uint8, or fp32 that is normalised.
        labels: [N], int64.
        bad: files that could not be read.
        views: instead of x, for each image several uint8 [C, H, W] of any sizes.
    """

    x: Tensor
    labels: Tensor
    bad: tuple[str, ...] = ()
    views: list[list[Tensor]] | None = None


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
        """A batch for each draw: uint8, or normalised and augmented where the draw has a seed. Nothing here needs workers."""
        for draw in draws:
            drawn = torch.tensor(draw.indices)
            index = drawn.clamp(min=0)
            x = self.images[index]
            if draw.seed is not None:
                generator = torch.Generator().manual_seed(draw.seed)
                x = augment.batch(normalise(x, self.mean, self.std), self.steps, generator)
            yield Batch(x, torch.where(drawn < 0, -1, self.labels[index]))


def in_memory(name: str, classes: list[str], train: Pixels, test: Pixels, normalise: str) -> Data:
    """Mean and standard deviation of the training split, for both: of the mean image (He et al. 2016, section 4.2) or of the
    channels.
    """
    pixels = train.images.float()
    if normalise == "channels":
        mean, std = pixels.mean((0, 2, 3))[:, None, None], pixels.std((0, 2, 3))[:, None, None]
    else:
        mean = pixels.mean(0)
        std = (pixels - mean).square().mean().sqrt().reshape(1, 1, 1)
    for split in (train, test):
        split.mean, split.std = mean, std
    return Data(name, classes, train, test, mean, std, train.images.shape[-1])


def digits(recipe: Recipe) -> Data:
    """1433 training and 364 test images: of each class every fifth in a fixed random order is for the test.

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
    return in_memory("digits", [str(label) for label in range(10)], *splits, recipe.normalise)


#: Archive and folder of each CIFAR.
_CIFAR = {
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz", "cifar-10-batches-py", "data_batch_1 ... data_batch_5, test_batch"),
    "cifar100": ("CIFAR100", "cifar-100-python.tar.gz", "cifar-100-python", "train, test, meta"),
}


def cifar(name: str, folder: Path, recipe: Recipe) -> Data:
    """50000 training and 10000 test images of 32x32, from the Python version's files.

    Raises:
        UsageError: they are not there or not whole; torchvision is missing.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise UsageError(f"data {name!r} needs torchvision: pip install 'fused_resnet[train]'") from error
    kind, archive, inside, content = _CIFAR[name]
    root = folder.parent if folder.name == inside else folder
    if not os.path.isdir(root / inside):  # not Path's, which raises where a name is too long
        raise UsageError(
            f"data {name!r}: there is no {root / inside}: bring {archive} from https://www.cs.toronto.edu/~kriz/cifar.html and "
            f"unpack it in {root} ({content}), or name its folder by --data-dir"
        )
    try:
        parts = [getattr(datasets, kind)(str(root), train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise UsageError(
            f"data {name!r}: {root / inside} is not whole ({content}, by their checksums): unpack {archive} again"
        ) from error
    train, test = (
        Pixels(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in parts
    )
    train.steps = recipe.augment
    return in_memory(name, list(parts[0].classes), train, test, recipe.normalise)


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
    if name == "folder":
        from . import folder as folders

        return folders.load(folder or FOLDER, recipe, on_corrupt)
    if name not in DATA:
        raise UsageError(str(unknown("data set", name, list(DATA))))
    augment.check(recipe.augment, ("pad_crop", "flip"), f"data {name!r}")
    return digits(recipe) if name == "digits" else cifar(name, folder or FOLDER, recipe)


def for_test(
    name: str, folder: Path | None, views: Views, recipe: Recipe | None, size: int | None, on_corrupt: str = "stop"
) -> Data:
    """A data set whose test images are seen through ``views``.

    Args:
        name, folder, on_corrupt: as for :func:`load`.
        views: of an image.
        recipe: of the network; None for one whose weights came from a file.
        size: rows and columns of a crop of a folder's image; None for the recipe's, or 224.

    Raises:
        UsageError: it is not there, or has no such views.
    """
    if size is not None:
        from .views import check_size

        check_size("size", size)
    if name == "folder":
        from . import folder as folders

        size = size or (folders.check(recipe) if recipe is not None else 224)
        return folders.for_test(folder or FOLDER, views.of_file(size), size, on_corrupt)
    if size is not None:
        raise UsageError(f"--size is for folders: images of data {name!r} are seen as they are")
    plain = Recipe("test", name, "", 1, 1, "steps", 1.0)
    return load(name, folder, plain if recipe is None else replace(recipe, augment=()), on_corrupt)
