"""Pages and pictures from results: everything is made first, then written, so that wrong input leaves the folder as it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..tuning.devices import find
from . import draw, pages, predicted, predicted_pages
from .results import ResultsError, check_rows, load, write


def files(paths: Sequence[Path]) -> dict[str, str]:
    """All files of the report, name -> text.

    Args:
        paths: results; without any, the report is of predictions, and says that nothing was measured.

    Raises:
        ResultsError: a file is not results of this schema, or of a dry run.
    """
    results: dict[str, dict[str, Any]] = {}
    for path in paths:
        data = load(path)
        if not data["measured"]:
            raise ResultsError(f"{path}: of a dry run: nothing in it was measured, so there is nothing to draw")
        check_rows(data, str(path))
        name = f"{pages.slug(data)}.md"
        if name in results:
            raise ResultsError(f"{path}: a second results file of the same GPU and day; give one of them")
        results[name] = data
    made: dict[str, str] = {}
    for name, data in results.items():
        pictures = _pictures(data, name.removesuffix(".md"))
        made |= {file: text for file, text in pictures.values()}
        made[name] = pages.measured_page(data, {which: file for which, (file, _) in pictures.items()})
    made |= _predictions()
    made["index.md"] = pages.index_page(results)
    return made


def _pictures(data: dict[str, Any], name: str) -> dict[str, tuple[str, str]]:
    """What can be drawn of results: which -> file and text."""
    caption = pages.evidence(data)
    drawn: dict[str, tuple[str, str]] = {}
    speedups = pages.speedup_groups(data)
    if speedups:
        how = "times as fast as the faster eager; interleaved, medians"
        drawn["speedup"] = (f"{name}-speedup.svg", draw.bars("Networks", how, caption, speedups, mark=1.0))
    memory = pages.memory_groups(data)
    if memory:
        how = "peak of a training step beyond parameters and optimizer state"
        drawn["memory"] = (f"{name}-memory.svg", draw.bars("Memory", how, caption, memory))
    roofs, points = pages.roofs(data), pages.roofline_points(data)
    if roofs and points:
        how = "each launch alone, under the measured rates of a copy and of a large product; area: part of the time"
        drawn["roofline"] = (f"{name}-roofline.svg", draw.roofline("Launches of ResNet-50", how, caption, points, *roofs))
    return drawn


def _predictions() -> dict[str, str]:
    device = find(predicted.SHOWN_DEVICE)
    size = f"bf16, batch {predicted.BATCH}, {predicted.SIZE}x{predicted.SIZE}"
    caption = "predicted by the analytical model in fused_resnet/tuning/model.py; not measured"
    roofs = (device.bandwidth, device.rate(predicted.DTYPE))
    return {
        "predicted.md": predicted_pages.predicted_page(),
        "predicted-launches.md": predicted_pages.launches_page(device),
        "predicted-speedup.svg": draw.bars(
            "ResNet-50: predicted speed-up over eager",
            f"predicted, not measured; {size}",
            caption,
            predicted.speedups(),
            mark=1.0,
            guessed=True,
        ),
        "predicted-roofline.svg": draw.roofline(
            f"Launches of ResNet-50 on the {device.name}: predicted",
            f"predicted, not measured; {size}; inference and training step; area: part of the time",
            caption,
            predicted.points(device),
            *roofs,
        ),
        "memory.svg": draw.bars(
            "Kept for the backward", f"counted from sizes; {size}", "counted from sizes; without parameters", predicted.memory()
        ),
    }


def write_all(made: dict[str, str], folder: Path) -> None:
    """Write the files, each at once."""
    for name, text in made.items():
        write(folder / name, text)
