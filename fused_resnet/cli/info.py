"""``fused-resnet info MODEL``: layers, parameters, FLOPs, launches and bytes of a forward pass and of a training step."""

from __future__ import annotations

import argparse
import copy
import warnings
from typing import Any

import torch
from torch import nn

from .. import counts
from ..models import MODELS, build, image_size
from ..specimens import classifier, classifiers, unknown_network
from ..swap import fuse, unfuse
from .arguments import CommandError, dtype, dtype_name, natural, one_line, refusing, too_large
from .text import scaled, table


def add(commands: Any) -> None:
    """Declare the command."""
    text = "layers, parameters, FLOPs, launches and bytes of a forward pass and a training step, eager and fused"
    parser = commands.add_parser("info", help=text, description=f"Show {text}. Nothing is computed: sizes suffice.")
    names = f"{', '.join(MODELS)}, cifar_resnet20, plain34 ...; vgg16 and the other classifiers of torchvision"
    parser.add_argument("model", metavar="MODEL", help=names)
    parser.add_argument("--batch", type=natural, default=1, metavar="N", help="images (1)")
    parser.add_argument("--size", type=natural, metavar="N", help="rows and columns of an image (224; for CIFAR 32)")
    parser.add_argument("--dtype", type=dtype, default="fp32", metavar="TYPE", help="fp32 (the default), fp16, bf16, fp64")
    parser.set_defaults(run=run)


def weight_layers(model: nn.Module) -> dict[str, int]:
    """How many convolutions and linear layers: ``weight layers``, which the names of networks count, and beside them the
    ``projections`` of shortcuts and the ``gates`` of highways, which they leave out (He et al. 2016, table 1)."""
    found = {"weight layers": 0, "projections": 0, "gates": 0}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            continue
        parts = set(name.split("."))
        if isinstance(module, nn.Linear):  # Swin has one called proj, which is in no shortcut
            kind = "weight layers"
        elif parts & {"downsample", "proj"}:  # ours and torchvision's ResNets; RegNets and MaxViT
            kind = "projections"
        else:
            kind = "gates" if "gate" in parts else "weight layers"
        found[kind] += 1
    return found


def _named(numbers: dict[str, int]) -> str:
    """Such as ``34 weight layers and 3 projections``."""
    words = [f"{number} {what.removesuffix('s') if number == 1 else what}" for what, number in numbers.items() if number]
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:]))) or "no weight layers"


def _pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The network ``name`` on the meta device in eval mode, eager and fused: ours, or a classifier of torchvision."""
    try:
        with torch.device("meta"):
            fused = build(name).eval()
    except ValueError as error:
        if name not in classifiers():  # asked only now: to import torchvision takes seconds
            raise CommandError(one_line(unknown_network(name, error))) from error
        eager = classifier(name).to("meta").eval()
        return eager, fuse(eager, inplace=False)
    return unfuse(copy.deepcopy(fused)), fused


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
    except (ValueError, RuntimeError) as error:  # one value per channel; images too small for an auxiliary classifier
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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fuse found no", UserWarning)  # the table shows it
        return _show(arguments)


def _show(arguments: argparse.Namespace) -> int:
    size = arguments.size or image_size(arguments.model)
    eager, fused = (model.to(arguments.dtype) for model in _pair(arguments.model))
    try:
        x = torch.empty(arguments.batch, 3, size, size, dtype=arguments.dtype, device="meta")
    except RuntimeError as error:  # more bytes than there are numbers for
        raise too_large(arguments.batch, size) from error
    # Transformers assert that images have their size.
    rows = refusing(lambda: counts.compare(eager, fused, x), RuntimeError, ValueError, AssertionError)
    all_eager, all_fused = counts.total(rows)
    convolutions = sum(kernel.flops for kernel in counts.kernels(eager, x) if kernel.name == "convolution")

    parameters = sum(parameter.numel() for parameter in eager.parameters())
    shape = f"{arguments.batch} x 3 x {size} x {size}, {dtype_name(arguments.dtype)}"
    print(f"{arguments.model}, forward pass in eval mode, input {shape}")
    print(f"{_named(weight_layers(eager))}, {scaled(parameters)} parameters, {scaled(all_eager.flops, 'FLOP')}")
    adds = f"{scaled(all_eager.flops // 2)} multiply-adds ({scaled(convolutions // 2)} in convolutions)"
    print(f"{adds}, each of which counts as two FLOPs\n")
    head = ["chain", "GFLOP", "launches eager", "fused", "MB eager", "fused", "saved"]
    cells = [_cells(row.place if row.chain else f"{row.place} (PyTorch)", row.eager, row.fused) for row in rows]
    print(table(head, [*cells, _cells("total", all_eager, all_fused)]))
    _show_step(eager, x)
    print("Bytes: each operand of each launch read once, its result written once. Counted, not measured.")
    return 0
