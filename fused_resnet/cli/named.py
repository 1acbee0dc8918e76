"""The model that a user names: of a zoo, or what a module or file makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .. import importing
from .arguments import CommandError, eager_model, one_line, refusing


def load(what: str) -> nn.Module:
    """The model that ``MODEL`` names, in eval mode.

    Raises:
        CommandError: there is none: no such name, file, module or function, or it returns something else, or fails.
    """
    return find(what)[0]


def find(what: str) -> tuple[nn.Module, bool]:
    """The same, and whether it is one of a zoo, which brings no weights."""
    if ":" in what and what.rpartition(":")[2]:
        return _made(what, refusing(lambda: importing.load(what), ValueError)), False
    source = what.removesuffix(":")
    if not source.endswith(".py"):
        try:
            return eager_model(what).eval(), True
        except CommandError:
            if not importing.exists(source):
                raise
    elif not Path(source).is_file():
        raise CommandError(f"no file {source!r} ({source}:FUNCTION)")
    return _made(*_only(source)), False


def _made(what: str, function: Any) -> nn.Module:
    """The module that an object is or returns."""
    model = function
    if not isinstance(function, nn.Module):
        if not callable(function):
            raise CommandError(f"{what} is a {type(function).__name__}, expected a function that returns an nn.Module")
        try:
            model = function()
        except Exception as error:
            raise CommandError(f"{what}() failed: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"{what}() returned a {type(model).__name__}, expected an nn.Module")
    return model.eval()


def _only(source: str) -> tuple[str, Any]:
    """The one model of a module or file, behind its name."""
    found: dict[str, Any] = refusing(lambda: importing.givers(source, nn.Module), ValueError)
    if len(found) == 1:
        [(name, value)] = found.items()
        return f"{source}:{name}", value
    kind = "file" if source.endswith(".py") else "module"
    if found:
        raise CommandError(
            f"{source!r} names a {kind} with several models ({', '.join(found)}): say which, such as {source}:{[*found][-1]}"
        )
    raise CommandError(
        f"{source!r} names a {kind} but no function in it: expected {source}:FUNCTION, which returns an nn.Module, such as "
        f"{source}:net (a {kind} alone does if one class, or one function annotated to return a module, needs no arguments)"
    )
