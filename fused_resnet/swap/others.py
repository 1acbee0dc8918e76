"""Forwards of other packages that a trace cannot follow as they are written, in other words.

Known by the class, and by the names in its code: of another version that does more nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .guards import original


def _convolution_of_detectron2(self: Any, x: Tensor) -> Tensor:
    """A convolution, and the normalisation and activation that it holds. As written it asks first whether there are images, to
    raise with a SyncBatchNorm.
    """
    x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
    if self.norm is not None:
        x = self.norm(x)
    return x if self.activation is None else self.activation(x)


#: Module and name of a class -> what its forward computes, and the names that its code may have.
_FORWARDS: dict[tuple[str, str], tuple[Callable[..., Any], frozenset[str]]] = {
    ("detectron2.layers.wrappers", "Conv2d"): (
        _convolution_of_detectron2,
        frozenset(
            ("F", "conv2d", "weight", "bias", "stride", "padding", "dilation", "groups", "norm", "activation", "torch", "jit")
            + ("is_scripting", "warnings", "catch_warnings", "numel", "training", "isinstance", "nn", "SyncBatchNorm")
            + ("check_if_dynamo_compiling", "modules", "batchnorm", "AssertionError")
        ),
    ),
}


def in_other_words(kind: type[Any]) -> Callable[..., Any] | None:
    """What computes the same as the forward of a class, where that is known and cannot be traced; else None."""
    kind = original(kind)
    forward = kind.forward
    if not isinstance(forward, FunctionType):
        return None
    written, names = _FORWARDS.get((forward.__module__, forward.__qualname__.partition(".")[0]), (None, frozenset()))
    return written if written is not None and names.issuperset(forward.__code__.co_names) else None
