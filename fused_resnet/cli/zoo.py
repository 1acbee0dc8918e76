"""``fused-resnet zoo PATTERN...``: fuses every model whose name matches, compares it and keeps a row of each in a CSV file.

Outputs in eval mode in fp32 are compared, and nothing else; ``fuse-check`` compares a training step and other types too.

A file that exists is gone on with: names that were compared are not done again, those that failed are; with ``--time`` those
that were not timed too. ``--markdown`` makes docs/models.md of it. A lock beside it may stay.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import sys
import time
from contextlib import ExitStack
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import counts, specimens
from ..detectors import comparable
from ..measure import circumstances, interleaved
from ..swap import explain, fuse
from ..whole_file import LOCK, held
from .arguments import CommandError, images, natural, one_line, positive, refusing
from .fuse_check import agreement
from .inspect import writable, write_text
from .named import load
from .text import Progress, sentence

#: Seconds to wait for another run that writes a row.
PATIENCE = 10.0
#: Columns of the file, and those that are filled with ``--time``.
COLUMNS = (
    "model", "chains", "launches_eager", "launches_fused", "megabytes_eager", "megabytes_fused", "fused_share",
    "error_eager", "error_fused", "agrees", "fuse_seconds", "note",
)  # fmt: skip
TIMES = ("ms_eager", "ms_channels_last", "ms_fused", "timed")
#: Seconds of one sample: a small model is called several times in turn, as it is in use.
SAMPLE = 0.03


def add(commands: Any) -> None:
    """Declare the command."""
    text = "fuse every model whose name matches, compare eval mode in fp32, and keep what came out as CSV"
    about = f"{sentence(text)}. Exit code 1 where one disagrees or fails; what failed is tried again the next time."
    parser = commands.add_parser("zoo", help=text, description=about)
    parser.add_argument(
        "patterns",
        nargs="*",
        metavar="PATTERN",
        help="resnet*, timm/resnet* (quoted), file.py:function; none with --markdown only",
    )
    parser.add_argument("--csv", type=Path, default=Path("bench/results/zoo.csv"), metavar="FILE", help="rows kept here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table of all rows here (docs/models.md)")
    parser.add_argument("--size", type=natural, default=64, metavar="N", help="rows and columns of the images compared (64)")
    parser.add_argument(
        "--counted", type=natural, default=224, metavar="N", help="of the image counted, on meta, and timed (224)"
    )
    parser.add_argument(
        "--time",
        type=positive,
        metavar="SECONDS",
        help="time inference of one image on this CPU too, so long: eager, eager in channels_last, fused, in turn",
    )
    parser.set_defaults(run=run)


def names(patterns: list[str]) -> list[str]:
    """The models that match, each once: torchvision's for images, timm's, and functions, which are named as they are."""
    vision = specimens.torchvision_models()
    groups = (vision, vision.segmentation, vision.detection) if vision is not None else ()
    known = [name for group in groups for name in vision.list_models(module=group)]  # type: ignore[union-attr]
    found: list[str] = []
    for pattern in patterns:
        if ":" in pattern:
            found.append(pattern)
        elif pattern.startswith("timm/"):
            matching = refusing(partial(specimens.timm_names, pattern.removeprefix("timm/")), ValueError)
            found += [f"timm/{name}" for name in matching]
        else:
            found += [name for name in known if fnmatch(name, pattern)]
    if patterns and not found:
        raise CommandError(f"no model matches {' '.join(patterns)}")
    return list(dict.fromkeys(found))


#: A row as it is in the file.
_Row = dict[str, str]


def _rows(file: Path) -> list[_Row]:
    """The rows of a file; without a last line that has no end, of a run that was killed or found the disk full."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CommandError(f"{file}: cannot be read ({error.strerror})") from error
    whole, _, rest = content.rpartition(b"\n")
    if not whole and ",".join(COLUMNS).encode().startswith(rest):  # not even the header
        return []
    try:
        reader = csv.DictReader(io.StringIO((whole or rest).decode(), newline=""))
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise CommandError(f"{file}: not CSV ({one_line(error)})") from error
    if tuple(reader.fieldnames or ()) not in ((*COLUMNS, *TIMES), COLUMNS) or any(
        None in found or None in found.values() for found in rows
    ):
        raise CommandError(f"{file}: these are no rows of fused-resnet zoo")
    if rest:
        print(f"{file}: its last line has no end and is left out", file=sys.stderr)
    return rows


def _keep(file: Path, made: _Row) -> None:
    """The row into the file, in the place of an older one of its model; several runs may do so in turn."""
    with ExitStack() as stack:
        try:
            stack.enter_context(held(file.with_name(f".{file.name}{LOCK}"), PATIENCE))
        except (TimeoutError, OSError) as error:
            raise CommandError(f"{file}: cannot be written, another run holds it or the folder is read-only") from error
        rows = _rows(file)  # anew: another run may have added some
        place = next((index for index, found in enumerate(rows) if found["model"] == made["model"]), len(rows))
        rows[place : place + 1] = [made]
        text = io.StringIO()
        writer = csv.DictWriter(text, (*COLUMNS, *TIMES), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(file, text.getvalue())


def _work(eager: nn.Module, size: int) -> tuple[list[counts.Work], float]:
    fused, x = fuse(eager, inplace=False), torch.zeros(1, 3, size, size)
    return [counts.Work.of(counts.kernels(model, x)) for model in (eager, fused)], counts.fused_share(fused, x)


def _counts(name: str, size: int) -> dict[str, Any]:
    """Launches and bytes of one image, from sizes alone; as they run where a model asks for values."""
    try:
        with torch.device("meta"):
            works, share = _work(comparable(load(name)), size)
    except (RuntimeError, NotImplementedError, CommandError):  # (the last: the model cannot be made there)
        works, share = _work(comparable(load(name)), size)
    return {
        "launches_eager": works[0].kernels,
        "launches_fused": works[1].kernels,
        "megabytes_eager": f"{works[0].bytes / 1e6:.1f}",
        "megabytes_fused": f"{works[1].bytes / 1e6:.1f}",
        "fused_share": f"{share:.3f}",
    }


def _times(eager: nn.Module, fused: nn.Module, x: Tensor, seconds: float) -> dict[str, str]:
    """Milliseconds of a forward of both, the eager one in both memory formats. Images are in the format of the faster."""
    last = copy.deepcopy(eager).to(memory_format=torch.channels_last)
    turned = x.contiguous(memory_format=torch.channels_last)
    calls = {"ms_eager": (eager, x), "ms_channels_last": (last, turned), "ms_fused": (fused, turned)}
    with torch.inference_mode():
        single = interleaved({name: partial(model, y) for name, (model, y) in calls.items()}, x.device, rounds=(3, 3))
        if single["ms_eager"].median < single["ms_channels_last"].median:
            calls["ms_fused"] = (fused, x)
        count = max(1, round(SAMPLE / min(timing.median for timing in single.values())))

        def burst(model: nn.Module, images: Tensor) -> None:
            for _ in range(count):
                model(images)

        bursts = {name: partial(burst, *call) for name, call in calls.items()}
        found = interleaved(bursts, x.device, seconds=seconds, rounds=(5, 1000))
    where = circumstances(x.device)
    timed = f"{where['device']}; PyTorch {where['versions']['torch']}; {where['date']}"
    return {**{name: f"{timing.milliseconds / count:.3g}" for name, timing in found.items()}, "timed": timed}


def row(name: str, size: int, counted: int, seconds: float | None = None) -> dict[str, Any]:
    """Fuse one model; what came out by :data:`COLUMNS`, and :data:`TIMES` where it is timed."""
    made: dict[str, Any] = {"model": name}
    try:
        whole = load(name)
        eager = comparable(whole)
        specimens.randomise(eager)
        x = specimens.images(2, size)
        specimens.calibrate(eager, specimens.images(8, size, seed=1))
        began = time.perf_counter()
        fused: nn.Module = fuse(eager, inplace=False)
        made["fuse_seconds"] = f"{time.perf_counter() - began:.2f}"
        made["chains"] = sum(line.fused for line in explain(fused, show=False).rows)
        found = agreement(eager, fused, x, torch.float32)
        made |= {"error_eager": f"{found.eager:.1e}", "error_fused": "" if found.failed else f"{found.fused:.1e}"}
        made |= {"agrees": "yes" if found.ok else "NO", "note": found.skipped or found.failed or ""}
        made |= _counts(name, counted)
        if seconds is not None and found.ok and not found.skipped:
            # A detector takes a list of images, and makes each as large as it is used to.
            made |= _times(whole, fuse(whole, inplace=False), specimens.images(1, counted), seconds)
    except Exception as error:  # the code of others
        made["agrees"] = made.get("agrees") if made.get("agrees") == "NO" else ""  # not all of it is done
        made["note"] = f"{type(error).__name__}: {one_line(error)[:120]}"
    return made


def markdown(rows: list[_Row]) -> str:
    """The table of the rows, for people."""
    head = """# Models

What `fuse` does to models of others: chains fused, launches and bytes of one image of 224 x 224 before and after, the part of
the convolutions' FLOPs that runs in launches of plans, and the relative error against float64, fp32, eager's and ours.
Compared are outputs in eval mode in fp32, and nothing else: a training step and other types are what `fused-resnet fuse-check
MODEL` compares, too.

Evidence: launches and bytes are *counted from sizes*, errors are *measured* on a CPU with random weights and small images
(64 x 64). Times, where there are any, are *measured* on the CPU named below: inference of one image of 224 x 224, fp32, eager
(contiguous, channels_last) and fused in turn, medians; the ratio is the faster eager's time over the fused model's. Runs of one
model differ by a few hundredths.

`fused-resnet zoo resnext50_32x4d 'timm/resnet50[ts]' bench/others.py:smp_unet_resnet34 --time 5 --markdown docs/models.md` adds
the rows of these to [`bench/results/zoo.csv`](../bench/results/zoo.csv) and makes this page of all its rows. Detectors are
compared without their choice of boxes (features, and all heads, on given regions), and timed whole: they make the image
800 x 800.

| model | chains | launches | MB | fused share | error eager, fused | | ms eager, fused | ratio |
|---|---|---|---|---|---|---|---|---|
"""
    lines = []
    for found in rows:
        launches = f"{found['launches_eager']} → {found['launches_fused']}"
        moved = f"{found['megabytes_eager']} → {found['megabytes_fused']}"
        errors = f"{found['error_eager']}, {found['error_fused']}"
        said = "agrees" if found["agrees"] == "yes" else f"**{found['agrees'] or 'not compared'}** {found['note']}"
        lines.append(
            f"| {found['model']} | {found['chains']} | {launches} | {moved} | {found['fused_share']} | {errors} | {said} "
            f"| {_told_times(found)} |"
        )
    machines = dict.fromkeys(found["timed"] for found in rows if found.get("timed"))
    timed = "".join(f"\nTimed on {machine}.\n" for machine in machines)
    return head + "\n".join(lines) + "\n" + timed


def ratio(found: _Row) -> float | None:
    """The faster eager's time over the fused model's, where they were timed."""
    if not found.get("ms_fused"):
        return None
    return min(float(found["ms_eager"]), float(found["ms_channels_last"])) / float(found["ms_fused"])


def _told_times(found: _Row) -> str:
    times = ratio(found)
    if times is None:
        return "- | -"
    return f"{found['ms_eager']}, {found['ms_channels_last']}; {found['ms_fused']} | {times:.2f}"


def run(arguments: argparse.Namespace) -> int:
    """Go on with the file; 1 if a model disagrees or failed."""
    if not arguments.patterns and arguments.markdown is None:
        raise CommandError("expected names of models, such as 'timm/resnet*', or --markdown")
    there = _rows(arguments.csv)
    untimed = arguments.time is not None
    done = {found["model"] for found in there if found["agrees"] and not (untimed and not found.get("timed"))}
    wanted = [name for name in names(arguments.patterns) if name not in done]
    if not there and not wanted:
        raise CommandError(f"{arguments.csv}: {'it has no rows' if arguments.csv.exists() else 'no such file'}")
    writable(arguments.markdown)
    if wanted:
        writable(arguments.csv)
        images(8, arguments.size)  # wrong input, not a failure of each model
    progress = Progress()
    for index, name in enumerate(wanted):
        progress.step(f"{index + 1} of {len(wanted)}: {name}")
        progress.bar(index / len(wanted))
        made = row(name, arguments.size, arguments.counted, arguments.time)
        _keep(arguments.csv, {column: str(value) for column, value in made.items()})
    progress.clear()
    rows = _rows(arguments.csv) if wanted else there
    if arguments.markdown is not None:
        write_text(arguments.markdown, markdown(rows))
    bad = [found["model"] for found in rows if found["agrees"] == "NO"]
    failed = [found["model"] for found in rows if not found["agrees"]]
    told = [f"{len(bad)} disagree {' '.join(bad)}".rstrip(), *[f"{len(failed)} failed {' '.join(failed)}"] * bool(failed)]
    print(f"{len(rows)} models in {arguments.csv}, {len(wanted)} of them new; {'; '.join(told)}")
    return 1 if bad or failed else 0
