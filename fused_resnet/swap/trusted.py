"""Whose forwards may be traced for speed alone: those of PyTorch's containers and of model zoos, which compute and do no more.

A trace keeps what a forward did once. What it asked beside its module, printed, counted or clocked is nowhere in the graph. A
region takes that risk for the chains that its forward calls (docs/decisions/008); where modules inside run their chains by
themselves nobody has to, so forwards of somebody's own are not traced for one look less.
"""

from __future__ import annotations

from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import nn

from .guards import original

#: Packages whose functions and modules compute and do no more. (Those of somebody's own may print, or count.)
ZOOS = frozenset(("fused_resnet", "open_clip", "segmentation_models_pytorch", "timm", "torchvision", "transformers"))


def of_a_zoo(name: str) -> bool:
    """Whether a module of Python's is of such a package."""
    return name.split(".")[0] in ZOOS


def is_known(module: nn.Module) -> bool:
    """Whether a module is of such a package, with the functions that its class was written with, and nobody's but those."""
    own = vars(nn.Module())
    for base in written_classes(module):
        if not of_a_zoo(base.__module__) or not all(map(_is_its_own, vars(base).values())):
            return False
    return all(_is_its_own(value) for name, value in module.__dict__.items() if name not in own)


def all_known(module: nn.Module) -> bool:
    """Whether a module and all that is in it are known."""
    return all(map(is_known, module.modules()))


def written_classes(module: nn.Module) -> list[type[nn.Module]]:
    """The class of a module and those that it is made from, but PyTorch's."""
    bases = [base for base in original(type(module)).__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    return [base for base in bases if not base.__module__.startswith("torch.nn.modules.")]


def _is_its_own(value: Any) -> bool:
    """Whether something of a module or a class cannot be called, or is a function of such a package's, or of PyTorch's."""
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        value = value.__func__
    elif isinstance(value, partial):
        value = value.func
    elif isinstance(value, property):
        return all(_is_its_own(part) for part in (value.fget, value.fset) if part is not None)
    if isinstance(value, FunctionType):
        where = str(value.__globals__.get("__name__"))
        wrapped = getattr(value, "__wrapped__", None)
        return (where.split(".")[0] == "torch" or of_a_zoo(where)) and (wrapped is None or _is_its_own(wrapped))
    if isinstance(value, (type, nn.Module, BuiltinFunctionType)) or not callable(value):
        return True
    where = type(value).__module__
    return where.split(".")[0] == "torch" or of_a_zoo(where)
