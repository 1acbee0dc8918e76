"""Where a forward counts on the layout of what fused children give it.

Fused blocks give channels_last. ``view`` fails on such a tensor where eager's contiguous one has a view of that shape, so in a
traced forward it becomes ``reshape``, which copies if it must. It stays where its result is written to in place, which has to
reach the tensor that was viewed. A module without children that views what it is given (a ``Flatten`` written by hand) is given
contiguous tensors.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..fused import Fused
from .patterns import Matcher
from .tracing import has_layers

#: Modules of others whose result is viewed by code that cannot be traced, by the class and its module.
_VIEWED = frozenset({("torchvision.models.detection.keypoint_rcnn", "KeypointRCNNHeads")})


def is_viewed(kind: type[nn.Module]) -> bool:
    """Whether the result of such a module must be contiguous, as eager's is."""
    return (kind.__module__, kind.__name__) in _VIEWED


def views_itself(module: nn.Module) -> bool:
    """Whether a module is somebody's own, without children or layers, with a call of ``view`` in its forward."""
    # The class of a scripted module has no forward to ask.
    if isinstance(module, Fused) or type(module).__module__.startswith("torch."):
        return False
    forward = type(module).forward
    return (
        isinstance(forward, FunctionType)
        and "view" in forward.__code__.co_names
        and not (module._modules or has_layers(module))
    )


class FusedView(Fused):
    """A module that is given contiguous tensors, since it views them. It holds no chain."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [argument.contiguous() if isinstance(argument, Tensor) else argument for argument in args]
        return super().forward(*tensors, **kwargs)


def is_view(node: fx.Node) -> bool:
    """``x.view(sizes)``, not ``x.view(dtype)``."""
    sizes = node.op == "call_method" and node.target == "view" and not node.kwargs
    return sizes and not any(isinstance(argument, torch.dtype) for argument in node.args)


def to_reshape(graph: fx.Graph, matcher: Matcher) -> set[fx.Node]:
    """The views of a graph that can be ``reshape`` as well."""
    return {node for node in graph.nodes if is_view(node) and not matcher.may_be_written(node)}
