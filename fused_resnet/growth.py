"""What grows with a network's depth, counted and not timed: launches, autograd nodes, Python calls, the compiler's graph.

Times of a step say little about how Python's part grows: they depend on the machine and on what else it does. The number of
function calls that Python makes does not, and each of them takes about as long as the next.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from .backends import count_launches
from .counts import nodes


@dataclass(frozen=True)
class Growth:
    """Of one network, in a training step without the optimizer.

    Attributes:
        launches: forward and backward.
        nodes: of autograd's graph.
        calls: Python functions called, in Python or in C, in the second step; the first fills caches.
        graph: nodes of the graphs that ``torch.compile`` makes, forward and backward; 0 where that was not asked for.
        compiling: Python functions called until then.
    """

    launches: int
    nodes: int
    calls: int
    graph: int = 0
    compiling: int = 0


@contextmanager
def _calls() -> Iterator[list[int]]:
    """Counts the calls that this thread makes. A backward on the CPU runs in it; on a GPU in one of its own."""
    count = [0]

    def called(frame: FrameType, event: str, argument: Any) -> None:
        count[0] += event == "call" or event == "c_call"

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        yield count
    finally:
        sys.setprofile(before)


def count(model: nn.Module, x: Tensor, compiled: bool = False) -> Growth:
    """One training step of ``model(x)``, twice; then compiled without a compiler behind the graph, if wanted.

    Args:
        model: fused or eager, in training mode, on the CPU.
        x: [N, C, H, W].
        compiled: count the graph of ``torch.compile`` too.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(run: Callable[[Tensor], Tensor]) -> Tensor:
        out = run(x).sum()
        torch.autograd.grad(out, parameters)
        return out

    with count_launches() as log:
        found = len(nodes([step(model)]))
    launches = len(log)
    with _calls() as calls:
        step(model)
    graph, compiling = _compiled(model, step) if compiled else (0, 0)
    return Growth(launches, found, calls[0], graph, compiling)


def _compiled(model: nn.Module, step: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> tuple[int, int]:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen = 0

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal seen
        seen += len(graph.graph.nodes)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=counting, bw_compiler=counting))
    with _calls() as calls:
        step(compiled)
    torch._dynamo.reset()
    return seen, calls[0]
