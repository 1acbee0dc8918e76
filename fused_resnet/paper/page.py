"""Figures and the page of a set of runs: what the paper says, and whether it shows here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..gpu.draw import Curve, lines
from ..models import build
from .files import write as write_file
from .results import Outcome, Spread, verdict
from .scales import Scale

#: Shallow, deep and gated; plain ones are dashed.
_COLOURS = ("#1971c2", "#d9480f", "#2b8a3e", "#862e9c", "#616e7c")

Outcomes = dict[str, Outcome]


def draw(scale: Scale, found: Outcomes, seeds: int, where: dict[str, Any]) -> dict[str, str]:
    """The page and its pictures, by file name.

    Args:
        scale: whose runs.
        found: what there is of them.
        seeds: how many each network should have.
        where: :func:`fused_resnet.measure.circumstances`.
    """
    caption = f"{where['device']}, PyTorch {where['versions']['torch']}, {where['date']}"
    files: dict[str, str] = {}
    pair = [names[index] for names in (scale.plain, scale.residual) for index in scale.compared]
    for split, title in (("train", "Training error, plain and residual"), ("test", "Test error, plain and residual")):
        _figure(files, f"degradation-{split}.svg", title, scale, found, pair, split, caption)
    deep = scale.residual[scale.compared[1]]
    gated = [*scale.highway, *(name.replace("highway", "resnet") for name in scale.highway), scale.plain[scale.compared[1]]]
    _figure(files, "highway.svg", "Training error, gated and ungated shortcuts", scale, found, gated, "train", caption)
    _figure(files, "options.svg", "Training error by kind of shortcut", scale, found, scale.options, "train", caption)
    watched = [name for name in scale.responses if name in found and found[name].responses]
    if watched:
        curves = [
            Curve(name, found[name].response_curve(), _COLOURS[index % 5], "plain" in name)
            for index, name in enumerate(watched)
        ]
        files["responses.svg"] = lines(
            "Standard deviations of layer responses (figure 7)", _seeds(found, watched), caption, curves, "layer", "deviation"
        )
    text = [f"# The paper's comparisons, scale {scale.name}", "", f"{scale.about}.", ""]
    text += _missing(scale, found, seeds)
    text += [*_verdicts(scale, found, deep), *_table(scale, found)]
    for name, words in _FIGURES.items():
        if name in files:
            text += [f"![{words}]({name})", ""]
    text += [*_notes(scale, where), *_time(found)]
    return {"paper.md": "\n".join(text), "runs.csv": _runs(scale, found), **files}


_FIGURES = {
    "degradation-train.svg": "Training error of plain and residual networks",
    "degradation-test.svg": "Test error of plain and residual networks",
    "responses.svg": "Standard deviations of layer responses",
    "options.svg": "Training error with shortcuts A, B and C",
    "highway.svg": "Training error of highway, residual and plain networks",
}


def _seeds(found: Outcomes, names: Sequence[str]) -> str:
    counts = {len(found[name].seeds) for name in names}
    few = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"mean of {few} seeds, bands from the least to the largest" if few != "1" else "one seed"


def _figure(
    files: dict[str, str],
    file: str,
    title: str,
    scale: Scale,
    found: Outcomes,
    names: Sequence[str],
    split: str,
    caption: str,
) -> None:
    present = [name for name in dict.fromkeys(names) if name in found]
    if not present:
        return
    curves = [Curve(name, found[name].curve(split), _COLOURS[index % 5], "plain" in name) for index, name in enumerate(present)]
    files[file] = lines(title, f"{scale.data}, {_seeds(found, present)}", caption, curves, "epoch", "error")


def _missing(scale: Scale, found: Outcomes, seeds: int) -> list[str]:
    short = {name: len(found[name].seeds) if name in found else 0 for name in scale.networks}
    absent = [f"{name} ({count} of {seeds})" for name, count in short.items() if count < seeds]
    return [f"Not complete, runs that have come to their end: {', '.join(absent)}.", ""] if absent else []


def _verdicts(scale: Scale, found: Outcomes, deep: str) -> list[str]:
    shallow_plain, deep_plain = (scale.plain[index] for index in scale.compared)
    shallow = scale.residual[scale.compared[0]]
    asked = [
        ("The plain network gets worse with depth (training error)", deep_plain, shallow_plain),
        ("The residual network gets worse with depth (training error)", deep, shallow),
        ("At the greater depth the plain network is worse than the residual one", deep_plain, deep),
    ]
    for name in scale.highway:
        asked.append(("The gated network is worse than the ungated one", name, name.replace("highway", "resnet")))
    base, *others = scale.options
    asked += [(f"Shortcut A is worse than {name[-1].upper()}", base, name) for name in others]
    lines_of = ["| asked | compared | answer |", "|---|---|---|"]
    for what, higher, lower in asked:
        lower = lower if lower in found or not lower.startswith("resnet") else f"{lower}_a"
        if higher in found and lower in found:
            a, b = found[higher].last("train"), found[lower].last("train")
            lines_of.append(f"| {what} | {higher} {a}, {lower} {b} | {verdict(a, b)} |")
    watched = {name: found[name].responses for name in scale.responses if name in found and found[name].responses}
    plain, residual = ([name for name in watched if ("plain" in name) is kind] for kind in (True, False))
    for first, second in zip(plain, residual):
        a, b = (Spread(tuple(sum(run) / len(run) for run in watched[name])) for name in (first, second))
        words = f"{first} {a.mean:.2f}, {second} {b.mean:.2f}"
        lines_of.append(f"| Responses of the plain network are larger (mean over layers) | {words} | {verdict(a, b)} |")
    answer = 'An answer is "yes" where every run of the one is above every run of the other, and is of this scale alone.'
    return [*lines_of, "", answer, ""] if len(lines_of) > 2 else []


def _table(scale: Scale, found: Outcomes) -> list[str]:
    rows = ["| network | parameters | seeds | training error, last epoch | test error at the end |", "|---|---|---|---|---|"]
    for name in sorted(scale.networks, key=lambda name: ("highway" in name, "resnet" in name, scale.networks.index(name))):
        if name in found:
            outcome = found[name]
            cells = [name, parameters(name), str(len(outcome.seeds)), str(outcome.last("train")), str(outcome.last("test"))]
            rows.append("| " + " | ".join(cells) + " |")
    return [*rows, "", "In brackets: the least and the largest of the seeds.", ""] if len(rows) > 2 else []


def parameters(name: str) -> str:
    """How many a network has, in millions; of 1000 classes, or 10 for CIFAR."""
    import torch

    with torch.device("meta"):
        model = build(name)
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M"


def _notes(scale: Scale, where: dict[str, Any]) -> list[str]:
    length = f"{scale.epochs:g} epochs" if scale.epochs else "the recipe's length"
    pooled = f", images averaged over squares of {scale.pool}x{scale.pool} pixels" if scale.pool > 1 else ""
    return [
        f"Data {scale.data}, recipe {scale.recipe}, {length}{pooled}. The training error is that of the epoch as it was run:",
        "on augmented images, with the batch's statistics. Layer responses are of the trained network on test images, behind",
        "each BatchNorm, in front of the ReLU and the sum: after few epochs they are near 1, where gamma starts, and what",
        "differs from it may be running statistics that are behind the weights.",
        "",
        f"{where['evidence']}, {where['date']}.",
        "",
    ]


def _time(found: Outcomes) -> list[str]:
    """Processor time, which other work on the machine does not change much; none where a run was interrupted."""
    outcomes = found.values()
    if any(len(outcome.processor) < len(outcome.seeds) for outcome in outcomes):
        return []
    total = sum(sum(outcome.processor) for outcome in outcomes)
    runs = sum(len(outcome.seeds) for outcome in outcomes)
    return [f"Processor time of the {runs} runs: {total / 60:.0f} minutes, with the start of each.", ""]


def _runs(scale: Scale, found: Outcomes) -> str:
    """Every run in a row: what the table and its spreads are made of."""
    rows = ["network,seed,recipe,training_error,test_error,processor_seconds"]
    for name, outcome in found.items():
        recipe = scale.deep_recipe if name in scale.deep else scale.recipe
        seconds = [f"{value:.0f}" for value in outcome.processor]
        if len(seconds) < len(outcome.seeds):
            seconds = [""] * len(outcome.seeds)
        ends = zip(outcome.seeds, outcome.last("train").values, outcome.last("test").values, seconds, strict=True)
        rows += [f"{name},{seed},{recipe},{train:.4f},{test:.4f},{spent}" for seed, train, test, spent in ends]
    return "\n".join([*rows, ""])


def write(out: Path, files: dict[str, str]) -> None:
    """Into the folder.

    Raises:
        LogError: one cannot be written.
    """
    for name, text in files.items():
        write_file(out / name, text)
