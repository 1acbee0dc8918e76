"""A run's folder, for one process at a time."""

from __future__ import annotations

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
