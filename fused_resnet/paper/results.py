"""What the logs of a set of runs say: curves, last errors with their spread, and whether an effect shows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import mean

from . import files
from .files import LogError
from .scales import Run
from .worker import DONE, LOG, PROCESSOR, RESPONSES, is_done

#: Columns of a log that are read; others may stand beside them.
COLUMNS = ("step", "epoch", "split", "loss", "error")


@dataclass(frozen=True)
class Row:
    """A row of a log: epochs done, ``train`` or ``test``, error from 0 to 1."""

    epoch: float
    split: str
    error: float


def read(path: Path) -> list[Row]:
    """The rows of a CSV log.

    Raises:
        LogError: it is not there, a column is missing, or a row is not of numbers.
    """
    reader = csv.DictReader(io.StringIO(files.text(path), newline=""))
    try:
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise LogError(f"{path}: expected the columns {','.join(COLUMNS)}, missing {', '.join(missing)}")
        return [Row(_finite(row["epoch"]), row["split"], _finite(row["error"])) for row in reader]
    except (TypeError, ValueError, csv.Error) as error:
        raise LogError(f"{path}, line {reader.line_num}: not a row of numbers ({error})") from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {text!r}")
    return number


def _whole_log(path: Path) -> tuple[Row, ...]:
    """Of a run that came to its end: both splits are in it."""
    rows = tuple(read(path))
    for split in ("train", "test"):
        if not any(row.split == split for row in rows):
            raise LogError(f"{path}: expected rows of the splits train and test, found none of {split}")
    return rows


@dataclass(frozen=True)
class Spread:
    """One number of several runs."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"{self.mean:.1%}"
        return f"{self.mean:.1%} ({min(self.values):.1%} to {max(self.values):.1%})"


@dataclass(frozen=True)
class Outcome:
    """All runs of one network that came to their end.

    Attributes:
        network: its name.
        seeds: of these runs.
        logs: rows of each.
        responses: standard deviations of the layers' responses of each, where they were looked at.
        processor: seconds of processor time of each that ran in one piece.
    """

    network: str
    seeds: tuple[int, ...]
    logs: tuple[tuple[Row, ...], ...]
    responses: tuple[tuple[float, ...], ...]
    processor: tuple[float, ...] = ()

    def last(self, split: str) -> Spread:
        """The error at the end: of ``train`` over the last epoch, as it was in training; of ``test`` the last one measured."""
        ends = []
        for rows in self.logs:
            chosen = [row for row in rows if row.split == split]
            final = [row.error for row in chosen if split == "test" or row.epoch > chosen[-1].epoch - 1 + 1e-9]
            ends.append(final[-1] if split == "test" else mean(final))
        return Spread(tuple(ends))

    def curve(self, split: str) -> list[tuple[float, float, float, float]]:
        """``(epoch, mean, least, largest)`` over the runs; rows of one epoch are taken together."""
        epochs: dict[int, list[float]] = {}
        for rows in self.logs:
            of_run: dict[int, list[float]] = {}
            for row in rows:
                if row.split == split:
                    of_run.setdefault(max(1, ceil(row.epoch - 1e-9)), []).append(row.error)
            for epoch, errors in of_run.items():
                epochs.setdefault(epoch, []).append(mean(errors))
        return [(epoch, mean(errors), min(errors), max(errors)) for epoch, errors in sorted(epochs.items())]

    def response_curve(self) -> list[tuple[float, float, float, float]]:
        """``(layer, mean, least, largest)`` of the standard deviations, layers from 1."""
        layers = zip(*self.responses, strict=True)
        return [(index, mean(values), min(values), max(values)) for index, values in enumerate(layers, 1)]


def collect(out: Path, runs: Sequence[Run]) -> dict[str, Outcome]:
    """What there is of the runs, by network. A network without one finished run is left out.

    Raises:
        LogError: a file of a run is damaged, or missing.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        if is_done(out, run):
            found.setdefault(run.network, []).append(run)
    outcomes = {}
    for network, done in found.items():
        logs = tuple(_whole_log(out / run.name / LOG) for run in done)
        paths = [path for run in done if (path := out / run.name / RESPONSES).exists()]
        responses = tuple(map(files.responses, paths))
        for path, layers in zip(paths, responses):
            if len(layers) != len(responses[0]):
                raise LogError(f"{path}: expected {len(responses[0])} layers as in {paths[0]}, got {len(layers)}")
        spent = []
        for run in done:
            path = out / run.name / DONE
            seconds = files.done(path).get(PROCESSOR)
            if seconds is not None:
                spent.append(files.number(path, PROCESSOR, seconds))
        outcomes[network] = Outcome(network, tuple(run.seed for run in done), logs, responses, tuple(spent))
    return outcomes


def verdict(higher: Spread, lower: Spread) -> str:
    """Whether one error is above another: in every pair of runs, in the mean only, or not."""
    if min(higher.values) > max(lower.values):
        if min(len(higher.values), len(lower.values)) > 1:
            return "yes, every seed"
        return "yes, of one seed each"
    return "in the mean only, the seeds overlap" if higher.mean > lower.mean else "no"
