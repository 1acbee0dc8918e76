"""``fused-resnet demo``: a torchvision ResNet swapped, counted, compared and timed; nothing is downloaded."""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import counts, measure, specimens
from ..backends import count_launches
from ..swap import explain, fuse
from .arguments import (
    CommandError,
    add_where,
    chosen_backend,
    dtype,
    dtype_name,
    eager_model,
    images,
    natural,
    naturals,
    one_line,
    positive,
)
from .inspect import writable
from .text import Progress, sentence, table

CONTIGUOUS, CHANNELS_LAST, FUSED = "eager contiguous", "eager channels_last", "fused"
#: Images of the training step that is compared, and the most rows and columns they have.
BATCH, SIDE = 4, 64


def add(commands: Any) -> None:
    """Declare the command."""
    text = "swap a torchvision ResNet-50 and compare it with eager PyTorch, on the device at hand"
    parser = commands.add_parser("demo", help=text, description=f"{sentence(text)}. About a minute.")
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="a torchvision model (resnet50)")
    parser.add_argument("--batch", type=naturals, default="1,8", metavar="N,N", help="images at once (1,8)")
    parser.add_argument("--size", type=natural, default=224, metavar="N", help="rows and columns of an image (224)")
    parser.add_argument("--dtype", type=dtype, metavar="TYPE", help="fp32, fp16, bf16 (fp32; fp16 on a GPU)")
    parser.add_argument("--seconds", type=positive, default=15.0, metavar="S", help="time to measure each batch for (15)")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), metavar="FILE", help="the picture (demo.png)")
    add_where(parser)
    parser.set_defaults(run=run)


class Trio:
    """The model three times with the same weights: eager in both memory formats, and fused."""

    def __init__(self, eager: nn.Module, where: torch.device, wanted: torch.dtype) -> None:
        contiguous = copy.deepcopy(eager).to(where, wanted)
        self.models: dict[str, nn.Module] = {
            CONTIGUOUS: contiguous,
            CHANNELS_LAST: copy.deepcopy(contiguous).to(memory_format=torch.channels_last),
            FUSED: fuse(contiguous, inplace=False),
        }

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        """``x`` in the layout each of them likes best."""
        last = x.contiguous(memory_format=torch.channels_last)
        return {CONTIGUOUS: x, CHANNELS_LAST: last, FUSED: last}

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """What each makes of ``x``."""
        with torch.no_grad():
            return {name: self.models[name](given) for name, given in self.inputs(x).items()}


def _stage(place: str) -> str:
    return place.split(".")[0]


def _stages(rows: list[counts.Row]) -> Iterator[tuple[str, list[counts.Row]]]:
    for stage, group in groupby((row for row in rows if row.chain), lambda row: _stage(row.place)):
        yield stage, list(group)


def _show_launches(trio: Trio, x: Tensor) -> None:
    rows = counts.compare(trio.models[CONTIGUOUS], trio.models[FUSED], x)
    explanation = explain(trio.models[FUSED], show=False)
    planned: dict[str, int] = {}
    for row in explanation.rows:
        planned[_stage(row.name)] = planned.get(_stage(row.name), 0) + (row.launches if row.fused else 0)
    cells = []
    for stage, group in _stages(rows):
        eager, fused = counts.total(group)
        what = "convolution, BatchNorm, ReLU, max-pool" if stage == "stem" else f"{len(group)} blocks"
        cells.append([stage, what, str(eager.kernels), str(planned[stage]), str(fused.kernels)])
    rest = [row for row in rows if not row.chain]
    if rest:
        eager, fused = counts.total(rest)
        cells.append(
            ["rest", ", ".join(row.place for row in rest[:3]) + " (PyTorch's)", str(eager.kernels), "", str(fused.kernels)]
        )
    eager, fused = counts.total(rows)
    cells.append(["total", "", str(eager.kernels), "", str(fused.kernels)])
    print("\nlaunches of one forward pass, counted as they ran")
    print(table(["", "", "eager", "planned", "ran"], cells, left=2))
    print(f"  bytes they move: {eager.bytes / 1e6:,.0f} MB eager, {fused.bytes / 1e6:,.0f} MB fused (each operand once)")


def _show_difference(trio: Trio, x: Tensor) -> None:
    outputs = trio.outputs(x)
    cells = []
    for name in (FUSED, CHANNELS_LAST):
        absolute, relative = measure.largest_difference(outputs[name], outputs[CONTIGUOUS])
        cells.append([name, f"{absolute:.1e}", f"{relative:.1e}"])
    print(f"\nlargest difference of the outputs from eager contiguous, batch {len(x)} (relative: to the largest output)")
    print(table(["", "absolute", "relative"], cells))


def _times(trio: Trio, batch: int, arguments: argparse.Namespace, progress: Progress) -> dict[str, measure.Timing]:
    contenders: dict[str, Callable[[], object]] = {}
    wanted = next(trio.models[FUSED].parameters()).dtype
    for name, model in trio.models.items():
        layout = torch.contiguous_format if name == CONTIGUOUS else torch.channels_last

        def make(layout: torch.memory_format = layout) -> Tensor:
            x = images(batch, arguments.size)
            return x.to(arguments.device, wanted).contiguous(memory_format=layout)

        inputs = measure.rotation(make, arguments.device)
        contenders[name] = lambda model=model, inputs=inputs: model(next(inputs))  # type: ignore[misc]
    with torch.no_grad():
        times = measure.interleaved(
            contenders, arguments.device, seconds=arguments.seconds, rounds=(3, 200), progress=progress.bar
        )
    progress.clear()
    return times


def _show_times(times: dict[int, dict[str, measure.Timing]]) -> None:
    cells = []
    for batch, row in times.items():
        faster = min(row[CONTIGUOUS].median, row[CHANNELS_LAST].median)
        for name, timing in row.items():
            ratio = f"{faster / timing.median:.2f}x" if name == FUSED else ""
            cells.append([str(batch), name, f"{timing.milliseconds:.1f}", f"{timing.images_per_second(batch):.1f}", ratio])
    samples = " and ".join(str(len(row[FUSED].samples)) for row in times.values())
    print(f"\nforward pass, interleaved, median of {samples} rounds")
    print(table(["batch", "", "ms", "images/s", "against the faster eager"], cells, left=2))


@dataclass(frozen=True)
class _Step:
    """What one training step gave: loss, gradients, launches of plans that ran, by backend, and bytes kept for the backward."""

    loss: float
    gradients: list[Tensor]
    launches: Counter[str]
    saved: int

    @staticmethod
    def of(model: nn.Module, x: Tensor, labels: Tensor) -> _Step:
        """Run it."""
        model.zero_grad(set_to_none=True)
        losses: list[Tensor] = []

        def forward() -> None:
            losses.append(F.cross_entropy(model(x), labels))

        with count_launches() as log:
            saved = measure.saved_bytes(forward, (*model.parameters(), *model.buffers()))
            losses[0].backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return _Step(losses[0].item(), gradients, Counter(name for name, _ in log.launches), saved)

    @property
    def ran(self) -> str:
        """``77 on cpu``."""
        return ", ".join(f"{number} on {name}" for name, number in self.launches.items()) or "none"


def _training_differences(eager: nn.Module, where: torch.device, wanted: torch.dtype, size: int) -> list[list[str]]:
    """One step in one element type, a row for each mode and each of fused and eager channels_last: what ran, what was kept, and
    how far loss and gradients are from eager contiguous.
    """
    trio = Trio(eager, where, wanted)
    inputs = trio.inputs(images(BATCH, size, seed=1).to(where, wanted))
    cells = []
    for training in (False, True):
        steps = {}
        for name, x in inputs.items():
            steps[name] = _Step.of(trio.models[name].train(training), x, torch.arange(len(x), device=where))
        truth = steps[CONTIGUOUS]
        for name in (FUSED, CHANNELS_LAST):
            step = steps[name]
            worst = max(measure.relative_error(*pair) for pair in zip(step.gradients, truth.gradients))
            kept = [f"{step.saved / 1e6:.1f}", f"{step.saved / truth.saved:.2f}"]
            cells.append([step.ran, *kept, f"{abs(step.loss - truth.loss) / abs(truth.loss):.1e}", f"{worst:.1e}"])
    return cells


def _show_training(eager: nn.Module, where: torch.device, size: int) -> None:
    labels = [[mode, name] for mode in ("frozen statistics", "batch statistics") for name in (FUSED, CHANNELS_LAST)]
    columns = [_training_differences(eager, where, wanted, size) for wanted in (torch.float32, torch.float64)]
    cells = [[*label, *single, *double[3:]] for label, single, double in zip(labels, *columns)]
    print(f"\none training step, batch {BATCH}, {size} x {size}: launches of plans that ran, MB kept for the backward, and")
    print("relative difference from eager contiguous (gradients: the largest)")
    head = ["", "", "launches", "MB kept", "of eager", "loss fp32", "gradients", "loss fp64", "gradients"]
    print(table(head, cells, left=2))
    if "none" in (cells[0][2], cells[2][2]):
        print("  No launches: the fused model runs it in plain PyTorch, as explain(model) says.")
    print("  In fp32 a ReLU within rounding of zero goes either way, which parts the gradients of any two correct programs:")
    print("  eager in its other memory format shows how far. In fp64 that hardly happens.")


def _draw(path: Path, title: str, times: dict[int, dict[str, measure.Timing]], facts: dict[str, Any]) -> None:
    try:
        from .picture import bars
    except ImportError:
        print("\nno picture: matplotlib is not installed (pip install 'fused_resnet[docs]')")
        return
    releases = ", ".join(f"{name} {release}" for name, release in facts["versions"].items())
    rates = {}
    for batch, row in times.items():
        rates[f"batch {batch}"] = {name: timing.images_per_second(batch) for name, timing in row.items()}
    bars(path, title, rates, f"{facts['evidence']}, {facts['date']}, interleaved, median\n{releases}")
    print(f"\npicture: {path}")


def _check_output(path: Path) -> None:
    """Raise before the work where the picture could not be written."""
    if not path.absolute().parent.is_dir():
        raise CommandError(f"--output: no folder {str(path.parent)!r}")
    writable(path)


def _check_model(name: str, eager: nn.Module, size: int) -> None:
    """Raise before the work where the model does not make one tensor of images, in a forward or in a training step."""
    for mode, batch, side in (("eval", 1, size), ("training", BATCH, min(size, SIDE))):
        model = copy.deepcopy(eager).train(mode == "training")
        x = images(batch, side)
        try:
            with torch.no_grad():
                out = model(x)
        except Exception as error:  # the model's own: another rank, a size that is too small, labels that are missing
            raise CommandError(f"--model {name} takes no {side} x {side} images in {mode} mode ({one_line(error)})") from error
        if not isinstance(out, Tensor):
            got = type(out).__name__
            raise CommandError(f"--model {name}: expected a model that makes a tensor of images, got a {got} in {mode} mode")


def run(arguments: argparse.Namespace) -> int:
    """Show the tables and write the picture."""
    where: torch.device = arguments.device
    wanted = arguments.dtype or (torch.float16 if where.type == "cuda" else torch.float32)
    _check_output(arguments.output)
    progress = Progress()
    with chosen_backend(arguments.backend, where):
        progress.step(f"building {arguments.model} with random weights and BatchNorm statistics")
        eager = eager_model(arguments.model)
        vision = type(eager).__module__.startswith("torchvision")
        _check_model(arguments.model, eager, arguments.size)
        x = images(max(arguments.batch), arguments.size, seed=2)
        specimens.randomise(eager)
        specimens.calibrate(eager, images(8, arguments.size))

        facts = measure.circumstances(where)
        title = f"{'torchvision' if vision else 'fused_resnet.plain'} {arguments.model}"
        shape = f"{arguments.size} x {arguments.size}, {dtype_name(wanted)}"
        print(f"{title}, {shape}, before and after fused_resnet.fuse(model)")
        print(f"{facts['evidence']}; PyTorch {facts['versions']['torch']}; {facts['date']}")

        progress.step("swapping, counting launches, comparing outputs")
        trio = Trio(eager, where, wanted)
        x = x.to(where, wanted)
        _show_launches(trio, x[:1])
        _show_difference(trio, x)

        times = {}
        for batch in arguments.batch:
            progress.step(f"timing batch {batch}, about {arguments.seconds:.0f} s")
            times[batch] = _times(trio, batch, arguments, progress)
        _show_times(times)

        del trio
        progress.step("one training step each, with frozen and with batch statistics")
        _show_training(eager, where, min(arguments.size, SIDE))
    _draw(arguments.output, f"{title}, {shape}", times, facts)
    return 0
