"""How far a run is, on stderr: a bar where a terminal shows it, and a line at each evaluation."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from .logs import Row
from .metrics import Window


def duration(seconds: float) -> str:
    """``75`` as ``1:15``, ``3700`` as ``1:01:40``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Progress:
    """The bar and the lines.

    Args:
        total: steps of the run.
        done: steps that were done before.
        show: False for nothing at all.
        stream: instead of stderr. Nothing is shown where there is none, or behind the first time that it cannot be written:
            whoever closes a pipe does not want the run to end.
    """

    def __init__(self, total: int, done: int, show: bool, stream: TextIO | None = None) -> None:
        self.stream: TextIO | None = stream or sys.stderr  # None where a process was started with it closed
        self.total, self.first = total, done
        self.show = show and self.stream is not None
        self.terminal = self.show and self.stream is not None and self.stream.isatty()
        self.began = self.drawn = self.rowed = time.monotonic()

    def left(self, step: int) -> str:
        """Time left, at the speed so far."""
        done = step - self.first
        if done < 1:
            return "?"
        return duration((time.monotonic() - self.began) / done * (self.total - step))

    def due(self) -> bool:
        """The bar is older than half a second."""
        return self.terminal and time.monotonic() - self.drawn > 0.5

    def between(self, step: int, window: Window) -> None:
        """The bar between two rows, if it is due."""
        if self.due() and window.images:
            speed = window.images / max(time.monotonic() - self.rowed, 1e-9)
            self._draw(step, window.loss / window.images, window.wrong / window.images, speed)

    def bar(self, row: Row) -> None:
        """The bar after a row of the log."""
        self.rowed = time.monotonic()
        self._draw(row.step, row.loss, row.error, row.images_per_second)

    def _draw(self, step: int, loss: float, error: float, speed: float) -> None:
        if self.terminal:
            self.drawn = time.monotonic()
            filled = round(20 * step / self.total)
            numbers = f"loss {loss:.4f}  error {error:.2%}  {speed:,.0f} images/s  {self.left(step)} left"
            text = f"[{'#' * filled}{'.' * (20 - filled)}] step {step}/{self.total}  {numbers}"
            self._print(f"\r\033[K{text}", end="")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.show:
            start = "\r\033[K" if self.terminal else ""
            self._print(f"{start}{text}")

    def _print(self, text: str, end: str = "\n") -> None:
        try:
            print(text, end=end, file=self.stream, flush=True)
        except OSError:
            self.show = self.terminal = False

    def tested(self, train: Row | None, test: Row) -> None:
        """A line after an evaluation."""
        speed = ""
        if train is not None:
            speed = f"train loss {train.loss:.4f} error {train.error:.2%}, {train.images_per_second:,.0f} images/s; "
        text = f"epoch {test.epoch:.4g}, step {test.step}/{self.total}: {speed}test loss {test.loss:.4f} error {test.error:.2%}"
        self.say(f"{text}; {self.left(test.step)} left")
