"""``fused-resnet report``: pages and pictures of docs/benchmarks/ from results of ``fused-resnet gpu``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import CommandError
from .gpu import writable
from .text import sentence


def add(commands: Any) -> None:
    """Declare the command."""
    text = "draw pages and pictures from results of the gpu command"
    parser = commands.add_parser(
        "report",
        help=text,
        description=f"{sentence(text)}; without results, from the model's predictions, which are called so.",
    )
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS", help="results.json files, one a GPU")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for index.md and the rest")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw everything, then write it."""
    from ..gpu import report
    from ..gpu.results import ResultsError

    writable(arguments.output, make=False)  # drawing takes most of a minute, and wrong results leave no folder
    try:
        made = report.files(arguments.results)
    except ResultsError as error:
        raise CommandError(str(error)) from error
    writable(arguments.output)
    report.write_all(made, arguments.output)
    what = f"{len(arguments.results)} results" if arguments.results else "no results: predictions only, nothing was measured"
    print(f"{len(made)} files in {arguments.output} ({what})")
    return 0
