"""Objects of other people's code, by ``module:name`` or ``file.py:name``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import typing
from pathlib import Path
from types import FunctionType, ModuleType
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


def _imported(source: str) -> ModuleType:
    """As :func:`_module`; whatever goes wrong is a ValueError of one line."""
    try:
        return _module(source)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # the code of others: whatever it raises
        said = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"cannot import {source!r}: {type(error).__name__}: {said or type(error).__name__}") from error


def _says_that_it_gives(value: Any, kind: type[Any]) -> bool:
    """Whether a class is one of ``kind``, or a function is annotated to return such, and neither has to be given anything.

    What says nothing is not called to find out: it may as well train.
    """
    if not isinstance(value, (type, FunctionType)):
        return False
    try:
        given = value if isinstance(value, type) else typing.get_type_hints(value).get("return")
        parameters = inspect.signature(value).parameters.values()
    except Exception:  # annotations are code of others, too
        return False
    optional = all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    return isinstance(given, type) and issubclass(given, kind) and optional


def givers(source: str, kind: type[Any]) -> dict[str, Any]:
    """What a module or file defines of a ``kind``, by name: such objects, classes of it, functions annotated to return one.

    Raises:
        ValueError: as :func:`load`.
    """
    module = _imported(source)
    public = [(name, value) for name, value in vars(module).items() if not name.startswith("_")]
    own = {name for name, value in public if getattr(value, "__module__", None) == module.__name__}
    return {
        name: value for name, value in public if isinstance(value, kind) or (name in own and _says_that_it_gives(value, kind))
    }


def load(what: str) -> Any:
    """The object that ``module:name`` or ``file.py:name`` names.

    Raises:
        ValueError: no such file, module or name, or its code fails; one line.
    """
    source, _, name = what.rpartition(":")
    module = _imported(source)
    if not hasattr(module, name):
        raise ValueError(f"{source!r} has no function {name!r}")
    return getattr(module, name)
