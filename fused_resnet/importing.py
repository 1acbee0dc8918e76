"""Objects of other people's code, by ``module:name`` or ``file.py:name``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def _module(source: str) -> ModuleType:
    """A module by its dotted name (from the working folder, too) or by its file."""
    if not source.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")
        return importlib.import_module(source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no file {source!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    ours = sys.modules.setdefault(path.stem, module) is module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if ours:  # or an import of that name would find half a module
            del sys.modules[path.stem]
        raise
    return module


def exists(name: str) -> bool:
    """Whether there is a module of this dotted name; it is not imported, the packages it lies in are."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.util.find_spec(name) is not None
    except Exception:  # of the packages' code: whatever it raises
        return False


def load(what: str) -> Any:
    """The object that ``module:name`` or ``file.py:name`` names.

    Raises:
        ValueError: no such file, module or name, or its code fails; one line.
    """
    source, _, name = what.rpartition(":")
    try:
        module = _module(source)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # the code of others: whatever it raises
        said = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"cannot import {source!r}: {type(error).__name__}: {said or type(error).__name__}") from error
    if not hasattr(module, name):
        raise ValueError(f"{source!r} has no function {name!r}")
    return getattr(module, name)
