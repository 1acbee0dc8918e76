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
NAMES = ("pad_crop", "flip", *SIZED, "colour", "trivial")


def check(steps: Sequence[dict[str, Any]], names: Sequence[str], what: str) -> None:
    """Steps are among ``names`` and run, on an example: a batch in memory, or an image where ``names`` are all.

    Raises:
        UsageError: a step has no such name, or does not take its arguments.
    """
    for step in steps:
        name = step.get("name") if isinstance(step, dict) else f"{step} (not an object with a name)"
        if name not in names:
            known = f"{name!r} is not for {what}" if name in NAMES else str(unknown("step", str(name), list(NAMES)))
            raise UsageError(f"augment: {known}; for {what} there are {', '.join(names)}")
    with torch.random.fork_rng(devices=[]):
        try:
            _try(steps, tuple(names) == NAMES)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"augment: {str(error).splitlines()[0]}") from error


def _try(steps: Sequence[dict[str, Any]], single: bool) -> None:
    if single:
        from torchvision.transforms.v2 import functional as T

        image(T.to_pil_image(torch.zeros(3, 40, 50, dtype=torch.uint8)), steps)
    else:
        batch(torch.zeros(1, 3, 32, 32), steps, torch.Generator())


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
        x = _call(_BATCHED, step, x, generator)
    return x


def _call(known: dict[str, Callable[..., Any]], step: dict[str, Any], *given: Any) -> Any:
    arguments = {key: value for key, value in step.items() if key != "name"}
    try:
        return known[step["name"]](*given, **arguments)
    except TypeError as error:
        raise TypeError(f"{step}: {error}") from error


# Of one decoded image (PIL); random numbers come from PyTorch's own generator, which the caller has seeded for this image.


def _between(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def scale_crop(image: Any, shorter: Sequence[int], size: int) -> Any:
    """The shorter side to a random length, then a random crop (Simonyan and Zisserman 2015; He et al. 2016, section 3.4)."""
    from torchvision.transforms.v2 import functional as T

    if min(shorter) < size:
        raise ValueError(f"scale_crop: shorter must be at least the size {size}, got {list(shorter)}")
    image = T.resize(image, [_between(*shorter)], antialias=True)
    top, left = _between(0, image.height - size), _between(0, image.width - size)
    return T.crop(image, top, left, size, size)


def resized_crop(image: Any, size: int, scale: Sequence[float] = (0.08, 1.0)) -> Any:
    """A crop of random area and aspect ratio, made ``size`` x ``size`` (Szegedy et al. 2015, section 6)."""
    from torchvision.transforms import v2

    return v2.RandomResizedCrop(size, scale=tuple(scale), antialias=True)(image)


def _flip_image(image: Any) -> Any:
    from torchvision.transforms.v2 import functional as T

    return T.hflip(image) if torch.rand(()) < 0.5 else image


def _pad_crop_image(image: Any, padding: int) -> Any:
    from torchvision.transforms.v2 import functional as T

    top, left = _between(0, 2 * padding), _between(0, 2 * padding)
    return T.crop(image, top - padding, left - padding, image.height, image.width)


#: Eigenvectors (columns) and eigenvalues of the covariance of ImageNet's colours, 0 to 1 (Krizhevsky et al. 2012, section 4.1);
#: the numbers are those of fb.resnet.torch.
_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_EIGENVALUES = (0.2175, 0.0188, 0.0045)


def colour(image: Any, strength: float = 0.1) -> Any:
    """One random multiple of each principal component of the colours, added to all pixels (Krizhevsky et al. 2012)."""
    from torchvision.transforms.v2 import functional as T

    shift = torch.tensor(_EIGENVECTORS) @ (strength * torch.randn(3) * torch.tensor(_EIGENVALUES))
    x = T.pil_to_tensor(image).float() + 255 * shift[:, None, None]
    return T.to_pil_image(x.round().clamp(0, 255).to(torch.uint8))


def trivial(image: Any) -> Any:
    """One random operation of random strength (TrivialAugment, Müller and Hutter 2021)."""
    from torchvision.transforms import v2

    return v2.TrivialAugmentWide()(image)


_SINGLE: dict[str, Callable[..., Any]] = {
    "pad_crop": _pad_crop_image,
    "flip": _flip_image,
    "scale_crop": scale_crop,
    "resized_crop": resized_crop,
    "colour": colour,
    "trivial": trivial,
}


def image(picture: Any, steps: Sequence[dict[str, Any]]) -> Any:
    """One PIL image through the steps."""
    for step in steps:
        picture = _call(_SINGLE, step, picture)
    return picture
