"""How the minutes are shared among the stages.

Each stage has a weight; it may take its part of what is left when it starts, so that what one does not use, the later ones get,
and what one overruns, they lose together.
"""

from __future__ import annotations

from collections.abc import Sequence

#: In order of worth; seconds of each in nine minutes.
WEIGHTS: dict[str, float] = {
    "machine": 25,
    "correct": 125,
    "launches": 90,
    "tuning": 90,
    "models": 105,
    "profile": 20,
    "compiled": 70,
}
STAGES = tuple(WEIGHTS)

#: Seconds kept for the summary.
END = 3.0
#: A stage with less than this is not started: PyTorch alone takes that long to import.
LEAST = 5.0


def allotted(left: float, stages: Sequence[str]) -> float:
    """Seconds for the first of ``stages``, the ones still to run, when ``left`` seconds are left for all."""
    return max(0.0, left - END) * WEIGHTS[stages[0]] / sum(WEIGHTS[name] for name in stages)


def grace(seconds: float) -> float:
    """How long after its budget a stage is killed: it should stop by itself, between two rows."""
    return min(10.0, 2.0 + seconds / 10)
