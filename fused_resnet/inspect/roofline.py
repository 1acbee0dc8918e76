"""The roofline of a network as SVG: a point a launch, by its FLOPs a byte and its predicted rate, under a device's two roofs.

Written by hand: a few lines of SVG need no library.
"""

from __future__ import annotations

from html import escape
from math import atan2, ceil, degrees, floor, log10, sqrt
from typing import Any

import torch

from ..tuning.devices import Device, find
from .show import title

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 900, 470, 70, 30, 66, 78
#: Colour and letter of each kind of launch with FLOPs: told apart in black and white, too.
_KINDS = {"conv": ("#d9480f", "f", "forward"), "dgrad": ("#1971c2", "d", "dgrad"), "wgrad": ("#2b8a3e", "w", "wgrad")}


def svg(report: dict[str, Any]) -> str:
    """The picture: a panel for each architecture with a known device.

    Raises:
        ValueError: there is none, or nothing to draw.
    """
    parts = [(arch, part) for arch, part in report["architectures"].items() if _points(part)]
    if not parts:
        raise ValueError("nothing to draw: no launch with FLOPs has a prediction")
    height = _HEIGHT * len(parts)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#1f2933">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, (arch, part) in enumerate(parts):
        lines += [f'<g transform="translate(0 {number * _HEIGHT})">', *_panel(report, arch, part), "</g>"]
    return "\n".join([*lines, "</svg>", ""])


def _points(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Launches with FLOPs, what was counted and what is predicted of each together."""
    points = []
    for row in part["launches"].values():
        predicted, counted = row["predicted"], row["counted"]
        if counted["flops"] and row["kind"] in _KINDS:
            intensity = counted["flops"] / max(predicted["memory_bytes"], 1)
            points.append({**row, **counted, "times": len(row["layers"]), "predicted": {**predicted, "intensity": intensity}})
    return points


class _Scale:
    """A logarithmic axis: a number to a place on the paper."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self.low, self.high = floor(log10(low) * 2) / 2, ceil(log10(high) * 2) / 2
        self.first, self.last = first, last

    def __call__(self, number: float) -> float:
        part = (log10(number) - self.low) / (self.high - self.low)
        return self.first + part * (self.last - self.first)

    def ticks(self) -> list[float]:
        """1, 3, 10, 30 ..."""
        steps = [factor * 10.0**power for power in range(floor(self.low), ceil(self.high) + 1) for factor in (1, 3)]
        return [step for step in steps if self.low - 1e-9 <= log10(step) <= self.high + 1e-9]


def _text(x: float, y: float, text: str, **style: str) -> str:
    attributes = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(text)}</text>'


def _panel(report: dict[str, Any], arch: str, part: dict[str, Any]) -> list[str]:
    device = find(part["device"])
    request = report["request"]
    types = {"fp16": torch.float16, "bf16": torch.bfloat16}
    tf32 = request["tf32"] and arch.startswith("sm_")
    rate = device.rate(types.get(request["dtype"], torch.float32), tf32) / 1e12
    bandwidth = device.bandwidth / 1e12
    points = _points(part)
    whole = part["totals"]["predicted"]["launches_seconds"]
    places = [(row["predicted"]["intensity"], row["flops"] / row["predicted"]["seconds"] / 1e12) for row in points]
    ridge = rate / bandwidth
    across = _Scale(min(*(x for x, _ in places), ridge / 4), max(*(x for x, _ in places), ridge * 4), _LEFT, _WIDTH - _RIGHT)
    up = _Scale(min(*(y for _, y in places), rate / 30) / 1.2, rate * 1.6, _HEIGHT - _BOTTOM, _TOP)

    lines = _axes(across, up)
    x0, x1 = 10.0**across.low, 10.0**across.high
    start = max(x0, 10.0**up.low / bandwidth)
    roof = [(start, start * bandwidth), (ridge, rate), (x1, rate)]
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in roof)
    lines.append(f'<polyline points="{path}" fill="none" stroke="#1f2933" stroke-width="1.5"/>')
    lines.append(_text(across(x1) - 4, up(rate) - 6, f"{rate:,.0f} TFLOP/s sustained", text_anchor="end"))
    middle = sqrt(start * ridge)
    slope = f"rotate(-{_angle(across, up, middle, bandwidth):.1f} {across(middle):.1f} {up(middle * bandwidth):.1f})"
    lines.append(
        _text(
            across(middle), up(middle * bandwidth) - 6, f"{bandwidth:.2f} TB/s sustained", text_anchor="middle", transform=slope
        )
    )
    order = sorted(range(len(points)), key=lambda index: -points[index]["times"] * points[index]["predicted"]["seconds"])
    for index in order:
        row, (x, y) = points[index], places[index]
        colour, letter, _ = _KINDS[row["kind"]]
        share = row["times"] * row["predicted"]["seconds"] / whole
        radius = max(3.5, 40 * sqrt(share))
        hint = f"{row['layers'][0]}: {row['label']}: {row['predicted']['seconds'] * 1e6:.1f} us x {row['times']}"
        lines.append(
            f'<g><title>{escape(hint)}</title><circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="{radius:.1f}" fill="{colour}" '
            f'fill-opacity="0.45" stroke="{colour}"/>'
            + _text(across(x), up(y) + 4, letter, text_anchor="middle", font_size="10")
            + "</g>"
        )
    return lines + _words(report, arch, device, points, whole)


def _angle(across: _Scale, up: _Scale, x: float, bandwidth: float) -> float:
    return degrees(atan2(up(x * bandwidth) - up(2 * x * bandwidth), across(2 * x) - across(x)))


def _axes(across: _Scale, up: _Scale) -> list[str]:
    lines = []
    for tick in across.ticks():
        x = across(tick)
        lines.append(f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{_HEIGHT - _BOTTOM}" stroke="#e4e7eb"/>')
        lines.append(_text(x, _HEIGHT - _BOTTOM + 16, f"{tick:g}", text_anchor="middle"))
    for tick in up.ticks():
        y = up(tick)
        lines.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#e4e7eb"/>')
        lines.append(_text(_LEFT - 8, y + 4, f"{tick:g}", text_anchor="end"))
    lines.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - _BOTTOM + 34, "FLOP a byte of memory", text_anchor="middle"))
    height = (_TOP + _HEIGHT - _BOTTOM) / 2
    lines.append(_text(18, height, "TFLOP/s", text_anchor="middle", transform=f"rotate(-90 18 {height})"))
    return lines


def _words(report: dict[str, Any], arch: str, device: Device, points: list[dict[str, Any]], whole: float) -> list[str]:
    """Title, legend and caption."""
    lines = [
        _text(_LEFT, 24, f"Predicted, not measured: {title(report)}", font_size="15", font_weight="bold"),
        _text(_LEFT, 42, f"{device.name} ({arch}); a point a launch, its area the part of the network's time", fill="#52606d"),
    ]
    x = float(_LEFT)
    for kind, (colour, letter, name) in _KINDS.items():
        if any(row["kind"] == kind for row in points):
            lines.append(f'<circle cx="{x + 6:.0f}" cy="56" r="5" fill="{colour}" fill-opacity="0.45" stroke="{colour}"/>')
            lines.append(_text(x + 16, 60, f"{letter}: {name}"))
            x += 90
    rest = whole - sum(row["times"] * row["predicted"]["seconds"] for row in points)
    caption = (
        f"{len(points)} different launches; those without FLOPs take {100 * rest / whole:.0f}% of the time and are not drawn."
    )
    lines.append(_text(_LEFT, _HEIGHT - 24, caption, fill="#52606d"))
    lines.append(
        _text(_LEFT, _HEIGHT - 9, f"Roofs: {device.source}; sustained parts {_parts(device)}.", fill="#52606d", font_size="10")
    )
    return lines


def _parts(device: Device) -> str:
    return f"{device.sustained['memory']:.2f} of memory and {device.sustained['matrix']:.2f} of matrix rates, " + (
        "measured" if device.measured else "assumed"
    )
