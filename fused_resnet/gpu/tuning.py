"""Stage ``tuning``: tiles and ways of the launches that cost most, measured, into ``tuning.json``.

For each launch the best candidates of the model, our convolution with its work on load apart, and PyTorch's convolution between
fused ends are checked against the reference, then timed in turns (:func:`fused_resnet.tuning.choice.choose` says what these
are). ``fused-resnet tune`` is this stage alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from .. import measure
from ..launch import Launch
from ..network import Use
from ..tuning import measured
from ..tuning.choice import Choice, candidates, choose
from ..tuning.measured import Entry, Table
from ..tuning.pieces import pieces
from . import operands
from .launches import arch_of, facts, key_of, multiprocessors_of, one_of_each, timed
from .results import Row, Time
from .stage import Stage, describe
from .timing import Call, interleaved, rotating, touched
from .warm import Item, Warm

TABLE = "tuning.json"
DEFAULT = "as chosen"

#: Tiles tried for the convolution that is left where a launch runs apart.
APART = 2
#: Launches whose candidates compile while another is timed.
AHEAD = 4


@dataclass(frozen=True)
class Way:
    """One way to run a launch: fused, apart or vendor, with a tile."""

    how: str
    tile: Any = None

    @property
    def name(self) -> str:
        """``fused 2x8x8 128f 64c 8w 4s``."""
        if self.tile is None:
            return self.how
        return f"{self.how} " + " ".join(f"{name}={value}" for name, value in asdict(self.tile).items())


def ways(launch: Launch, arch: str, most: int, default: Choice, tf32: bool = False, multiprocessors: int = 0) -> list[Way]:
    """What is tried: the default first, at most ``most`` tiles of the fused kernel, then the launch in pieces."""
    found = [Way(default.how, default.tile)]
    found += [Way("fused", tile) for tile in candidates(launch, arch, tf32, multiprocessors)[:most]]
    apart = pieces(launch, "apart")
    if apart is not None:
        found += [Way("apart", tile) for tile in candidates(apart.core, arch, tf32, multiprocessors)[:APART]]
    if pieces(launch, "vendor") is not None:
        found.append(Way("vendor"))
    return list(dict.fromkeys(found))


def tf32_of(launch: Launch, device: torch.device) -> bool:
    """Whether the launch is multiplied as tf32 here, by PyTorch's settings."""
    if device.type != "cuda":
        return False
    from ..backends.triton import tf32_allowed

    return tf32_allowed(launch.dtype, device)


def cost(entry: tuple[str, Use], stage: Stage) -> float:
    """Seconds that tuning the launch could save at most: what it takes over its roofline, as often as it runs.

    Before it was timed, what the model expects it to take.
    """
    use = entry[1]
    row = stage.results.row("launches", key_of(entry))
    time = (row or {}).get("times", {}).get("fused")
    if row and time:
        return float(use.times * (time["median"] - (row["roofline"] or 0.0)))
    count = multiprocessors_of(stage.device)
    predicted = choose(use.launch, arch_of(stage.device) or "interpreter", multiprocessors=count).seconds
    return use.times * (predicted if predicted is not None else use.launch.bytes / 1e12)


def run(stage: Stage) -> None:
    """A row for each launch, the costliest first, and the table anew behind each."""
    torch.backends.cudnn.benchmark = False  # as it is where the choice is followed: the vendor is not faster here than there
    arch = arch_of(stage.device)
    gpu = stage.results.data["machine"].get("gpu") or ("" if stage.dry else torch.cuda.get_device_name(stage.device))
    path = Path(stage.results.data.get("wanted", {}).get("table") or stage.folder / TABLE)
    table = Table(gpu, torch.__version__, measure.versions().get("triton", ""), date.today().isoformat(), known(path, gpu))
    if not path.exists():
        _write(path, table, stage.dry)
    by_signature = {entry[1].launch.signature: entry for entry in timed(stage)}  # a launch of two networks once
    todo = [
        entry
        for entry in sorted(by_signature.values(), key=lambda entry: -cost(entry, stage))
        if measured.key_of(entry[1].launch, tf32_of(entry[1].launch, stage.device)) not in table.entries
    ]
    if stage.dry:
        todo = one_of_each(todo)
    tried = {
        launch: _ways(launch, arch, gpu, stage.scope.candidates, stage.device) for launch in (entry[1].launch for entry in todo)
    }
    with Warm(arch, gpu) as warm:
        place = 0

        def tune(entry: tuple[str, Use]) -> Row:
            nonlocal place
            for following in todo[place : todo.index(entry) + 1 + AHEAD]:
                launch = following[1].launch
                warm.add(_items(launch, tried[launch], tf32_of(launch, stage.device)))
            place = todo.index(entry)
            row, found = _tuned(entry, tried[entry[1].launch], stage, warm)
            if found is not None:
                launch = entry[1].launch
                table.entries[measured.key_of(launch, tf32_of(launch, stage.device))] = found  # type: ignore[index]
                _write(path, table, stage.dry)
            return row

        stage.each("tuning", todo, lambda entry: entry[1].launch.signature, tune)


def known(path: Path, gpu: str) -> dict[str, Entry]:
    """Entries of a table that still hold: of this GPU and these versions."""
    table = measured.read(path)
    versions = (gpu, torch.__version__, measure.versions().get("triton", ""))
    same = table is not None and (table.gpu, table.torch, table.triton) == versions
    return dict(table.entries) if table is not None and same else {}


def _write(path: Path, table: Table, dry: bool) -> None:
    """To the folder of the results, and to where this run's later stages look for it."""
    measured.write(path, table)
    if table.gpu and not dry:
        measured.write(measured.user_path(table.gpu), table)


def _ways(launch: Launch, arch: str | None, gpu: str, most: int, device: torch.device) -> list[Way]:
    if arch is not None:
        tf32, count = tf32_of(launch, device), multiprocessors_of(device)
        default = choose(launch, arch, tf32, gpu, multiprocessors=count)
        return ways(launch, arch, most, default, tf32, count)
    # The interpreter: tiles that a GPU would get, in pieces too.
    return ways(launch, "sm_90", most, choose(launch, "interpreter"))


def _items(launch: Launch, found: Sequence[Way], tf32: bool) -> Iterator[Item]:
    """What is compiled for the ways of a launch: first the fused kernels, then the convolutions that are left apart."""
    yield from (Item(launch, way.tile, tf32) for way in found if way.how == "fused")
    parts = pieces(launch, "apart")
    if parts is not None:
        for way in found:
            if way.how == "apart":
                yield Item(parts.core, way.tile, tf32)


def _tuned(entry: tuple[str, Use], tried: Sequence[Way], stage: Stage, warm: Warm) -> tuple[Row, Entry | None]:
    where, use = entry
    launch, device = use.launch, stage.device
    tf32 = tf32_of(launch, device)
    given = operands.random_operands(launch, device, 0)
    expected = operands.truth(launch, given)
    right, problems, wrong = [], {}, False
    for way in tried:
        late = warm.wait(Item(launch, way.tile, tf32), max(1.0, stage.left())) if way.how == "fused" else ""
        problem, off = (late, False) if late else _problem(launch, way, given, expected, device)
        if problem:
            problems[way.name], wrong = problem, wrong or off
        else:
            right.append(way)
    del expected
    row: Row = {
        "where": where,
        **facts(use, stage.results),
        "measured": not stage.dry,
        "problems": problems,
        "tried": len(tried),
    }
    if not right:
        return {**row, "status": "failed", "error": next(iter(problems.values())), "times": {}, "chosen": None}, None
    times = _times(launch, right, stage)
    named = {way.name: way for way in right}
    best: dict[str, str] = {}  # way -> the fastest of it
    for name, time in times.items():
        how = named[name].how
        if how not in best or (time and time["median"] < _seconds(times[best[how]])):
            best[how] = name
    chosen = min(best.values(), key=lambda name: _seconds(times[name]))
    shown: dict[str, Time | None] = {DEFAULT: times.get(tried[0].name), **{how: times[name] for how, name in best.items()}}
    row.update(times=shown, chosen={"how": named[chosen].how, "tile": _tile(named[chosen])}, default=_tile(tried[0]))
    row.update(status="wrong" if wrong else "ok", error="; ".join(f"{k}: {v}" for k, v in problems.items())[:300] or None)
    time = times[chosen]
    if time is None:
        return row, None
    others = {how: _seconds(times[name]) for how, name in best.items() if how != named[chosen].how}
    return row, Entry(named[chosen].how, named[chosen].tile, time["median"], others)


def _problem(
    launch: Launch, way: Way, given: operands.Operands, expected: operands.Operands, device: torch.device
) -> tuple[str, bool]:
    """Why a way is no choice, and whether that is because its values are off. A lost device raises."""
    try:
        verdict = operands.compare(launch, given, operands.run(launch, given, way.tile, way.how), expected)
        return "; ".join(verdict.wrong), bool(verdict.wrong)
    except Exception as error:
        problem = describe(error)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return problem, False


def _times(launch: Launch, right: Sequence[Way], stage: Stage) -> dict[str, Time | None]:
    from ..backends import triton

    device = stage.device
    if stage.dry:  # each has run once, and there is nothing to time
        return {way.name: None for way in right}
    sets: dict[int, operands.Operands] = {}

    def given(number: int) -> operands.Operands:
        if number not in sets:
            sets[number] = operands.random_operands(launch, device, number)
        return sets[number]

    def call(way: Way, number: int) -> Call:
        here = given(number)
        return lambda: triton.run(launch, here, tile=way.tile, how=way.how)

    moved = max(launch.bytes, touched(*given(0).values()))
    calls = {way.name: rotating(lambda number, way=way: call(way, number), moved, device) for way in right}  # type: ignore[misc]
    with torch.no_grad():
        return interleaved(calls, device, seconds=0.5, rounds=(5, 20))


def _seconds(time: Time | None) -> float:
    return time["median"] if time else float("inf")


def _tile(way: Way) -> dict[str, int] | None:
    return None if way.tile is None else asdict(way.tile)
