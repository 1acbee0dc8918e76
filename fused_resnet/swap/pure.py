"""Whether what a module's forward does follows from its attributes, its children and its inputs: read off its code.

A traced forward is what it was when it was traced. Its guards see what is in modules; a flag of a program's that its forward
asks, a line that it prints, a clock that it reads are nowhere in the graph. Where a forward is traced for the chains that it
calls itself that is a risk worth naming (docs/decisions/008); where modules inside run their chains themselves nobody has to
take it. So of such a forward only code is traced that has none of this in it. (That of model zoos has none: it is not read.)
"""

from __future__ import annotations

import builtins
import dis
from collections.abc import Iterator
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from .guards import original
from .tracing import ZOOS

#: Packages whose functions compute and do no more, and that nobody sets flags in.
_KNOWN = ZOOS | {"torch", "math", "operator", "_operator", "itertools", "functools", "collections", "typing", "builtins"}
#: Functions of Python's that do more than compute.
_DO_MORE = frozenset(
    ("__import__", "breakpoint", "compile", "delattr", "eval", "exec", "globals", "id", "input", "locals", "open", "print",
     "setattr", "vars")
)  # fmt: skip
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
#: Instructions that read an attribute, by what they begin with.
_OF_OBJECTS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER")
#: Of ``try`` and ``with``: what is caught there may not be raised while it is traced.
_CATCHES = ("PUSH_EXC_INFO", "SETUP_FINALLY", "SETUP_WITH")


def _package(thing: Any) -> str:
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None)
    return str(name or "builtins").split(".")[0]


def is_pure(module: nn.Module) -> bool:
    """Whether a module's forward, and the methods that it calls, ask nothing but what is in it and what they are given."""
    kind = original(type(module))
    if _package(kind) in _KNOWN:
        return True
    read = _reads(kind)
    return read is not None and all(_stays(value) for name, value in module.__dict__.items() if name in read)


def _reads(kind: type[Any]) -> frozenset[str] | None:
    """The names of attributes that a class's forward reads, or methods of such names; None where they do more than that, or
    read an attribute of the class's.
    """
    bases = [base for base in kind.__mro__ if _package(base) not in _KNOWN]
    read, done, seen = {"forward", "__call__", "__getattr__", "__getattribute__"}, set[str](), set[int]()
    while read - done:
        name = (read - done).pop()
        done.add(name)
        for value in (vars(base)[name] for base in bases if name in vars(base)):
            value = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
            if not isinstance(value, FunctionType) or not _asks_nobody(value, read, seen):
                return None
    return frozenset(read)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of functions written in it."""
    yield code
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _codes(part)


def _asks_nobody(function: FunctionType, read: set[str], seen: set[int]) -> bool:
    """Whether a function asks nothing but its arguments; adds the names of the attributes that it reads to ``read``."""
    if id(function) in seen:
        return True
    seen.add(id(function))
    try:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # one that is empty
        return False
    if not all(_is_known(cell, read, seen) for cell in cells):
        return False
    for code in _codes(function.__code__):
        for step in dis.get_instructions(code):
            name = str(step.argval)
            if step.opname in _CATCHES:
                return False
            if step.opcode not in dis.hasname:
                continue
            if step.opname.startswith(_OF_OBJECTS):
                read.add(name)
            elif step.opname != "LOAD_GLOBAL":  # it writes, or imports
                return False
            elif name in function.__globals__:
                if not _is_known(function.__globals__[name], read, seen):
                    return False
            elif name in _DO_MORE or not hasattr(builtins, name):
                return False
    return True


def _is_known(thing: Any, read: set[str], seen: set[int]) -> bool:
    """Whether a name outside a function stands for a package, function or class that computes and does no more."""
    if isinstance(thing, FunctionType) and _package(thing) not in _KNOWN:
        return _asks_nobody(thing, read, seen)
    if isinstance(thing, type) and _package(thing) not in _KNOWN:
        return issubclass(thing, (nn.Module, Enum, BaseException))
    functions = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, type)
    named = isinstance(thing, functions) or _package(type(thing)) == "typing"
    return named and _package(thing) in _KNOWN and getattr(thing, "__name__", "") not in _DO_MORE


def _stays(value: Any, depth: int = 10) -> bool:
    """Whether an attribute is seen to change where it does: not an object in which something is set."""
    if type(value) in (tuple, list, dict):
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return depth > 0 and all(_stays(part, depth - 1) for part in parts)
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return _is_known(value, set(), set())
    return type(value) in _PLAIN or isinstance(value, (Enum, type))
