"""Folders of images: decoded, changed and cut by worker processes, one image at a time."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import augment, seeds
from . import recipe as recipes
from .data import Batch, Data, Draw
from .errors import DataError, UsageError
from .recipe import Recipe

#: Mean and standard deviation of ImageNet's channels, as torchvision's weights expect them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: A decoded image to uint8 [C, H, W], or to several of such.
View = Callable[[Any], Tensor | list[Tensor]]


def pixels(image: Any) -> Tensor:
    """A PIL image as uint8 [3, H, W]."""
    from torchvision.transforms.v2 import functional as T

    return T.pil_to_tensor(image)


def decoded(path: str) -> Any:
    """An image file as a PIL image of RGB, 8 bits a colour; 16 bits of grey become 8, 65535 is 255.

    Pillow's own conversion cuts every value above 255 off: such an image would be white.

    Raises:
        ValueError: 32-bit or float pixels, which have no largest value that would be white.
        Exception: whatever a decoder makes of a damaged file.
    """
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        # Pillow before 11 opens 16 bits of these two formats, which know no more, as 32.
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            small = np.rint(np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8)
            return Image.fromarray(small).convert("RGB")
        if image.mode in ("I", "F"):
            kind = "32-bit" if image.mode == "I" else "float"
            raise ValueError(f"{kind} pixels, expected 8 or 16 bits a colour")
        return image.convert("RGB")


def blank() -> Any:
    """An image for which there need be no file."""
    from PIL import Image

    return Image.new("RGB", (64, 64))


@dataclass(frozen=True)
class Centre:
    """The shorter side to 256 / 224 of ``size``, then the crop in the centre. An object, since workers may get it pickled."""

    size: int

    def __call__(self, image: Any) -> Tensor:
        from torchvision.transforms.v2 import functional as T

        small = T.resize(image, [round(self.size * 256 / 224)], antialias=True)
        return pixels(T.center_crop(small, [self.size, self.size]))


class _Images(Dataset[Any]):
    """Key (index, seed) -> (pixels, label), or (None, path, reason). Lives in the workers."""

    def __init__(self, samples: Sequence[tuple[str, int]], steps: Sequence[dict[str, Any]], view: View) -> None:
        self.samples, self.steps, self.view = samples, steps, view

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[Any, ...]:
        index, seed = key
        if index < 0:
            return self.view(blank()), -1
        path, label = self.samples[index]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd metadata; what cannot be decoded raises
                image = decoded(path)
        except Exception as error:  # a damaged file makes a decoder raise whatever comes to it
            return None, path, f"{type(error).__name__}: {error}".splitlines()[0]
        if seed is None:
            return self.view(image), label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.mix(seed, index))
            return pixels(augment.image(image, self.steps)), label


def _together(items: list[tuple[Any, ...]]) -> tuple[Any, Tensor, list[tuple[str, str]]]:
    good = [item for item in items if item[0] is not None]
    bad = [(item[1], item[2]) for item in items if item[0] is None]
    x: Any = [item[0] for item in good] or None
    if x and isinstance(x[0], Tensor):
        x = torch.stack(x)
    return x, torch.tensor([item[1] for item in good], dtype=torch.int64), bad


class Folder:
    """A split of files, each with its label."""

    def __init__(
        self, samples: Sequence[tuple[str, int]], steps: Sequence[dict[str, Any]], view: View, on_corrupt: str
    ) -> None:
        self.samples, self.steps, self.view, self.on_corrupt = samples, steps, view, on_corrupt

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, draws: Iterable[Draw], workers: int = 0) -> Iterator[Batch]:
        """A batch of uint8 for each draw, augmented where it has a seed. What is random in an image comes from the draw's seed
        and the image's number, whichever worker decodes it.

        Raises:
            DataError: an image cannot be read and ``on_corrupt`` is ``stop``; or none of a batch can.
        """
        loader: DataLoader[Any] = DataLoader(
            _Images(self.samples, self.steps, self.view),
            batch_sampler=_Keys(draws),
            num_workers=workers,
            collate_fn=_together,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or a new iterator would draw from the run's random numbers
        )
        for x, labels, bad in _of_workers(loader):
            if bad and self.on_corrupt == "stop":
                raise DataError(f"{bad[0][0]}: cannot be read as an image ({bad[0][1]}); --on-corrupt skip leaves such out")
            if x is None:
                raise DataError(f"{bad[0][0]} and the rest of its batch: cannot be read as images ({bad[0][1]})")
            names = tuple(path for path, _ in bad)
            yield Batch(x, labels, names) if isinstance(x, Tensor) else Batch(torch.empty(0), labels, names, x)


def _of_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """What the workers send; of one that was killed while it sent, a RuntimeError as PyTorch's own where it was not sending."""
    sent = iter(loader)
    while True:
        try:
            got = next(sent)
        except StopIteration:
            return
        except (OSError, EOFError) as error:
            time.sleep(1)  # the signal of its end, which raises what says more, may come later than the end of what it sent
            raise RuntimeError(f"DataLoader worker cannot be read from: {type(error).__name__}: {error}") from error
        yield got


class _Keys:
    """Draws as the keys of :class:`_Images`."""

    def __init__(self, draws: Iterable[Draw]) -> None:
        self.draws = draws

    def __iter__(self) -> Iterator[Any]:
        for draw in self.draws:
            yield [(index, draw.seed) for index in draw.indices]


def _samples(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise UsageError(f"data 'folder': {folder}: {str(error).splitlines()[0]}") from error
    return list(found.classes), list(found.samples)


def check(recipe: Recipe) -> int:
    """A recipe is for a folder; rows and columns that its images have.

    Raises:
        UsageError: it is not.
    """
    augment.check(recipe.augment, augment.NAMES, "images of a folder")
    sizes: list[int] = [step["size"] for step in recipe.augment if step["name"] in augment.SIZED]
    if not sizes:
        raise UsageError(
            f"recipe {recipe.name!r} is not for a folder: its augment has none of {', '.join(augment.SIZED)}, which cut images "
            "of any size to one"
        )
    if recipe.normalise != "channels":
        raise UsageError(f"recipe {recipe.name!r} is not for a folder: normalise must be 'channels', got {recipe.normalise!r}")
    return sizes[-1]


def _fitting() -> list[str]:
    """The package's recipes that are for a folder."""
    found = []
    for name in recipes.names():
        with suppress(UsageError):
            check(recipes.load(name))
            found.append(name)
    return found


def load(folder: Path, recipe: Recipe, on_corrupt: str) -> Data:
    """``folder/train/CLASS/*`` and ``folder/val/CLASS/*``.

    Raises:
        UsageError: they are not there, have other classes, or the recipe is not for a folder: which are.
    """
    try:
        size = check(recipe)
    except UsageError as error:
        raise UsageError(f"{error}; {' and '.join(_fitting())} are for a folder") from error
    _look(folder, ("train", "val"))
    classes, train = _samples(folder / "train")
    tests = for_test(folder, Centre(size), size, on_corrupt)
    if classes != tests.classes:
        only = sorted(set(classes) ^ set(tests.classes))[0]
        where = "train" if only in classes else "val"
        raise UsageError(f"data 'folder': class {only!r} is only in {folder / where}")
    return replace(tests, train=Folder(train, recipe.augment, Centre(size), on_corrupt))


def for_test(folder: Path, view: View, size: int, on_corrupt: str) -> Data:
    """``folder/val/CLASS/*`` alone, seen through ``view``; the training split is empty.

    Raises:
        UsageError: it is not there.
    """
    _look(folder, ("val",))
    classes, test = _samples(folder / "val")
    mean, std = (255 * torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    return Data("folder", classes, Folder((), (), view, on_corrupt), Folder(test, (), view, on_corrupt), mean, std, size)


def _look(folder: Path, parts: Sequence[str]) -> None:
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise UsageError("data 'folder' needs torchvision: pip install 'fused_resnet[train]'") from error
    for part in parts:
        if not os.path.isdir(folder / part):  # not Path's, which raises where a name is too long
            raise UsageError(
                f"data 'folder': there is no {folder / part}: bring a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, one "
                "subfolder a class, and name it by --data-dir"
            )
