"""Files that are either the old ones or the new ones, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UsageError

#: In a run's folder, of the process that writes there. The file may stay; what counts is the system's lock on it.
LOCK = ".lock"
#: Seconds to wait for it: a run that was killed leaves its decoding workers for about five, and they hold it with it.
PATIENCE = 10.0


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder for this process. The lock ends with the process, however that ends.

    Raises:
        UsageError: another process holds it.
        OSError: the folder cannot be written.
    """
    import filelock

    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except filelock.Timeout as error:
        raise UsageError(f"{folder}: another run is writing into it: wait for its end, or name another --out") from error
    try:
        yield
    finally:
        lock.release()


def replace(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to ``path``, whole or not at all.

    It goes to a file beside it, onto the disk (fsync), and under its name in one step (rename). Whoever is killed in between,
    or finds the disk full, leaves the old file as it was. The name beside it is always the same: leftovers do not gather.

    Raises:
        OSError: it could not be written; the old file is still there.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """The rename itself onto the disk, where the system lets a folder be opened (not on Windows)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems do not sync folders
        pass
    finally:
        os.close(descriptor)
