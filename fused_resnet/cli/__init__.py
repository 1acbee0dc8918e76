"""The command line, ``fused-resnet`` or ``python -m fused_resnet``: one file a command.

A command's module has ``add(commands)``, which declares its arguments, and ``run(arguments) -> int``, which does the work and
returns the exit code. Wrong input is one line on stderr and exit code 2.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..train.distributed import told
from . import demo, evaluate, fuse_check, gpu, info, inspect, paper, profile, report, train, tune, zoo
from .arguments import CommandError, Parser
from .streams import OutputError, lasting


def _parser() -> Parser:
    parser = Parser(prog="fused-resnet", description="ResNets with convolution, BatchNorm, ReLU and shortcut fused.")
    parser.add_argument("--version", action="version", version=f"fused-resnet {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in (demo, info, inspect, fuse_check, train, evaluate, paper, profile, gpu, tune, report, zoo):
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; ``sys.argv``'s by default.

    Returns:
        Exit code: 0 done, 1 the answer is no (``fuse-check``) or it had to stop, 2 wrong input, 130 interrupted. A reader of
        the output who goes away (``head``) stops nothing. A process of torchrun's with all done does not return: it ends.
    """
    with lasting():
        try:
            code = _run(argv)
            sys.stdout.flush()
            sys.stderr.flush()
        except OutputError as error:
            print(f"fused-resnet: {error}", file=sys.stderr)
            code = 1
    if argv is None and code == 0 and _shared(sys.argv[1:]):
        _end()
    return code


def _shared(command: Sequence[str]) -> bool:
    """Whether a command line is that of one process of several that train or evaluate together."""
    return command[:1] in (["train"], ["evaluate"]) and told()


def _end() -> None:
    """End a process of several whose work is done and written, at once.

    While an interpreter takes itself down PyTorch aborts (2.11 to 2.14, its issue 190489) where a thread of gloo has the last
    hold of a tensor, as it may for a moment behind the last exchange: on a busy machine one finished run in some twenty failed.
    """
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(0)


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
        code: int = arguments.run(arguments)
        return code
    except CommandError as error:
        print(f"fused-resnet: error: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse's way out, of --help too
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("fused-resnet: interrupted", file=sys.stderr)
        return 130
