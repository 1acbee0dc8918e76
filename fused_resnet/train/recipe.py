"""Recipes: how a network is trained, as data. The named ones are the JSON files in ``recipes/``."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..specimens import unknown
from . import fields
from .errors import UsageError

_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class WarmUp:
    """A smaller learning rate at the start.

    Attributes:
        length: in the recipe's unit.
        factor: of the recipe's rate, at the start.
        shape: ``constant``: the factor until the end of the warm-up; ``linear``: from the factor to 1.
    """

    length: float
    factor: float = 0.1
    shape: str = "linear"


@dataclass(frozen=True)
class Plateau:
    """When the error counts as falling no more.

    Attributes:
        patience: time without a better epoch, in the recipe's unit.
        least: by how much an epoch's training error, 0 to 1, has to be below the best so far to be a better one.
        times: how often the rate is divided at most.
    """

    patience: float
    least: float = 0.0
    times: int = 3


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        name, about: for people.
        data, model: what it is meant for; both can be chosen otherwise.
        batch: images in a step, of all processes together.
        length, unit: of the run, in ``steps`` or ``epochs``; milestones and warm-up are in the same unit.
        lr, momentum, nesterov, weight_decay: of SGD.
        decay_all: also decay the vectors: gamma and beta of BatchNorms, biases.
        schedule: ``steps`` (times ``factor`` at each milestone), ``plateau`` (times ``factor`` when the training error has
            stopped falling), ``cosine`` (to 0 at the end) or ``constant``.
        milestones, plateau: of these two schedules.
        label_smoothing: of the cross-entropy (Szegedy et al. 2016, section 7).
        ema: decay of an exponential moving average of weights and statistics, which is then what is evaluated; or None.
        augment: steps of :mod:`fused_resnet.train.augment`, each a name with its arguments, in order.
        normalise: by the training set's ``pixel_mean`` (the mean image, one standard deviation) or ``channels`` (of a folder:
            ImageNet's).
    """

    name: str
    data: str
    model: str
    batch: int
    length: float
    unit: str
    lr: float
    about: str = ""
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_all: bool = True
    schedule: str = "steps"
    milestones: tuple[float, ...] = ()
    plateau: Plateau | None = None
    factor: float = 0.1
    warm_up: WarmUp | None = None
    label_smoothing: float = 0.0
    ema: float | None = None
    augment: tuple[dict[str, Any], ...] = field(default_factory=tuple)
    normalise: str = "pixel_mean"

    def __post_init__(self) -> None:
        fields.check(self)

    def lasting(self, length: float, unit: str) -> Recipe:
        """The same recipe for a run of another length: milestones, warm-up and patience stay the same parts of it.

        Raises:
            UsageError: no such length.
        """
        if not (fields.is_number(length) and 0 < length <= fields.LONGEST):
            raise UsageError(f"{unit} must be above 0 and at most {fields.LONGEST}, got {fields.shown(length)}")
        scale = length / self.length
        warm_up = self.warm_up and dataclasses.replace(self.warm_up, length=self.warm_up.length * scale)
        plateau = self.plateau and dataclasses.replace(self.plateau, patience=self.plateau.patience * scale)
        milestones = tuple(mark * scale for mark in self.milestones)
        return dataclasses.replace(self, length=length, unit=unit, milestones=milestones, warm_up=warm_up, plateau=plateau)

    def total(self, steps_per_epoch: int) -> int:
        """Steps of the run.

        Raises:
            UsageError: there is none.
        """
        total = self.steps(self.length, steps_per_epoch)
        if total < 1:
            each = f" of {steps_per_epoch} steps" if self.unit == "epochs" else ""
            raise UsageError(f"{self.unit} must be at least one step together, got {self.length:g} {self.unit}{each}")
        return total

    def steps(self, length: float, steps_per_epoch: int) -> int:
        """A length of this recipe in steps."""
        return round(length if self.unit == "steps" else length * steps_per_epoch)

    def data_dict(self) -> dict[str, Any]:
        """As plain data, for checkpoints and comparisons."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int, divided: int = 0) -> float:
    """The learning rate of step ``step``, counted from 0.

    It depends on nothing else, but for the schedule ``plateau``: there on how often it was ``divided`` before.
    """
    warm = recipe.warm_up
    warm_steps = recipe.steps(warm.length, steps_per_epoch) if warm else 0
    if warm is not None and step < warm_steps:
        if warm.shape == "constant":
            return recipe.lr * warm.factor
        return recipe.lr * (warm.factor + (1 - warm.factor) * step / warm_steps)
    total = recipe.steps(recipe.length, steps_per_epoch)
    if recipe.schedule == "cosine":
        part = (step - warm_steps) / max(1, total - warm_steps)
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * part))
    if recipe.schedule == "plateau":
        return recipe.lr * recipe.factor**divided
    if recipe.schedule == "steps":
        return recipe.lr * recipe.factor ** sum(step >= recipe.steps(mark, steps_per_epoch) for mark in recipe.milestones)
    return recipe.lr


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load(name: str) -> Recipe:
    """A recipe by its name, or from a JSON file.

    Raises:
        UsageError: no such recipe or file, or not a recipe.
    """
    path = Path(name) if name.endswith(".json") else _FOLDER / f"{name}.json"
    if not os.path.isfile(path):  # not Path's, which raises where a name is too long
        if name.endswith(".json"):
            raise UsageError(f"recipe {name}: no such file")
        raise UsageError(str(unknown("recipe", name, names())))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"recipe {path}: {error}") from error
    return from_data(data, str(path))


def from_data(data: Any, where: str) -> Recipe:
    """A recipe from plain data.

    Raises:
        UsageError: a field is missing, unknown or of a wrong value.
    """
    if not isinstance(data, dict):
        raise UsageError(f"recipe {where}: expected a JSON object, got a {type(data).__name__}")
    known = {entry.name for entry in dataclasses.fields(Recipe)}
    for key in data:
        if key not in known:
            raise UsageError(f"recipe {where}: {unknown('field', key, sorted(known))}")
    for key in ("augment", "milestones"):
        if not isinstance(data.get(key, []), list):
            raise UsageError(f"recipe {where}: {key} must be a list, got {fields.shown(data[key])}")
    for key in ("warm_up", "plateau"):
        if data.get(key) and not isinstance(data[key], dict):  # nothing is null, however it is said
            raise UsageError(f"recipe {where}: {key} must be an object or null, got {fields.shown(data[key])}")
    try:
        changed = {
            "warm_up": WarmUp(**data["warm_up"]) if data.get("warm_up") else None,
            "plateau": Plateau(**data["plateau"]) if data.get("plateau") else None,
            "augment": tuple(data.get("augment", ())),
            "milestones": tuple(data.get("milestones", ())),
        }
        return Recipe(**{**data, **changed})
    except TypeError as error:
        raise UsageError(f"recipe {where}: {error}") from error
