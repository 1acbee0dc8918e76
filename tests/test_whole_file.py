"""Files are the old ones or the new ones, whatever happens in between."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fused_resnet.whole_file import write_whole


@pytest.mark.parametrize("durable", [False, True])
def test_written_whole_and_with_the_users_mode(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b"the old one, which is longer")
    write_whole(path, b"new", durable=durable)
    (tmp_path / "plain").write_bytes(b"")
    assert path.read_bytes() == b"new" and sorted(file.name for file in tmp_path.iterdir()) == ["plain", "table.json"]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("fails", ["open", "replace"])
def test_the_old_one_stays_where_it_cannot_be(
    tmp_path: Path, durable: bool, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt from the keyboard, or a full disk; and nothing is left beside it."""
    path = tmp_path / "table.json"
    path.write_bytes(b"old")
    error = KeyboardInterrupt() if fails == "replace" else OSError(28, "No space left on device")

    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(*((os, "replace") if fails == "replace" else (Path, "open")), failing)
    with pytest.raises(type(error)):
        write_whole(path, b"new", durable=durable)
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["table.json"]


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("fsync") or fsync(descriptor))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    write_whole(tmp_path / "checkpoint", b"weights", durable=True)
    assert done == ["fsync", "replace", "fsync"]
    write_whole(tmp_path / "cache", b"facts")
    assert done[3:] == ["replace"]
