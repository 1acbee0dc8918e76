"""The launches of a network, from its name: what is inspected, tuned and timed launch by launch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backends import backend, count_launches
from .chain_function import ChainFunction
from .counts import nodes
from .fused import Fused
from .launch import Launch
from .models import build
from .swap import fuse, unfuse

#: ``infer``: eval mode. ``train``: the batch's statistics, forward and backward to all parameters (not to the images).
MODES = ("infer", "train")


@dataclass(frozen=True)
class Use:
    """Launches of a network that are one kernel on operands of one size.

    Attributes:
        launch: the first of them.
        layers: the layer of each, in the order in which they run.
    """

    launch: Launch
    layers: tuple[str, ...]

    @property
    def times(self) -> int:
        """How often it runs."""
        return len(self.layers)


def launches(model: nn.Module, batch: int, size: int, dtype: torch.dtype, mode: str) -> list[tuple[str, Launch]]:
    """All launches of one pass through a fused model, with the layer's dotted name, in the order in which they run.

    Args:
        model: fused, on the meta device. Its mode is set.
        batch, size: images, their rows and columns.
        dtype: element type of images and model.
        mode: one of :data:`MODES`.
    """
    model = model.to(dtype).train(mode == "train")
    x = torch.empty(batch, 3, size, size, dtype=dtype, device="meta")
    marks: list[tuple[int, str]] = []  # from this launch on, this module
    hooks: list[Any] = []

    def entered(name: str) -> None:
        marks.append((len(log), name))

    named_nodes: dict[Any, str] = {}  # of the backward; a stage's last node is its last block's

    def left(name: str, output: Tensor) -> None:
        named_nodes.setdefault(output.grad_fn, name)

    with count_launches() as log, backend("reference"), torch.set_grad_enabled(mode == "train"):
        for name, module in model.named_modules():
            if isinstance(module, Fused):
                hooks.append(module.register_forward_pre_hook(lambda _m, _x, name=name: entered(name)))
                hooks.append(module.register_forward_hook(lambda _m, _x, output, name=name: left(name, output)))
        try:
            output = model(x)
        finally:
            for hook in hooks:
                hook.remove()
        if mode == "train":
            for node in nodes([output]):
                if node.name() == f"{ChainFunction.__name__}Backward":
                    name = named_nodes.get(node, "")
                    node.register_prehook(lambda _, name=name: entered(name))
            torch.autograd.grad(output.sum(), list(model.parameters()), allow_unused=True)
    named = []
    for index, (_, launch) in enumerate(log.launches):
        block = [name for start, name in marks if start <= index][-1]
        named.append((".".join(filter(None, (block, launch.layer))), launch))
    return named


def distinct(named: Iterable[tuple[str, Launch]]) -> list[Use]:
    """Launches that are the same kernel on operands of the same sizes, taken together; in the order of their first."""
    uses: dict[str, tuple[Launch, list[str]]] = {}
    for layer, launch in named:
        uses.setdefault(launch.signature, (launch, []))[1].append(layer)
    return [Use(launch, tuple(layers)) for launch, layers in uses.values()]


def network(name: str, memory: str = "default") -> nn.Module:
    """The fused model ``name``, on the meta device: sizes without contents.

    Raises:
        ValueError: no such model.
    """
    with torch.device("meta"):
        return fuse(unfuse(build(name)), memory=memory)


def uses(name: str, batch: int, size: int, dtype: torch.dtype, mode: str, memory: str = "default") -> list[Use]:
    """The distinct launches of the model ``name``; arguments and errors of :func:`network` and :func:`launches`."""
    return distinct(launches(network(name, memory), batch, size, dtype, mode))
