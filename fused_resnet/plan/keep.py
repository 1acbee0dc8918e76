"""What is kept from a forward for its backward: what the backward's launches read and do not make."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..chain import BUFFERS, Chain, Layer, Pool
from .backward import backward_plan
from .forward import rebuild_plan
from .launches import smallest


@lru_cache(maxsize=1024)
def nominal_size(chain: Chain) -> tuple[int, int, int]:
    """``(n, h, w)`` of a small image that the chain accepts: for what does not depend on sizes."""
    sides = (8, 8)
    windows: list[Layer | Pool] = [*chain.layers, *([] if chain.pool is None else [chain.pool])]
    for window in reversed(windows):
        sides = smallest(sides, window)
    return 1, *sides


@lru_cache(maxsize=4096)
def saved_slots(chain: Chain, needs: frozenset[str]) -> tuple[str, ...]:
    """Slots that must outlive the forward so that :func:`backward_plan` can run: all it reads, except ``dout``."""
    plan = backward_plan(chain, *nominal_size(chain), torch.float32, needs)
    return tuple(slot for slot in plan.reads() if slot != "dout")


@lru_cache(maxsize=4096)
def remembered_slots(chain: Chain, needs: frozenset[str], drop: bool) -> tuple[str, ...]:
    """:func:`saved_slots`; or, to ``drop`` the output, what the backward and :func:`rebuild_plan` read without it."""
    saved = saved_slots(chain, needs)
    if not drop:
        return saved
    reads = rebuild_plan(chain, *nominal_size(chain), torch.float32).reads()
    return tuple(slot for slot in dict.fromkeys((*saved, *reads)) if slot != "out")


@lru_cache(maxsize=4096)
def kept_slots(chain: Chain, needs: frozenset[str], drop: bool = False) -> tuple[str, ...]:
    """The part of :func:`remembered_slots` that the forward makes on its way to ``out``."""
    inputs = {"x", "out", *chain.operand_slots}
    return tuple(slot for slot in remembered_slots(chain, needs, drop) if slot not in inputs)


def trainable_slots(chain: Chain) -> frozenset[str]:
    """The inputs and all parameters: what gradients can be wanted of."""
    return frozenset(
        (
            *chain.inputs,
            *(layer.slot(role) for layer in chain.weight_layers for role in layer.parameter_roles if role not in BUFFERS),
        )
    )
