"""What came of a run: at most 40 lines for the terminal, failures first, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .contenders import CHANNELS_LAST, COMPILED, CONTIGUOUS, FUSED
from .results import Row, failures

LINES = 40
#: Failures listed, and rows of each table.
FAILURES, ROWS = 10, 8


def milliseconds(time: Any) -> str:
    """``3.21 ms``, or that nothing was measured."""
    return "not measured" if not time else f"{time['median'] * 1e3:.3g} ms"


def speedup(row: Row) -> float | None:
    """The faster eager time over the fused time."""
    times = row.get("times") or {}
    eager = [times[name]["median"] for name in (CONTIGUOUS, CHANNELS_LAST) if times.get(name)]
    fused = times.get(FUSED)
    return min(eager) / fused["median"] if eager and fused else None


def lines(data: dict[str, Any]) -> list[str]:
    """The summary, failures first."""
    made = [*_failures(data), *_stages(data), *_ceilings(data), *_checks(data), *_models(data), *_launches(data)]
    made += [*_tuning(data), *_profile(data)]
    return made if len(made) <= LINES else [*made[: LINES - 1], "(more in summary.md and results.json)"]


def markdown(data: dict[str, Any]) -> str:
    """The whole of it as a file."""
    machine = data["machine"]
    title = "Measured" if data["measured"] else "Not measured: a dry run through the interpreter"
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    text = [f"# {title}", "", f"{machine.get('gpu') or 'no GPU'}; {versions}; {machine.get('date', data['begun'][:10])}", ""]
    parts = (
        ("Failures", _failures(data, most=1000)),
        ("Stages", _stages(data)),
        ("Ceilings", _ceilings(data)),
        ("Correctness", _checks(data)),
        ("Models", _models(data, most=1000)),
        ("Launches", _launches(data, most=1000)),
        ("Tuning", _tuning(data, most=1000)),
        ("A training step", _profile(data, most=1000)),
    )
    for name, part in parts:
        said = list(part)
        if said:
            text += [f"## {name}", "", "```", *said, "```", ""]
    return "\n".join(text)


def _failures(data: dict[str, Any], most: int = FAILURES) -> Iterator[str]:
    found = failures(data)
    yield f"{len(found)} failures" if found else "no failures"
    for line in found[:most]:
        yield f"  FAILED {line}"[:160]
    if len(found) > most:
        yield f"  and {len(found) - most} more"


def _stages(data: dict[str, Any]) -> Iterator[str]:
    said = [f"{name} {state.get('status', 'killed')} {state.get('seconds', 0):.0f} s" for name, state in data["stages"].items()]
    yield f"stages: {', '.join(said)}"
    for name, state in data["stages"].items():
        for note in state.get("notes", []):
            if "time" in note:
                yield f"  {name}: {note}"[:160]


def _ceilings(data: dict[str, Any]) -> Iterator[str]:
    rates = [f"{row['key']} {_rate(row)}" for row in data["ceilings"] if row["status"] == "ok"]
    if rates:
        yield "ceilings: " + ", ".join(rates)


def _rate(row: Row) -> str:
    if row["rate"] is None:
        return "not measured"
    return (
        f"{row['rate'] / 1e12:.2f} T{row['unit']}" if row["rate"] > 1e10 else f"{row['rate'] / 1e3:.0f} thousand {row['unit']}"
    )


def _checks(data: dict[str, Any]) -> Iterator[str]:
    rows = data["checks"]
    if rows:
        right = sum(row["status"] == "ok" for row in rows)
        worst = max((row["relative_error"] or 0 for row in rows if "relative_error" in row), default=0.0)
        yield f"launches checked: {right} of {len(rows)} right, largest relative error {worst:.1e}"
    files = [row for row in data["tests"] if row.get("kind") == "file"]
    if files:
        outcomes = {"passed": "passed", "failed": "failed", "skipped": "skipped", "late": "not started"}
        yield "tests: " + ", ".join(f"{sum(row[name] for row in files)} {said}" for name, said in outcomes.items())
    for row in data["tests"]:
        if row.get("kind") == "sanitizer":
            yield f"{row['key']}: {row['status']}{': ' + row['error'] if row.get('error') else ''}"[:160]


def _models(data: dict[str, Any], most: int = 14) -> Iterator[str]:
    for row in data["models"][:most]:
        times = row.get("times")
        if not times:
            yield f"{row['key']}: {row['status']}"
            continue
        ratio = speedup(row)
        said = ", ".join(f"{name} {milliseconds(time)}" for name, time in times.items() if name == FUSED or _rival(name))
        yield f"{row['key']}: {said}" + (f"; {ratio:.2f}x the faster eager" if ratio else "")


def _rival(name: str) -> bool:
    return name.startswith((COMPILED, "eager"))


def _launches(data: dict[str, Any], most: int = ROWS) -> Iterator[str]:
    def spent(row: Row) -> float:
        time = (row.get("times") or {}).get("fused")
        return float(row["uses"] * time["median"]) if time else 0.0

    rows = [row for row in data["launches"] if row["status"] == "ok"]
    if not rows:
        return
    if not data["measured"]:
        yield f"launches run: {len(rows)}, not measured"
        return
    yield f"launches timed: {len(rows)}; the costliest:"
    for row in sorted(rows, key=lambda row: -spent(row))[:most]:
        yield launch_line(row)


def launch_line(row: Row) -> str:
    """One launch: how often, its time, its part of the roofline, the vendor's convolution."""
    times = row["times"]
    ours, vendor = times.get("fused"), times.get("convolution of PyTorch")
    said = f"  {row['uses']}x {milliseconds(ours)}"
    if ours and row["roofline"]:
        said += f", {100 * row['roofline'] / ours['median']:.0f}% of the roofline"
    if vendor:
        said += f", cuDNN's convolution {milliseconds(vendor)}"
    return f"{said}: {row['signature'].partition(' -> ')[0]}"[:160]


def _tuning(data: dict[str, Any], most: int = 4) -> Iterator[str]:
    rows = [row for row in data["tuning"] if row.get("times")]
    gains = [
        (row, before["median"] / min(time["median"] for time in row["times"].values() if time))
        for row in rows
        if (before := row["times"].get("as chosen"))
    ]
    if rows and not gains:
        yield f"tuned: {len(rows)} launches, not measured"
    if gains:
        yield f"tuned: {len(gains)} launches, the most gained:"
    for row, gain in sorted(gains, key=lambda pair: -pair[1])[:most]:
        yield f"  {gain:.2f}x by {row['chosen']['how']}: {row['signature'].partition(' -> ')[0]}"[:160]


def _profile(data: dict[str, Any], most: int = 6) -> Iterator[str]:
    for row in data["profile"]:
        if row["status"] != "ok":
            continue
        if not row["measured"]:
            yield f"profile of {row['key']}: {sum(line['launches'] for line in row['lines'])} launches, not measured"
            continue
        bound = "the host is the limit" if row["cpu_bound"] else "the device is the limit"
        times = f"{row['span'] * 1e3:.2f} ms, idle {row['idle'] * 1e3:.2f} ms"
        yield f"profile of {row['key']}: {times}, {row['launches']} launches; {bound}"
        for line in row["lines"][:most]:
            yield f"  {100 * line['part']:.0f}% {line['kind']} ({line['launches']})"
