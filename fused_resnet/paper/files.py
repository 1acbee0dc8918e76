"""Files of a set of runs: read with one line where they are damaged, and written whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..whole_file import write_whole


class LogError(Exception):
    """A file of the folder cannot be read or written: which, and why."""


def text(path: Path) -> str:
    """What a file says.

    Raises:
        LogError: it is not there, a folder, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LogError(f"{path}: not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise LogError(f"{path}: cannot be read ({error.strerror})") from error


def _json(path: Path, kind: type, what: str) -> Any:
    try:
        found = json.loads(text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise LogError(f"{path}: not JSON, cut off or damaged ({error})") from error
    if not isinstance(found, kind):
        raise LogError(f"{path}: expected {what}, got a {type(found).__name__}")
    return found


def done(path: Path) -> dict[str, Any]:
    """What a run says about itself at its end.

    Raises:
        LogError: it is damaged.
    """
    found: dict[str, Any] = _json(path, dict, "a JSON object")
    return found


def number(path: Path, name: str, value: Any) -> float:
    """A number of a file.

    Raises:
        LogError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise LogError(f"{path}: {name} must be a number, got {str(value)[:60]!r}")
    return float(value)


def responses(path: Path) -> tuple[float, ...]:
    """Standard deviations of the layers' responses.

    Raises:
        LogError: it is damaged.
    """
    found = _json(path, list, "a list of numbers")
    if not found:
        raise LogError(f"{path}: expected a list of numbers, got an empty one")
    return tuple(number(path, f"entry {index}", value) for index, value in enumerate(found, 1))


def write(path: Path, content: str) -> None:
    """All of it or nothing.

    Raises:
        LogError: it cannot be written.
    """
    try:
        write_whole(path, content.encode())
    except OSError as error:
        raise LogError(f"{path}: cannot be written ({error.strerror})") from error
