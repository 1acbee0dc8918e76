"""What a traced forward may have decided by, kept so that at each call it can be told whether the graph still holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import nn

from .. import watch
from ..describe import hooked

_PLAIN = (type(None), bool, int, float, str)


class _Object:
    """An object that is told by being the same one, not by its address, at which there may be another when it is gone."""

    __slots__ = ("hash", "value")

    def __init__(self, value: Any) -> None:
        try:
            self.value: Callable[[], Any] = ref(value)
        except TypeError:
            self.value = lambda: value
        self.hash = id(value)

    def __eq__(self, other: object) -> bool:
        return type(other) is _Object and (value := self.value()) is not None and other.value() is value

    def __hash__(self) -> int:
        return self.hash


def printed(value: Any, depth: int = 10) -> Any:
    """What two equal values have in common: plain values themselves, containers by their contents, others as objects."""
    if type(value) in (*_PLAIN, complex, bytes, torch.dtype, torch.device):
        return (type(value), value)
    if depth and type(value) in (tuple, list):
        return (type(value), tuple(printed(part, depth - 1) for part in value))
    if depth and isinstance(value, dict):
        return (type(value), tuple((printed(key, 0), printed(part, depth - 1)) for key, part in value.items()))
    if depth and type(value) in (set, frozenset):
        return (type(value), frozenset(printed(part, 0) for part in value))
    return (type(value), _Object(value))


#: Attributes of every nn.Module that say nothing about its forward, or that are compared otherwise.
_OWN = frozenset(vars(nn.Module())) | {"fused_backend", "fused_memory", "fused_region", watch.ATTRIBUTE}


def original(kind: Any) -> type[Any]:
    """The class behind a fused one."""
    return getattr(kind, "unfused_class", None) or kind


@dataclass(frozen=True)
class Guard:
    """What a traced forward may have read of one module: its class, its attributes, its children's classes, and which of its
    parameters and buffers are None.
    """

    path: tuple[str, ...]
    kind: type[Any]
    plain: tuple[tuple[str, Any], ...]
    others: tuple[tuple[str, Any], ...]
    children: tuple[tuple[str, type[Any]], ...]
    tensors: tuple[tuple[str, bool], ...]
    training: bool
    called: bool

    @staticmethod
    def of(path: str, module: nn.Module, called: bool) -> Guard:
        """Of the module as it is; ``called``: it would run, and its hooks with it (a ModuleList does not)."""
        own = {key: value for key, value in module.__dict__.items() if key not in _OWN}
        plain = tuple((key, value) for key, value in own.items() if type(value) in _PLAIN)
        others = tuple((key, printed(value)) for key, value in own.items() if type(value) not in _PLAIN)
        children = tuple((name, original(type(child))) for name, child in module._modules.items())
        names = tuple(path.split(".")) if path else ()
        return Guard(names, original(type(module)), plain, others, children, _which(module), module.training, called)

    def broken(self, root: nn.Module) -> str | None:
        """What has changed, or None."""
        module = descend(root, self.path)
        if module is None or original(type(module)) is not self.kind:
            return f"{'.'.join(self.path) or 'the module'} is no longer a {self.kind.__name__}"
        found = module.__dict__
        if "forward" in found:
            return f"forward was replaced on its {self.kind.__name__}"
        if self.called and (hooked(module) or module._compiled_call_impl is not None):
            return f"a hook looks into its {self.kind.__name__}"
        if module.training is not self.training:
            return f"its {self.kind.__name__} is in another mode than when it was traced"
        children = module._modules
        if len(children) != len(self.children):
            return f"the children of its {self.kind.__name__} changed"
        for now, (name, kind) in zip(children, self.children, strict=True):
            if now != name or original(type(children[name])) is not kind:
                return f"{name} of its {self.kind.__name__} was replaced"
        if _which(module) != self.tensors:
            return f"its {self.kind.__name__} has other parameters or buffers"
        for key, value in self.plain:
            if key not in found or type(found[key]) is not type(value) or found[key] != value:
                return f"the attribute {key} of its {self.kind.__name__} changed"
        if torch.compiler.is_compiling():  # which cannot compare objects by their ids
            return None
        names = {key for key, _ in (*self.plain, *self.others)} | _OWN
        for key in found:
            if key not in names and hasattr(self.kind, key):
                return f"the attribute {key} stands in front of that of its {self.kind.__name__}'s class"
        for key, value in self.others:
            if key not in found or printed(found[key]) != value:
                return f"the attribute {key} of its {self.kind.__name__} changed"
        return None


@dataclass(frozen=True)
class Tie:
    """Two names of one tensor, dotted, of which a trace has read the first for both."""

    first: str
    second: str
    path: ClassVar[tuple[str, ...]] = ()

    def broken(self, root: nn.Module) -> str | None:
        """What has changed, or None."""
        one, other = (self._tensor(root, place) for place in (self.first, self.second))
        return None if one is other else f"{self.second} is no longer the tensor that {self.first} is"

    @staticmethod
    def _tensor(root: nn.Module, place: str) -> Any:
        *path, name = place.split(".")
        owner = descend(root, tuple(path))
        return None if owner is None else getattr(owner, name, None)


def _which(module: nn.Module) -> tuple[tuple[str, bool], ...]:
    """Its parameters and buffers by name, and which are not None."""
    return tuple((key, value is not None) for key, value in (*module._parameters.items(), *module._buffers.items()))


def signature(module: nn.Module) -> Any:
    """What two modules have in common that are traced to the same graph: all that their forwards can decide by."""
    own = tuple((key, printed(value)) for key, value in module.__dict__.items() if key not in _OWN)
    tensors = tuple((key, type(value)) for key, value in (*module._parameters.items(), *module._buffers.items()))
    children = tuple((name, child is not None and signature(child)) for name, child in module._modules.items())
    watched = hooked(module) or "forward" in module.__dict__ or module._compiled_call_impl is not None
    return type(module), module.training, watched, own, tensors, children


def descend(root: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    """The module at a place, or None."""
    module: Any = root
    for name in path:
        module = module._modules.get(name)
        if module is None:
            return None
    return module
