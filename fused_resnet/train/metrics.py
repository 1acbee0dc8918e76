"""Loss and error, summed over steps and processes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import sampler
from .config import Config
from .data import Data
from .distributed import World


class NotFinite(ArithmeticError):
    """The loss of a step is NaN or infinite."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"the loss of step {step} is {loss}")
        self.step, self.loss = step, loss


@dataclass
class Window:
    """Sums over the steps since the last row of the log.

    ``seconds`` are those before the last checkpoint, ``waited`` those in which the loop waited for images. ``epoch_wrong`` and
    ``epoch_images`` are of the epoch so far, for the schedule ``plateau``: they go on behind a row.

    Losses stay on the device until they are read, so that no step waits for the one before.
    """

    loss: float = 0.0
    wrong: float = 0.0
    images: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    epoch_wrong: float = 0.0
    epoch_images: float = 0.0
    _pending: list[tuple[int, int, Tensor, Tensor]] = field(default_factory=list, init=False)

    def add(self, step: int, images: int, loss: Tensor, wrong: Tensor) -> None:
        """One step's mean loss and number of wrong answers."""
        self._pending.append((step, images, loss.detach(), wrong.detach()))

    def read(self) -> None:
        """Wait for the steps that are under way, and add them up.

        Raises:
            NotFinite: of a step of this process.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        numbers = torch.stack([torch.stack((loss.double(), wrong.double())) for _, _, loss, wrong in pending]).tolist()
        for (step, images, _, _), (loss, wrong) in zip(pending, numbers):
            if not math.isfinite(loss):
                raise NotFinite(step, loss)
            self.loss += loss * images
            self.wrong += wrong
            self.images += images
            self.epoch_wrong += wrong
            self.epoch_images += images

    def next(self) -> Window:
        """The one behind a row."""
        return Window(epoch_wrong=self.epoch_wrong, epoch_images=self.epoch_images)

    def sums(self) -> list[float]:
        """All that was added up, as :class:`Window` takes it."""
        return [getattr(self, entry.name) for entry in fields(self) if entry.init]


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, world: World, config: Config, batch: int) -> tuple[float, float, int, list[str]]:
    """Mean loss and error on the test split, how many images were in it, and files that could not be read.

    The model is left in its mode.
    """
    training = model.training
    model.eval()
    loss = wrong = images = 0.0
    bad: list[str] = []
    draws = sampler.in_order(len(data.test), batch, world.rank, world.size)
    for got in world.together(data.test.batches(draws, config.workers)):
        x = data.normalise(got.x.to(world.device)).contiguous(memory_format=torch.channels_last)
        labels = got.labels.to(world.device)
        with torch.autocast(world.device.type, dtype=amp_dtype(config.amp), enabled=config.amp != "off"):
            logits = model(x)
        counted = labels >= 0
        loss += F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=-1).item()
        wrong += float(((logits.argmax(1) != labels) & counted).sum().item())
        images += int(counted.sum())
        bad += got.bad
    model.train(training)
    loss, wrong, images = world.sum([loss, wrong, images])
    return loss / max(images, 1), wrong / max(images, 1), int(images), bad


def amp_dtype(amp: str) -> torch.dtype:
    """The element type of ``--amp``."""
    return torch.float16 if amp == "fp16" else torch.bfloat16
