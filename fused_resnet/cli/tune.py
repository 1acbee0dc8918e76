"""``fused-resnet tune``: measures tiles and ways of a network's launches on this GPU, and keeps the fastest."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..models import MODELS
from ..network import MODES
from ..whole_file import LOCK
from .arguments import CommandError, dtype, dtype_name, natural, one_line, positive
from .gpu import alone, need_gpu, writable
from .text import sentence


def add(commands: Any) -> None:
    """Declare the command."""
    text = "measure how each launch of a network runs fastest on this GPU, and keep it"
    parser = commands.add_parser("tune", help=text, description=f"{sentence(text)}. Interrupted or out of time, call it again.")
    parser.add_argument("models", nargs="*", default=["resnet50"], metavar="MODEL", help=f"{', '.join(MODELS)} (resnet50)")
    parser.add_argument("--batch", type=natural, default=256, metavar="N", help="images (256)")
    parser.add_argument("--size", type=natural, default=224, metavar="N", help="rows and columns of an image (224)")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both", help="inference, training, both (the default)")
    parser.add_argument("--dtype", type=dtype, default="bf16", metavar="TYPE", help="bf16 (the default), fp16")
    parser.add_argument("--minutes", type=positive, default=10.0, metavar="M", help="time to spend (10)")
    parser.add_argument("--candidates", type=natural, default=12, metavar="N", help="tiles tried for a launch (12)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="instead of the file in the user's cache folder")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: a toy network through the interpreter, nothing is kept")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Tune; 0, 1 if a candidate was wrong or a launch failed."""
    from ..gpu import networks
    from ..gpu.conductor import Run
    from ..tuning import measured

    for name in arguments.models:
        try:
            networks.check_name(name)
        except ValueError as error:
            raise CommandError(one_line(error)) from error
    if arguments.dtype not in (torch.bfloat16, torch.float16):
        raise CommandError(f"--dtype: only launches in bf16 and fp16 have candidates, got {dtype_name(arguments.dtype)}")
    gpu = need_gpu("tune", arguments.dry_run)
    modes = MODES if arguments.mode == "both" else (arguments.mode,)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fused-resnet-tune-"))
        output: Path = Path(folder, "dry.json")
        wanted: dict[str, Any] = {}
        if not arguments.dry_run:
            output = arguments.output or measured.user_path(gpu)
            writable(output.parent)
            stack.enter_context(alone(output.with_name(f".{output.name}{LOCK}"), output, "--output"))
            there = measured.read(output)
            if there is not None and there.gpu != gpu:
                raise CommandError(f"{output} holds choices of another GPU, {there.gpu}; name another --output")
            layers = [[name, mode] for name in arguments.models for mode in modes]
            wanted.update(
                candidates=arguments.candidates,
                layers=layers,
                batch=arguments.batch,
                size=arguments.size,
                dtype=dtype_name(arguments.dtype),
            )
        before = _entries(output)
        code = Run(
            Path(folder),
            60 * arguments.minutes,
            arguments.dry_run,
            ("tuning",),
            wanted={**wanted, "table": str(output.resolve())},
        )()
        after = _entries(output)
    if arguments.dry_run:
        print("a dry run: nothing was measured, nothing is kept")
    else:
        print(f"{after} measured choices in {output}, {after - before} of them new")
    return code


def _entries(path: Path) -> int:
    from ..tuning import measured

    table = measured.read(path)
    return len(table.entries) if table is not None else 0
