"""``fused-resnet paper``: the comparisons of He et al. 2016 at a chosen scale, their figures and a page."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from .arguments import CommandError, add_training, device, natural, one_line, positive, whole
from .gpu import writable
from .text import sentence


def add(commands: Any) -> None:
    """Declare the command."""
    text = "run the paper's comparisons and draw its figures"
    about = f"{sentence(text)}: plain against residual, options A, B, C, highways, layer responses. docs/paper.md tells more."
    parser = commands.add_parser("paper", help=text, description=about)
    parser.add_argument("--scale", choices=("tiny", "cifar", "imagenet"), default="tiny", help="how large (tiny: minutes)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the runs, the figures and paper.md (runs/paper-SCALE)"
    )
    parser.add_argument("--seeds", type=natural, metavar="N", help="how often each network is trained; by default the scale's")
    parser.add_argument("--jobs", type=natural, metavar="N", help="runs at a time (2 on a CPU, 1 on a GPU)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where the data set lies, if it has to be brought")
    parser.add_argument("--device", type=device, default="auto", metavar="NAME", help="auto (the default), cpu, cuda, cuda:N")
    add_training(parser)
    parser.add_argument("--workers", type=whole, metavar="N", help="imagenet: processes that decode images, of each run (2)")
    parser.add_argument("--on-corrupt", choices=("stop", "skip"), help="imagenet: at an image that cannot be read (stop)")
    parser.add_argument("--recipe", metavar="NAME", help="another recipe than the scale's, as of the train command")
    parser.add_argument("--epochs", type=positive, metavar="N", help="another length of each run")
    parser.add_argument("--draw", action="store_true", help="train nothing: draw what the folder's logs hold")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run what is not done, then draw; 1 if a run failed."""
    from ..measure import circumstances
    from ..paper.files import LogError
    from ..paper.page import draw, write
    from ..paper.results import collect
    from ..paper.runs import Options, RunFailed, check_same, everything
    from ..paper.scales import SCALES
    from ..train import UsageError
    from ..train import recipe as recipes
    from ..train.files import alone

    scale = SCALES[arguments.scale]
    of_files = {"--workers": arguments.workers, "--on-corrupt": arguments.on_corrupt}
    idle = [name for name, value in of_files.items() if value is not None]
    if idle and scale.data != "folder":
        raise CommandError(f"{', '.join(idle)}: for --scale imagenet, whose images are files, got --scale {scale.name}")
    if arguments.recipe:
        scale = dataclasses.replace(scale, recipe=arguments.recipe, deep_recipe=arguments.recipe)
    if arguments.epochs:
        scale = dataclasses.replace(scale, epochs=arguments.epochs)
    if arguments.recipe or arguments.epochs:
        length = f"{scale.epochs:g} epochs" if scale.epochs else "its own length"
        scale = dataclasses.replace(scale, about=f"{scale.about} (here recipe {scale.recipe}, {length})")
    out: Path = arguments.out or Path("runs") / f"paper-{scale.name}"
    nothing = CommandError(f"{out}: no run of scale {scale.name} has come to its end there; leave --draw out to start them")
    if arguments.draw and not out.is_dir():
        raise nothing
    writable(out)
    seeds = arguments.seeds or scale.seeds
    jobs = arguments.jobs or (1 if arguments.device.type == "cuda" else 2)
    code = 0
    options = Options(
        out,
        seeds,
        jobs,
        arguments.data_dir,
        arguments.backend,
        str(arguments.device),
        arguments.memory,
        arguments.amp,
        arguments.compile,
        2 if arguments.workers is None else arguments.workers,
        arguments.on_corrupt or "stop",
    )
    try:
        recipes.load(scale.recipe)
        check_same(scale, options)
    except (LogError, UsageError) as error:
        raise CommandError(one_line(error)) from error
    if not arguments.draw:
        count = len(scale.runs(seeds))
        print(f"{scale.name}: {scale.about}; {count} runs into {out}", flush=True)
        try:
            with alone(out):
                everything(scale, options, lambda line: print(line, flush=True))
        except UsageError as error:
            raise CommandError(one_line(error)) from error
        except RunFailed as error:
            print(f"fused-resnet: {one_line(error)}", file=sys.stderr)
            code = 1
        except KeyboardInterrupt:
            print("fused-resnet: interrupted; the same command goes on where it was", file=sys.stderr)
            code = 130
    try:
        found = collect(out, scale.runs(seeds))
    except LogError as error:
        raise CommandError(one_line(error)) from error
    if not found:
        if code:
            return code
        raise nothing
    try:
        write(out, draw(scale, found, seeds, circumstances(arguments.device)))
    except LogError as error:
        raise CommandError(one_line(error)) from error
    print(f"{out / 'paper.md'}")
    return code
