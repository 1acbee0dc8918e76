"""How fast a data set gives batches, beside how fast a network takes them: whether loading is what bounds a training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from . import sampler
from .data import Batch, Data
from .errors import UsageError

#: Part of a loop's time, waited for images or taken from the steps' cores, from which loading counts as what bounds it.
BOUND = 0.25


@dataclass(frozen=True)
class Supply:
    """What was seen.

    Attributes:
        data: the data set's name.
        batch, workers: images in a step; processes that decode a folder's images (a small set has none).
        alone: images a second that are made ready when nothing else is done.
        stepping: images a second of the steps when nothing is loaded: of a batch that is there already.
        taken: images a second of the whole loop, loading and steps together.
        waited: part of the loop's time in which the step waited for images, 0 to 1.
    """

    data: str
    batch: int
    workers: int
    alone: float
    stepping: float
    taken: float
    waited: float

    @property
    def share(self) -> float:
        """How fast the loop is, of its steps alone."""
        return self.taken / max(self.stepping, 1e-9)

    @property
    def why(self) -> str:
        """How loading bounds the training: ``waits``, ``shares``, or it does not: empty.

        Steps wait for images; or they do not, and are slower than alone since workers compute on the same cores. That no clock
        around the waiting sees. Without workers loading is waited for, and other slowness is not its own.
        """
        if self.waited > BOUND:
            return "waits"
        return "shares" if self.workers and self.share < 1 - BOUND else ""

    @property
    def bounds(self) -> bool:
        """Whether loading is what bounds the training."""
        return bool(self.why)


def watch(
    data: Data,
    step: Callable[[Tensor], None],
    device: torch.device,
    batch: int,
    workers: int,
    seconds: float,
    now: Callable[[], float] = time.perf_counter,
) -> Supply:
    """Step alone, load alone, then load and step in turn as :func:`fused_resnet.train.fit` does, each for about ``seconds``.

    The steps come first, with a batch that is made here: workers that are there would fill their queues beside them.

    Args:
        data: its training images, augmented after its recipe.
        step: what a batch is given to: normalised, [N, C, H, W], channels_last, on ``device``.
        device: where the step computes; a GPU is waited for at the end only.
        batch, workers: as of a run.
        seconds: for each of the three; at least three batches.
        now: the clock (tests).

    Raises:
        UsageError: the set has fewer images than a batch.
        DataError: an image cannot be read, or where such are skipped, none of a batch can.
    """
    check(data, batch)

    def ready(got: Batch) -> None:
        step(data.normalise(got.x.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last))

    held = next(data.train.batches(sampler.draws(0, len(data.train), batch, range(1))))
    ready(held)
    _wait(device)
    began, images = now(), 0
    for got in _some(repeat(held), seconds, now):
        ready(got)
        images += len(got.labels)
    _wait(device)
    stepping = images / max(now() - began, 1e-9)
    batches = data.train.batches(sampler.draws(0, len(data.train), batch, range(10**9)), workers)
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
    processes = workers if data.name == "folder" else 0
    return Supply(data.name, batch, processes, alone, stepping, images / whole, waited / whole)


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
