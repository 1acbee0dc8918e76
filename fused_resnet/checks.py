"""Arguments of constructors: an error of the type that PyTorch raises, with the argument, what it got and what is expected."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any


def whole(name: str, value: Any, least: int | None = None) -> None:
    """Raise where ``value`` is no whole number, or smaller than ``least``. NumPy's whole numbers are some, as for PyTorch.

    Raises:
        TypeError: it is none.
        RuntimeError: it is too small.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if least is not None and number < least:
        raise RuntimeError(f"{name} must be at least {least}, got {value!r}")


def pair(name: str, value: Any, least: int, single: bool = True) -> tuple[int, int]:
    """``value`` for rows and columns: a whole number of at least ``least``, or two of them.

    Args:
        single: whether a sequence of one stands for two, as for PyTorch it does in a stride, but not in a filter's size.

    Raises:
        TypeError: neither.
        RuntimeError: too small, or another number of them.
    """
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    sizes: tuple[Any, ...] = tuple(value) if several else (value, value)
    if several and len(sizes) != 2 and not (single and len(sizes) == 1):
        raise RuntimeError(f"{name} must be a whole number or two of them, got {value!r}")
    for part in sizes:
        try:
            whole(name, part, least)
        except TypeError:
            raise TypeError(f"{name} must be a whole number or two of them, got {value!r}") from None
    return sizes[0], sizes[-1]
