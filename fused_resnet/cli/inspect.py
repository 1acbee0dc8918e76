"""``fused-resnet inspect``: what the compiler makes of a network's launches, and their predicted times. No GPU needed."""

from __future__ import annotations

import argparse
import json
import os
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..models import MODELS
from ..network import MODES
from ..specimens import unknown
from ..tuning import devices
from .arguments import CommandError, dtype, natural, refusing
from .text import Progress, kernel_progress


def add(commands: Any) -> None:
    """Declare the command."""
    text = "what the compiler makes of a network's launches for a GPU, and their predicted times"
    about = f"Show {text}: registers, spills, occupancy, the main loop's instructions, FLOPs and bytes. No GPU is needed."
    parser = commands.add_parser("inspect", help=text, description=about)
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="a network (resnet50)")
    parser.add_argument("--batch", type=natural, default=256, metavar="N", help="images (256)")
    parser.add_argument("--size", type=natural, default=224, metavar="N", help="rows and columns of an image (224)")
    parser.add_argument("--dtype", type=dtype, default="bf16", metavar="TYPE", help="bf16 (the default), fp16, fp32")
    parser.add_argument("--tf32", action="store_true", help="fp32 may be multiplied as tf32")
    parser.add_argument("--mode", choices=MODES, default="infer", help="infer (the default) or train: forward and backward")
    parser.add_argument("--arch", default="sm_90", metavar="A,B", help="architectures (sm_90)")
    parser.add_argument(
        "--device", metavar="NAME", help="predict for this GPU; by default for a typical one of each architecture"
    )
    parser.add_argument("--layer", metavar="PATTERN", help="only these layers: a part of the name, or all of it with * and ?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the roofline, SVG")
    parser.add_argument("--asm", type=Path, metavar="DIR", help="write each kernel's assembly")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="show what changed between two reports; no more"
    )
    parser.set_defaults(run=run)


def _devices(archs: str, name: str | None) -> dict[str, devices.Device]:
    """Architecture -> the device to predict for."""
    from ..inspect import report

    known = report.architectures()
    chosen: dict[str, devices.Device] = {}
    for arch in (part.strip() for part in archs.split(",")):
        if arch not in known:
            raise CommandError(f"unknown architecture {arch!r}: expected one of {', '.join(known)}")
        typical = devices.typical(arch)
        assert typical is not None
        chosen[arch] = typical
    if name is not None:
        device = refusing(lambda: devices.find(name), ValueError)
        if device.arch not in chosen:
            raise CommandError(f"--device {device.name} is of {device.arch}, which is not in --arch {archs}")
        chosen[device.arch] = device
    return chosen


def writable(file: Path | None, folder: Path | None = None) -> None:
    """Raise before the work where its result could not be written."""
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"cannot make the folder {folder}: {error.strerror}") from error
    place = folder if folder is not None else file.parent if file is not None else None
    if place is not None and not (place.is_dir() and os.access(place, os.W_OK)):
        missing = "" if place.exists() else ": it does not exist, and is not made for a file"  # a slip is likelier than a wish
        raise CommandError(f"cannot write to the folder {place}{missing}")
    if file is not None and file.is_dir():
        raise CommandError(f"{file} is a folder")
    if file is not None and file.exists() and not file.is_file():  # /dev/null: a file would take its place
        raise CommandError(f"{file} is no regular file")


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, write the files."""
    from ..inspect import cache, compiling, report, roofline, show

    if arguments.compare:
        before, after = (refusing(partial(report.load, path), ValueError) for path in arguments.compare)
        print(refusing(lambda: show.compare(before, after), ValueError))
        return 0
    if arguments.model not in MODELS:
        raise CommandError(str(unknown("model", arguments.model, list(MODELS))))
    if arguments.dtype.itemsize > 4:
        raise CommandError("the Triton kernels compute in fp32, fp16 and bf16: choose one of them with --dtype")
    chosen = _devices(arguments.arch, arguments.device)
    for file in (arguments.json, arguments.picture):
        writable(file)
    if find_spec("triton") is None:
        raise CommandError("inspect needs Triton, which PyTorch brings on Linux")

    kept = cache.Cache()
    request = report.Request(
        arguments.model,
        arguments.batch,
        arguments.size,
        arguments.dtype,
        arguments.mode,
        chosen,
        arguments.layer,
        arguments.tf32,
    )
    chosen_uses = refusing(lambda: report.wanted(request), ValueError, RuntimeError)
    writable(None, arguments.asm)
    jobs = report.jobs(request, chosen_uses)
    outcomes = refusing(
        lambda: compiling.compile_all(jobs, kept, assembly=arguments.asm is not None, progress=kernel_progress()), RuntimeError
    )
    found = report.make(request, chosen_uses, outcomes)
    picture = refusing(lambda: roofline.svg(found), ValueError) if arguments.picture is not None else None
    print("\n".join(show.pages(found)))
    if kept.broken is not None:
        Progress().step(f"nothing is kept for the next time: cannot write to {kept.broken}")
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(found, indent=1) + "\n")
    if picture is not None:
        write_text(arguments.picture, picture)
    if arguments.asm is not None:
        for job, outcome in zip(jobs, outcomes, strict=True):
            if outcome.assembly is not None:
                name = re.sub(r"[^A-Za-z0-9.]+", "_", f"{job.arch} {report.label(job.launch)}").strip("_")
                write_text(arguments.asm / f"{name}.asm", outcome.assembly)
    return 1 if any(outcome.error for outcome in outcomes) else 0


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    from ..whole_file import write_whole

    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise CommandError(f"{path}: cannot be written ({error.strerror or error})") from error
