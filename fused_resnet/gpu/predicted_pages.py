"""The Markdown pages of docs/benchmarks/ that hold predictions."""

from __future__ import annotations

from collections.abc import Iterator

from ..tuning.devices import Device, devices
from . import predicted
from .pages import MODES, label, table

_ASSUMPTIONS = """The model is [`fused_resnet/tuning/model.py`](../../fused_resnet/tuning/model.py): for every launch the
best of the tiles that compile without a spill, by the most loaded of tensor cores, L2 cache, vector units, latency and memory;
two launches follow each other by at least 1.5 us. Eager PyTorch is given the same model for its convolutions, with the best
plain tile, and the roofline for every other kernel, BatchNorm's second reading of its operands included: what it takes at best.
Casts of autocast, the host's time and the optimizer are on neither side. The rates of the devices are published ones, with the
part of them that a copy and a large product reach (measured on one H200 only:
[`devices.json`](../../fused_resnet/tuning/devices.json))."""


def predicted_page() -> str:
    """What the model expects, of all devices."""
    named: list[Device] = list(devices().values())
    text = [
        "# Predictions",
        "",
        "**predicted: nothing on this page was measured.** Drawn by `fused-resnet report`.",
        "",
        _ASSUMPTIONS,
        "",
        f"## Networks, bf16, batch {predicted.BATCH}, {predicted.SIZE}x{predicted.SIZE}",
        "",
        "![predicted speed-up](predicted-speedup.svg)",
        "",
    ]
    for mode, title in MODES.items():
        rows = [
            [device.name, *(_ratio(predicted.total(name, mode, device)) for name in predicted.NETWORKS)] for device in named
        ]
        text += [table([f"{title}: eager, fused, ms (predicted)", *predicted.NETWORKS], rows), ""]
    text += [
        "## Kept for the backward",
        "",
        "Counted from sizes, not predicted: what autograd saves in a training step, without parameters.",
        "",
        "![memory](memory.svg)",
        "",
        f"## Launches of ResNet-50 on the {predicted.SHOWN_DEVICE}",
        "",
        "![predicted roofline](predicted-roofline.svg)",
        "",
        "The table: [predicted-launches.md](predicted-launches.md).",
    ]
    return "\n".join(text) + "\n"


def _ratio(total: predicted.Total) -> str:
    return f"{total.eager * 1e3:.1f}, {total.fused * 1e3:.1f} ({total.ratio:.2f}x)"


def launches_page(device: Device) -> str:
    """The launches of ResNet-50, one by one."""
    text = [
        f"# Launches of ResNet-50 on the {device.name}, predicted",
        "",
        f"**predicted: nothing on this page was measured.** bf16, batch {predicted.BATCH}, the model's assumptions: "
        "[predicted.md](predicted.md).",
        "",
        "Roofline: each operand once at the rate of a copy, or FLOPs at that of a large product, whichever takes longer.",
        "",
    ]
    for mode, title in MODES.items():
        rows = list(_predicted_rows(mode, device))
        text += [
            f"## {title.capitalize()}",
            "",
            table(["layer", "launch", "times", "us", "of the roofline", "bound by", "runs"], rows),
            "",
        ]
    return "\n".join(text).rstrip() + "\n"


def _predicted_rows(mode: str, device: Device) -> Iterator[list[str]]:
    for use in predicted.uses(predicted.SHOWN, mode):
        launch, guess = use.launch, predicted.expected(use.launch, device)
        floor = max(launch.flops / device.rate(launch.dtype), launch.bytes / device.bandwidth)
        name = label(launch.signature)
        yield [
            use.layers[0],
            name,
            str(use.times),
            f"{guess.seconds * 1e6:.1f}",
            f"{100 * floor / guess.seconds:.0f}%",
            guess.bound,
            guess.how,
        ]
