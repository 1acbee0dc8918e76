"""What the analytical model expects of whole networks on GPUs: shown until there are measurements, and as predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from .. import counts, network
from ..launch import Launch
from ..models import MODELS
from ..network import Use
from ..swap import fuse, unfuse
from ..tuning import choice, model
from ..tuning.devices import Device, devices
from .draw import Group, Point

NETWORKS = ("resnet18", "resnet50", "resnet152", "resnext50_32x4d")
BATCH, SIZE, DTYPE = 256, 224, torch.bfloat16
#: What the tables of single launches are of.
SHOWN, SHOWN_DEVICE = "resnet50", "H200"


@dataclass(frozen=True)
class Expected:
    """A launch: seconds, what bounds it, and how it runs."""

    seconds: float
    bound: str
    how: str


@dataclass(frozen=True)
class Total:
    """A network on a device: seconds of a pass, eager and fused."""

    eager: float
    fused: float

    @property
    def ratio(self) -> float:
        """How many times as fast."""
        return self.eager / self.fused


@cache
def expected(launch: Launch, device: Device) -> Expected:
    """What the model expects where the best of its own tiles is taken, or the launch in pieces where that is clearly better."""
    seconds, tile = choice.ranked(launch, device)[0]
    apart = choice.in_pieces(launch, device, False)
    if apart is not None and apart[0] < choice.WORTH * seconds:
        return Expected(apart[0], model.predict(launch, tile, device).bound, "apart")
    return Expected(seconds, model.predict(launch, tile, device).bound, "fused")


@cache
def uses(name: str, mode: str) -> tuple[Use, ...]:
    """The distinct launches of a network at the batch that is shown."""
    return tuple(network.uses(name, BATCH, SIZE, DTYPE, mode))


@cache
def _kernels(name: str, mode: str) -> tuple[tuple[counts.Kernel, ...], tuple[counts.Kernel, ...]]:
    """Of the eager network, and of the fused one those that are no launches (the average, the classifier)."""
    with torch.device("meta"):
        x = torch.empty(BATCH, 3, SIZE, SIZE, dtype=DTYPE)
        eager = unfuse(MODELS[name]())
        fused = fuse(unfuse(MODELS[name]()))
    sides = []
    for one in (eager, fused):
        one = one.to(DTYPE).train(mode == "train")
        sides.append(tuple(counts.step(one, x).kernels) if mode == "train" else tuple(counts.kernels(one, x)))
    return sides[0], tuple(kernel for kernel in sides[1] if not kernel.fused)


@cache
def total(name: str, mode: str, device: Device) -> Total:
    """A whole network; the optimizer is on neither side."""
    eager, outside = _kernels(name, mode)
    launches = sum(use.times * expected(use.launch, device).seconds for use in uses(name, mode))
    rest = sum(choice.eager_seconds(kernel, device, DTYPE) for kernel in outside)
    return Total(sum(choice.eager_seconds(kernel, device, DTYPE) for kernel in eager), launches + rest)


def speedups() -> list[Group]:
    """Bars of all devices: how many times as fast as eager, the network that is shown."""

    def bar(mode: str, device: Device) -> tuple[float, str]:
        ratio = total(SHOWN, mode, device).ratio
        return ratio, f"{ratio:.2f}x"

    return [
        Group(device.name, {"inference": bar("infer", device), "training step": bar("train", device)})
        for device in devices().values()
    ]


@cache
def saved(name: str) -> Mapping[str, int]:
    """Bytes kept for the backward of a training step, by contender, counted from sizes."""
    with torch.device("meta"):
        x = torch.empty(1, 3, SIZE, SIZE, dtype=DTYPE)
        models = {
            "eager": unfuse(MODELS[name]()),
            "fused": fuse(unfuse(MODELS[name]())),
            "fused, low memory": fuse(unfuse(MODELS[name]()), memory="low"),
        }
    return {who: BATCH * counts.step(one.to(DTYPE).train(), x).saved for who, one in models.items()}


def memory() -> list[Group]:
    """Bars of what is kept for the backward."""
    groups = []
    for name in NETWORKS:
        kept = saved(name)
        whole = kept["eager"]
        groups.append(Group(name, {who: (size, f"{size / 1e9:.1f} GB ({size / whole:.2f})") for who, size in kept.items()}))
    return groups


def points(device: Device, modes: Sequence[str] = ("infer", "train")) -> list[Point]:
    """The launches with FLOPs of the network that is shown."""
    made = []
    for mode in modes:
        whole = sum(use.times * expected(use.launch, device).seconds for use in uses(SHOWN, mode))
        for use in uses(SHOWN, mode):
            if use.launch.flops:
                seconds = expected(use.launch, device).seconds
                hint = f"{mode} {use.layers[0]}: {seconds * 1e6:.0f} us predicted, {use.times} times"
                share = use.times * seconds / whole / len(modes)
                made.append(
                    Point(use.launch.kind, use.launch.flops / use.launch.bytes, use.launch.flops / seconds, share, hint)
                )
    return made
