"""``fused-resnet profile MODEL...``: images a second, time by launch, memory by layer, and what bounds it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .. import growth, kept, measure, profiling
from ..gpu import draw
from ..models import build, image_size
from ..train import TrainingError, UsageError
from ..train.data import Data
from ..train.supply import Supply, check, watch
from .arguments import (
    CommandError,
    add_where,
    chosen_backend,
    dtype,
    dtype_name,
    natural,
    naturals,
    one_line,
    positive,
    too_large,
    whole,
)
from .arguments import device as named_device
from .gpu import writable
from .inspect import write_text
from .text import Progress, scaled, sentence, table

#: Rows of the table of launches.
MOST = 12


def add(commands: Any) -> None:
    """Declare the command."""
    text = "images a second over depth and batch, time by launch, data loading, memory by layer, eager beside fused"
    parser = commands.add_parser("profile", help=text, description=f"{sentence(text)}; docs/paper.md has an example.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names, such as cifar_resnet20 cifar_resnet56 resnet50")
    parser.add_argument("--batch", type=naturals, metavar="A,B", help="images in a call (8)")
    parser.add_argument("--size", type=natural, metavar="N", help="rows and columns; by default the network's own")
    parser.add_argument("--mode", choices=profiling.MODES, help="a training step (the default) or a forward")
    parser.add_argument("--memory", choices=("default", "less", "low"), help="what is kept for the backward")
    parser.add_argument("--dtype", type=dtype, metavar="TYPE", help="fp32 (the default), fp16, bf16")
    parser.add_argument("--seconds", type=positive, metavar="S", help="to time each pair (3)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for profile.json, trace.json and the pictures")
    grow = parser.add_argument_group("what grows with the depth", "counted on small images; nothing is timed")
    grow.add_argument("--growth", action="store_true", help="launches, autograd nodes and Python calls of each model's step")
    grow.add_argument("--compile", action="store_true", help="and nodes of the compiler's graph (minutes for 100 layers)")
    data = parser.add_argument_group("data loading", "beside a training step; by default the digits for CIFAR's networks")
    data.add_argument("--recipe", metavar="NAME", help="whose images and augmentation, as of the train command")
    data.add_argument("--data", metavar="NAME", help="digits, cifar10, cifar100 or folder; by default the recipe's")
    data.add_argument("--data-dir", type=Path, metavar="DIR", help="where the data set lies, if it has to be brought")
    data.add_argument("--workers", type=whole, metavar="N", help="processes that decode images of a folder (2)")
    add_where(parser)
    parser.set_defaults(run=run, device=None)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and write where a folder is given."""
    for name in arguments.models:
        try:
            with torch.device("meta"):
                build(name)
        except ValueError as error:
            raise CommandError(one_line(error)) from error
    if arguments.compile and not arguments.growth:
        raise CommandError("--compile is for --growth")
    if arguments.growth:
        _refuse_with_growth(arguments)
    _fill_in(arguments)
    if arguments.out is not None:
        writable(arguments.out)
    if arguments.growth:
        _growth(arguments)
        return 0
    images = _images(arguments)
    _check_images(arguments)
    with chosen_backend(arguments.backend, arguments.device):
        try:
            _profile(arguments, images)
        except TrainingError as error:  # an image that cannot be read
            print(f"fused-resnet: {one_line(error)}", file=sys.stderr)
            return 1
        except ValueError as error:  # one value a channel
            raise CommandError(one_line(error)) from error
    return 0


#: Options that ``--growth`` has no use for, and what they are where they are not given: argparse does not tell "given" from
#: "as by default", so that they have none there.
IDLE: dict[str, Any] = {
    "batch": [8],
    "size": 0,
    "mode": "train",
    "dtype": torch.float32,
    "seconds": 3.0,
    "recipe": "",
    "data": "",
    "data_dir": None,
    "workers": 2,
    "device": "auto",
}


def _refuse_with_growth(arguments: argparse.Namespace) -> None:
    """It counts a training step of two small fp32 images on the CPU, whatever is asked for."""
    given = [f"--{name.replace('_', '-')}" for name in IDLE if getattr(arguments, name) is not None]
    if given:
        raise CommandError(f"--growth counts a training step of two small fp32 images on the CPU: leave out {', '.join(given)}")


def _fill_in(arguments: argparse.Namespace) -> None:
    """The defaults of :data:`IDLE`."""
    for name, value in IDLE.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, named_device(value) if name == "device" else value)


def _growth(arguments: argparse.Namespace) -> None:
    """Of each model in training mode on two images, eager and fused."""
    head = ["", "launches", "autograd nodes", "Python calls", *["graph nodes", "Python calls to compile"] * arguments.compile]
    cells, rows = [], []
    progress = Progress()
    side = 8 if all(name.startswith("cifar_") for name in arguments.models) else 32
    for name in arguments.models:
        progress.step(name)
        pair = profiling.pair_of(profiling.Subject(name, 2), torch.device("cpu"), torch.float32, arguments.memory)
        for how, model in (("eager", pair.eager), ("fused", pair.fused)):
            with chosen_backend(arguments.backend, torch.device("cpu")):
                found = growth.count(model, torch.randn(2, 3, side, side), arguments.compile)
            numbers = list(vars(found).values())[: len(head) - 1]
            cells.append([f"{name}, {how}", *(f"{number:,}" if number else "-" for number in numbers)])
            rows.append({"model": name, "how": how, **vars(found)})
    print(f"a training step of two images of {side}x{side}, counted on the CPU; the numbers are those of any size of images")
    print(table(head, cells))
    if arguments.out is not None:
        write_text(arguments.out / "growth.json", json.dumps(rows, indent=1))


def _images(arguments: argparse.Namespace) -> Data | str:
    """The data set whose loading is looked at, or why none is."""
    from ..train import data, recipe

    asked = arguments.recipe or arguments.data
    if arguments.mode != "train":
        if asked:
            raise CommandError("--recipe and --data are for --mode train")
        return ""
    if not asked and not arguments.models[-1].startswith("cifar_"):
        return "not looked at: --recipe imagenet-paper --data-dir DIR does"
    try:
        chosen = recipe.load(arguments.recipe or "digits")
        images = data.load(arguments.data or chosen.data, arguments.data_dir, chosen, on_corrupt="skip")
        check(images, arguments.batch[-1])  # the last one is looked at in detail
        return images
    except UsageError as error:
        if asked:
            raise CommandError(one_line(error)) from error
        return f"not looked at: {one_line(error)}"


def _check_images(arguments: argparse.Namespace) -> None:
    """Raise before the work where no memory holds the images."""
    for subject in profiling.subjects(arguments.models, arguments.batch, arguments.size, arguments.mode):
        try:
            subject.images(arguments.device, arguments.dtype)
        except (RuntimeError, TypeError, MemoryError) as error:
            raise too_large(subject.batch, subject.size or image_size(subject.model)) from error


def _profile(arguments: argparse.Namespace, images: Data | str) -> None:
    device, kind, mode = arguments.device, arguments.dtype, arguments.mode
    where = measure.circumstances(device)
    print(f"{'a training step' if mode == 'train' else 'a forward pass'}, {dtype_name(kind)}; {where['evidence']}")
    progress = Progress()
    rows, cells = [], []
    for subject in profiling.subjects(arguments.models, arguments.batch, arguments.size, mode):
        progress.step(f"{subject.model}, batch {subject.batch}")
        pair = profiling.pair_of(subject, device, kind, arguments.memory)
        times = profiling.throughput(subject, pair, device, kind, arguments.seconds)
        rates = {name: subject.batch / timing.median for name, timing in times.items()}
        rows.append({"model": subject.model, "batch": subject.batch, "images_per_second": rates})
        speed = f"{rates['fused'] / rates['eager']:.2f}x"
        cells.append([subject.model, str(subject.batch), f"{rates['eager']:,.1f}", f"{rates['fused']:,.1f}", speed])
    print("\nimages a second, eager and fused in turn")
    print(table(["", "batch", "eager", "fused", "fused/eager"], cells))

    progress.step(f"{subject.model}, batch {subject.batch}: by launch")  # the last one in detail
    limits = profiling.ceilings(device, kind)
    call = profiling.call_of(pair.fused, subject.images(device, kind), mode)
    spent = profiling.launches(call, device, limits)
    loading: Supply | None = None
    if not isinstance(images, str):
        progress.step(f"{images.name}: data loading")
        step = profiling.step_of(pair.fused, mode)
        loading = watch(images, lambda x: step(x.to(kind)), device, subject.batch, arguments.workers, arguments.seconds / 2)
    _show_launches(subject, spent, limits, device)
    _show_loading(images, loading)
    layers, modes = [], []
    if mode == "train":
        progress.step(f"{subject.model}, batch {subject.batch}: memory")
        layers = kept.by_layer(pair, subject.images(device, kind))
        modes = kept.by_mode(pair, subject.images(device, kind))
        _show_layers(layers)
        _show_modes(modes)
    if arguments.out is not None:
        profiling.trace(call, device, arguments.out / "trace.json")
        _write(arguments.out, where, rows, spent, limits, subject, loading, layers, modes)


def _share(line: profiling.Line, spent: profiling.Times) -> list[str]:
    part = f"{line.seconds / spent.whole:.0%}"
    rates = [scaled(line.flops / max(line.seconds, 1e-12), "FLOP/s"), scaled(line.bytes / max(line.seconds, 1e-12), "B/s")]
    return [str(line.times), f"{line.seconds * 1e3:.2f}", part, *rates, line.bound]


def _short(signature: str) -> str:
    """A launch's signature without its operands, and without ends that do nothing."""
    words = signature.split(" -> ")[0].split(" ")[:-1]
    ends = [end for end in words.pop().split("/") if end not in ("identity", "store")]
    plain = [word for word in words if word not in ("p0x0", "d1x1", "g1", "s1x1")]
    return " ".join(filter(None, (*plain, "+".join(ends))))


def _show_launches(
    subject: profiling.Subject, spent: profiling.Times, limits: profiling.Ceilings, device: torch.device
) -> None:
    print(f"\n{subject.model}, batch {subject.batch}: where {spent.whole * 1e3:.1f} ms go")
    head = ["", "launches", "ms", "of all", "FLOP/s", "B/s", "nearest bound"]
    cells = [[line.what, *_share(line, spent)] for line in spent.kinds]
    outside = max(spent.whole - spent.inside, 0.0)
    cells.append(["outside the launches", "", f"{outside * 1e3:.2f}", f"{outside / spent.whole:.0%}", "", "", ""])
    print(table(head, cells))
    print(f"\nthe {min(MOST, len(spent.launches))} that take longest, of {len(spent.launches)}")
    print(table(head, [[_short(line.what), *_share(line, spent)] for line in spent.launches[:MOST]]))
    reached = f"{scaled(limits.bandwidth, 'B/s')} in a copy, {scaled(limits.arithmetic, 'FLOP/s')} in a product of matrices"
    print(f"  reached here and now: {reached}, {limits.start * 1e6:.1f} us for a launch of one pixel")
    print(f"  from {profiling.BOUND:.0%} of one of the first two a launch counts as bound by it")
    for flag in spent.flags(device):
        print(f"  bound by {flag}")


def _show_loading(images: Data | str, loading: Supply | None) -> None:
    if loading is None:
        if images:
            print(f"\ndata loading: {images}")
        return
    workers = f", {loading.workers} workers" if loading.workers else ""
    print(f"\ndata loading: {loading.data}, batch {loading.batch}{workers}")
    rates = f"{loading.alone:,.1f} made ready alone, {loading.stepping:,.1f} taken by steps alone, {loading.taken:,.1f} by both"
    print(f"  images a second: {rates} together, {loading.share:.2f} of steps alone")
    print(f"  the steps wait {loading.waited:.1%} of the time: {_VERDICTS[loading.why]}{_advice(loading)}")


#: By :attr:`fused_resnet.train.supply.Supply.why`.
_VERDICTS = {
    "waits": "waiting for images is what bounds the training",
    "shares": "sharing the processor with the loader's workers is what bounds the training",
    "": "loading is not what bounds the training",
}


def _advice(loading: Supply) -> str:
    if not loading.workers or not loading.why:
        return ""
    return "; more --workers help where cores are idle" if loading.why == "waits" else "; more --workers do not help"


def _cell(number: int) -> str:
    return f"{number / 2**20:.2f}"


def _show_layers(layers: list[tuple[str, int, int]]) -> None:
    total = ("total", sum(row[1] for row in layers), sum(row[2] for row in layers))
    shown = layers if len(layers) <= 40 else [*layers[:12], ("...", 0, 0), *layers[-12:]]
    cells = [[place, _cell(e), _cell(f)] if place != "..." else ["...", "", ""] for place, e, f in shown]
    cells.append([total[0], _cell(total[1]), f"{_cell(total[2])} ({total[2] / max(total[1], 1):.2f} of eager)"])
    print("\nkept for the backward, MiB, by the layer that keeps it first")
    print(table(["", "eager", "fused"], cells))


def _show_modes(modes: list[kept.Kept]) -> None:
    eager = modes[0]
    cells = [
        [row.how, _cell(row.behind), f"{row.behind / eager.behind:.2f}", _cell(row.most), f"{row.most / eager.most:.2f}"]
        for row in modes
    ]
    print("\nheld by autograd, MiB: between forward and backward, and at most at any moment of the step")
    print(table(["", "between", "of eager", "at most", "of eager"], cells))


def _write(
    out: Path,
    where: dict[str, Any],
    rows: list[dict[str, Any]],
    spent: profiling.Times,
    limits: profiling.Ceilings,
    subject: profiling.Subject,
    loading: Supply | None,
    layers: list[tuple[str, int, int]],
    modes: list[kept.Kept],
) -> None:
    caption = f"{where['device']}, PyTorch {where['versions']['torch']}, {where['date']}"
    groups = [
        draw.Group(
            f"{row['model']}, batch {row['batch']}",
            {name: (rate, f"{rate:,.1f}") for name, rate in row["images_per_second"].items()},
        )
        for row in rows
    ]
    write_text(out / "throughput.svg", draw.bars("Images a second", where["evidence"], caption, groups))
    by_kind = [
        draw.Group(line.what, {"fused": (line.seconds * 1e3, f"{line.seconds * 1e3:.2f} ms, {line.bound}")})
        for line in spent.kinds
    ]
    title = f"{subject.model}, batch {subject.batch}: time by kind of launch"
    write_text(out / "launches.svg", draw.bars(title, where["evidence"], caption, by_kind))
    document = {
        **where,
        "throughput": rows,
        "subject": vars(subject),
        "whole_seconds": spent.whole,
        "host_seconds": spent.host,
        "kinds": [vars(line) for line in spent.kinds],
        "launches": [vars(line) for line in spent.launches],
        "loading": loading and {**vars(loading), "bounds": loading.bounds, "why": loading.why},
        "kept_bytes": [{"place": place, "eager": eager, "fused": fused} for place, eager, fused in layers],
        "held_bytes": [vars(row) for row in modes],
        "ceilings": vars(limits),
    }
    write_text(out / "profile.json", json.dumps(document, indent=1))
    pictures = ["throughput.svg", "launches.svg"]
    if layers:
        pictures.append("memory.svg")
        title = f"{subject.model}, batch {subject.batch}: MiB kept for the backward"
        by_stage: dict[str, tuple[int, int]] = {}
        for place, eager, fused in layers:
            stage = place.split(".")[0]
            before = by_stage.get(stage, (0, 0))
            by_stage[stage] = before[0] + eager, before[1] + fused
        bars = [
            draw.Group(stage, {name: (size / 2**20, _cell(size)) for name, size in zip(("eager", "fused"), sizes)})
            for stage, sizes in by_stage.items()
        ]
        write_text(out / "memory.svg", draw.bars(title, "counted as it ran", caption, bars))
    print(f"\n{out}: profile.json, trace.json (for chrome://tracing or Perfetto), {', '.join(pictures)}")
