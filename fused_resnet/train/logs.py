"""What a run writes down: rows of a CSV file, and the same for TensorBoard."""

from __future__ import annotations

import csv
import io
import os
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from ..whole_file import write_whole
from .errors import UsageError


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        step: steps done.
        epoch: the same in epochs.
        split: ``train`` (the mean since the row before, in training mode) or ``test``.
        loss: mean cross-entropy.
        error: part of the images whose top-1 answer is wrong, 0 to 1.
        lr: learning rate of the last step.
        images_per_second: of all processes together.
    """

    step: int
    epoch: float
    split: str
    loss: float
    error: float
    lr: float
    images_per_second: float


COLUMNS = tuple(field.name for field in fields(Row))


def _line(values: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _format(row: Row) -> str:
    return _line(astuple(row))  # floats so that they are read back exactly


def read(path: Path) -> list[Row]:
    """The rows of a CSV file. Blank lines are left out, and so is a last line that was cut off.

    Raises:
        UsageError: a file with other columns, or with a line that is not a row.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    if not lines:
        return []
    if lines[0].strip() != ",".join(COLUMNS).encode():
        raise UsageError(f"{path}: expected the columns {','.join(COLUMNS)}")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        try:
            step, epoch, split, *numbers = next(csv.reader([line.decode("utf-8")]))
            if split not in ("train", "test"):
                raise ValueError(split)
            rows.append(Row(int(step), float(epoch), split, *map(float, numbers)))
        except (ValueError, TypeError, csv.Error) as error:
            expected = f"{','.join(COLUMNS)} with split train or test and numbers otherwise"
            raise UsageError(f"{path}, line {number}: not a row, expected {expected}, got {line[:80]!r}") from error
    return rows


class Log:
    """The CSV file of a run, ``log.csv``, and TensorBoard's events if wanted.

    Args:
        folder: the run's.
        step: steps done. Rows behind it, of a run that was killed after its last checkpoint, are taken out.
        tensorboard: write events into ``folder/tensorboard`` too.

    Raises:
        UsageError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        path = folder / "log.csv"
        self.rows = [row for row in read(path) if row.step <= step]
        write_whole(path, (_line(COLUMNS) + "".join(map(_format, self.rows))).encode(), durable=True)
        self._file = path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UsageError("--tensorboard needs the package tensorboard: pip install 'fused_resnet[train]'") from error
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: Row) -> None:
        """One row, in the file when this returns."""
        self.rows.append(row)
        self._file.write(_format(row))
        self._file.flush()
        if self._board is not None:
            for name in ("loss", "error", "lr", "images_per_second"):
                if name != "lr" or row.split == "train":
                    self._board.add_scalar(f"{name}/{row.split}", getattr(row, name), row.step)

    def sync(self) -> None:
        """Onto the disk: a checkpoint is never ahead of its rows."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """End it, and raise nothing: :meth:`write` and :meth:`sync` told of all that failed. What a full disk left of a row is
        tried again here, and its error would take the place of the one that stopped the run.
        """
        with suppress(OSError):
            self._file.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()
