"""Stage ``models``: whole networks, in inference and training, eager against fused, in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from .. import measure
from . import networks
from .contenders import CHANNELS_LAST, CONTIGUOUS, FUSED, LOW, Contender, step_bytes
from .results import Row, Time, finite
from .scope import Cell
from .stage import Stage, describe
from .timing import summed

#: How far a pass may be from itself, recorded: the vendor's products may be made otherwise, in bf16.
REPLAYED = 2**-7


def run(stage: Stage) -> None:
    """A row for each cell: all contenders but torch.compile, whose stage is the last."""
    torch.backends.cudnn.benchmark = True

    def row(cell: Cell) -> Row:
        names = [CONTIGUOUS, CHANNELS_LAST, FUSED, *[LOW] * (cell.mode == "train" and not stage.dry)]
        return compared(cell, names, stage)

    stage.each("models", stage.scope.cells, lambda cell: cell.key, row)


@lru_cache(maxsize=1)
def eager_model(name: str, device: torch.device, size: int) -> nn.Module:
    """The network that all contenders of a cell are copies of."""
    return networks.eager(name, device, size)


def compared(cell: Cell, names: Sequence[str], stage: Stage, check: bool = True, seconds: float = 2.0) -> Row:
    """Check that fused agrees with eager, then time all contenders in turns."""
    model = eager_model(cell.network, stage.device, stage.scope.size)
    row: Row = {
        "status": "ok",
        "network": cell.network,
        "mode": cell.mode,
        "batch": cell.batch,
        "size": stage.scope.size,
        "precision": cell.precision,
        "graph": cell.graph,
        "measured": not stage.dry,
    }
    if check:
        try:
            row.update(agreement(cell, model, stage))
        except torch.OutOfMemoryError:
            row["errors"] = None  # fp32 needs twice the memory; the smaller batches are compared
    contenders: dict[str, Contender] = {}
    memory: dict[str, int | None] = {}
    problems: dict[str, str] = {}
    for name in names:
        problem = _prepare(name, cell, model, stage, contenders, memory)
        if problem:
            problems[name] = problem
    times = _times(contenders, stage.device, seconds)
    if FUSED in problems:
        row.update(status="out of memory" if "OutOfMemory" in problems[FUSED] else "failed", error=problems[FUSED])
    own = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    return {**row, "times": times, "step_bytes": memory, "parameter_bytes": own, "problems": problems}


def _prepare(
    name: str, cell: Cell, model: nn.Module, stage: Stage, contenders: dict[str, Contender], memory: dict[str, int | None]
) -> str | None:
    """Build a contender, warm it up, weigh it; why it cannot take part, or None."""
    try:
        contender = Contender(name, model, cell, stage.scope.size, stage.device)
        for _ in range(1 if stage.dry else 3):
            contender()
        memory[name] = step_bytes(contender)
        if cell.graph:
            contender.capture()
            if not contender.replay_error() <= REPLAYED:  # NaN is not either
                return f"replayed it is {contender.replay_error():.1e} from the pass that is not recorded"
        contenders[name] = contender
        return None
    except Exception as error:
        problem = describe(error)
    if stage.device.type == "cuda":  # raises where the device is lost: the row is then the crash's
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return problem


def _times(contenders: dict[str, Contender], device: torch.device, seconds: float) -> dict[str, Time | None]:
    calls: dict[str, Callable[[], object]] = dict(contenders)
    if device.type != "cuda":
        return dict.fromkeys(calls)
    timings = measure.interleaved(calls, device, seconds=seconds, rounds=(5, 100), warm_up=1)
    return {name: summed(timing.samples) for name, timing in timings.items()}


def agreement(cell: Cell, model: nn.Module, stage: Stage) -> dict[str, Any]:
    """Errors of eager and fused against eager in fp32 without tf32; fused may be twice as far as eager.

    Of the logits in inference, of all gradients together in training (a root mean square: next to zero a ReLU may fall on the
    other side).
    """
    plain = replace(cell, graph=False)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = Contender(CHANNELS_LAST, model, replace(plain, precision="fp32"), stage.scope.size, stage.device)
        x = next(exact.inputs)
        truth = _values(exact, x)
        del exact
    errors = {}
    for name in (CHANNELS_LAST, FUSED):
        contender = Contender(name, model, plain, stage.scope.size, stage.device)
        made = _values(contender, x.to(next(contender.module.parameters()).dtype))
        errors[name] = measure.relative_error(made, truth)
    close = errors[FUSED] <= max(2 * errors[CHANNELS_LAST], 1e-5)
    found: dict[str, Any] = {"errors": {name: finite(error) for name, error in errors.items()}}
    if not close:
        found.update(status="wrong", error=f"error {errors[FUSED]:.1e} against fp32, eager's own {errors[CHANNELS_LAST]:.1e}")
    return found


def _values(contender: Contender, x: torch.Tensor) -> torch.Tensor:
    """Logits, or all gradients in a row."""
    if not contender.training:
        return contender.forward(x).detach().float()
    contender.loss(x).backward()
    gradients = [parameter.grad for parameter in contender.module.parameters() if parameter.grad is not None]
    return torch.cat([gradient.flatten().float() for gradient in gradients])
