"""What can go wrong, each told in one line: wrong input, and a run that cannot go on."""

from __future__ import annotations


class UsageError(ValueError):
    """Wrong input: the command ends with exit code 2.

    Attributes:
        of_all: every process of the run raises it: the first one tells it.
    """

    of_all = False


class TrainingError(RuntimeError):
    """A run or an evaluation that cannot go on: exit code 1. What was saved before is whole.

    Attributes:
        of_all: as :class:`UsageError`'s.
    """

    of_all = False


def ended_elsewhere(error: RuntimeError) -> str | None:
    """What PyTorch raises here because another process failed, in a few words; None for whatever else it raises.

    That of a worker comes by a signal, and so out of any line: the network may be in the middle of a step.
    """
    said = (str(error).strip().splitlines() or [""])[0]
    if said.startswith("DataLoader worker"):
        return f"a process that decodes images failed ({said.rstrip('. ')})"
    if "gloo/transport" in said or "NCCL" in said:
        return "another process of the run ended, or cannot be reached"
    return None


class DataError(TrainingError):
    """An image that cannot be read; the network is as it was after the last whole step."""
