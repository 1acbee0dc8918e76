"""Which images a step sees: a function of seed, epoch and step, so that a position is all there is to remember."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from . import seeds
from .data import Draw


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, images: int) -> torch.Tensor:
    """The order of the images in an epoch: a permutation, int64 [images]."""
    return torch.randperm(images, generator=seeds.generator("order", seed, epoch))


def draws(seed: int, images: int, batch: int, steps: range, rank: int = 0, world: int = 1) -> Iterator[Draw]:
    """What process ``rank`` of ``world`` draws in each of ``steps``.

    A batch is cut into the processes' parts, so the images of a step do not depend on how many they are. The images left over
    at the end of an epoch are not used in it.
    """
    per_epoch = images // batch
    for step in steps:
        epoch, place = divmod(step, per_epoch)
        indices = order(seed, epoch, images)[place * batch : (place + 1) * batch]
        yield Draw(indices[rank::world].tolist(), seeds.mix("augment", seed, step, rank, world))


def share(images: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[Draw]:
    """A process's part of all images once, without anything random, in batches of about one size; it may be none at all."""
    mine = list(range(rank, images, world))
    batches = -(-len(mine) // batch)
    for index in range(batches):
        yield Draw(mine[index * len(mine) // batches : (index + 1) * len(mine) // batches])


def in_order(images: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[Draw]:
    """All images once, without anything random; each process has its part, and all have equally many.

    A process that is one image short gets another, as the index -1: it is computed and not counted.
    """
    mine = list(range(rank, images, world))
    mine += [-1] * (-(-images // world) - len(mine))
    for start in range(0, len(mine), batch):
        yield Draw(mine[start : start + batch])
