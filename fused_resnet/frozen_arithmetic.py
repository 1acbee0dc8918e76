"""Frozen BatchNorms that are arithmetic in a graph of functions: each becomes the call of ``F.batch_norm`` that it equals.

Torchvision's, transformers', timm's and detectron2's ``FrozenBatchNorm2d`` compute ``x * scale + (bias - mean * scale)`` with
``scale = weight * rsqrt(var + eps)``: vectors of C values, reshaped to ``[1, C, 1, 1]`` before or after the arithmetic on them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

Node = fx.Node

_TIMES, _PLUS, _MINUS = (operator.mul, torch.mul), (operator.add, torch.add), (operator.sub, torch.sub)


def example(node: Any) -> Tensor | None:
    """What Dynamo says of a node's value, if it is a tensor."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


@dataclass(frozen=True)
class Frozen:
    """One: the tensors it reads, and where its arithmetic starts and ends."""

    x: Node
    weight: Node
    bias: Node
    mean: Node
    var: Node
    eps: float
    first: Node
    out: Node


class _Reader:
    """Reads one; what it passed on the way is in ``nodes``."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def bare(self, node: Any) -> Any:
        """A vector, without the reshapes of it."""
        while isinstance(node, Node) and node.op == "call_method" and node.target in ("reshape", "view"):
            self.nodes.append(node)
            node = node.args[0]
        return node

    def two(self, node: Any, targets: tuple[Any, ...]) -> tuple[Any, Any] | None:
        """What an operator of two operands reads."""
        known = isinstance(node, Node) and node.op == "call_function" and node.target in targets
        if not known or len(node.args) != 2 or node.kwargs:
            return None
        self.nodes.append(node)
        return node.args

    def root(self, node: Any) -> tuple[Any, float] | None:
        """``var`` and ``eps`` of ``rsqrt(var + eps)``."""
        if not isinstance(node, Node) or node.target not in ("rsqrt", torch.rsqrt) or len(node.args) != 1 or node.kwargs:
            return None
        self.nodes.append(node)
        inner = self.bare(node.args[0])
        total = self.two(inner, _PLUS)
        if total is None:
            return inner, 0.0
        return (self.bare(total[0]), float(total[1])) if type(total[1]) in (int, float) else None

    def read(self, out: Node) -> Frozen | None:
        """The frozen BatchNorm that ends in a node."""
        total = self.two(out, _PLUS)
        product = self.two(total[0], _TIMES) if total is not None else None
        if total is None or product is None:
            return None
        scaling = self.bare(product[1])
        factors, difference = self.two(scaling, _TIMES), self.two(self.bare(total[1]), _MINUS)
        root = self.root(self.bare(factors[1])) if factors is not None else None
        moved = self.two(self.bare(difference[1]), _TIMES) if difference is not None else None
        if factors is None or difference is None or root is None or moved is None or self.bare(moved[1]) is not scaling:
            return None
        weight, bias, mean = self.bare(factors[0]), self.bare(difference[0]), self.bare(moved[0])
        order = {node: index for index, node in enumerate(out.graph.nodes)}
        first = min(self.nodes, key=order.__getitem__)
        found = Frozen(product[0], weight, bias, mean, *root, first, out)
        return found if _is_of_channels(found, product[1], total[1]) else None


def _is_of_channels(found: Frozen, scale: Any, shift: Any) -> bool:
    """Whether all vectors are of the images' channels and type, and neither statistic is learned."""
    x, vectors = example(found.x), [example(node) for node in (found.weight, found.bias, found.mean, found.var)]
    spread = [example(scale), example(shift)]
    if x is None or x.dim() != 4:
        return False
    along = (1, x.shape[1], 1, 1)
    fits = all(part is not None and part.dtype == x.dtype and tuple(part.shape) == along for part in spread)
    fits = fits and all(part is not None and part.dtype == x.dtype and tuple(part.shape) == along[1:2] for part in vectors)
    return fits and not any(part is not None and part.requires_grad for part in vectors[2:])


def frozen_norms(graph: fx.Graph) -> Iterator[Frozen]:
    """Those of a graph, each in front of what reads it."""
    for node in list(graph.nodes):
        found = _Reader().read(node)
        if found is not None:
            yield found


def as_calls(found: Frozen) -> None:
    """Put ``F.batch_norm`` in place of one; what nobody reads any more is erased."""
    graph = found.out.graph
    with graph.inserting_before(found.out):
        vectors = (found.mean, found.var, found.weight, found.bias)
        call = graph.call_function(F.batch_norm, (found.x, *vectors, False, 0.0, found.eps))
    call.meta = dict(found.out.meta)
    found.out.replace_all_uses_with(call)
    _erase(found.out, found.first)


def _erase(out: Node, first: Node) -> None:
    """The arithmetic from its end to its start, where nobody reads it."""
    node = out
    while True:
        before = node.prev
        last = node is first
        arithmetic = node.target in (*_TIMES, *_PLUS, *_MINUS, torch.rsqrt, "rsqrt", "reshape", "view")
        if arithmetic and not node.users:
            node.graph.erase_node(node)
        if last:
            return
        node = before
