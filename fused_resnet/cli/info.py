"""``fused-resnet info MODEL``: layers, parameters, FLOPs, launches and bytes of a forward pass and of a training step."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import nn

from .. import counts
from ..models import MODELS, build, image_size
from ..swap import fuse, unfuse
from .arguments import dtype, dtype_name, natural, one_line, refusing, too_large
from .text import scaled, table


def add(commands: Any) -> None:
    """Declare the command."""
    text = "layers, parameters, FLOPs, launches and bytes of a forward pass and a training step, eager and fused"
    parser = commands.add_parser("info", help=text, description=f"Show {text}. Nothing is computed: sizes suffice.")
    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(MODELS)}, cifar_resnet20, plain34 ...")
    parser.add_argument("--batch", type=natural, default=1, metavar="N", help="images (1)")
    parser.add_argument("--size", type=natural, metavar="N", help="rows and columns of an image (224; for CIFAR 32)")
    parser.add_argument("--dtype", type=dtype, default="fp32", metavar="TYPE", help="fp32 (the default), fp16, bf16, fp64")
    parser.set_defaults(run=run)


def weight_layers(model: nn.Module) -> int:
    """Convolutions and linear layers, projections included."""
    return sum(isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) for module in model.modules())


def _megabytes(number: int) -> str:
    return f"{number / 1e6:,.1f}"


def _cells(place: str, eager: counts.Work, fused: counts.Work) -> list[str]:
    saved = f"{eager.bytes / fused.bytes:.1f}x" if fused.bytes else ""
    numbers = [f"{fused.flops / 1e9:,.2f}", str(eager.kernels), str(fused.kernels)]
    return [place, *numbers, _megabytes(eager.bytes), _megabytes(fused.bytes), saved]


def _part(number: int, whole: int) -> list[str]:
    return [_megabytes(number), f"{number / whole:.2f}"]


def _show_step(eager: nn.Module, x: torch.Tensor) -> None:
    """Launches and bytes of a training step, and what it keeps in between."""
    eager.train()
    models = {
        "eager": eager,
        "fused": fuse(eager, inplace=False),
        'fused, memory="low"': fuse(eager, memory="low", inplace=False),
    }
    print("\na training step: forward with the batch's statistics, backward to all parameters")
    try:
        steps = {name: counts.step(model, x) for name, model in models.items()}
    except ValueError as error:  # one value per channel
        print(f"  none for this input: {one_line(error)}\n")
        return
    works = {name: counts.Work.of(step.kernels) for name, step in steps.items()}
    cells = []
    for name, step in steps.items():
        numbers = [f"{works[name].flops / 1e9:,.2f}", str(len(step.forward)), str(len(step.backward))]
        pairs = ((works[name].bytes, works["eager"].bytes), (step.saved, steps["eager"].saved))
        parts = [cell for number, whole in pairs for cell in (_megabytes(number), f"{number / whole:.2f}")]
        cells.append([name, *numbers, *parts])
    print(table(["", "GFLOP", "launches forward", "backward", "MB", "of eager", "MB kept between", "of eager"], cells))
    twice = counts.Work.of(counts.in_passes(steps["eager"].kernels)).bytes
    ratio = works["fused"].bytes / twice
    print(
        f"  with BatchNorm as the two passes it makes each way, eager moves {_megabytes(twice)} MB (fused: {ratio:.2f} of it)\n"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the tables."""
    size = arguments.size or image_size(arguments.model)
    with torch.device("meta"):
        fused = refusing(lambda: build(arguments.model), ValueError).eval().to(arguments.dtype)
        try:
            x = torch.empty(arguments.batch, 3, size, size, dtype=arguments.dtype)
        except RuntimeError as error:  # more bytes than there are numbers for
            raise too_large(arguments.batch, size) from error
    eager = unfuse(copy.deepcopy(fused))
    rows = refusing(lambda: counts.compare(eager, fused, x), RuntimeError)
    all_eager, all_fused = counts.total(rows)

    parameters = sum(parameter.numel() for parameter in eager.parameters())
    shape = f"{arguments.batch} x 3 x {size} x {size}, {dtype_name(arguments.dtype)}"
    print(f"{arguments.model}, forward pass in eval mode, input {shape}")
    print(
        f"{weight_layers(eager)} weight layers, {scaled(parameters)} parameters, {scaled(all_eager.flops, 'FLOP')} "
        "(a multiply-add counts two)\n"
    )
    head = ["chain", "GFLOP", "launches eager", "fused", "MB eager", "fused", "saved"]
    cells = [_cells(row.place if row.chain else f"{row.place} (PyTorch)", row.eager, row.fused) for row in rows]
    print(table(head, [*cells, _cells("total", all_eager, all_fused)]))
    _show_step(eager, x)
    print("Bytes: each operand of each launch read once, its result written once. Counted, not measured.")
    return 0
