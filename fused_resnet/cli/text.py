"""Tables on stdout and progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, indent: str = "  ") -> str:
    """Columns as wide as they must be; the first ``left`` to the left, the others to the right."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = []
    for line in lines:
        cells = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        text.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(text)


def sentence(text: str) -> str:
    """With a large first letter; the others stay as they are (``str.capitalize`` makes ``eager pytorch`` of eager PyTorch)."""
    return text[:1].upper() + text[1:]


def scaled(number: float, unit: str = "") -> str:
    """``1234567`` as ``1.23 M``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            digits = f"{number / factor:.3g}" if number < 999.5 * factor else f"{number / factor:.0f}"
            return f"{digits} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


class Progress:
    """One line on stderr a step; a bar where a terminal shows it."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def step(self, what: str) -> None:
        """A step begins."""
        self.clear()
        print(f"[{time.monotonic() - self.began:3.0f} s] {what}", file=sys.stderr, flush=True)

    def bar(self, part: float) -> None:
        """How far the step is, 0 to 1."""
        if self.terminal:
            filled = round(30 * part)
            print(f"\r        [{'#' * filled}{'.' * (30 - filled)}]", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the bar away."""
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def kernel_progress() -> Callable[[int, int], None]:
    """For :func:`fused_resnet.inspect.compiling.compile_all`: a bar on a terminal, elsewhere a line now and then."""
    progress = Progress()
    last = [-1e9]

    def show(done: int, of: int) -> None:
        if not of:
            return
        now = time.monotonic()
        if progress.terminal:
            if not done:
                progress.step(f"{of} kernels to compile")
            progress.bar(done / of)
            if done == of:
                progress.clear()
        elif now - last[0] > 20 or done == of:
            last[0] = now
            progress.step(f"{done} of {of} kernels compiled")

    return show
