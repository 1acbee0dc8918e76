"""Objects of other people's code by name: what is found, and that nothing is left behind of what fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fused_resnet import importing


def test_a_file_that_fails_leaves_no_half_module(tmp_path: Path) -> None:
    """Mended, and named by its module's name in the same process, it is read anew."""
    file = tmp_path / "half_a_module_of_a_test.py"
    file.write_text("found = 1\nraise RuntimeError('not yet\\nready')\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot import '.*half_a_module_of_a_test\.py': RuntimeError: not yet$"):
        importing.load(f"{file}:found")
    assert file.stem not in sys.modules
    file.write_text("found = 2\n", encoding="utf-8")
    try:
        assert importing.load(f"{file}:found") == 2
        assert sys.modules[file.stem].found == 2
    finally:
        sys.modules.pop(file.stem, None)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file 'nowhere\.py'"):
        importing.load("nowhere.py:make")
    with pytest.raises(ValueError, match="'json' has no function 'make'"):
        importing.load("json:make")
    with pytest.raises(ValueError, match="cannot import 'no_such_module': ModuleNotFoundError"):
        importing.load("no_such_module:make")
