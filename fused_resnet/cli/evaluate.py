"""``fused-resnet evaluate``: top-1 and top-5 of checkpoints or of weights from a file, fused or not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..train.config import AMP, BACKENDS
from .arguments import CommandError, natural, naturals, one_line, tell, whole
from .text import Progress, sentence


def add(commands: Any) -> None:
    """Declare the command."""
    text = "top-1 and top-5 of trained networks: one crop, ten crops, several sizes, ensembles"
    about = f"{sentence(text)}. Checkpoints know their network, data and normalisation; docs/train.md tells more."
    parser = commands.add_parser("evaluate", help=text, description=about)
    parser.add_argument(
        "checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="files or folders of train; several are an ensemble"
    )
    parser.add_argument("--model", action="append", default=[], metavar="NAME", help="a network without a checkpoint; several")
    more = "and its state_dict, such as torchvision's; several, of that one --model or each of its own, in their order"
    parser.add_argument("--weights", type=Path, action="append", default=[], metavar="FILE", help=more)
    parser.add_argument("--data", default="", metavar="NAME", help="a data set; by default the checkpoint's, or folder")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where it lies, if it has to be brought")
    parser.add_argument("--size", type=natural, metavar="N", help="rows and columns of a crop (the checkpoint's, or 224)")
    parser.add_argument("--crops", choices=("one", "ten"), default="one", help="views of an image (one)")
    parser.add_argument(
        "--scales", type=naturals, default=[], metavar="N,N", help="whole images instead of crops: 224,256,384,480,640"
    )
    parser.add_argument("--flip", action="store_true", help="every view mirrored, too")
    parser.add_argument("--batch", type=natural, default=64, metavar="N", help="images at once (64)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto (the default), cpu, cuda, cuda:N")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="eager is the unfused network (auto)")
    parser.add_argument("--amp", choices=AMP, default="off", help="element type of autocast (off)")
    parser.add_argument("--workers", type=whole, default=2, metavar="N", help="processes that decode images (2)")
    parser.add_argument("--on-corrupt", choices=("stop", "skip"), default="stop", help="at an image that cannot be read (stop)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; 1 if it had to stop."""
    from ..train import TrainingError, UsageError

    try:
        return _evaluate(arguments)
    except UsageError as error:
        raise CommandError(one_line(error)) from error
    except TrainingError as error:
        tell(error)
        return 1


def _evaluate(arguments: argparse.Namespace) -> int:
    from ..train import Recipe, UsageError, data, members, networks
    from ..train.data import Data
    from ..train.distributed import World
    from ..train.evaluate import evaluate
    from ..train.views import Views

    names, files = arguments.model, arguments.weights
    if not arguments.checkpoints and not names and not files:
        raise UsageError("expected checkpoints, or --model with --weights")
    if bool(names) != bool(files):
        raise UsageError("--model and --weights belong together")
    if len(names) > 1 and len(names) != len(files):
        raise UsageError(f"expected one --model for all --weights, or one for each, got {len(names)} for {len(files)} files")
    if arguments.scales and arguments.crops == "ten":
        raise UsageError("--crops ten cuts images and --scales takes them whole: expected one of the two")
    world = World.join(arguments.device)
    device = world.device
    networks.check_backend(arguments.backend, device)
    views = Views(arguments.crops, tuple(arguments.scales), arguments.flip)

    def test_images(name: str, recipe: Recipe | None = None) -> Data:
        return data.for_test(name, arguments.data_dir, views, recipe, arguments.size, arguments.on_corrupt)

    found = [members.from_checkpoint(path, device, arguments.backend) for path in arguments.checkpoints]
    trained = found[0] if found else None
    name = arguments.data or (trained.data if trained is not None else "folder")
    recipe = trained.recipe if trained is not None else None
    found += [
        members.from_weights(model, path, device, arguments.backend, None, lambda: len(test_images(name, recipe).classes))
        for model, path in zip(names * len(files) if len(names) == 1 else names, files, strict=True)
    ]
    images = test_images(name, recipe)
    for member in found:
        for size in views.scales or (images.size,):
            batch = arguments.batch
            networks.try_out(member.model, member.name, member.outputs, size, device, arguments.amp, batch, trained=False)
    result = evaluate(
        found,
        images,
        views,
        device,
        batch=arguments.batch,
        workers=arguments.workers,
        amp=arguments.amp,
        world=world,
        progress=Progress().bar if world.first else None,
    )
    world.leave()
    if not world.first:
        return 0
    Progress().clear()
    who = found[0].name if len(found) == 1 else f"ensemble of {len(found)}"
    print(f"{who} on the test images of {name}, {views} ({result.views} a network), {device}, backend {arguments.backend}")
    five = f"; top-5 accuracy {result.top5:.2%}, error {1 - result.top5:.2%}" if len(images.classes) > 5 else ""
    print(
        f"top-1 accuracy {result.top1:.2%}, error {1 - result.top1:.2%}{five}; {result.images} images in {result.seconds:.1f} s"
    )
    if result.bad:
        print(f"{len(result.bad)} images could not be read and were skipped: {', '.join(result.bad[:5])}")
    return 0
