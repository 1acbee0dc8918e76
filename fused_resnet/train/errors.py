"""What can go wrong, each told in one line: wrong input, and a run that cannot go on."""

from __future__ import annotations


class UsageError(ValueError):
    """Wrong input: the command ends with exit code 2."""


class TrainingError(RuntimeError):
    """A run or an evaluation that cannot go on: exit code 1. What was saved before is whole.

    Attributes:
        of_all: every process of the run raises it: the first one tells it.
    """

    of_all = False


class DataError(TrainingError):
    """An image that cannot be read; the network is as it was after the last whole step."""
