"""Whose forwards may be traced for speed alone: those of PyTorch's containers and of model zoos, which compute and do no more.

A trace keeps what a forward did once. What it asked beside its module, printed, counted or clocked is nowhere in the graph. A
region takes that risk for the chains that its forward calls (docs/decisions/008); where modules inside run their chains by
themselves nobody has to, so forwards of somebody's own are not traced for one look less.
"""

from __future__ import annotations

from functools import partial
from types import FunctionType
from typing import Any

from torch import nn

from .guards import original
from .region import FusedRegion, usable

#: Packages whose functions and modules compute and do no more. (Those of somebody's own may print, or count.)
ZOOS = frozenset(("fused_resnet", "open_clip", "segmentation_models_pytorch", "timm", "torchvision", "transformers"))


def of_a_zoo(name: str) -> bool:
    """Whether a module of Python's is of such a package."""
    return name.split(".")[0] in ZOOS


def is_known(module: nn.Module) -> bool:
    """Whether a module is of such a package, with the functions that its class was written with, and nobody's but those."""
    kind = original(type(module))
    for base in kind.__mro__:
        if base in nn.Module.__mro__ or not issubclass(base, nn.Module):
            continue
        if not (base.__module__.startswith("torch.nn.modules.") or of_a_zoo(base.__module__)):
            return False
        if any(not _is_its_own(value) for value in vars(base).values()):
            return False
    own = vars(nn.Module())
    return all(_is_its_own(value) for name, value in module.__dict__.items() if name not in own)


def _is_its_own(value: Any) -> bool:
    """Whether something of a module or a class is no function, or one of such a package's, or of PyTorch's."""
    value = value.func if isinstance(value, partial) else value
    value = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
    if isinstance(value, FunctionType):
        where = str(value.__globals__.get("__name__"))
        return where.split(".")[0] == "torch" or of_a_zoo(where)
    return True


def all_known(module: nn.Module) -> bool:
    """Whether a module and all that is in it are known, or written out in a region anyway."""
    written: set[str] = set()
    for path, inner in module.named_modules(remove_duplicate=False):
        if isinstance(inner, FusedRegion):
            region, _ = usable(inner)
            if region is not None:
                names = path.split(".") if path else []
                written.update(".".join((*names, *inlined)) for inlined in ((), *region.inlined))
    found = module.named_modules(remove_duplicate=False)
    return all(path in written or is_known(inner) for path, inner in found)
