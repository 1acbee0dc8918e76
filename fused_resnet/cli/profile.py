"""``fused-resnet profile MODEL...``: images a second, time by launch, memory by layer, and what bounds it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from .. import measure, profiling
from ..gpu import draw
from ..models import build
from .arguments import (
    CommandError,
    add_backend,
    add_device,
    chosen_backend,
    dtype,
    dtype_name,
    natural,
    naturals,
    one_line,
    positive,
)
from .gpu import writable
from .text import Progress, scaled, table

#: Rows of the table of launches.
MOST = 12


def add(commands: Any) -> None:
    """Declare the command."""
    text = "images a second over depth and batch, time by launch, memory by layer, eager beside fused"
    parser = commands.add_parser("profile", help=text, description=f"{text.capitalize()}; docs/paper.md has an example.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names, such as cifar_resnet20 cifar_resnet56 resnet50")
    parser.add_argument("--batch", type=naturals, default="8", metavar="A,B", help="images in a call (8)")
    parser.add_argument("--size", type=natural, default=0, metavar="N", help="rows and columns; by default the network's own")
    parser.add_argument("--mode", choices=profiling.MODES, default="train", help="a training step (the default) or a forward")
    parser.add_argument("--memory", choices=("default", "less", "low"), help="what is kept for the backward")
    parser.add_argument("--dtype", type=dtype, default="fp32", metavar="TYPE", help="fp32 (the default), fp16, bf16")
    parser.add_argument("--seconds", type=positive, default=3.0, metavar="S", help="to time each pair (3)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for profile.json, trace.json and the pictures")
    add_device(parser)
    add_backend(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and write where a folder is given."""
    for name in arguments.models:
        try:
            with torch.device("meta"):
                build(name)
        except ValueError as error:
            raise CommandError(one_line(error)) from error
    if arguments.out is not None:
        writable(arguments.out)
    with chosen_backend(arguments.backend, arguments.device):
        try:
            _profile(arguments)
        except ValueError as error:  # one value a channel
            raise CommandError(one_line(error)) from error
    return 0


def _profile(arguments: argparse.Namespace) -> None:
    device, kind, mode = arguments.device, arguments.dtype, arguments.mode
    where = measure.circumstances(device)
    print(f"{'a training step' if mode == 'train' else 'a forward pass'}, {dtype_name(kind)}; {where['evidence']}")
    progress = Progress()
    rows, cells = [], []
    for subject in profiling.subjects(arguments.models, arguments.batch, arguments.size, mode):
        progress.step(f"{subject.model}, batch {subject.batch}")
        pair = profiling.Pair.of(subject, device, kind, arguments.memory)
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
    _show_launches(subject, spent, limits, device)
    kept = profiling.kept_by_layer(pair, subject.images(device, kind)) if mode == "train" else []
    if kept:
        _show_kept(kept)
    if arguments.out is not None:
        profiling.trace(call, device, arguments.out / "trace.json")
        _write(arguments.out, where, rows, spent, kept, limits, subject)


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
    print(
        f"  reached here and now: {scaled(limits.bandwidth, 'B/s')} in a copy, {scaled(limits.arithmetic, 'FLOP/s')} in a "
        f"product of matrices; from {profiling.BOUND:.0%} of one a launch counts as bound by it"
    )
    for flag in spent.flags(device):
        print(f"  bound by {flag}")


def _show_kept(kept: list[tuple[str, int, int]]) -> None:
    def cell(number: int) -> str:
        return f"{number / 2**20:.2f}"

    total = ("total", sum(row[1] for row in kept), sum(row[2] for row in kept))
    shown = kept if len(kept) <= 40 else [*kept[:12], ("...", 0, 0), *kept[-12:]]
    cells = [[place, cell(e), cell(f)] if place != "..." else ["...", "", ""] for place, e, f in shown]
    cells.append([total[0], cell(total[1]), f"{cell(total[2])} ({total[2] / max(total[1], 1):.2f} of eager)"])
    print("\nkept for the backward, MiB, by the layer that keeps it first")
    print(table(["", "eager", "fused"], cells))


def _write(
    out: Path,
    where: dict[str, Any],
    rows: list[dict[str, Any]],
    spent: profiling.Times,
    kept: list[tuple[str, int, int]],
    limits: profiling.Ceilings,
    subject: profiling.Subject,
) -> None:
    caption = f"{where['device']}, PyTorch {where['versions']['torch']}, {where['date']}"
    groups = [
        draw.Group(
            f"{row['model']}, batch {row['batch']}",
            {name: (rate, f"{rate:,.1f}") for name, rate in row["images_per_second"].items()},
        )
        for row in rows
    ]
    (out / "throughput.svg").write_text(draw.bars("Images a second", where["evidence"], caption, groups), encoding="utf-8")
    by_kind = [
        draw.Group(line.what, {"fused": (line.seconds * 1e3, f"{line.seconds * 1e3:.2f} ms, {line.bound}")})
        for line in spent.kinds
    ]
    title = f"{subject.model}, batch {subject.batch}: time by kind of launch"
    (out / "launches.svg").write_text(draw.bars(title, where["evidence"], caption, by_kind), encoding="utf-8")
    document = {
        **where,
        "throughput": rows,
        "subject": vars(subject),
        "whole_seconds": spent.whole,
        "host_seconds": spent.host,
        "kinds": [vars(line) for line in spent.kinds],
        "launches": [vars(line) for line in spent.launches],
        "kept_bytes": [{"place": place, "eager": eager, "fused": fused} for place, eager, fused in kept],
        "ceilings": vars(limits),
    }
    (out / "profile.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    print(f"\n{out}: profile.json, trace.json (for chrome://tracing or Perfetto), throughput.svg, launches.svg")
