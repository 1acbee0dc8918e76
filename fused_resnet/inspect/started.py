"""Which kernels a network's launches start on an architecture: most are one, some run in pieces.

Follows :func:`fused_resnet.backends.triton.run` and :mod:`fused_resnet.backends.triton_apart` without running anything;
``tests/test_inspect_started.py`` holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..launch import Launch
from ..tuning.choice import choose
from ..tuning.pieces import dy_slot, pieces


def started(named: Iterable[tuple[str, Launch]], arch: str, tf32: bool = False) -> Iterator[tuple[str, Launch]]:
    """The launches that start a kernel, in their order.

    Args:
        named: launches of a network with their layers' names, see :func:`fused_resnet.network.launches`.
        arch: what is chosen for, by the model: no GPU is named that something was measured on.
        tf32: whether fp32 may be multiplied as tf32.
    """
    block, left = "", set[str]()
    for layer, launch in named:
        now = layer.removesuffix(launch.layer)
        if now != block:
            block, left = now, set()
        # A dgrad reads the dy that its layer's wgrad has left, whatever would be chosen for it alone.
        waits = launch.kind == "dgrad" and "y" in launch.roles and dy_slot(launch) in left
        how = "apart" if waits else choose(launch, arch, tf32).how
        parts = pieces(launch, how) if how == "apart" else None  # only measurements choose the vendor's convolution
        if parts is None:
            yield layer, launch
            continue
        for first in parts.first:
            slot = first.outputs[0][1]
            if slot in left:
                left.remove(slot)
                continue
            if first.kind == "output_gradient":
                left.add(slot)
            yield layer, first
        yield layer, parts.core
