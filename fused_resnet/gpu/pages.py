"""The Markdown pages of docs/benchmarks/, from results and from predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..tuning import measured
from .contenders import CHANNELS_LAST, COMPILED, CONTIGUOUS, FUSED, LOW
from .draw import Group, Point
from .launches import VENDOR
from .machine import rate
from .results import Row, failures
from .summary import speedup

UNMEASURED = "not measured"
MODES = {"infer": "inference", "train": "training step"}
_CONTENDERS = (CONTIGUOUS, CHANNELS_LAST, COMPILED, f"{COMPILED} max-autotune", FUSED, LOW)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all but the first column to the right."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def slug(data: Mapping[str, Any]) -> str:
    """A results file's page: GPU and date."""
    return f"{measured.slug(data['machine'].get('gpu') or 'no gpu')}-{data['machine'].get('date') or data['begun'][:10]}"


def evidence(data: Mapping[str, Any]) -> str:
    """The line that stands on every page and picture: grade, machine, versions, date."""
    machine = data["machine"]
    versions = machine.get("versions", {})
    said = [
        f"{name} {versions[key]}"
        for name, key in (("PyTorch", "torch"), ("Triton", "triton"), ("CUDA", "cuda"))
        if key in versions
    ]
    driver = machine.get("as_found", {}).get("driver_version")
    parts = [
        machine.get("gpu") or "no GPU",
        *said,
        *[f"driver {driver}"] * bool(driver),
        machine.get("date") or data["begun"][:10],
    ]
    return f"{data['grade']}: {', '.join(parts)}"


def shown(time: Any, factor: float = 1e3, unit: str = "") -> str:
    """The median of a time, or that there is none."""
    return UNMEASURED if not time else f"{time['median'] * factor:.3g}{unit}"


def spread(time: Any) -> str:
    """Half the distance of the quartiles, in percent of the median."""
    return UNMEASURED if not time else f"{50 * (time['high'] - time['low']) / time['median']:.1f}%"


def label(signature: str) -> str:
    """A launch for people, from its signature: ``conv 3x3 stride 2, 64 to 128, 56x56: bn_relu, stats``."""
    kind, _, batch, image, *rest = signature.partition(" -> ")[0].split(" ")
    given = {name[0]: name[1:] for name in rest if name[0] in "CKkspdg" and name[1:2].isdigit()}
    window = given.get("k") or next(name for name in rest if name[0].isdigit())
    said = f"{kind} {window}" + (" stride 2" if given["s"] == "2x2" else "")
    if int(given.get("g", "1")) > 1:
        said += f" {given['g']} groups"
    said += f", {given['C']} to {given['K']}" if "K" in given else f", {given['C']}"
    ends = [end for end in next(name for name in rest if name.count("/") == 3).split("/") if end not in ("identity", "store")]
    return f"{said}, {image}, {batch}" + (f": {', '.join(ends)}" if ends else "")


# ---- a results file


def measured_page(data: dict[str, Any], pictures: Mapping[str, str]) -> str:
    """The page of a results file.

    Args:
        data: checked results.
        pictures: name -> file of those that were drawn.
    """
    machine = data["machine"]
    text = [f"# {machine.get('gpu') or 'No GPU'}", "", f"**{evidence(data)}.**", "", _circumstances(data), ""]
    wrong = failures(data)
    if wrong:
        text += [f"## {len(wrong)} failures", "", *(f"* `{line}`" for line in wrong), ""]
    sections = (
        ("Networks", _networks(data), ("speedup", "memory")),
        ("Ceilings", _ceilings(data), ()),
        ("Correctness", _correctness(data), ()),
        ("Launches of ResNet-50", _launches(data), ("roofline",)),
        ("Tuning", _tuning(data), ()),
        ("A training step", _profile(data), ()),
    )
    for title, body, drawn in sections:
        if body:
            text += [f"## {title}", ""]
            text += [line for name in drawn if name in pictures for line in (f"![{name}]({pictures[name]})", "")]
            text += [body, ""]
    return "\n".join(text).rstrip() + "\n"


def _circumstances(data: Mapping[str, Any]) -> str:
    found = data["machine"].get("as_found", {})
    clocks = [
        f"{what} {found[key]}"
        for what, key in (("SM clock", "clocks.sm"), ("memory clock", "clocks.mem"), ("power limit", "power.limit"))
        if key in found
    ]
    text = "Interleaved runs; the median, with half the distance of the quartiles beside it. Nothing on the card was changed"
    return f"{text}; as found: {', '.join(clocks)}." if clocks else f"{text}."


def _networks(data: Mapping[str, Any]) -> str:
    rows = []
    for row in data["models"]:
        times = row.get("times") or {}
        ratio = speedup(row)
        cells = [
            f"{shown(times[name])} ± {spread(times[name])}" if times.get(name) else (UNMEASURED if name in times else "-")
            for name in _CONTENDERS
        ]
        rows.append([row["key"], *cells, f"{ratio:.2f}x" if ratio else UNMEASURED, row["status"]])
    if not rows:
        return ""
    text = table(["ms", *_CONTENDERS, "fused against the faster eager", ""], rows)
    memory = [
        [row["key"], *(_gigabytes(row["step_bytes"].get(name)) for name in (CHANNELS_LAST, FUSED, LOW))]
        for row in data["models"]
        if row.get("step_bytes") and row.get("mode") == "train"
    ]
    if memory:
        text += "\n\n" + table(["peak memory of a training step beyond parameters, GB", CHANNELS_LAST, FUSED, LOW], memory)
    return text


def _gigabytes(size: Any) -> str:
    return UNMEASURED if not size else f"{size / 1e9:.2f}"


def _ceilings(data: Mapping[str, Any]) -> str:
    rows = [
        [row["key"], UNMEASURED if row.get("rate") is None else f"{row['rate'] / 1e12:.3g} T{row['unit']}"]
        for row in data["ceilings"]
        if row["status"] == "ok"
    ]
    return table(["what", "rate"], rows) if rows else ""


def _correctness(data: Mapping[str, Any]) -> str:
    lines = []
    if data["checks"]:
        right = sum(row["status"] == "ok" for row in data["checks"])
        twice = sum(bool(row.get("bitwise_twice")) for row in data["checks"])
        lines.append(
            f"{right} of {len(data['checks'])} distinct launches agree with the reference executor at the sizes they have in "
            f"the networks, on random operands, into poisoned memory; {twice} are bitwise equal on a second run."
        )
    files = [row for row in data["tests"] if row.get("kind") == "file"]
    if files:
        cells = [[f"`{row['key']}`", *(str(row[name]) for name in ("passed", "failed", "skipped", "late"))] for row in files]
        lines.append(table(["tests", "passed", "failed", "skipped", "not started for want of time"], cells))
    for row in data["tests"]:
        if row.get("kind") == "sanitizer":
            why = f" ({row['error']})" if row.get("error") else ""
            lines.append(f"{row['key']}: {row['status']}{why}.")
    return "\n\n".join(lines)


def _launches(data: Mapping[str, Any]) -> str:
    rows = []
    for row in data["launches"]:
        if row["status"] != "ok":
            continue
        ours, vendor = row["times"].get("fused"), row["times"].get(VENDOR)
        part = f"{100 * row['roofline'] / ours['median']:.0f}%" if ours and row.get("roofline") else UNMEASURED
        beside = shown(vendor, 1e6) if VENDOR in row["times"] else "-"
        rows.append(
            [
                f"{row['where']}: {row['layer']}",
                label(row["signature"]),
                str(row["uses"]),
                shown(ours, 1e6),
                spread(ours),
                part,
                beside,
            ]
        )
    head = ["layer", "launch", "times", "us", "±", "of the roofline", "cuDNN's convolution alone, us"]
    return table(head, rows) if rows else ""


def _tuning(data: Mapping[str, Any]) -> str:
    rows = []
    for row in data["tuning"]:
        times = row.get("times") or {}
        if times:
            chosen = row["chosen"]["how"] if row.get("chosen") else "-"
            rows.append(
                [
                    label(row["signature"]),
                    *(shown(times[how], 1e6) if how in times else "-" for how in ("as chosen", "fused", "apart", "vendor")),
                    chosen,
                ]
            )
    return table(["us", "as chosen before", "fused", "apart", "vendor", "kept"], rows) if rows else ""


def _profile(data: Mapping[str, Any]) -> str:
    parts = []
    for row in data["profile"]:
        if row["status"] != "ok":
            continue
        if not row.get("measured"):
            parts.append(f"{row['key']}: {UNMEASURED}.")
            continue
        bound = "the host is the limit" if row["cpu_bound"] else "the device is the limit"
        span, idle, host, whole = (f"{row[name] * 1e3:.2f} ms" for name in ("span", "idle", "host", "whole"))
        parts.append(
            f"{row['key']}, {row['cell']}: {span} from the first kernel to the last, {idle} of it idle, {row['launches']} "
            f"launches; {bound} ({host} to start them, {whole} in all)."
        )
        parts.append(
            table(
                ["kind", "launches", "ms", "part"],
                [
                    [line["kind"], str(line["launches"]), f"{line['seconds'] * 1e3:.3f}", f"{100 * line['part']:.1f}%"]
                    for line in row["lines"]
                ],
            )
        )
    return "\n\n".join(parts)


def speedup_groups(data: Mapping[str, Any]) -> list[Group]:
    """Bars of all cells with times: how many times as fast as the faster eager one."""
    groups = []
    for row in data["models"]:
        times = {name: time for name, time in (row.get("times") or {}).items() if time}
        eager = [times[name]["median"] for name in (CONTIGUOUS, CHANNELS_LAST) if name in times]
        if eager and FUSED in times:
            values = {
                name: (
                    min(eager) / times[name]["median"],
                    f"{min(eager) / times[name]['median']:.2f}x, {shown(times[name])} ms",
                )
                for name in _CONTENDERS
                if name in times
            }
            groups.append(Group(row["key"].replace(", torch.compile", ","), values))
    return groups


def memory_groups(data: Mapping[str, Any]) -> list[Group]:
    """Bars of the training steps' peak memory."""
    groups = []
    for row in data["models"]:
        sizes = {name: size for name, size in (row.get("step_bytes") or {}).items() if size}
        if row.get("mode") == "train" and FUSED in sizes and "compiled" not in row:
            groups.append(
                Group(row["key"], {name: (sizes[name], f"{sizes[name] / 1e9:.2f} GB") for name in _CONTENDERS if name in sizes})
            )
    return groups


def roofline_points(data: Mapping[str, Any]) -> list[Point]:
    """Timed launches with FLOPs."""
    rows = [row for row in data["launches"] if row["status"] == "ok" and row["times"].get("fused")]
    whole = sum(row["uses"] * row["times"]["fused"]["median"] for row in rows) or 1.0
    return [_point(row, whole) for row in rows if row["flops"]]


def _point(row: Row, whole: float) -> Point:
    seconds = row["times"]["fused"]["median"]
    hint = f"{row['where']} {row['layer']}: {seconds * 1e6:.0f} us, {row['uses']} times"
    return Point(row["kind"], row["flops"] / row["bytes"], row["flops"] / seconds, row["uses"] * seconds / whole, hint)


def roofs(data: dict[str, Any]) -> tuple[float, float] | None:
    """The measured bandwidth and matrix rate."""
    bandwidth, matrix = rate(data, "copy"), rate(data, "bf16 product")
    return (bandwidth, matrix) if bandwidth and matrix else None


# ---- the first page


def index_page(results: Mapping[str, dict[str, Any]]) -> str:
    """What there is.

    Args:
        results: page -> its data.
    """
    text = [
        "# Benchmarks",
        "",
        "Drawn by `fused-resnet report`; [docs/gpu.md](../gpu.md) says how to measure. Not edited by hand.",
        "",
    ]
    if not results:
        text += [
            "**No time has been measured on a GPU yet.** What the analytical model expects is on the page of "
            "[predictions](predicted.md), and is nothing but that.",
            "",
            "Measured times of a CPU are in the [README](../../README.md#numbers).",
        ]
        return "\n".join(text) + "\n"
    for page, data in results.items():
        wrong = failures(data)
        text += [f"* [{data['machine'].get('gpu')}]({page}): {evidence(data)}" + (f"; {len(wrong)} failures" if wrong else "")]
    text += ["", "What the analytical model expects of these and of other devices: [predictions](predicted.md)."]
    return "\n".join(text) + "\n"
