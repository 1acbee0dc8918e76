"""A run's folder, for one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..whole_file import LOCK as LOCK
from ..whole_file import held
from .errors import UsageError

#: Seconds to wait for it: a run that was killed leaves its decoding workers for about five, and they hold it with it.
PATIENCE = 10.0


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder for this process. The lock ends with the process, however that ends.

    Raises:
        UsageError: another process holds it.
        OSError: the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(held(folder / LOCK, PATIENCE))
        except TimeoutError as error:
            raise UsageError(f"{folder}: another run is writing into it: wait for its end, or name another --out") from error
        yield
