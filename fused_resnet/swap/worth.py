"""Whether a fused model is worth it, on an input that somebody has: timed in turn with the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..measure import interleaved

#: A fused model that is slower than that, times the model as it was, is left alone.
LEAST = 0.97
#: Calls in front of the first that is timed: a network is looked at as a whole at its third.
_WARM_UP = 4
_SECONDS = 1.0


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model with the same parameters and buffers."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def speedup(fused: nn.Module, plain: nn.Module, example: Tensor | tuple[Any, ...]) -> float:
    """The time of ``plain(*example)`` over that of ``fused(*example)``, without gradients, medians of calls in turn.

    What is slower at first is timed again, and the better of the two counts: a machine may have been doing something else.
    """
    args = example if isinstance(example, tuple) else (example,)
    devices = [leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    device = devices[0] if devices else torch.device("cpu")

    buffers = [(buffer, buffer.clone()) for buffer in plain.buffers()]

    def call(model: nn.Module) -> Callable[[], object]:
        return lambda: model(*args)

    def once() -> float:
        contenders = {"plain": call(plain), "fused": call(fused)}
        times = interleaved(contenders, device, seconds=_SECONDS, rounds=(7, 200), warm_up=_WARM_UP)
        return times["plain"].median / times["fused"].median

    with torch.no_grad(), torch.random.fork_rng():
        try:
            first = once()
            return first if first >= LEAST else max(first, once())
        finally:  # in eval mode few forwards write any
            for buffer, before in buffers:
                buffer.copy_(before)
