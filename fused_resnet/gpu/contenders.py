"""The contenders for a whole network: eager in both layouts, torch.compile, and fused, each on inputs of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import measure
from ..swap import fuse
from . import networks
from .scope import Cell

CONTIGUOUS, CHANNELS_LAST, FUSED, LOW = "eager contiguous", "eager channels_last", "fused", "fused, low memory"
COMPILED = "torch.compile"


def compiled_name(mode: str) -> str:
    """The contender of one of torch.compile's modes."""
    return COMPILED if mode == "default" else f"{COMPILED} {mode}"


class Contender:
    """One contender of a cell: call it once and it makes one pass, or one training step.

    Attributes:
        name: what it is called in results.
        module: as ``name`` says, on the device.
        recorded, captured: input and logits of the pass that was recorded.
    """

    recorded: Tensor
    captured: Tensor

    def __init__(self, name: str, eager: nn.Module, cell: Cell, size: int, device: torch.device) -> None:
        self.name, self.cell, self.device = name, cell, device
        self.training = cell.mode == "train"
        layout = torch.contiguous_format if name == CONTIGUOUS else torch.channels_last
        dtype = cell.parameters
        module = copy.deepcopy(eager).to(device, dtype).to(memory_format=layout).train(self.training)
        if name in (FUSED, LOW):
            module = fuse(module, memory="low" if name == LOW else "default")
        self.module: Any = module
        if name.startswith(COMPILED):
            torch._dynamo.reset()
            mode = name.removeprefix(COMPILED).strip()
            if device.type != "cuda":  # the dry run is not about compilers
                self.module = torch.compile(module, backend="eager")
            elif mode:  # max-autotune would capture graphs of its own; here they are captured for all contenders, or for none
                self.module = torch.compile(module, mode=f"{mode}-no-cudagraphs")
            else:
                self.module = torch.compile(module)
        self.inputs: Iterator[Tensor] = measure.rotation(
            lambda: networks.images(cell.batch, size, device, dtype, layout == torch.channels_last), device
        )
        # So slow that weights stay as they are, however many rounds there are.
        self.optimizer = torch.optim.SGD(module.parameters(), lr=1e-9, momentum=0.9) if self.training else None
        self.labels: Tensor | None = None
        self.replay: Callable[[], object] | None = None

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 where parameters are fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cell.precision == "autocast")

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        with torch.set_grad_enabled(self.training), self.autocast():
            y: Tensor = self.module(x)
        return y

    def loss(self, x: Tensor) -> Tensor:
        """Cross entropy with fixed labels."""
        y = self.forward(x)
        if self.labels is None:
            self.labels = torch.arange(len(y), device=y.device) % y.shape[1]
        return F.cross_entropy(y.float(), self.labels)

    def __call__(self) -> object:
        """What is timed."""
        if self.replay is not None:
            return self.replay()
        x = next(self.inputs)
        if self.optimizer is None:
            return self.forward(x)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(x).backward()
        self.optimizer.step()
        return None

    def capture(self) -> None:
        """Record the pass once; from here on a call replays it. On a CPU there are no graphs: calls stay as they are."""
        if self.device.type != "cuda":
            return
        x = self.recorded = next(self.inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.forward(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.captured = self.forward(x)
        self.replay = graph.replay

    def replay_error(self) -> float:
        """How far the recorded pass, replayed a second time over poisoned logits, is from one that is not recorded."""
        if self.replay is None:
            return 0.0
        expected = self.forward(self.recorded)
        self.replay()
        self.captured.fill_(torch.nan)
        self.replay()
        return measure.relative_error(self.captured, expected.double())


def step_bytes(contender: Contender) -> int | None:
    """Memory that one call takes at its peak, beyond what is there before it: activations, gradients, temporaries."""
    if contender.device.type != "cuda":
        return None
    if contender.optimizer is not None:
        contender.optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contender()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
