"""What a call is given: tensors, or tensors in lists, tuples and dicts, one deep; taken apart, and put together again.

How many there are, in what, and under which keys is the *structure* of a call's arguments: what a forward that loops over a
list decides by, and so what its graph is made for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dis import get_instructions
from types import CodeType
from typing import Any

from torch import Tensor, nn

from .guards import original

#: For each argument None, a tensor, or the name of a container and its keys. Plain values, which torch.compile can compare.
Structure = tuple[tuple[str, tuple[Any, ...]] | None, ...]

_KINDS: dict[str, type[Any]] = {"list": list, "tuple": tuple, "dict": dict, "OrderedDict": OrderedDict}


def structure_of(args: tuple[Any, ...]) -> Structure | None:
    """The structure of a call's arguments; None where they hold anything else."""
    found: list[tuple[str, tuple[Any, ...]] | None] = []
    for argument in args:
        if isinstance(argument, Tensor):
            found.append(None)
            continue
        name = type(argument).__name__
        if _KINDS.get(name) is not type(argument):  # a named tuple, a list of somebody's own
            return None
        keys = tuple(argument) if isinstance(argument, dict) else tuple(range(len(argument)))
        parts = argument.values() if isinstance(argument, dict) else argument
        if not all([isinstance(part, Tensor) for part in parts]) or not all([type(key) in (str, int) for key in keys]):
            return None
        found.append((name, keys))
    return tuple(found)


def tensors_of(args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors in a call's arguments, in their order."""
    found: list[Tensor] = []
    for argument in args:
        if isinstance(argument, Tensor):
            found.append(argument)
        else:
            found.extend(argument.values() if isinstance(argument, dict) else argument)
    return found


def put_together(structure: Structure, parts: Iterator[Any]) -> list[Any]:
    """Arguments of that structure out of ``parts``."""
    made = []
    for argument in structure:
        if argument is None:
            made.append(next(parts))
            continue
        name, keys = argument
        held = [next(parts) for _ in keys]
        made.append(_KINDS[name](zip(keys, held) if issubclass(_KINDS[name], dict) else held))
    return made


def told(structure: Structure | None) -> str:
    """A structure in words."""
    if structure is None:
        return "tensors"
    return ", ".join("a tensor" if part is None else f"a {part[0]} of {len(part[1])}" for part in structure)


class Given:
    """The containers that a forward is given while it is traced, and whether it only reads them.

    The caller's own containers are taken apart in front of the graph, which therefore can neither change them nor give them
    back.
    """

    def __init__(self, arguments: list[Any]) -> None:
        self.containers = [argument for argument in arguments if isinstance(argument, (list, tuple, dict))]
        self.before = [self._contents(container) for container in self.containers]

    @staticmethod
    def _contents(container: Any) -> list[Any]:
        return [part for item in container.items() for part in item] if isinstance(container, dict) else list(container)

    def changed(self) -> bool:
        """Whether something was put in, taken out or moved. By identity: what stands for tensors cannot be compared."""
        for container, before in zip(self.containers, self.before):
            now = self._contents(container)
            if len(now) != len(before) or any(part is not other for part, other in zip(now, before)):
                return True
        return False

    def holds(self, value: Any) -> bool:
        """Whether one of the containers that can be changed is ``value`` or in it."""
        if any(value is container and type(container) is not tuple for container in self.containers):
            return True
        if type(value) in (list, tuple):
            return any(self.holds(part) for part in value)
        return isinstance(value, dict) and any(self.holds(part) for part in value.values())


#: Methods that change a list or a dict.
_CHANGING = frozenset(
    {"append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse",
     "update", "setdefault", "popitem", "move_to_end", "__setitem__", "__delitem__"}
)  # fmt: skip
_CHANGING_OPERATIONS = ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")


def hands_on(value: Any) -> bool:
    """Whether there is a list or a dict in the arguments of a call."""
    return isinstance(value, (list, dict)) or (type(value) is tuple and any(hands_on(part) for part in value))


def may_change(module: nn.Module) -> bool:
    """Whether the forward of a module, or of one in it, looks as if it changed a list or dict. Functions that it calls are not
    looked into.
    """
    kinds = {original(type(part)) for part in module.modules()}
    forwards = [kind.forward for kind in kinds if not kind.__module__.startswith("torch.")]
    codes: list[CodeType] = [forward.__code__ for forward in forwards if hasattr(forward, "__code__")]
    while codes:
        code = codes.pop()
        if not _CHANGING.isdisjoint(code.co_names) or any(op.opname in _CHANGING_OPERATIONS for op in get_instructions(code)):
            return True
        codes.extend(inner for inner in code.co_consts if isinstance(inner, CodeType))
    return False
