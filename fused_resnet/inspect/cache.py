"""Facts about compiled kernels, kept in the user's cache: ``fused_resnet/inspect`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

One small JSON file a kernel, by the hash of everything it depends on: the kernel's source, its constants and options, the
target, Triton, and the files that read the assembly. Assembly is kept beside it, compressed, where it was asked for.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from functools import cache
from pathlib import Path

from ..whole_file import write_whole
from .facts import Facts

_PACKAGE = Path(__file__).parents[1]
#: What turns a compile into facts.
_READERS = ("inspect/assembly.py", "inspect/facts.py", "backends/triton_compile.py", "backends/cubin.py")


def default_folder() -> Path:
    """Where facts are kept by default."""
    home = os.environ.get("XDG_CACHE_HOME")
    base = Path(home) if home and os.path.isabs(home) else Path.home() / ".cache"
    return base / "fused_resnet" / "inspect"


@cache
def _readers() -> str:
    digest = hashlib.sha256()
    for name in _READERS:
        digest.update((_PACKAGE / name).read_bytes())
    return digest.hexdigest()


class Cache:
    """Facts and assembly by the key of a compile. A folder that cannot be written to is a cache that forgets."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()
        #: Why nothing is kept, if so.
        self.broken: str | None = None

    def _path(self, key: str, ending: str) -> Path:
        digest = hashlib.sha256(f"{key} {_readers()}".encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}{ending}"

    def facts(self, key: str) -> Facts | None:
        """What is known of a compile; None if nothing, or nothing readable."""
        try:
            return Facts.from_json(json.loads(self._path(key, ".json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def assembly(self, key: str) -> str | None:
        """The assembly of a compile, if it was kept."""
        try:
            return gzip.decompress(self._path(key, ".asm.gz").read_bytes()).decode() or None
        except (OSError, EOFError, ValueError):
            return None

    def keep(self, key: str, facts: Facts, assembly: str | None = None) -> None:
        """Store what a compile gave."""
        self._write(self._path(key, ".json"), json.dumps(facts.as_json()).encode())
        if assembly is not None:
            self._write(self._path(key, ".asm.gz"), gzip.compress(assembly.encode(), mtime=0))

    def _write(self, path: Path, data: bytes) -> None:
        if self.broken is not None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data)
        except OSError as error:
            self.broken = f"{self.folder}: {error.strerror or error}"
