"""A chain, described by data: the weight layers of one block, its shortcut and its pooling.

A chain is ``out = pool(act(norm_L(conv_L(... act(norm_1(conv_1(x))) ...)) + shortcut(x)))`` where the normalisations,
activations, the shortcut and the pooling may each be absent. He et al. 2016, section 3, draws the blocks; every block of a
ResNet, its stem, and any ``Sequential`` of convolutions, BatchNorms and ReLUs is one. :mod:`fused_resnet.plan` turns a chain
into launches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .launch import Geometry, HashedOnce, Pair, PoolGeometry, output_size


@dataclass(frozen=True)
class Layer:
    """One weight layer: a convolution, the BatchNorm behind it if any, and its activation.

    ``norm`` says that running statistics are applied (BatchNorm in eval mode, or frozen); ``affine`` that it has gamma and
    beta. The activation of the last layer of a chain comes after the shortcut.
    """

    name: str
    filters: int
    channels: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = False
    norm: bool = False
    affine: bool = False
    eps: float = 0.0
    activation: str = "identity"

    @property
    def token(self) -> str:
        """The layer in one line of text. See :attr:`Chain.token`."""
        sizes = (self.filters, self.channels, *self.kernel, *self.stride, *self.padding, *self.dilation, self.groups)
        numbers = ",".join([f"{size}" for size in sizes])
        return f"{numbers};{self.bias};{self.norm};{self.affine};{float(self.eps).hex()};{self.activation};{self.name}"

    @staticmethod
    def parse(token: str) -> Layer:
        """The layer that a :attr:`token` stands for."""
        numbers, bias, norm, affine, eps, activation, name = token.split(";", 6)
        filters, channels, *windows, groups = [int(number) for number in numbers.split(",")]
        kernel, stride, padding, dilation = zip(windows[::2], windows[1::2], strict=True)
        flags = (bias == "True", norm == "True", affine == "True")
        return Layer(name, filters, channels, kernel, stride, padding, dilation, groups, *flags, float.fromhex(eps), activation)

    @property
    def parameter_roles(self) -> tuple[str, ...]:
        """Roles of the tensors this layer reads besides its input, in the order in which they are passed."""
        roles = ["w"]
        if self.bias:
            roles.append("bias")
        if self.affine:
            roles += ["gamma", "beta"]
        if self.norm:
            roles += ["mean", "var"]
        return tuple(roles)

    @property
    def epilogue(self) -> str:
        """The epilogue without a shortcut (a key of :data:`fused_resnet.launch.EPILOGUES`)."""
        return "affine" if self.norm else "bias" if self.bias else "store"

    def geometry(self, n: int, h: int, w: int) -> Geometry:
        """Sizes of its convolution on ``n`` images of ``h`` x ``w`` pixels."""
        r, s = self.kernel
        return Geometry(n, h, w, self.channels, self.filters, r, s, self.stride, self.padding, self.dilation, self.groups)

    def slot(self, role: str) -> str:
        """What plans call this layer's operand of that role."""
        return f"{self.name}.{role}"


@dataclass(frozen=True)
class Pool:
    """Max-pooling at the end of a chain (the stem's)."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def geometry(self, n: int, h: int, w: int, c: int) -> PoolGeometry:
        """Sizes of the pooling on ``n`` images of ``h`` x ``w`` pixels and ``c`` channels."""
        return PoolGeometry(n, h, w, c, self.kernel, self.stride, self.padding, self.dilation)


@dataclass(frozen=True)
class Chain(HashedOnce):
    """Weight layers in a row, with an optional shortcut around them and an optional pooling behind.

    ``residual`` without a ``projection`` is the identity shortcut.
    """

    layers: tuple[Layer, ...]
    residual: bool = False
    projection: Layer | None = None
    pool: Pool | None = None

    def __hash__(self) -> int:
        return self.hash

    @property
    def weight_layers(self) -> tuple[Layer, ...]:
        """All layers that have filters, the projection last."""
        return self.layers if self.projection is None else (*self.layers, self.projection)

    @property
    def parameter_slots(self) -> tuple[str, ...]:
        """Slots of all parameters and buffers, in the order in which :func:`fused_resnet.functional.chain` takes them."""
        return (_slots if torch.compiler.is_compiling() else _cached_slots)(self)

    def activation_shapes(self, n: Any, h: Any, w: Any) -> dict[str, tuple[Any, Any, Any, Any]]:
        """Logical shapes of ``out`` and of the activations in front of it, by slot; also for symbolic sizes."""
        shapes = {}
        windows: list[tuple[Layer | Pool, int]] = [(layer, layer.filters) for layer in self.layers]
        if self.pool is not None:
            windows.append((self.pool, self.layers[-1].filters))
        for index, (window, filters) in enumerate(windows):
            h = output_size(h, window.kernel[0], window.stride[0], window.padding[0], window.dilation[0])
            w = output_size(w, window.kernel[1], window.stride[1], window.padding[1], window.dilation[1])
            shapes[f"a{index + 1}"] = (n, filters, h, w)
        shapes["out"] = shapes.pop(f"a{len(windows)}")
        return shapes

    @property
    def token(self) -> str:
        """The chain as text; :meth:`parse` reads it back. Operators seen by torch.compile carry it.

        Put together from single numbers, since torch.compile traces this. It may hold eps to be symbolic, which its hexadecimal
        form makes a constant in all PyTorch versions (repr, JSON and plain formatting do not).
        """
        pool = self.pool
        windows = () if pool is None else (*pool.kernel, *pool.stride, *pool.padding, *pool.dilation)
        lines = [",".join([f"{size}" for size in windows]), f"{self.residual}"]
        lines.append("" if self.projection is None else self.projection.token)
        return "\n".join([*lines, *[layer.token for layer in self.layers]])

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(token: str) -> Chain:
        """The chain that a :attr:`token` stands for."""
        pool, residual, projection, *layers = token.split("\n")
        sizes = [int(size) for size in pool.split(",")] if pool else []
        return Chain(
            tuple(Layer.parse(layer) for layer in layers),
            residual == "True",
            Layer.parse(projection) if projection else None,
            Pool(*zip(sizes[::2], sizes[1::2], strict=True)) if sizes else None,
        )


def _slots(chain: Chain) -> tuple[str, ...]:
    return tuple([layer.slot(role) for layer in chain.weight_layers for role in layer.parameter_roles])


_cached_slots = lru_cache(maxsize=4096)(_slots)  # torch.compile traces past caches, and warns of them
