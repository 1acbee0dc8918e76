"""What a network keeps between forward and backward: by layer, by memory mode, and with its stages checkpointed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import counts
from .chain import MEMORY
from .chain_function import ChainFunction
from .fused import Fused
from .swap import unfuse


@dataclass(frozen=True)
class Pair:
    """The same network fused and eager, in one mode, on one device."""

    fused: nn.Module
    eager: nn.Module

    @staticmethod
    def of(fused: nn.Module, memory: str | None = None) -> Pair:
        """A fused network and its unfused copy; ``memory`` None is the network's own."""
        if memory is not None:
            with_memory(fused, memory)
        return Pair(fused, unfuse(copy.deepcopy(fused)))


def by_layer(pair: Pair, x: Tensor) -> list[tuple[str, int, int]]:
    """``(place, eager, fused)`` bytes that a forward keeps for its backward, parameters left out, each storage once.

    It belongs to the place that saved it first. The last row is what was saved outside all chains.
    """
    places = counts._places(pair.fused)
    eager = _eager_kept(pair.eager, x, places)
    fused = _fused_kept(pair.fused, x)
    order = [place for place in dict.fromkeys([*fused, *eager]) if place]
    rows = [(place, eager.get(place, 0), fused.get(place, 0)) for place in order]
    return [*rows, ("outside the chains", eager.get("", 0), fused.get("", 0))]


def _eager_kept(model: nn.Module, x: Tensor, places: dict[str, str]) -> dict[str, int]:
    skipped = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    stack = [""]
    kept: dict[str, int] = {}
    alive: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in skipped and storage._cdata not in alive:
            alive[storage._cdata] = storage
            kept[stack[-1]] = kept.get(stack[-1], 0) + storage.nbytes()
        return tensor

    hooks = []
    for name, module in model.named_modules():
        if name in places:
            hooks.append(module.register_forward_pre_hook(lambda _m, _x, name=name: stack.append(places[name])))
            hooks.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    del out
    return kept


def _fused_kept(model: nn.Module, x: Tensor) -> dict[str, int]:
    """By the nodes of the graph, in the order of the model's chains: a hook on a block would change what it keeps."""
    skipped = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    total: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        total[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    ran = [node for node in counts.nodes([out]) if node.name() == f"{ChainFunction.__name__}Backward"]
    ran.sort(key=lambda node: node._sequence_nr())
    names = [
        ".".join(filter(None, (name, chain)))
        for name, module in model.named_modules()
        if isinstance(module, Fused)
        for chain, _ in module.chains()
    ]
    if len(names) != len(ran):  # some ran one by one
        names = [f"chain {index}" for index in range(1, len(ran) + 1)]
    kept: dict[str, int] = {}
    taken = set(skipped)
    for name, node in zip(names, ran):
        for tensor in node.saved_tensors:
            key = tensor.untyped_storage()._cdata
            if key not in taken:
                taken.add(key)
                kept[name] = kept.get(name, 0) + tensor.untyped_storage().nbytes()
    rest = sum(storage.nbytes() for key, storage in total.items() if key not in taken)
    return {**kept, "": rest}


# ----------------------------------------------------------------------------------------------------- modes and stages


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd holds in a training step, parameters and buffers left out, each storage once.

    Attributes:
        how: ``eager``, ``fused, memory="low"``, ...; ``stages checkpointed`` where each stage keeps its input alone.
        behind: between forward and backward.
        most: at any moment of the step; more than that only where something is computed again.
    """

    how: str
    behind: int
    most: int


class _Again(nn.Module):
    """A stage that keeps its input, and is computed again in the backward."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        """Reentrant, which saves the input where it can be counted."""
        y: Tensor = checkpoint(self.stage, x, use_reentrant=True)
        return y


def checkpointed(model: nn.Module) -> nn.Module:
    """A copy whose stages (children named ``layer1`` ...) are each under :func:`torch.utils.checkpoint.checkpoint`."""
    model = copy.deepcopy(model)
    for name, child in list(model.named_children()):
        if name.startswith("layer"):
            setattr(model, name, _Again(child))
    return model


def through_a_step(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Bytes held behind the forward, and at most, in one forward and backward to the parameters. No ``.grad`` is left."""
    skipped = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    holders: dict[int, int] = {}
    now = most = 0

    class Holder:
        """Of one saved tensor; dies with the node that saved it."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, most
            self.tensor, self.storage = tensor, tensor.untyped_storage()
            self.key = self.storage._cdata
            if self.key not in skipped:
                now += 0 if holders.get(self.key) else self.storage.nbytes()
                holders[self.key] = holders.get(self.key, 0) + 1
                most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            if self.key not in skipped:
                holders[self.key] -= 1
                now -= 0 if holders[self.key] else self.storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Holder, lambda holder: holder.tensor):
        out = model(x)
        behind = now
        out.float().sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return behind, most


def by_mode(pair: Pair, x: Tensor) -> list[Kept]:
    """Eager and every memory mode, each as it is and with its stages checkpointed.

    Running statistics move in copies alone.
    """
    rows = []
    for memory in (None, *MEMORY):
        how = "eager" if memory is None else f'fused, memory="{memory}"'
        model = copy.deepcopy(pair.eager) if memory is None else with_memory(copy.deepcopy(pair.fused), memory)
        rows.append(Kept(how, *through_a_step(model, x)))
        if memory in (None, "low"):
            rows.append(Kept(f"{how}, stages checkpointed", *through_a_step(checkpointed(model), x)))
    return rows


def with_memory(model: nn.Module, memory: str) -> nn.Module:
    """The same model, each of whose fused modules keeps what ``memory`` says."""
    for module in model.modules():
        if isinstance(module, Fused):
            module.fused_memory = memory
    return model
