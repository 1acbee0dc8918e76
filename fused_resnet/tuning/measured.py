"""Measured choices: one JSON file a GPU, read before the model is asked.

``fused_resnet/tuning/<gpu>.json`` comes with the package. A user's own, written by ``fused-resnet tune``, lies in the cache
folder (``$XDG_CACHE_HOME/fused_resnet/tuning/``, by default ``~/.cache/fused_resnet/tuning/``) and wins entry by entry::

    {"schema": 2, "gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-25",
     "entries": {"<key>": {"how": "fused", "tile": {"images": 1, ...}, "seconds": 7.5e-05,
                           "alternatives": {"vendor": 9.1e-05}}}}

The key is :func:`key_of`: a launch's signature, in which fp32 multiplied as tf32 is another type. Files of schema 1 did not
tell the two apart. They are read: what they say of fp32 was measured under PyTorch's default, which is tf32 on NVIDIA's GPUs.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..launch import Launch
from ..whole_file import write_whole
from .tile import Strip, Tile

SCHEMA = 2

#: How a launch can run: as one kernel; with what it does on load written first, by a launch of its own ("apart"); or with
#: PyTorch's convolution between launches for its two ends ("vendor").
HOW = ("fused", "apart", "vendor")

#: A measurement at another batch speaks for one at most so many times larger or smaller.
NEAR = 2.0


@dataclass(frozen=True)
class Entry:
    """A measured choice.

    Attributes:
        how: one of :data:`HOW`.
        tile: of our own kernel, None for the vendor's.
        seconds: what it took.
        alternatives: what the best of the other ways took.
    """

    how: str
    tile: Tile | Strip | None
    seconds: float
    alternatives: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """What was measured on one GPU: its name as PyTorch gives it, versions, the date, entries by :func:`key_of`."""

    gpu: str
    torch: str
    triton: str
    date: str
    entries: Mapping[str, Entry]


def slug(gpu: str) -> str:
    """A GPU's name as a file's: ``NVIDIA H200`` -> ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def package_path(gpu: str) -> Path:
    """The file that comes with the package."""
    return Path(__file__).with_name(f"{slug(gpu)}.json")


def user_path(gpu: str) -> Path:
    """The user's own file."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "fused_resnet", "tuning", f"{slug(gpu)}.json")


def _entry(data: Mapping[str, Any]) -> Entry:
    if data["how"] not in HOW:
        raise ValueError(f"how must be one of {', '.join(HOW)}, got {data['how']!r}")
    tile = data.get("tile")
    kind = Tile if tile is not None and "images" in tile else Strip
    return Entry(
        data["how"], None if tile is None else kind(**tile), float(data["seconds"]), dict(data.get("alternatives", {}))
    )


def read(path: Path) -> Table | None:
    """The table in a file; None where there is no file, and, with a warning that names it, where the file is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"tuning file {path} is ignored: {error}", stacklevel=2)
        return None
    try:
        if data["schema"] not in (1, SCHEMA):
            raise ValueError(f"schema {data['schema']!r}, expected 1 or {SCHEMA}")
        tf32 = data["schema"] == 1 and "rocm" not in data["torch"]
        entries = {_key(key, tf32): _entry(entry) for key, entry in data["entries"].items()}
        return Table(data["gpu"], data["torch"], data["triton"], data["date"], entries)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        warnings.warn(f"tuning file {path} is ignored: {type(error).__name__}: {error}", stacklevel=2)
        return None


def write(path: Path, table: Table) -> None:
    """Write a table; the file is the old one or the new one, whatever happens.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"schema": SCHEMA, "gpu": table.gpu, "torch": table.torch, "triton": table.triton, "date": table.date}
    entries = {key: asdict(entry) for key, entry in sorted(table.entries.items())}
    text = json.dumps({**data, "entries": entries}, indent=1)
    write_whole(path, f"{text}\n".encode())


def key_of(launch: Launch, tf32: bool = False) -> str:
    """What a launch's entries are found by: its signature, with ``tf32`` in the place of ``fp32`` where it is multiplied so."""
    return _key(launch.signature, tf32)


def _key(signature: str, tf32: bool) -> str:
    return signature.replace(" fp32 ", " tf32 ", 1) if tf32 else signature


def _without_batch(key: str) -> tuple[str, int]:
    match = re.search(r" N(\d+) ", key)
    assert match, key
    return key.replace(match[0], " ", 1), int(match[1])


@cache
def _known(gpu: str) -> dict[str, dict[int, Entry]]:
    """Entries of a GPU by key without the batch, then by batch."""
    found: dict[str, dict[int, Entry]] = {}
    for path in (package_path(gpu), user_path(gpu)):
        table = read(path)
        for key, entry in (table.entries if table else {}).items():
            rest, batch = _without_batch(key)
            found.setdefault(rest, {})[batch] = entry
    return found


def forget() -> None:
    """Read the files again at the next question. (:func:`.choice.forget` also forgets what was chosen by them.)"""
    _known.cache_clear()


def find(launch: Launch, gpu: str, tf32: bool = False) -> Entry | None:
    """What was measured for a launch on ``gpu``: at its own batch, else at the nearest within a factor of :data:`NEAR`."""
    if not gpu:
        return None
    rest, batch = _without_batch(key_of(launch, tf32))
    batches = _known(gpu).get(rest)
    if not batches:
        return None
    nearest = min(batches, key=lambda other: max(other, batch) / min(other, batch))
    return batches[nearest] if max(nearest, batch) <= NEAR * min(nearest, batch) else None
