"""Files that are either the old ones or the new ones, whatever happens while they are written, and one writer at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: In a run's folder, of the process that writes there.
LOCK = ".lock"


@contextmanager
def held(lock: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a file for this process. It may stay behind: what counts is the system's lock on it, which ends with the process,
    however that ends.

    Args:
        lock: made where it is not there.
        patience: seconds to wait for another process.

    Raises:
        TimeoutError: another process holds it.
        OSError: it cannot be made.
    """
    import filelock

    mine = filelock.FileLock(lock)
    mine.acquire(timeout=patience)  # filelock.Timeout is a TimeoutError
    try:
        yield
    finally:
        mine.release()


def write_whole(path: Path, content: bytes | memoryview, *, durable: bool = False) -> None:
    """Write ``content`` to ``path``, whole or not at all.

    It goes to a file beside it and under its name in one step (rename). Whoever is killed in between, or finds the disk full,
    leaves the old file as it was. Several may write the same file at a time; the last one stays.

    Args:
        durable: onto the disk first (fsync): the file survives a power failure, too. For a single writer: the name beside it is
            always the same, so that the leftovers of one who is killed do not gather.

    Raises:
        OSError: it could not be written; the old file is still there.
    """
    path = path.resolve()  # what a link leads to is written, not a file in the link's place
    mine = "new" if durable else f"{os.getpid()}-{threading.get_ident()}"
    beside = path.with_name(f".{path.name}.{mine}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if durable:
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
