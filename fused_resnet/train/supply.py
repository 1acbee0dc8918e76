"""How fast a data set gives batches, beside how fast a network takes them: whether loading is what a training waits for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import sampler
from .data import Batch, Data
from .errors import UsageError

#: Part of the time that a loop waits for images, from which loading counts as what bounds it.
BOUND = 0.25


@dataclass(frozen=True)
class Supply:
    """What was seen.

    Attributes:
        data: the data set's name.
        batch, workers: images in a step; processes that decode a folder's images (a small set has none).
        alone: images a second that are made ready when nothing else is done.
        taken: images a second of the whole loop, loading and steps together.
        waited: part of the loop's time in which the step waited for images, 0 to 1.
    """

    data: str
    batch: int
    workers: int
    alone: float
    taken: float
    waited: float

    @property
    def bounds(self) -> bool:
        """Whether loading is what bounds the training."""
        return self.waited > BOUND


def watch(
    data: Data,
    step: Callable[[Tensor], None],
    device: torch.device,
    batch: int,
    workers: int,
    seconds: float,
    now: Callable[[], float] = time.perf_counter,
) -> Supply:
    """Load alone, then load and step in turn as :func:`fused_resnet.train.fit` does, each for about ``seconds``.

    Args:
        data: its training images, augmented after its recipe.
        step: what a batch is given to: normalised, [N, C, H, W], channels_last, on ``device``.
        device: where the step computes; a GPU is waited for at the end only.
        batch, workers: as of a run.
        seconds: for each of the two; at least three batches.
        now: the clock (tests).

    Raises:
        UsageError: the set has fewer images than a batch.
        DataError: an image cannot be read, or where such are skipped, none of a batch can.
    """
    check(data, batch)
    batches = data.train.batches(sampler.draws(0, len(data.train), batch, range(10**9)), workers)

    def ready(got: Batch) -> None:
        step(data.normalise(got.x.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last))

    for _ in range(2 * workers + 2):  # the workers start, and what they have made ready beforehand is used up
        ready(next(batches))
    began, images = now(), 0
    for got in _some(batches, seconds, now):
        images += len(got.labels)
    alone = images / max(now() - began, 1e-9)
    ready(next(batches))
    _wait(device)
    began, images, waited, rounds = now(), 0, 0.0, 0
    while rounds < 3 or now() - began < seconds:
        asked = now()
        got = next(batches)
        waited += now() - asked
        ready(got)
        images, rounds = images + len(got.labels), rounds + 1
    _wait(device)
    whole = max(now() - began, 1e-9)
    return Supply(data.name, batch, workers if data.name == "folder" else 0, alone, images / whole, waited / whole)


def check(data: Data, batch: int) -> None:
    """A data set has a batch.

    Raises:
        UsageError: fewer images than that.
    """
    if len(data.train) < batch:
        raise UsageError(f"batch must be at most the {len(data.train)} training images of data {data.name!r}, got {batch}")


def _some(batches: Iterator[Batch], seconds: float, now: Callable[[], float]) -> Iterator[Batch]:
    began = now()
    for count, got in enumerate(batches, 1):
        yield got
        if count >= 3 and now() - began >= seconds:
            return


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
