"""The schedule of the paper's ImageNet networks: the rate is divided when the error has stopped falling."""

from __future__ import annotations

from dataclasses import dataclass

from .recipe import Recipe


@dataclass
class Falling:
    """How the training error has fallen so far; all of it is in a checkpoint.

    Attributes:
        best: the smallest error of an epoch that counted.
        since: the step of that epoch's end, or of the last division.
        divided: how often the rate was divided.
    """

    best: float = float("inf")
    since: int = 0
    divided: int = 0

    def look(self, error: float, step: int, recipe: Recipe, steps_per_epoch: int) -> None:
        """An epoch has ended.

        Args:
            error: of all its images as they were trained on, 0 to 1.
            step: steps done.
            recipe: one with a plateau.
            steps_per_epoch: for lengths in epochs.
        """
        plateau = recipe.plateau
        assert plateau is not None
        if error < self.best - plateau.least:
            self.best, self.since = error, step
        elif self.divided < plateau.times and step - self.since >= recipe.steps(plateau.patience, steps_per_epoch):
            self.divided, self.since = self.divided + 1, step
