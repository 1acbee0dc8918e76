"""``fused-resnet gpu``: everything that one GPU can tell in some minutes, into one folder."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..gpu.budget import STAGES
from ..whole_file import LOCK, held
from .arguments import CommandError, positive
from .text import sentence


def add(commands: Any) -> None:
    """Declare the command."""
    text = "check, time, tune and profile everything on this machine's GPU"
    parser = commands.add_parser("gpu", help=text, description=f"{sentence(text)}; docs/gpu.md describes what it writes.")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for results.json, tuning.json, summary.md"
    )
    parser.add_argument("--minutes", type=positive, default=9.0, metavar="M", help="time for all stages together (9)")
    parser.add_argument("--stages", type=stages, default=",".join(STAGES), metavar="A,B", help=f"some of {', '.join(STAGES)}")
    parser.add_argument("--resume", action="store_true", help="go on behind what the folder holds")
    parser.add_argument(
        "--dry-run", action="store_true", help="no GPU: every stage through the interpreter, nothing is measured"
    )
    parser.set_defaults(run=run)


def stages(text: str) -> list[str]:
    """Names of stages, separated by commas, in the order in which they run."""
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(STAGES)}, got {name!r}")
    return [name for name in STAGES if name in names]


def need_gpu(command: str, dry: bool) -> str:
    """The GPU's name; empty in a dry run.

    Raises:
        CommandError: there is none.
    """
    if dry:
        return ""
    if not torch.cuda.is_available():
        raise CommandError(f"{command}: PyTorch sees no GPU here; --dry-run walks through every stage without one")
    return torch.cuda.get_device_name(0)


def writable(folder: Path, make: bool = True) -> None:
    """Make sure that a folder is there and takes files; without ``make``, that it could be made, of which nothing is left."""
    place = folder
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            place = next((parent for parent in (folder, *folder.absolute().parents) if parent.exists()), folder)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise CommandError(f"{folder}: cannot be written ({error.strerror})") from error


@contextmanager
def alone(lock: Path, what: Path, option: str) -> Iterator[None]:
    """Hold ``lock`` for this run, which writes to ``what``, as ``option`` says.

    Raises:
        CommandError: another run holds it, or it cannot be made.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(held(lock))
        except TimeoutError as error:
            told = f"{what}: another run is writing into it: wait for its end, or name another {option}"
            raise CommandError(told) from error
        except OSError as error:
            raise CommandError(f"{lock}: cannot be written ({error.strerror})") from error
        yield


def run(arguments: argparse.Namespace) -> int:
    """Run the stages."""
    gpu = need_gpu("gpu", arguments.dry_run)
    writable(arguments.out)
    with alone(arguments.out / LOCK, arguments.out, "--out"):
        return _run(arguments, gpu)


def _run(arguments: argparse.Namespace, gpu: str) -> int:
    from ..gpu.conductor import Run, machine_differs
    from ..gpu.results import NAME, ResultsError, check_rows, load

    path = arguments.out / NAME
    if path.exists():
        if not arguments.resume:
            raise CommandError(f"{path} is there already: --resume goes on behind it, another --out starts anew")
        try:
            data = load(path)
            check_rows(data, str(path))
        except ResultsError as error:
            raise CommandError(str(error)) from error
        if data["measured"] == arguments.dry_run:
            raise CommandError(
                f"{path} is {'measured' if data['measured'] else 'of a dry run'}: it cannot be gone on with here"
            )
        reason = machine_differs(data, gpu, torch.__version__) if gpu else None
        if reason:
            raise CommandError(f"{path} was measured elsewhere: {reason}")
    return Run(arguments.out, 60 * arguments.minutes, arguments.dry_run, arguments.stages, arguments.resume)()
