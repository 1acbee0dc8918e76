"""A document of :mod:`.report` as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..cli.text import table

_COMPILED = (
    "launch",
    "runs",
    "registers",
    "spills B",
    "shared KiB",
    "resident",
    "limited by",
    "warps",
    "stages",
    "matrix",
    "operands",
    "loads",
    "loop m/l/b/o",
    "other",
)
_PREDICTED = (
    "launch",
    "runs",
    "GFLOP",
    "MB",
    "FLOP/B",
    "L2 MB",
    "rim",
    "programs",
    "waves",
    "tail",
    "us",
    "all us",
    "share",
    "bound",
)


def title(document: Mapping[str, Any]) -> str:
    """What was inspected, and with which versions."""
    request, versions = document["request"], document["versions"]
    size = f"{request['batch']} x 3 x {request['size']} x {request['size']}, {request['dtype']}{', tf32' * request['tf32']}"
    what = f", layers {request['layer']}" if request["layer"] else ""
    return f"{request['model']}, {request['mode']}, {size}{what}; Triton {versions['triton']}, PyTorch {versions['torch']}"


def pages(document: Mapping[str, Any]) -> Iterator[str]:
    """The text, a page an architecture."""
    yield title(document)
    for arch, part in document["architectures"].items():
        yield "\n".join(_page(arch, part))


def _page(arch: str, part: Mapping[str, Any]) -> Iterator[str]:
    rows = list(part["launches"].values())
    yield f"\n{arch}, COMPILED: read off the compiler's output, nothing ran"
    yield table(_COMPILED, [_compiled(row) for row in rows])
    yield _compiled_total(part["totals"])
    yield f"\n{arch}, PREDICTED for one {part['device']} by a model of its published limits, not measured; the longest first"
    whole = part["totals"]["predicted"]["launches_seconds"]
    order = sorted(rows, key=lambda row: -spent(row))
    yield table(_PREDICTED, [_predicted(row, whole) for row in order])
    yield _predicted_total(part["totals"])


def spent(row: Mapping[str, Any]) -> float:
    """Seconds of all runs of a launch."""
    return float(len(row["layers"]) * row["predicted"]["seconds"])


def stages(facts: Mapping[str, Any]) -> str:
    """``4``, or ``3-4`` where operands have different numbers of buffers."""
    low, high = facts["stages"]
    return f"{low}" if low == high else f"{low}-{high}"


def _compiled(row: Mapping[str, Any]) -> list[str]:
    facts = row["compiled"]
    if facts is None:
        return [row["label"], str(len(row["layers"])), f"no kernel: {row['error']}", *[""] * (len(_COMPILED) - 3)]
    reading, occupancy, loop = facts["reading"], facts["occupancy"], facts["reading"]["loop"]
    mix = other = "-"
    if loop:
        mix = "/".join(str(loop[name]) for name in ("matrix", "load", "barrier", "other"))
        other = f"{loop['other'] / max(sum(loop[name] for name in ('matrix', 'load', 'barrier', 'other')), 1):.0%}"
    return [
        row["label"],
        str(len(row["layers"])),
        str(facts["registers"]),
        str(facts["spills"]),
        f"{facts['shared'] / 1024:.0f}",
        f"{occupancy['programs']} ({occupancy['warps']:.0%})",
        occupancy["limited_by"],
        str(facts["num_warps"]),
        stages(facts),
        reading["matrix"] or "-",
        reading["operands"] or "-",
        "+".join(reading["loads"]) or "-",
        mix,
        other,
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _predicted(row: Mapping[str, Any], whole: float) -> list[str]:
    guess, runs = row["predicted"], len(row["layers"])
    l2 = guess.get("l2_bytes")
    return [
        row["label"],
        str(runs),
        f"{row['counted']['flops'] / 1e9:,.1f}",
        f"{guess['memory_bytes'] / 1e6:,.1f}",
        f"{row['counted']['flops'] / max(guess['memory_bytes'], 1):,.0f}",
        _number(None if l2 is None else l2 / 1e6, ",.0f"),
        _number(guess.get("rim"), ".0%"),
        _number(guess.get("programs"), ",d"),
        _number(guess.get("waves"), ",.2f"),
        _number(guess.get("tail"), ".0%"),
        f"{guess['seconds'] * 1e6:,.1f}",
        f"{runs * guess['seconds'] * 1e6:,.1f}",
        f"{runs * guess['seconds'] / whole:.1%}",
        guess["bound"],
    ]


def _compiled_total(totals: Mapping[str, Any]) -> str:
    compiled = totals["compiled"]
    text = f"  {compiled['distinct']} distinct launches compiled, {compiled['spilling']} spill; most registers "
    text += f"{compiled['registers']}, most shared memory {compiled['shared'] / 1024:.0f} KiB"
    return text + (f"; {compiled['failed']} without a kernel" if compiled["failed"] else "")


def _predicted_total(totals: Mapping[str, Any]) -> str:
    counted, guess = totals["counted"], totals["predicted"]
    lines = [
        f"  {counted['launches']} launches, {counted['flops'] / 1e12:.2f} TFLOP, {counted['bytes'] / 1e9:.2f} GB:"
        f" {guess['launches_seconds'] * 1e3:.2f} ms (each at the roofline: {guess['roofline_seconds'] * 1e3:.2f} ms)"
    ]
    if "eager_seconds" in guess:
        lines.append(
            f"  the network, with {counted['outside_kernels']} kernels outside the launches:"
            f" {guess['fused_seconds'] * 1e3:.2f} ms"
        )
        lines.append(
            f"  eager, its {counted['eager_kernels']} kernels ({counted['eager_bytes'] / 1e9:.2f} GB) by the same model:"
            f" {guess['eager_seconds'] * 1e3:.2f} ms; predicted ratio {guess['ratio']:.2f}"
        )
        lines.append(
            f"  eager with each kernel at the roofline: {guess['eager_roofline_seconds'] * 1e3:.2f} ms;"
            f" ratio {guess['roofline_ratio']:.2f}, what the device's copy and matrix rates alone would allow"
        )
    return "\n".join(lines)


#: What is compared of a compile: heading -> key.
_COMPARED = {"registers": "registers", "spills": "spills", "shared": "shared", "warps": "num_warps"}


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What changed from one document to another; launches are the same by signature.

    Raises:
        ValueError: the two are of different requests.
    """
    asked = [document["request"] for document in (before, after)]
    unlike = [f"{key} {asked[0][key]} and {asked[1][key]}" for key in asked[0] if asked[0][key] != asked[1].get(key)]
    if unlike:
        raise ValueError(f"the reports are of different requests, so nothing can be compared: {', '.join(unlike)}")
    lines = [f"before: {title(before)}", f"after:  {title(after)}"]
    old, new = before["architectures"], after["architectures"]
    for arch in dict.fromkeys([*old, *new]):
        if arch not in old or arch not in new:
            lines += ["", f"{arch}: only {'after' if arch in new else 'before'}"]
            continue
        cells = list(_changes(old[arch]["launches"], new[arch]["launches"]))
        lines += ["", f"{arch}, compiled and predicted (loop: matrix/load/barrier/other)"]
        lines.append(table(["launch", "what", "before", "after"], cells) if cells else "  nothing changed")
        was, now = (part[arch]["totals"]["predicted"]["launches_seconds"] for part in (old, new))
        lines.append(f"  all launches, predicted: {was * 1e3:.2f} ms -> {now * 1e3:.2f} ms")
    return "\n".join(lines)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[list[str]]:
    labels = {signature: row["label"] for signature, row in (*old.items(), *new.items())}
    for signature in dict.fromkeys([*old, *new]):
        if signature not in old or signature not in new:
            yield [labels[signature], f"only {'after' if signature in new else 'before'}", "", ""]
            continue
        was, now = _compared(old[signature]), _compared(new[signature])
        for heading in dict.fromkeys([*was, *now]):
            if was.get(heading) != now.get(heading):
                yield [labels[signature], heading, was.get(heading, "-"), now.get(heading, "-")]


def _compared(row: Mapping[str, Any]) -> dict[str, str]:
    """What is compared of a row, as text."""
    made, tile = row["compiled"], row["tile"]
    found = {
        "tile": "x".join(str(value) for value in tile.values()) if tile else "-",
        "us": f"{row['predicted']['seconds'] * 1e6:.1f}",
    }
    if made is None:
        return {**found, "error": row["error"]}
    found |= {heading: str(made[key]) for heading, key in _COMPARED.items()}
    reading, loop = made["reading"], made["reading"]["loop"]
    found |= {"stages": stages(made), "matrix": reading["matrix"] or "-", "operands": reading["operands"] or "-"}
    found["loop"] = "/".join(str(loop[kind]) for kind in ("matrix", "load", "barrier", "other")) if loop else "-"
    return found
