"""``fused-resnet fuse-check MODEL``: fuses a copy of a model and reports whether it computes the same.

The truth is the eager model in float64, with the weights as the type at hand holds them. In eval mode the fused model may be
twice as far from it as eager is, in fp32 in any case :data:`FP32`. In training :mod:`fused_resnet.agreement` has the rule.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import counts, specimens
from ..agreement import FURTHER, NOTHING, Distance, Uncomparable, in_training, outputs
from ..detectors import REGIONS, comparable
from ..measure import relative_error
from ..swap import explain, fuse
from .arguments import (
    CommandError,
    add_where,
    chosen_backend,
    dtype,
    dtype_name,
    images,
    natural,
    one_line,
    refusing,
)
from .named import find
from .text import sentence, table

#: Relative error that is allowed in fp32 in any case.
FP32 = 1e-5
#: How many times eager's own error is allowed.
FACTOR = 2.0
#: ``--mode`` -> what is compared.
MODES = {"infer": ("infer",), "train": ("train",), "both": ("infer", "train")}
#: Images, and their rows and columns, where nothing is asked for.
BATCH, SIZE = 2, 64
#: Images that statistics are taken from, at least, and that a training step has where nothing is asked for. The last BatchNorms
#: of a network may see one pixel of each: of two values batch statistics keep little but the sign, whatever computes them.
MANY = 8


def _sizes(text: str) -> tuple[int, ...]:
    """The shape that ``16x8`` names."""
    try:
        sizes = tuple(natural(part) for part in text.lower().split("x"))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"expected a shape such as 16x8, 4x8x100 or 2x3x64x64, got {text!r} ({error})"
        ) from error
    if len(sizes) < 2:
        raise argparse.ArgumentTypeError(f"expected a batch and what is in it, such as 16x8 or 2x3x64x64, got {text!r}")
    return sizes


def add(commands: Any) -> None:
    """Declare the command."""
    text = "fuse a copy of a model and compare it with eager PyTorch"
    about = (
        f"{sentence(text)}: outputs in eval mode; outputs, gradients of all parameters and running statistics in a training "
        "step, with dropouts off. "
        "Exit code 0 where they agree, 1 where they disagree or nothing could be compared, 2 for wrong input."
    )
    parser = commands.add_parser("fuse-check", help=text, description=about)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a torchvision name, timm/NAME, module:function or file.py:function that returns an nn.Module, or a file or "
        "module with one of them",
    )
    parser.add_argument("--mode", choices=list(MODES), default="both", help="infer, train, or both (the default)")
    parser.add_argument("--batch", type=natural, metavar="N", help=f"images ({BATCH}; {MANY} in a training step)")
    parser.add_argument("--size", type=natural, metavar="N", help=f"rows and columns of an image ({SIZE})")
    parser.add_argument(
        "--input",
        type=_sizes,
        metavar="SHAPE",
        help="of the whole input: 16x8 (rows), 4x8x100 (signals), 1x3x224x224 (images); instead of --batch and --size",
    )
    parser.add_argument(
        "--dtype",
        type=lambda text: [dtype(part.strip()) for part in text.split(",")],
        default="fp32,fp16,bf16",
        metavar="TYPES",
        help="fp32,fp16,bf16 (the default)",
    )
    add_where(parser)
    parser.set_defaults(run=run)


def _channels(model: nn.Module) -> int:
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return convolutions[0].in_channels if convolutions else 3


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    """All floating-point results of a model, in a row, in float64."""
    with torch.no_grad():
        leaves = outputs(model(x))
    return torch.cat([leaf.reshape(-1).double() for leaf in leaves]) if leaves else torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True)
class Agreement:
    """Errors against float64 in one element type; ``skipped`` says why there are none, ``failed`` what the fused model raises
    where eager runs.
    """

    dtype: torch.dtype
    eager: float = 0.0
    fused: float = 0.0
    skipped: str | None = None
    failed: str | None = None

    @property
    def bound(self) -> float:
        """What the fused model may have."""
        own = FACTOR * self.eager
        return max(own, FP32) if self.dtype in (torch.float32, torch.float64) else own

    @property
    def ok(self) -> bool:
        """The fused model agrees (False for NaN)."""
        return self.skipped is not None or (self.failed is None and self.fused <= self.bound)

    @property
    def cells(self) -> list[str]:
        """A row of the table."""
        if self.skipped is not None:
            return [dtype_name(self.dtype), "-", "-", "-", f"skipped: {self.skipped}"]
        if self.failed is not None:
            return [dtype_name(self.dtype), f"{self.eager:.1e}", "-", f"{self.bound:.1e}", f"FAILS: {self.failed}"]
        numbers = [f"{number:.1e}" for number in (self.eager, self.fused, self.bound)]
        return [dtype_name(self.dtype), *numbers, "ok" if self.ok else "DIFFERS"]


def agreement(eager: nn.Module, fused: nn.Module, x: Tensor, wanted: torch.dtype) -> Agreement:
    """Compare the two in one element type.

    Args:
        eager, fused: the same model, fp32; copies are converted.
        x: fp32 images.
    """
    model = copy.deepcopy(eager).to(wanted)
    x = x.to(wanted)
    try:
        own = _outputs(model, x)
    except (RuntimeError, NotImplementedError) as error:
        return Agreement(wanted, skipped=f"eager does not run in it here ({one_line(error)})")
    truth = _outputs(model.double(), x.double())
    if truth.numel() == 0:
        return Agreement(wanted, skipped=NOTHING)
    if not truth.isfinite().all():
        return Agreement(wanted, skipped="the model overflows even in fp64")
    if not own.isfinite().all():
        return Agreement(wanted, skipped=f"eager itself overflows in {dtype_name(wanted)}")
    eagers = relative_error(own, truth)
    try:
        result = _outputs(copy.deepcopy(fused).to(wanted), x)
    except Exception as raised:  # whatever it is, eager runs
        return Agreement(wanted, eagers, failed=f"{type(raised).__name__}: {one_line(raised)}")
    return Agreement(wanted, eagers, relative_error(result, truth))


@dataclass(frozen=True)
class TrainingAgreement:
    """What :func:`fused_resnet.agreement.in_training` found in one element type; ``skipped`` and ``failed`` as above."""

    dtype: torch.dtype
    found: dict[str, Distance] = field(default_factory=dict)
    skipped: str | None = None
    failed: str | None = None

    @property
    def ok(self) -> bool:
        """The fused model agrees."""
        return self.skipped is not None or (self.failed is None and all(one.ok for one in self.found.values()))

    @property
    def cells(self) -> list[str]:
        """A row of the table."""
        if self.skipped is not None or self.failed is not None:
            said = f"skipped: {self.skipped}" if self.skipped is not None else f"FAILS: {self.failed}"
            return [dtype_name(self.dtype), *"-" * 9, said]
        numbers = [f"{number:.1e}" for one in self.found.values() for number in (one.eager, one.fused, one.allowed)]
        wrong = ", ".join(what for what, one in self.found.items() if not one.ok)
        return [dtype_name(self.dtype), *numbers, f"DIFFERS: {wrong}" if wrong else self._right]

    @property
    def undecided(self) -> list[str]:
        """What zeros would agree with as well, so far is eager itself from float64."""
        return [what for what, one in self.found.items() if one.allowed >= 1]

    @property
    def _right(self) -> str:
        said = [f"{what} undecided" for what in self.undecided]
        for one in self.found.values():
            if one.median is not None:
                said.append(f"{one.median:.1f} times eager's own in the middle of {1 + FURTHER} inputs")
        return f"ok ({', '.join(said)})" if said else "ok"


def training_agreement(eager: nn.Module, fused: nn.Module, x: Tensor, wanted: torch.dtype) -> TrainingAgreement:
    """Compare a training step of the two in one element type; arguments as of :func:`agreement`, both in training mode."""
    try:
        found = in_training(copy.deepcopy(eager).to(wanted), copy.deepcopy(fused).to(wanted), x.to(wanted))
    except Uncomparable as why:
        return TrainingAgreement(wanted, skipped=str(why))
    except Exception as raised:  # whatever it is, eager runs
        return TrainingAgreement(wanted, failed=f"{type(raised).__name__}: {one_line(raised)}")
    return TrainingAgreement(wanted, found)


def _in_training(eager: nn.Module) -> nn.Module:
    """A copy in training mode, whose dropouts are off: they draw in the order of memory, and the layouts differ."""
    model = copy.deepcopy(eager).train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def _fewest_values(learning: nn.Module, step: Tensor) -> int | None:
    """The least number of values of a channel that a BatchNorm takes batch statistics of."""
    model, seen = copy.deepcopy(learning), []

    def see(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        if norm.training:
            seen.append(given[0].numel() // max(given[0].shape[1], 1))

    for norm in specimens.norms(model):
        norm.register_forward_pre_hook(see)
    try:
        with torch.no_grad():
            model(step)
    except Exception:  # the code of others, which the table tells of
        return None
    return min(seen, default=None)


def _fused_copy(eager: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing could be fused stands in the report
        return refusing(lambda: fuse(eager, inplace=False), RuntimeError, TypeError)


def _report_launches(eager: nn.Module, fused: nn.Module, x: Tensor) -> None:
    before = counts.kernels(eager, x)
    try:
        after = counts.kernels(fused, x)
    except Exception as error:  # told again where its values are compared
        print(f"launches: {len(before)} in eager mode; the fused model does not run ({one_line(error)})")
        return
    launches = sum(kernel.fused for kernel in after)
    left = len(after) - launches
    print(f"launches: {len(before)} in eager mode, {len(after)} fused ({launches} of plans, {left} of PyTorch), as they ran")


def _report_left_alone(fused: nn.Module) -> None:
    rows = explain(fused, show=False)
    if not any(row.fused for row in rows.rows):
        print("nothing in it could be fused")
    for (what, reason), number in Counter((row.what, row.note) for row in rows.left_alone).items():
        print(f"left alone: {number} x {what}: {reason}")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 1 if anything disagrees, or nothing could be compared."""
    where = arguments.device
    if arguments.input is not None and (arguments.batch is not None or arguments.size is not None):
        raise CommandError("--input is the whole shape: leave --batch and --size out")
    modes = MODES[arguments.mode]
    with chosen_backend(arguments.backend, where):
        torch.manual_seed(0)  # weights that nobody brings: the same in each run
        model, of_a_zoo = find(arguments.model)
        eager = comparable(model).to(where).float()
        x, many = (made.to(where) for made in _inputs(arguments, eager))
        if of_a_zoo:
            specimens.randomise(eager)
        filled = _fill(eager, x, many)
        fused = _fused_copy(eager)

        # Batch statistics of few values are ill-conditioned: without a word of the user, a step is on many images.
        step = x if arguments.input is not None or arguments.batch is not None else many
        more = f", in training {' x '.join(map(str, step.shape))}," if "train" in modes and step is not x else ""
        print(f"{arguments.model}, input {' x '.join(map(str, x.shape))}{more} on {where}")
        if eager is not model:
            print(f"a detector: features and heads, these on {len(REGIONS)} given regions, without the choice of boxes")
        if filled:
            print(f"{filled} BatchNorms had no statistics yet: taken from random images")
        _report_launches(eager, fused, x)
        _report_left_alone(fused)
        results: list[Agreement | TrainingAgreement] = []
        print("relative error against float64, ||y - y64|| / ||y64||:")
        if "infer" in modes:
            inferred = [agreement(eager, fused, x, wanted) for wanted in arguments.dtype]
            print(table(["eval mode", "eager", "fused", "allowed", ""], [result.cells for result in inferred]))
            results += inferred
        if "train" in modes:
            learning = _in_training(eager)
            both = learning, _fused_copy(learning)
            trained = [training_agreement(*both, step, wanted) for wanted in arguments.dtype]
            columns = [f"{what}: eager" for what in ("output", "gradients", "statistics")]
            head = ["training step", *(cell for column in columns for cell in (column, "fused", "allowed")), ""]
            print(table(head, [result.cells for result in trained]))
            if any(result.undecided for result in trained):
                print("undecided: eager itself is too far from float64 there; larger images or --dtype fp64 say more")
            fewest = _fewest_values(learning, step)
            if fewest is not None and fewest < MANY:
                print(
                    f"a BatchNorm takes its statistics of {fewest} values there, which makes large errors of small ones, in "
                    "eager too: more images or larger ones say more"
                )
            results += trained
    if all(result.skipped is not None for result in results):
        print("nothing could be compared")
        return 1
    agree = all(result.ok for result in results)
    print("agrees with eager" if agree else "DISAGREES with eager")
    return 0 if agree else 1


def _inputs(arguments: argparse.Namespace, eager: nn.Module) -> tuple[Tensor, Tensor]:
    """What the models are compared on, and more of it for statistics."""
    if arguments.input is None:
        batch, size, channels = arguments.batch or BATCH, arguments.size or SIZE, _channels(eager)
        return images(batch, size, channels), images(max(MANY, batch), size, channels, seed=1)
    first, *rest = arguments.input

    def make(number: int, seed: int) -> Tensor:
        return torch.randn(number, *rest, generator=torch.Generator().manual_seed(seed))

    try:
        return make(first, 0), make(max(MANY, first), 1)
    except (RuntimeError, TypeError, MemoryError) as error:
        shape = "x".join(map(str, arguments.input))
        raise CommandError(f"--input: expected a shape that fits into memory, got {shape}") from error


def _example(model: nn.Module) -> str:
    """A shape that the first layer with weights takes."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            return f"16x{module.in_features}"
        if isinstance(module, nn.Conv1d):
            return f"4x{module.in_channels}x100"
        if isinstance(module, nn.Conv2d):
            return f"2x{module.in_channels}x{SIZE}x{SIZE}"
    return "16x8"


def _fill(eager: nn.Module, x: Tensor, many: Tensor) -> int:
    """Fill the statistics from ``many`` and run the model once: a size or rank it does not take is wrong input."""
    try:
        filled = specimens.calibrate(eager, many)
        with torch.no_grad():
            eager(x)
    except Exception as error:  # the code of others: whatever it raises
        shape = "x".join(map(str, x.shape))
        said = f"{type(error).__name__}: {one_line(error)}"
        expected = f"expected a shape that the model takes, for example --input {_example(eager)}"
        raise CommandError(f"{expected}, got {shape}, on which eager PyTorch fails ({said})") from error
    return filled
