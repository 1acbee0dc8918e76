"""What the commands' arguments have in common: one-line errors, numbers, names."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import backends, specimens
from ..measure import automatic_device


class CommandError(Exception):
    """Wrong input: told in one line on stderr, exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse, with errors on one line."""

    def error(self, message: str) -> NoReturn:
        """Raise what :func:`fused_resnet.cli.main` prints."""
        raise CommandError(f"{message} (see {self.prog} --help)")


#: More of anything that is counted here is a slip, and PyTorch has no word for many more.
MOST = 2**31 - 1


def _from(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:  # of thousands of digits, too
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {_short(text)}")
    if number > MOST:
        raise argparse.ArgumentTypeError(f"expected a whole number of at most {MOST}, got {_short(text)}")
    return number


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def natural(text: str) -> int:
    """A number from 1 to :data:`MOST`."""
    return _from(1, text)


def whole(text: str) -> int:
    """A number from 0 to :data:`MOST`."""
    return _from(0, text)


def naturals(text: str) -> list[int]:
    """Numbers from 1 to :data:`MOST`, separated by commas."""
    return [natural(part.strip()) for part in text.split(",")]


def positive(text: str) -> float:
    """A number above 0, of at most :data:`MOST`."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= MOST:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and of at most {MOST}, got {_short(text)}")
    return number


def dtype(text: str) -> torch.dtype:
    """An element type by its short name."""
    if text not in specimens.DTYPES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(specimens.DTYPES)}, got {text!r}")
    return specimens.DTYPES[text]


def dtype_name(wanted: torch.dtype) -> str:
    """The short name of an element type."""
    return next(name for name, known in specimens.DTYPES.items() if known == wanted)


def device(text: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    if text == "auto":
        return automatic_device()
    try:
        wanted = torch.device(text)
    except RuntimeError:
        wanted = torch.device("meta")
    if wanted.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, got {text!r}")
    if wanted.type == "cuda" and not (torch.cuda.is_available() and (wanted.index or 0) < torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"{text!r} is not there: PyTorch sees {torch.cuda.device_count()} GPUs")
    return wanted


def add_where(parser: argparse.ArgumentParser) -> None:
    """Declare ``--device`` and ``--backend``, see :func:`chosen_backend`."""
    parser.add_argument("--device", type=device, default="auto", metavar="NAME", help="auto (the default), cpu, cuda, cuda:N")
    parser.add_argument(
        "--backend", choices=list(backends.BACKENDS), help="what runs the launches; by default chosen by the device"
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """Declare how a network is run that is trained: ``--backend``, ``--memory``, ``--amp``, ``--compile``."""
    from ..train.config import AMP, BACKENDS  # of no other commands' concern

    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="eager is the unfused network (auto)")
    parser.add_argument(
        "--memory", choices=("default", "less", "low"), help="what is kept for the backward (the network's own choice)"
    )
    parser.add_argument("--amp", choices=AMP, default="off", help="element type of autocast (off)")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")


def chosen_backend(name: str | None, where: torch.device) -> AbstractContextManager[Any]:
    """The context in which the backend ``name`` runs, after a look at whether it can run on ``where`` at all."""
    try:
        backends.resolve(name, where)
    except (RuntimeError, ValueError) as error:
        raise CommandError(one_line(error)) from error
    return nullcontext() if name is None else backends.backend(name)


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def told_elsewhere(error: Exception) -> bool:
    """Whether every process of a run raises this, and another one, the first, tells it."""
    return getattr(error, "of_all", False) and int(os.environ.get("RANK", 0)) != 0


def tell(error: Exception) -> None:
    """One line on stderr, of one process."""
    if not told_elsewhere(error):
        print(f"fused-resnet: {one_line(error)}", file=sys.stderr)


def eager_model(name: str) -> nn.Module:
    """:func:`fused_resnet.specimens.eager_model`, whose errors are the command's."""
    return refusing(lambda: specimens.eager_model(name), ValueError)


def images(batch: int, size: int, channels: int = 3, *, seed: int = 0) -> Tensor:
    """:func:`fused_resnet.specimens.images`, as many and as large as ``--batch`` and ``--size`` say.

    Raises:
        CommandError: no memory holds them.
    """
    try:
        return specimens.images(batch, size, channels, seed=seed)
    except (RuntimeError, TypeError, MemoryError) as error:
        raise too_large(batch, size, channels) from error


def too_large(batch: int, size: int, channels: int = 3) -> CommandError:
    """The error where images of the arguments' batch and size cannot be made."""
    return CommandError(f"--batch and --size: expected images that fit into memory, got {batch} x {channels} x {size} x {size}")


def refusing(make: Callable[[], Any], *errors: type[Exception]) -> Any:
    """``make()``; its ``errors`` become the command's."""
    try:
        return make()
    except errors as error:
        raise CommandError(one_line(error)) from error
