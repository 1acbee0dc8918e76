"""The results of a run: one JSON file, written anew, whole, after every row. docs/gpu.md describes it for readers.

Every part is a list of rows; a row has a ``key``, unique in its part, and a ``status``. A time is a :class:`Time`, or null
where nothing was measured; a file whose ``measured`` is false (``--dry-run``) has no times, and :func:`check` holds it to that.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from ..stored import NONE, NUMBER, OBJECT, TEXT, Fields, fields, hold

#: Raised when a reader of the old file would misread the new one.
SCHEMA = 1
NAME = "results.json"

#: Lists of rows, in the order in which they are made.
PARTS = ("ceilings", "checks", "tests", "launches", "tuning", "models", "profile")

#: ``ok``; ``wrong``: it ran and the values are off; ``failed``: it raised; ``crashed``: it took its process with it, or hung.
STATUSES = ("ok", "wrong", "failed", "crashed", "out of memory", "skipped")
BAD = ("wrong", "failed", "crashed")

Row = dict[str, Any]


class Time(TypedDict):
    """Seconds: the median of ``rounds`` rounds, and their quartiles."""

    median: float
    low: float
    high: float
    rounds: int


class ResultsError(ValueError):
    """A file that is not such results; the message names it and says why."""


#: What a file holds: its own keys, those of its parts, and of every row.
_WHOLE: Fields = {
    **fields("measured", (bool,)), **fields("begun grade", TEXT), **fields("machine stages", OBJECT), "seconds": NUMBER,
    "running": (dict, NONE),
}  # fmt: skip
_MACHINE: Fields = {"gpu": (str, NONE), "date": TEXT, **fields("versions as_found", OBJECT)}
_STATE: Fields = {"status": TEXT, "seconds": NUMBER, "notes": (list,), "error": (str, NONE)}
_ROW = fields("key status", TEXT)

#: Of rows that pages and summary show more of, see :func:`check_rows`.
_CEILING: Fields = {"unit": TEXT, "rate": (*NUMBER, NONE)}
_FILE = fields("passed failed skipped late", NUMBER)
_LAUNCH: Fields = {
    **fields("where layer kind signature", TEXT), **fields("uses flops bytes", NUMBER), "times": OBJECT,
    "roofline": (*NUMBER, NONE),
}  # fmt: skip
_TUNED: Fields = {"signature": TEXT, "chosen": (dict, NONE)}
_STEP: Fields = {"cell": TEXT, "cpu_bound": (bool,), **fields("span idle host whole launches", NUMBER)}
_LINE: Fields = {"kind": TEXT, "launches": NUMBER, **fields("seconds part", (*NUMBER, NONE))}


def empty(measured: bool, begun: str) -> dict[str, Any]:
    """Results without rows."""
    return {
        "about": "fused-resnet gpu: results of one run; docs/gpu.md describes them",
        "schema": SCHEMA,
        "measured": measured,
        "grade": "measured" if measured else "interpreted",
        "begun": begun,
        "seconds": 0.0,
        "machine": {},
        "stages": {},
        "running": None,
        **{part: [] for part in PARTS},
    }


def times_of(row: Row) -> Iterator[tuple[str, Any]]:
    """The times of a row, by contender."""
    times = row.get("times")
    if isinstance(times, dict):
        yield from times.items()
    for name in ("seconds", "rate"):  # of a ceiling or a line of the profile
        if name in row:
            yield name, row[name]


def check(data: Any, name: str) -> dict[str, Any]:
    """``data`` if it is results of this schema, whose times are where they may be.

    Raises:
        ResultsError: it is not.
    """
    if not isinstance(data, dict) or "schema" not in data:
        raise ResultsError(f"{name}: these are no results of fused-resnet gpu (no 'schema')")
    if data["schema"] != SCHEMA:
        raise ResultsError(f"{name}: results of schema {data['schema']!r}, this version reads {SCHEMA}; measure again")
    _hold(data, _WHOLE, name)
    _hold(data, {"wanted": OBJECT}, name, optional=True)
    _hold(data["machine"], _MACHINE, f"{name}: machine", optional=True)
    for stage, state in data["stages"].items():
        _hold(state, _STATE, f"{name}: stage {stage!r}", optional=True)
    if data["running"] is not None:
        _hold(data["running"], fields("stage part key", TEXT), f"{name}: running")
        if data["running"]["part"] not in PARTS:
            raise ResultsError(f"{name}: running: not whole: expected 'part' of {', '.join(PARTS)}")
    for part in PARTS:
        rows = data.get(part)
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "key" in row and "status" in row for row in rows):
            raise ResultsError(f"{name}: not whole: {part!r} is not a list of rows with key and status")
        for row in rows:
            _hold(row, _ROW, f"{name}: {part}")
            _check_times(data["measured"], part, row, name)
    return data


def _hold(data: Any, expected: Fields, name: str, optional: bool = False) -> None:
    hold(data, expected, name, ResultsError, optional)


def check_rows(data: dict[str, Any], name: str) -> None:
    """Raise where a row of checked results lacks what pages and summary show of it.

    Raises:
        ResultsError: it does.
    """
    for part, row in _all_rows(data):
        place, ok = f"{name}: {part} {row['key']!r}", row["status"] == "ok"
        if part == "ceilings" and ok:
            _hold(row, _CEILING, place)
        elif part == "checks":
            _hold(row, {"relative_error": (*NUMBER, NONE)}, place, optional=True)
        elif part == "tests" and row.get("kind") == "file":
            _hold(row, _FILE, place)
        elif part == "launches" and ok:
            _hold(row, _LAUNCH, place)
        elif part == "tuning" and row.get("times"):
            _hold(row, _TUNED, place)
            _hold(row["chosen"] or {"how": ""}, {"how": TEXT}, f"{place}: chosen")
        elif part == "models":
            _hold(row, {"step_bytes": (dict, NONE)}, place, optional=True)
        elif part == "profile" and ok:
            _hold(row, {"measured": (bool,), "lines": (list,), **(_STEP if row.get("measured") else {})}, place)
            for line in row["lines"]:
                _hold(line, _LINE, f"{place}: lines")


def _check_times(measured: bool, part: str, row: Row, name: str) -> None:
    if not isinstance(row.get("times", {}), (dict, NONE)):
        raise ResultsError(f"{name}: {part} {row['key']!r}: not whole: 'times' is an object, got {type(row['times']).__name__}")
    for contender, time in times_of(row):
        place = f"{name}: {part} {row['key']!r}"
        if time is None:
            continue
        if not measured:
            raise ResultsError(f"{place} has a time for {contender!r}, but nothing was measured")
        value = time.get("median") if isinstance(time, dict) else None if contender in (row.get("times") or {}) else time
        if not isinstance(value, (int, float)) or not value > 0:
            raise ResultsError(f"{place}: {time!r} is no time")
        if isinstance(time, dict):
            _hold(time, fields("median low high", NUMBER), f"{place}: {contender!r}")


def load(path: Path) -> dict[str, Any]:
    """The results in a file.

    Raises:
        ResultsError: it cannot be read, or is not results of this schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ResultsError(f"{path}: not text") from error
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ResultsError(f"{path}: not JSON (line {error.lineno})") from error
    except (RecursionError, ValueError) as error:  # nested thousands deep, or a number of thousands of digits
        raise ResultsError(f"{path}: damaged: no results are nested so deep, or have such numbers") from error
    return check(data, str(path))


def write(path: Path, text: str) -> None:
    """Replace a file at once: whoever reads it, or kills this process, finds the old one or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def finite(number: float) -> float | None:
    """``number``, or None where JSON has no word for it."""
    return number if math.isfinite(number) else None


@dataclass
class Results:
    """A results file and what is in it. One process writes at a time: the stage that runs, or the conductor between stages."""

    path: Path
    data: dict[str, Any]

    @staticmethod
    def open(path: Path) -> Results:
        """The file as it is; errors as :func:`load`."""
        return Results(path, load(path))

    @property
    def measured(self) -> bool:
        """Whether times are times."""
        return bool(self.data["measured"])

    def save(self) -> None:
        """Write the file."""
        write(self.path, json.dumps(self.data, indent=1, allow_nan=False) + "\n")

    def reload(self) -> None:
        """Take up what another process wrote."""
        self.data = load(self.path)

    def rows(self, part: str) -> list[Row]:
        """All rows of a part."""
        rows: list[Row] = self.data[part]
        return rows

    def row(self, part: str, key: str) -> Row | None:
        """The row called ``key``."""
        return next((row for row in self.rows(part) if row["key"] == key), None)

    def begin(self, stage: str, part: str, key: str) -> None:
        """From here on ``key`` is what a crash is blamed on."""
        self.data["running"] = {"stage": stage, "part": part, "key": key}
        self.save()

    def put(self, part: str, row: Row) -> None:
        """Add a row, or replace the one of its key; nothing runs any more."""
        assert row["status"] in STATUSES, row
        rows = self.rows(part)
        place = next((i for i, old in enumerate(rows) if old["key"] == row["key"]), len(rows))
        rows[place : place + 1] = [row]
        self.data["running"] = None
        self.save()

    def blame(self, stage: str, error: str) -> bool:
        """The stage's process is gone: note that on the row that ran, if there was one."""
        running = self.data["running"]
        self.data["running"] = None
        if not running or running["stage"] != stage:
            self.save()
            return False
        old = self.row(running["part"], running["key"]) or {"key": running["key"]}
        self.put(running["part"], {**old, "status": "crashed", "error": error})
        return True


def failures(data: dict[str, Any]) -> list[str]:
    """What went wrong, a line each: stages first, then rows in their order."""
    lines = []
    for name, state in data["stages"].items():
        if state.get("status") == "failed":  # of a run that was killed there are its notes alone
            lines.append(f"stage {name}: {state.get('error', 'failed')}")
    for part, row in _all_rows(data):
        if row["status"] in BAD:
            error = row.get("error") or row["status"]
            lines.append(f"{part}: {row['key']}: {row['status']}: {error}")
    return lines


def _all_rows(data: dict[str, Any]) -> Iterable[tuple[str, Row]]:
    for part in PARTS:
        for row in data[part]:
            yield part, row
