"""``fused-resnet fuse-check MODEL``: fuses a copy of a model and reports whether it computes the same.

The truth is the eager model in float64, with the weights as the type at hand holds them. The fused model may be twice as far
from it as eager is, in fp32 in any case :data:`FP32`.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import counts, importing, specimens
from ..measure import relative_error
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
    one_line,
    refusing,
)
from .text import sentence, table

#: Relative error that is allowed in fp32 in any case.
FP32 = 1e-5
#: How many times eager's own error is allowed.
FACTOR = 2.0


def add(commands: Any) -> None:
    """Declare the command."""
    text = "fuse a copy of a model and compare it with eager PyTorch"
    parser = commands.add_parser("fuse-check", help=text, description=f"{sentence(text)}. Exit code 1 where they disagree.")
    parser.add_argument(
        "model", metavar="MODEL", help="a torchvision name, or module:function or file.py:function that returns an nn.Module"
    )
    parser.add_argument("--batch", type=natural, default=2, metavar="N", help="images (2)")
    parser.add_argument("--size", type=natural, default=64, metavar="N", help="rows and columns of an image (64)")
    parser.add_argument(
        "--dtype",
        type=lambda text: [dtype(part.strip()) for part in text.split(",")],
        default="fp32,fp16,bf16",
        metavar="TYPES",
        help="fp32,fp16,bf16 (the default)",
    )
    add_where(parser)
    parser.set_defaults(run=run)


def load(what: str) -> nn.Module:
    """The model that ``MODEL`` names, in eval mode.

    Raises:
        CommandError: there is none: no such name, file, module or function, or it returns something else, or fails.
    """
    if ":" not in what:
        if what.endswith(".py"):
            raise CommandError(f"{what!r} names a file but no function: expected {what}:FUNCTION")
        return eager_model(what)
    function = refusing(lambda: importing.load(what), ValueError)
    model = function
    if not isinstance(function, nn.Module):
        if not callable(function):
            raise CommandError(f"{what} is a {type(function).__name__}, expected a function that returns an nn.Module")
        try:
            model = function()
        except Exception as error:
            raise CommandError(f"{what}() failed: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"{what}() returned a {type(model).__name__}, expected an nn.Module")
    return model.eval()


def _channels(model: nn.Module) -> int:
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return convolutions[0].in_channels if convolutions else 3


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    """All floating-point results of a model, in a row, in float64."""
    with torch.no_grad():
        leaves = [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
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
    """Print the report; 1 if anything disagrees."""
    where = arguments.device
    with chosen_backend(arguments.backend, where):
        eager = load(arguments.model).to(where).float()
        x = images(arguments.batch, arguments.size, _channels(eager)).to(where)
        if ":" not in arguments.model:
            specimens.randomise(eager)
        many = images(max(8, arguments.batch), arguments.size, x.shape[1], seed=1).to(where)
        filled = refusing(_running(eager, x, many), Exception)
        fused = _fused_copy(eager)

        shape = " x ".join(map(str, x.shape))
        print(f"{arguments.model}, input {shape} on {where}, eval mode")
        if filled:
            print(f"{filled} BatchNorms had no statistics yet: taken from random images")
        _report_launches(eager, fused, x)
        _report_left_alone(fused)
        results = [agreement(eager, fused, x, wanted) for wanted in arguments.dtype]
    print("relative error against float64, ||y - y64|| / ||y64||:")
    print(table(["", "eager", "fused", "allowed", ""], [result.cells for result in results]))
    agree = all(result.ok for result in results)
    print("agrees with eager" if agree else "DISAGREES with eager")
    return 0 if agree else 1


def _running(eager: nn.Module, x: Tensor, many: Tensor) -> Callable[[], int]:
    """Fills the statistics from ``many`` and runs the model once: a size or rank it does not take is wrong input."""

    def attempt() -> int:
        filled = specimens.calibrate(eager, many)
        with torch.no_grad():
            eager(x)
        return filled

    return attempt
