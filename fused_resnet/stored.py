"""What files of ours must hold, checked where they are read: a damaged one is named, not met later as a KeyError."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Types = tuple[type, ...]
#: Key -> the types of its value.
Fields = Mapping[str, Types]

TEXT: Types = (str,)
NONE = type(None)
NUMBER: Types = (int, float)
OBJECT: Types = (dict,)

_WORDS = {str: "text", dict: "an object", list: "a list", bool: "true or false", NONE: "null"}
_WORDS |= dict.fromkeys(NUMBER, "a number")


def fields(keys: str | Iterable[str], types: Types) -> dict[str, Types]:
    """The same types for several keys, given one by one or in one text."""
    return dict.fromkeys(keys.split() if isinstance(keys, str) else keys, types)


def hold(data: Any, expected: Fields, name: str, error: type[ValueError] = ValueError, optional: bool = False) -> None:
    """Raise where a key is missing (unless all are ``optional``), or its value is of another type.

    Args:
        data: what should be an object.
        expected: its keys; others may be there.
        name: of the file and the place in it, for the message.

    Raises:
        ValueError: or ``error``.
    """
    if not isinstance(data, dict):
        raise error(f"{name}: not whole: expected an object, got {_got(data)}")
    for key, types in expected.items():
        if key not in data:
            if optional:
                continue
            raise error(f"{name}: not whole: {key!r} is missing")
        value = data[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):  # a bool is an int to Python
            wanted = " or ".join(dict.fromkeys(_WORDS.get(kind, kind.__name__) for kind in types))
            raise error(f"{name}: not whole: {key!r}: expected {wanted}, got {_got(value)}")


def _got(value: Any) -> str:
    return _WORDS.get(type(value), type(value).__name__)
