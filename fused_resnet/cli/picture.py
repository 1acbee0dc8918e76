"""The demo's picture. The only module here that needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

#: Grey for the two that are there already, colour for ours; told apart in black and white, too.
_COLOURS = ("#9aa5b1", "#616e7c", "#d9480f")


def bars(path: Path, title: str, rates: dict[str, dict[str, float]], caption: str) -> None:
    """Draw images/s as horizontal bars, a panel a batch, and write them to ``path``.

    Args:
        rates: panel -> contender -> images/s.
        caption: device, evidence, date and versions.
    """
    figure = Figure(figsize=(8, 1.3 + 1.35 * len(rates)), dpi=150, layout="constrained")
    panels = figure.subplots(len(rates), 1, squeeze=False)[:, 0]
    figure.suptitle(f"{title}: images/s", fontsize=12, fontweight="bold")
    for panel, (name, values) in zip(panels, rates.items()):
        drawn = panel.barh(list(values), list(values.values()), color=_COLOURS[-len(values) :], height=0.7)
        panel.bar_label(drawn, fmt="%.1f", padding=4, fontsize=9)
        panel.invert_yaxis()
        panel.set_ylabel(name, fontsize=10)
        panel.margins(x=0.12)
        panel.xaxis.set_visible(False)
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.tick_params(labelsize=9, length=0)
    figure.supxlabel(caption, fontsize=7, color="#52606d")
    figure.savefig(path)
