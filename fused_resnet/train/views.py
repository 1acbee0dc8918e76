"""What a network sees of a test image: one crop, ten crops, or the whole image at several sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .errors import UsageError
from .folder import pixels

#: Zeros around an image of a set in memory before it is cut into ten.
PADDING = 4
#: Rows and columns of an image: one of so many pixels is 200 MB in fp32, six times the length of the paper's largest.
LARGEST = 4096


def check_size(name: str, size: int) -> None:
    """Raise where images cannot be made so long.

    Raises:
        UsageError: not from 1 to :data:`LARGEST`.
    """
    if not 1 <= size <= LARGEST:
        raise UsageError(f"{name} must be from 1 to {LARGEST} pixels, got {size}")


@dataclass(frozen=True)
class Views:
    """Which views an image has; scores are the mean of their softmaxes.

    Attributes:
        crops: ``one``: the centre; ``ten``: the four corners, the centre, and all mirrored (Krizhevsky et al. 2012, 4.1).
        scales: instead of crops, the whole image with its shorter side at each of these lengths. A network with one linear
            layer behind a global average is then what He et al. 2016, section 3.4, call fully-convolutional: the mean of the
            scores of all places is the score of the mean.
        flip: every view mirrored, too.
    """

    crops: str = "one"
    scales: tuple[int, ...] = ()
    flip: bool = False

    def __post_init__(self) -> None:
        for scale in self.scales:
            check_size("scales", scale)

    def __str__(self) -> str:
        what = "ten crops" if self.crops == "ten" else "one crop"
        if self.scales:
            what = f"whole images at {', '.join(map(str, self.scales))}"
        return f"{what}, mirrored too" if self.mirrored else what

    def of_file(self, size: int) -> Callable[[Any], list[Tensor]]:
        """For a decoded image: its views, uint8 [3, H, W] each. Runs in the workers."""
        return _OfFile(self, size)

    def of_batch(self, x: Tensor) -> Iterator[Tensor]:
        """For a normalised batch [N, C, H, W] in memory: one tensor a view.

        The one crop is the image; ten crops are of the image with :data:`PADDING` zeros around it; whole images are
        interpolated.
        """
        if self.scales:
            views = [
                F.interpolate(x, scale_factor=scale / min(x.shape[2:]), mode="bilinear", antialias=True)
                for scale in self.scales
            ]
        elif self.crops == "ten":
            padded = F.pad(x, (PADDING,) * 4)
            views = [crop for side in (padded, padded.flip(-1)) for crop in _five(side, x.shape[2], x.shape[3])]
        else:
            views = [x]
        for view in views:
            yield view
            if self.mirrored:
                yield view.flip(-1)

    @property
    def mirrored(self) -> bool:
        """Mirrored views are still to be added; ten crops have them."""
        return self.flip and (self.crops != "ten" or bool(self.scales))


def _five(x: Tensor, h: int, w: int) -> Iterator[Tensor]:
    """Corners and centre, h x w, of [..., H, W]."""
    bottom, right = x.shape[-2] - h, x.shape[-1] - w
    for top, left in ((0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))):
        yield x[..., top : top + h, left : left + w]


@dataclass(frozen=True)
class _OfFile:
    views: Views
    size: int

    def __call__(self, image: Any) -> list[Tensor]:
        from torchvision.transforms.v2 import functional as T

        if self.views.scales:
            found = [pixels(T.resize(image, [scale], antialias=True)) for scale in self.views.scales]
        else:
            whole = pixels(T.resize(image, [round(self.size * 256 / 224)], antialias=True))
            found = list(_five(whole, self.size, self.size))
            if self.views.crops == "one":
                found = found[-1:]
            else:
                found += _five(whole.flip(-1), self.size, self.size)
        if self.views.mirrored:
            found = [side for view in found for side in (view, view.flip(-1))]
        return [view.contiguous() for view in found]
