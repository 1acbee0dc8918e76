"""What a command prints into: streams that may be closed, full, or strict about names of files."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any


class OutputError(Exception):
    """Stdout cannot be written: a full disk, say. Not an OSError, which a command would take for one of its files."""


class _Lasting:
    """A stream whose reader may go away.

    ``head`` and ``less`` close their end when they have seen enough. The work is not done by then: what is printed goes nowhere
    from there on, and the command goes on to its end and its exit code.

    Args:
        stream: what is written to.
        lost: errors that are as good as a reader who went away.
    """

    def __init__(self, stream: Any, lost: type[OSError]) -> None:
        self._stream, self._lost = stream, lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._failed(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        # What is in the buffer is tried again at the end of the process: it has to find a place.
        try:
            number = self._stream.fileno()
        except (OSError, ValueError, AttributeError):  # an object of the caller's, with no file behind it
            self._stream = io.StringIO()
        else:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, number)
            finally:
                os.close(nowhere)
        if not isinstance(error, self._lost):
            raise OutputError(f"stdout cannot be written ({error.strerror or error})") from error


@contextmanager
def lasting() -> Iterator[None]:
    """Stdout and stderr as :class:`_Lasting`; nowhere where the process was started without one."""
    with ExitStack() as held:
        for stream, redirect, lost in (
            (sys.stdout, redirect_stdout, BrokenPipeError),
            (sys.stderr, redirect_stderr, OSError),
        ):
            target: Any = stream
            if target is None:
                target = held.enter_context(open(os.devnull, "w", encoding="utf-8"))
            elif getattr(target, "errors", None) == "strict" and hasattr(target, "reconfigure"):
                # A name that is not UTF-8 is no reason to end a command behind its work.
                target.reconfigure(errors="backslashreplace")
            held.enter_context(redirect(_Lasting(target, lost)))
        yield
