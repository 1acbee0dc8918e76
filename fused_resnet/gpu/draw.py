"""Pictures as SVG, written by hand: bars by group, and rooflines. The same data gives the same file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH = 860
_LEFT, _RIGHT, _TOP = 190, 70, 64

#: By contender; told apart in black and white, too: the darker, the newer.
COLOURS = {
    "eager": "#9aa5b1",
    "eager contiguous": "#cbd2d9",
    "eager channels_last": "#9aa5b1",
    "torch.compile": "#616e7c",
    "torch.compile max-autotune": "#3e4c59",
    "fused": "#d9480f",
    "fused, low memory": "#f08c00",
    "inference": "#d9480f",
    "training step": "#1971c2",
}
_KINDS = {"conv": "#d9480f", "dgrad": "#1971c2", "wgrad": "#2b8a3e"}
_NAMES = {"conv": "forward", "dgrad": "gradient of the input (dgrad)", "wgrad": "gradient of the filters (wgrad)"}


@dataclass(frozen=True)
class Group:
    """Bars that stand together: a label, and a value with what is written behind it for each contender."""

    label: str
    bars: Mapping[str, tuple[float, str]]


@dataclass(frozen=True)
class Point:
    """A launch under a roofline: its kind, FLOPs a byte, FLOP/s, part of the whole time, and a hint."""

    kind: str
    intensity: float
    rate: float
    share: float
    hint: str


def _text(x: float, y: float, text: str, **style: object) -> str:
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(text)}</text>'


def _page(height: float, title: str, subtitle: str, caption: str, body: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#1f2933">',
            f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>',
            _text(20, 26, title, font_size=16, font_weight="bold"),
            _text(20, 44, subtitle, fill="#52606d"),
            *body,
            _text(20, height - 12, caption, font_size=10, fill="#52606d"),
            "</svg>",
            "",
        ]
    )


def bars(
    title: str, subtitle: str, caption: str, groups: Sequence[Group], mark: float | None = None, guessed: bool = False
) -> str:
    """Horizontal bars, group below group.

    Args:
        title, subtitle: above; the subtitle says how the numbers are known.
        caption: device, versions, date.
        groups: what is drawn.
        mark: a vertical line, at what all are compared with.
        guessed: predictions: pale, with a broken outline.
    """
    largest = max((value for group in groups for value, _ in group.bars.values()), default=0) or 1.0
    scale = (WIDTH - _LEFT - _RIGHT - 60) / largest
    names = list(dict.fromkeys(name for group in groups for name in group.bars))
    body, y = _legend(names), float(_TOP + 24)
    top = y
    for group in groups:
        middle = y + 8 * len(group.bars) + 4
        body.append(_text(_LEFT - 10, middle, group.label, text_anchor="end"))
        for name, (value, said) in group.bars.items():
            body.append(
                f'<rect x="{_LEFT}" y="{y:.1f}" width="{value * scale:.1f}" height="14" {_fill(name, guessed)}>'
                f"<title>{escape(f'{group.label}, {name}: {said}')}</title></rect>"
            )
            body.append(_text(_LEFT + value * scale + 5, y + 11, said, font_size=11))
            y += 16
        y += 12
    if mark is not None:
        x = _LEFT + mark * scale
        body.insert(
            0, f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6:.0f}" y2="{y - 6:.0f}" stroke="#9aa5b1" stroke-dasharray="3 3"/>'
        )
    return _page(y + 26, title, subtitle, caption, body)


def _fill(name: str, guessed: bool) -> str:
    colour = COLOURS.get(name, "#616e7c")
    return f'fill="{colour}"' + f' fill-opacity="0.35" stroke="{colour}" stroke-dasharray="4 3"' * guessed


def _legend(names: Sequence[str], colours: Mapping[str, str] = COLOURS) -> list[str]:
    body, x = [], 20.0
    for name in names:
        body.append(f'<rect x="{x:.1f}" y="{_TOP - 8}" width="12" height="12" fill="{colours.get(name, "#616e7c")}"/>')
        body.append(_text(x + 17, _TOP + 2, name))
        x += 34 + 6.6 * len(name)
    return body


class _Scale:
    """A logarithmic axis: a number to a place on the paper."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self.low, self.high = log10(low), log10(high)
        self.first, self.last = first, last

    def __call__(self, number: float) -> float:
        return self.first + (log10(number) - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """1, 3, 10, 30 ..., those that are on the paper."""
        steps = [factor * 10.0**power for power in range(floor(self.low), ceil(self.high) + 1) for factor in (1, 3)]
        return [step for step in steps if self.low - 1e-9 <= log10(step) <= self.high + 1e-9]


def roofline(title: str, subtitle: str, caption: str, points: Sequence[Point], bandwidth: float, matrix: float) -> str:
    """Launches with FLOPs under the two roofs; the area of a point is its part of the time.

    Args:
        title, subtitle, caption: as of :func:`bars`.
        points: what is drawn.
        bandwidth, matrix: bytes and FLOPs a second of the roofs.
    """
    height, left, bottom = 520.0, 80, 62
    ridge = matrix / bandwidth
    low, high = min(point.intensity for point in points), max(point.intensity for point in points)
    across = _Scale(min(low, ridge) / 1.6, max(high, ridge) * 1.6, left, WIDTH - 30)
    slowest = min(point.rate for point in points)
    up = _Scale(min(slowest, matrix / 20) / 1.5, matrix * 1.5, height - bottom, _TOP + 20)
    body = _legend([_NAMES[kind] for kind in _KINDS], {_NAMES[kind]: colour for kind, colour in _KINDS.items()})
    for tick in across.ticks():
        x = across(tick)
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP + 20}" y2="{height - bottom}" stroke="#e4e7eb"/>')
        body.append(_text(x, height - bottom + 16, f"{tick:g}", text_anchor="middle", font_size=11))
    for tick in up.ticks():
        y = up(tick)
        body.append(f'<line x1="{left}" x2="{WIDTH - 30}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e7eb"/>')
        body.append(_text(left - 6, y + 4, f"{tick / 1e12:g}", text_anchor="end", font_size=11))
    start = max(10**across.low, 10**up.low / bandwidth)
    roof = [(start, start * bandwidth), (ridge, matrix), (10**across.high, matrix)]
    line = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in roof)
    body.append(f'<polyline points="{line}" fill="none" stroke="#1f2933" stroke-width="1.5"/>')
    body.append(_text(WIDTH - 34, up(matrix) - 6, f"{matrix / 1e12:,.0f} TFLOP/s", text_anchor="end"))
    body.append(_text(across(start) + 8, up(start * bandwidth) - 64, f"{bandwidth / 1e12:.2f} TB/s"))
    for point in sorted(points, key=lambda point: -point.share):
        colour = _KINDS[point.kind]
        body.append(
            f'<circle cx="{across(point.intensity):.1f}" cy="{up(point.rate):.1f}" r="{max(3.5, 45 * point.share**0.5):.1f}" '
            f'fill="{colour}" fill-opacity="0.45" stroke="{colour}"><title>{escape(point.hint)}</title></circle>'
        )
    body.append(_text((left + WIDTH) / 2, height - bottom + 34, "FLOPs a byte of memory", text_anchor="middle"))
    body.append(_text(18, height / 2, "TFLOP/s", transform=f"rotate(-90 18 {height / 2:.0f})", text_anchor="middle"))
    return _page(height, title, subtitle, caption, body)


@dataclass(frozen=True)
class Curve:
    """A line: its name, ``(x, middle, low, high)`` in order of x, its colour, and whether it is dashed."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    colour: str
    dashed: bool = False


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two."""
    step = 10 ** floor(log10(max(high - low, 1e-12) / 4))
    step *= next((factor for factor in (1, 2, 5) if (high - low) / (step * factor) <= 6), 10)
    return [step * index for index in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def lines(title: str, subtitle: str, caption: str, curves: Sequence[Curve], across: str, up: str) -> str:
    """Curves over a number, each with the band between its lowest and its highest.

    Args:
        title, subtitle, caption: as of :func:`bars`.
        curves: what is drawn.
        across, up: what the axes are.
    """
    xs = [x for curve in curves for x, *_ in curve.points] or [0.0, 1.0]
    tops = [high for curve in curves for *_, high in curve.points] or [1.0]
    left, right, top, bottom = 70.0, WIDTH - 30.0, _TOP + 40.0, _TOP + 360.0
    x0, x1, y1 = min(xs), max(max(xs), min(xs) + 1e-9), 1.05 * max(max(tops), 1e-9)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - y / y1 * (bottom - top)

    body = _legend([curve.name for curve in curves], {curve.name: curve.colour for curve in curves})
    for value in _ticks(0, y1):
        _, y = at(x0, value)
        body.append(f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e7eb"/>')
        body.append(_text(left - 8, y + 4, f"{value:g}", text_anchor="end"))
    for value in _ticks(x0, x1):
        x, _ = at(value, 0)
        body.append(_text(x, bottom + 18, f"{value:g}", text_anchor="middle"))
    body.append(_text((left + right) / 2, bottom + 38, across, text_anchor="middle", fill="#52606d"))
    body.append(_text(left, top - 12, up, fill="#52606d"))
    for curve in curves:
        upper = [at(x, high) for x, _, _, high in curve.points]
        lower = [at(x, low) for x, _, low, _ in reversed(curve.points)]
        band = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*upper, *lower))
        middle = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y, _, _ in curve.points)
        dashes = ' stroke-dasharray="5 4"' * curve.dashed
        body.append(f'<polygon points="{band}" fill="{curve.colour}" fill-opacity="0.15"/>')
        body.append(
            f'<polyline points="{middle}" fill="none" stroke="{curve.colour}" stroke-width="2"{dashes}>'
            f"<title>{escape(curve.name)}</title></polyline>"
        )
    return _page(bottom + 72, title, subtitle, caption, body)
