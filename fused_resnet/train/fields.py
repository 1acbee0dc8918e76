"""What each field of a recipe may be: one check a field, and one line where it fails."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from .recipe import Recipe

UNITS = ("steps", "epochs")
NORMALISE = ("pixel_mean", "channels")
SCHEDULES = ("steps", "plateau", "cosine", "constant")

#: Steps or epochs of a run, at most: up to there a float counts every step.
LONGEST = 2**53

#: What is expected, and whether a value is that.
Rule = tuple[str, Callable[[Any], bool]]


def is_number(value: Any) -> bool:
    """A finite number; JSON's true is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    size: Any = abs(value)
    return bool(size <= sys.float_info.max)


def is_whole(value: Any) -> bool:
    """A whole number; JSON's true is none."""
    return not isinstance(value, bool) and isinstance(value, numbers.Integral)


def shown(value: Any) -> str:
    """A value for a message, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _among(choices: tuple[str, ...]) -> Rule:
    return f"one of {', '.join(choices)}", lambda value: value in choices


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not set("/\\\0") & set(value)


_TEXT: Rule = ("text", lambda value: isinstance(value, str))
_YES_OR_NO: Rule = ("true or false", lambda value: isinstance(value, bool))
_NUMBER: Rule = ("a number above 0", lambda value: is_number(value) and value > 0)
_FROM_0: Rule = ("a number from 0", lambda value: is_number(value) and value >= 0)
_BELOW_1: Rule = ("at least 0 and below 1", lambda value: is_number(value) and 0 <= value < 1)
_TO_1: Rule = ("from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
_LENGTH: Rule = (f"a number above 0 and at most {LONGEST}", lambda value: is_number(value) and 0 < value <= LONGEST)
_LATER: Rule = (f"a number from 0 to {LONGEST}", lambda value: is_number(value) and 0 <= value <= LONGEST)

#: In the order in which they are checked; ``name`` first, since the messages hold it.
_RULES: dict[str, Rule] = {
    # The folder of its runs is called so.
    "name": ("a name of a folder, without / and \\", _is_file_name),
    "about": _TEXT,
    "data": _TEXT,
    "model": _TEXT,
    "unit": _among(UNITS),
    "schedule": _among(SCHEDULES),
    "normalise": _among(NORMALISE),
    "batch": ("a whole number above 0", lambda value: is_whole(value) and value > 0),
    "length": _LENGTH,
    "lr": _NUMBER,
    "momentum": _FROM_0,
    "nesterov": _YES_OR_NO,
    "weight_decay": _FROM_0,
    "decay_all": _YES_OR_NO,
    "milestones": (
        f"a list of numbers from 0 to {LONGEST}",
        lambda value: isinstance(value, (list, tuple)) and all(map(_LATER[1], value)),
    ),
    "factor": _FROM_0,
    "label_smoothing": _TO_1,
    "ema": ("null, or at least 0 and below 1", lambda value: value is None or _BELOW_1[1](value)),
    # Its steps are checked against the data (augment.py).
    "augment": ("a list of objects, each with a name", lambda value: isinstance(value, (list, tuple))),
}
_WARM_UP: dict[str, Rule] = {"length": _LATER, "factor": _FROM_0, "shape": _among(("constant", "linear"))}
_PLATEAU: dict[str, Rule] = {
    "patience": _LENGTH,
    "least": _BELOW_1,
    "times": ("a whole number above 0", lambda value: is_whole(value) and value > 0),
}


def check(recipe: Recipe) -> None:
    """Every field is of its type and within its bounds, and those that depend on each other agree.

    Raises:
        UsageError: one is not: its name, its value, and what it must be.
    """
    _look(recipe, _RULES, recipe.name)
    for name, rules, kind in (("warm_up", _WARM_UP, "WarmUp"), ("plateau", _PLATEAU, "Plateau")):
        part = getattr(recipe, name)
        if part is None:
            continue
        if type(part).__name__ != kind:  # by name: recipe.py imports this file
            raise UsageError(f"{name} of recipe {recipe.name!r} must be an object or null, got {shown(part)}")
        _look(part, rules, recipe.name, f"{name}.")
    if recipe.nesterov and recipe.momentum == 0:
        raise UsageError(f"momentum of recipe {recipe.name!r} must be above 0 with nesterov, got {recipe.momentum}")
    if (recipe.plateau is not None) != (recipe.schedule == "plateau"):
        raise UsageError(f"plateau of recipe {recipe.name!r} must be given with the schedule 'plateau', and with it alone")


def _look(part: Any, rules: dict[str, Rule], recipe: Any, where: str = "") -> None:
    for name, (expected, holds) in rules.items():
        value = getattr(part, name)
        if not holds(value):
            raise UsageError(f"{where}{name} of recipe {shown(recipe)} must be {expected}, got {shown(value)}")
