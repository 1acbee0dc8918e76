"""``fused-resnet train``: a network from nothing to a test error, after a recipe; nothing is lost when it is interrupted."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..train.config import DISTRIBUTED
from .arguments import CommandError, add_training, natural, one_line, positive, tell, told_elsewhere, whole
from .text import sentence


def add(commands: Any) -> None:
    """Declare the command."""
    text = "train a network after a recipe, on digits at once, on CIFAR or a folder of images"
    about = f"{sentence(text)}. Run it again with --resume after an interruption; docs/train.md tells more."
    parser = commands.add_parser("train", help=text, description=about)
    parser.add_argument("--recipe", default="digits", metavar="NAME", help="a recipe's name or a JSON file (digits)")
    parser.add_argument("--model", default="", metavar="NAME", help="a network; by default the recipe's")
    parser.add_argument(
        "--data", default="", metavar="NAME", help="digits, cifar10, cifar100 or folder; by default the recipe's"
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where the data set lies, if it has to be brought")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for log and checkpoints (runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="go on behind the folder's checkpoint, if there is one")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, order and augmentation (0)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, metavar="N", help="another length; the schedule is stretched with it")
    length.add_argument("--steps", type=natural, metavar="N", help="the same in steps")
    parser.add_argument("--batch", type=natural, metavar="N", help="images in a step, of all processes together")
    parser.add_argument("--lr", type=positive, metavar="LR", help="another learning rate")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto (the default), cpu, cuda, cuda:N")
    add_training(parser)
    parser.add_argument("--distributed", choices=DISTRIBUTED, default="ddp", help="what shares the work under torchrun (ddp)")
    parser.add_argument("--workers", type=whole, default=2, metavar="N", help="processes that decode images (2)")
    parser.add_argument("--on-corrupt", choices=("stop", "skip"), default="stop", help="at an image that cannot be read (stop)")
    parser.add_argument("--log-every", type=natural, default=0, metavar="N", help="steps between rows (a tenth of an epoch)")
    parser.add_argument("--checkpoint-every", type=natural, default=0, metavar="N", help="steps between checkpoints (an epoch)")
    parser.add_argument("--evaluate-every", type=positive, default=1, metavar="N", help="epochs between evaluations (1)")
    parser.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train; 1 if it had to stop."""
    import dataclasses

    from ..train import Config, TrainingError, UsageError, fit
    from ..train import recipe as recipes

    try:
        recipe = recipes.load(arguments.recipe)
        if arguments.epochs or arguments.steps:
            unit = "epochs" if arguments.epochs else "steps"
            recipe = recipe.lasting(arguments.epochs or arguments.steps, unit)
        changed = {name: getattr(arguments, name) for name in ("batch", "lr") if getattr(arguments, name)}
        recipe = dataclasses.replace(recipe, **changed)
        options = {field.name for field in dataclasses.fields(Config)} - {"recipe", "out"}
        config = Config(
            recipe,
            out=arguments.out or Path("runs") / recipe.name,
            data_folder=arguments.data_dir,
            **{name: value for name, value in vars(arguments).items() if name in options},
        )
        history = fit(config)
    except UsageError as error:
        if told_elsewhere(error):
            return 2
        raise CommandError(one_line(error)) from error
    except TrainingError as error:
        tell(error)
        return 1
    if history.rows:
        tests = [row for row in history.rows if row.split == "test"]
        best = f"{history.best:.2%}" if history.best <= 1 else "none"  # where no test loss was finite
        last = f"{tests[-1].error:.2%}, best {best}" if tests else "not measured"
        print(f"{history.step} steps; test error {last}; waited for images {history.waited:.1%} of the time")
        if history.bad:
            print(f"{len(history.bad)} images could not be read and were skipped: {', '.join(history.bad[:5])}")
        print(f"{history.checkpoint}, {config.out / 'log.csv'}")
    return 0
