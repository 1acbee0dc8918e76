"""Top-1 and top-5 of one network or an ensemble, over one or many views of each image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import sampler
from .data import Batch, Data
from .distributed import World
from .errors import DataError, TrainingError, UsageError, ended_elsewhere
from .members import Member
from .metrics import amp_dtype
from .views import Views


@dataclass(frozen=True)
class Result:
    """What :func:`evaluate` finds.

    Attributes:
        top1, top5: part of the images whose label is the first, or among the first five, of the answers, 0 to 1.
        images: how many.
        views: of each image, by each network.
        bad: files that could not be read.
        seconds: for all.
    """

    top1: float
    top5: float
    images: int
    views: int
    bad: list[str]
    seconds: float


def _groups(got: Batch, member: Member, data: Data, views: Views, device: torch.device) -> Iterator[tuple[list[int], Tensor]]:
    """Views of one size together: for each group the images' places in the batch, and the normalised views."""
    if got.views is None:
        x = member.normalise(got.x.to(device), data.mean, data.std)
        for view in views.of_batch(x):
            yield list(range(len(x))), view
        return
    by_size: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for place, of_image in enumerate(got.views):
        for view in of_image:
            by_size.setdefault(view.shape, []).append((place, view))
    for group in by_size.values():
        for start in range(0, len(group), len(got.labels)):
            part = group[start : start + len(got.labels)]
            x = torch.stack([view for _, view in part]).to(device)
            yield [place for place, _ in part], member.normalise(x, data.mean, data.std)


@torch.no_grad()
def probabilities(
    members: Sequence[Member], got: Batch, data: Data, views: Views, device: torch.device, amp: str = "off"
) -> tuple[Tensor, int]:
    """Softmaxes, averaged over the views of an image and then over the networks: fp64 [N, classes]; and views of an image."""
    total = torch.zeros(len(got.labels), members[0].outputs, dtype=torch.float64, device=device)
    seen = 0
    for member in members:
        for places, x in _groups(got, member, data, views, device):
            with torch.autocast(device.type, dtype=amp_dtype(amp), enabled=amp != "off"):
                scores = member.model(x.contiguous(memory_format=torch.channels_last))
            if not isinstance(scores, Tensor) or scores.shape != (len(x), members[0].outputs):
                what = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise UsageError(f"{member.name}: must return a tensor [{len(x)}, {members[0].outputs}], got {what}")
            total.index_add_(0, torch.tensor(places, device=device), scores.double().softmax(1))
            seen += len(places)
    return total / (seen / len(got.labels)), round(seen / len(got.labels) / len(members))


def evaluate(
    members: Sequence[Member],
    data: Data,
    views: Views,
    device: torch.device,
    *,
    batch: int = 64,
    workers: int = 0,
    amp: str = "off",
    world: World | None = None,
    progress: Callable[[float], None] | None = None,
) -> Result:
    """Run the test split of ``data`` through one network or several.

    Args:
        members: networks with the same classes.
        data: its test split is used, made for these views.
        views: what a network sees of an image.
        device: where the networks are.
        batch: images at once.
        workers: processes that decode images.
        amp: element type of autocast.
        world: the processes that share the images, each of which gets the result for all; by default this one alone.
        progress: called after each batch with the part that is done.

    Raises:
        UsageError: the networks or the data have different classes.
        TrainingError: an image cannot be read, or a process that decodes images failed.
    """
    for member in members:
        if member.outputs != len(data.classes):
            raise UsageError(f"{member.name} has {member.outputs} classes, data {data.name!r} has {len(data.classes)}")
        if member.classes is not None and member.classes != data.classes:
            raise UsageError(f"{member.name} was trained on classes of other names than those of data {data.name!r}")
    world = world or World(device)
    began = time.perf_counter()
    mine = len(range(world.rank, len(data.test), world.size))
    first = five = images = count = 0
    bad: list[str] = []
    failed: DataError | None = None
    try:
        try:
            for got in data.test.batches(sampler.share(len(data.test), batch, world.rank, world.size), workers):
                scores, count = probabilities(members, got, data, views, device, amp)
                order = scores.topk(min(5, scores.shape[1])).indices.cpu()
                right = order == got.labels[:, None]
                first += int(right[:, 0].sum())
                five += int(right.any(1).sum())
                images += len(got.labels)
                bad += got.bad
                if progress is not None:
                    progress(min(1.0, (images + len(bad)) / mine))
        except DataError as error:
            failed = error
        found = world.gather((first, five, images, count, bad, failed and str(failed)))
    except RuntimeError as error:
        why = ended_elsewhere(error)
        if why is None:
            raise
        raise TrainingError(f"stopped behind {images} of {mine} images: {why}") from error
    for *_, text in found:
        if text is not None:  # the first that has one, in every process
            stopped = TrainingError(text)
            stopped.of_all = world.size > 1
            raise stopped from failed
    first, five, images = (sum(numbers) for numbers in zip(*(part[:3] for part in found)))
    if images == 0:
        raise UsageError(f"data {data.name!r} has no test images")
    views_of_one, skipped = max(part[3] for part in found), [name for part in found for name in part[4]]
    return Result(first / images, five / images, images, views_of_one, skipped, time.perf_counter() - began)
