"""What a run looks at: networks, batches and sizes, for a GPU and for the dry run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..specimens import DTYPES

#: The network that only the dry run has: a stem and a block, so small that the interpreter can run it.
TOY = "toy"


@dataclass(frozen=True)
class Cell:
    """A row of the models' table.

    Attributes:
        network: name of the model.
        mode: ``infer`` or ``train``.
        batch: images at once.
        precision: ``autocast`` (parameters in fp32) or ``bf16`` (parameters too).
        graph: the pass is captured once and replayed.
    """

    network: str
    mode: str
    batch: int
    precision: str = "autocast"
    graph: bool = False

    @property
    def key(self) -> str:
        """``resnet50 infer b1 autocast graph``."""
        return " ".join([self.network, self.mode, f"b{self.batch}", self.precision, *["graph"] * self.graph])

    @property
    def parameters(self) -> torch.dtype:
        """Their type in the model."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


@dataclass(frozen=True)
class Scope:
    """What the stages go through.

    Attributes:
        size: rows and columns of an image.
        layers: network and mode whose launches are checked, timed and tuned, in order of worth.
        checked: further ones that are only checked.
        batch: of those launches.
        cells: what is timed as a whole.
        compiled: cells that torch.compile joins, with its modes, in order of worth.
        candidates: tiles tried for a launch.
        dtype: of the launches that are timed and tuned.
    """

    size: int
    layers: tuple[tuple[str, str], ...]
    checked: tuple[tuple[str, str], ...]
    batch: int
    cells: tuple[Cell, ...]
    compiled: tuple[tuple[Cell, str], ...]
    candidates: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def profiled(self) -> Cell:
        """The training step that is profiled."""
        return next(cell for cell in self.cells if cell.mode == "train")


def _cells(networks: tuple[str, ...], large: int) -> tuple[Cell, ...]:
    def of(network: str) -> list[Cell]:
        return [
            Cell(network, "train", large),
            Cell(network, "infer", large),
            Cell(network, "infer", 1, graph=True),
            Cell(network, "infer", 32),
            Cell(network, "infer", 1),
        ]

    first, *others = networks
    plain = [Cell(first, "infer", large, "bf16"), Cell(first, "infer", 1, "bf16", graph=True)]
    return (*of(first), *plain, *(cell for network in others for cell in of(network)))


def full(memory_bytes: int) -> Scope:
    """What is measured on a GPU; half the large batch as often as its memory asks for (ResNet-152 trains in about 32 GB)."""
    large = 256
    while large > 16 and memory_bytes < large * 180e6:
        large //= 2
    cells = _cells(("resnet50", "resnet18", "resnext50_32x4d", "resnet152"), large)
    by_key = {cell.key: cell for cell in cells}

    def named(*keys: str) -> list[Cell]:
        return [by_key[key.replace("LARGE", f"b{large}")] for key in keys]

    default = named(
        "resnet50 infer LARGE autocast",
        "resnet50 train LARGE autocast",
        "resnet50 infer LARGE bf16",
        "resnet50 infer b1 autocast",
        "resnet18 train LARGE autocast",
        "resnet18 infer LARGE autocast",
    )
    tuned = named("resnet50 infer LARGE bf16", "resnet50 train LARGE autocast")
    return Scope(
        size=224,
        layers=(("resnet50", "train"), ("resnet50", "infer")),
        checked=(("resnext50_32x4d", "train"), ("resnext50_32x4d", "infer"), ("resnet18", "train"), ("resnet18", "infer")),
        batch=large,
        cells=cells,
        compiled=(*((cell, "default") for cell in default), *((cell, "max-autotune") for cell in tuned)),
        candidates=12,
    )


def toy() -> Scope:
    """The dry run's: every stage, at the smallest sizes that take the same way through the code."""
    train = Cell(TOY, "train", 2)
    infer = Cell(TOY, "infer", 1)
    return Scope(
        size=16,
        layers=((TOY, "infer"), (TOY, "train")),
        checked=(),
        batch=2,
        cells=(train, replace(infer, graph=True)),
        compiled=((infer, "default"),),
        candidates=1,
    )


def narrowed(scope: Scope, wanted: Mapping[str, Any]) -> Scope:
    """The scope with what a user asked for in its place: networks with modes, a batch, a size, a number of candidates."""
    fields: dict[str, Any] = {name: wanted[name] for name in ("batch", "size", "candidates") if wanted.get(name)}
    if wanted.get("layers"):
        fields["layers"] = tuple((network, mode) for network, mode in wanted["layers"])
    if wanted.get("dtype"):
        fields["dtype"] = DTYPES[wanted["dtype"]]
    return replace(scope, **fields)
