"""A chain, described by data: the weight layers of one block, its shortcut and its pooling.

A chain is ``out = pool(act(norm_L(conv_L(... act(norm_1(conv_1(x))) ...)) + shortcut(x)))`` where the normalisations,
activations, the shortcut and the pooling may each be absent; or, with a gate, ``T * act(norm_L(...)) + (1 - T) * shortcut(x)``
with ``T = sigmoid(gate(x))``. The shortcut starts from ``x``, or from a second input, ``skip``, such as what a feature pyramid
hands down, or an average pooling of ``x``. In front of the first convolution there may be a BatchNorm with its activation, the
chain's *entry* (blocks with pre-activation, dense layers): then ``conv_1``, and a projection, read ``act(norm_0(x))``, and the
identity shortcut is ``x``. He et al. 2016, section 3, draws the blocks; every block of a ResNet, its stem, and
any ``Sequential`` of convolutions, BatchNorms and activations is one. :mod:`fused_resnet.plan` turns a chain into launches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .activations import from_output
from .launch import Geometry, HashedOnce, Pair, PoolGeometry, accumulation_dtype, index_dtype, output_size

#: What training may keep for the backward: what it reads; or, in a stage of blocks, every second block's output made again from
#: what else is kept (``less``); or besides the last convolution and the projection of each block computed again (``low``).
MEMORY = ("default", "less", "low")
#: Roles of what a training forward updates in place.
UPDATED = ("running_mean", "running_var", "batches")
#: Roles of the tensors that never get gradients.
BUFFERS = ("mean", "var", *UPDATED)


@dataclass(frozen=True)
class Layer:
    """One weight layer: a convolution, the BatchNorm behind it if any, and its activation.

    The activation of the last layer of a chain comes after the shortcut.

    Attributes:
        norm: there is a BatchNorm; ``affine``: it has gamma and beta.
        batch: it normalises by the batch's statistics (training mode, or no running ones), else by given ones (eval, frozen).
        tracked: running statistics are updated; ``counted``: so is the number of batches.
        momentum: of the update; None is the cumulative average.
        group: name of the process group that shares the batch (SyncBatchNorm), or empty.
        activation: a key of :data:`fused_resnet.activations.ACTIVATIONS`; ``slope``: LeakyReLU's, 0 for all others.
        weights: False for a shortcut without parameters: every ``stride``-th pixel, zeros for the channels added (option A);
            and for a chain's entry, which has no convolution: what its BatchNorm reads is the chain's input.
        rewritable: what the activation makes may be written over before the backward (``out += x``): as in PyTorch, which takes
            the gradient of a LeakyReLU or ReLU6 that is not in place at its input. Of a chain's last layer.
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
    batch: bool = False
    tracked: bool = False
    counted: bool = False
    momentum: float | None = 0.0
    group: str = ""
    slope: float = 0.0
    weights: bool = True
    rewritable: bool = False

    @property
    def token(self) -> str:
        """The layer in one line of text. See :attr:`Chain.token`."""
        sizes = (self.filters, self.channels, *self.kernel, *self.stride, *self.padding, *self.dilation, self.groups)
        numbers = ",".join([f"{size}" for size in sizes])
        flags = f"{self.weights};{self.bias};{self.norm};{self.affine};{self.batch};{self.tracked};{self.counted}"
        flags = f"{flags};{self.rewritable}"
        momentum = "" if self.momentum is None else float(self.momentum).hex()
        activation = f"{self.activation};{float(self.slope).hex()}"
        return f"{numbers};{flags};{float(self.eps).hex()};{momentum};{activation};{self.group};{self.name}"

    @staticmethod
    def parse(token: str) -> Layer:
        """The layer that a :attr:`token` stands for."""
        numbers, *words, eps, momentum, activation, slope, group, name = token.split(";", 14)
        filters, channels, *windows, groups = [int(number) for number in numbers.split(",")]
        kernel, stride, padding, dilation = zip(windows[::2], windows[1::2], strict=True)
        weights, bias, norm, affine, batch, tracked, counted, rewritable = [word == "True" for word in words]
        return Layer(
            name,
            filters,
            channels,
            kernel,
            stride,
            padding,
            dilation,
            groups,
            bias,
            norm,
            affine,
            float.fromhex(eps),
            activation,
            batch,
            tracked,
            counted,
            float.fromhex(momentum) if momentum else None,
            group,
            float.fromhex(slope),
            weights,
            rewritable,
        )

    @property
    def parameter_roles(self) -> tuple[str, ...]:
        """Roles of the tensors this layer reads besides its input, in the order in which they are passed."""
        roles = ["w"] if self.weights else []
        if self.bias:
            roles.append("bias")
        if self.affine:
            roles += ["gamma", "beta"]
        if self.norm and not self.batch:
            roles += ["mean", "var"]
        if self.tracked:
            roles += ["running_mean", "running_var"]
        if self.counted:
            roles.append("batches")
        return tuple(roles)

    @property
    def epilogue(self) -> str:
        """The epilogue without a shortcut (a key of :data:`fused_resnet.launch.EPILOGUES`)."""
        return "stats" if self.batch else "affine" if self.norm else "bias" if self.bias else "store"

    @property
    def masked_by_output(self) -> bool:
        """Whether the gradient in front of the activation follows from the activation's output."""
        return from_output(self.activation, self.slope)

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

    ``residual`` without a ``projection`` is the identity shortcut; ``memory`` is one of :data:`MEMORY`. A ``gate`` is a
    convolution of ``x`` without a BatchNorm; the activation of the last layer then comes before the shortcut. With ``skip`` the
    shortcut, or its projection, starts from a second input of that name. ``entry`` is the BatchNorm in front of the first
    convolution, a layer without weights; without ``skip`` a projection, too, starts behind it.
    """

    layers: tuple[Layer, ...]
    residual: bool = False
    projection: Layer | None = None
    pool: Pool | None = None
    memory: str = "default"
    gate: Layer | None = None
    skip: bool = False
    entry: Layer | None = None

    def __hash__(self) -> int:
        return self.hash

    @property
    def weight_layers(self) -> tuple[Layer, ...]:
        """All layers: the entry, those in a row, the projection and the gate."""
        first, behind = [self.entry], [self.projection, self.gate]
        return tuple([layer for layer in (*first, *self.layers, *behind) if layer is not None])

    def before(self, index: int) -> Layer | None:
        """The layer whose BatchNorm and activation ``layers[index]`` reads, if any."""
        return self.layers[index - 1] if index > 0 else self.entry

    @property
    def projects_entry(self) -> bool:
        """Whether the projection reads what the entry gives, as the first convolution does."""
        return self.entry is not None and self.projection is not None and not self.skip

    @property
    def start(self) -> str:
        """The slot that the shortcut, or its projection, reads (behind the entry, see :attr:`projects_entry`)."""
        return "skip" if self.skip else "x"

    @property
    def shortcut_slot(self) -> str:
        """The slot of what is added."""
        return self.start if self.projection is None else "yd"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Slots of the inputs."""
        return ("x", "skip") if self.skip else ("x",)

    @property
    def operand_slots(self) -> tuple[str, ...]:
        """Slots of all that is given besides ``x``: the second input, if any, then :attr:`parameter_slots`."""
        return (*self.inputs[1:], *self.parameter_slots)

    @property
    def parameter_slots(self) -> tuple[str, ...]:
        """Slots of all parameters and buffers, in the order in which :func:`fused_resnet.functional.chain` takes them."""
        return (_slots if torch.compiler.is_compiling() else _cached_slots)(self)

    @property
    def buffer_slots(self) -> tuple[str, ...]:
        """Slots of the running statistics that a forward updates, part of :attr:`parameter_slots`."""
        return tuple([layer.slot(role) for layer in self.weight_layers for role in layer.parameter_roles if role in UPDATED])

    @property
    def batch(self) -> bool:
        """Whether any BatchNorm normalises by the batch's statistics."""
        return any(layer.batch for layer in self.weight_layers)

    @property
    def normalised_late(self) -> bool:
        """Whether the last sum is a launch of its own (``bn_add_relu``), since statistics must be known first."""
        side = self.projection is not None and self.projection.batch
        if self.gate is not None:
            return False
        return side or (self.layers[-1].batch and (self.pool is None or self.residual))

    @property
    def normalised_in_pool(self) -> bool:
        """Whether the pooling applies the last BatchNorm on load."""
        return self.pool is not None and self.layers[-1].batch and not self.normalised_late

    @property
    def activated_in_pool(self) -> bool:
        """Whether the pooling applies the last activation on load, at least where a backward follows."""
        return self.pool is not None and (self.normalised_in_pool or self.pre_activation(-1) is not None)

    @property
    def masked_by_output(self) -> bool:
        """Whether the gradient in front of the last activation is made from its output, which nobody may write over then."""
        last = self.layers[-1]
        return last.masked_by_output and not (last.rewritable and self.pool is None and self.gate is None)

    def pre_activation(self, index: int) -> str | None:
        """What plans call ``layers[index]`` in front of its activation, where a backward reads that instead of its output.

        That is so with given statistics and an activation such as SiLU, whose derivative the output does not tell. (With the
        batch's statistics it is computed again from ``y``.) A forward with such a slot to keep writes it in the place of the
        activation, which the next launch applies on load.
        """
        last = index in (-1, len(self.layers) - 1)
        layer = self.layers[index]
        masked = self.masked_by_output if last else layer.masked_by_output
        return None if layer.batch or (last and self.normalised_late) or masked else f"z{index % len(self.layers) + 1}"

    def output_slot(self, index: int) -> str:
        """What plans call what the convolution of ``layers[index]`` writes: ``a`` behind the activation, ``y`` in front."""
        last = index == len(self.layers) - 1
        if self.layers[index].batch or (last and self.normalised_late):
            return f"y{index + 1}"
        return "out" if last and self.pool is None and self.gate is None else f"a{index + 1}"

    @property
    def pooled_slot(self) -> str:
        """What the pooling reads."""
        return f"a{len(self.layers)}" if self.normalised_late else self.output_slot(len(self.layers) - 1)

    def made(self, n: Any, h: Any, w: Any, dtype: torch.dtype) -> dict[str, tuple[tuple[Any, ...], torch.dtype]]:
        """Logical shape and type of all that a forward may hand to the backward, by slot; also for symbolic sizes."""

        def behind(window: Layer | Pool, rows: Any, columns: Any) -> tuple[Any, Any]:
            sizes = zip((rows, columns), window.kernel, window.stride, window.padding, window.dilation, strict=True)
            return tuple(output_size(*size) for size in sizes)  # type: ignore[return-value]

        slots: dict[str, tuple[tuple[Any, ...], torch.dtype]] = {}
        for layer in self.weight_layers:
            roles = ("batch_mean", "invstd") if layer.batch else ()
            slots.update({layer.slot(role): ((layer.filters,), accumulation_dtype(dtype)) for role in roles})
            if layer.group:
                slots[layer.slot("count")] = ((1,), accumulation_dtype(dtype))
        if self.gate is not None:
            slots["t"] = ((n, self.gate.filters, *behind(self.gate, h, w)), dtype)
        for index, layer in enumerate(self.layers):
            h, w = behind(layer, h, w)
            for slot in (self.output_slot(index), self.pre_activation(index)):
                if slot is not None:
                    slots[slot] = ((n, layer.filters, h, w), dtype)
        filters = self.layers[-1].filters
        if self.projection is not None:  # what is added has the shape of what it is added to
            slots["yd"] = ((n, filters, h, w), dtype)
        if self.pool is not None:
            slots[self.pooled_slot] = ((n, filters, h, w), dtype)
            h, w = behind(self.pool, h, w)
            slots["indices"] = ((n, filters, h, w), index_dtype(self.pool.kernel))
        slots["out"] = ((n, filters, h, w), dtype)
        return slots

    @property
    def token(self) -> str:
        """The chain as text; :meth:`parse` reads it back. Operators seen by torch.compile carry it.

        Put together from single numbers, since torch.compile traces this. It may hold eps to be symbolic, which its hexadecimal
        form makes a constant in all PyTorch versions (repr, JSON and plain formatting do not).
        """
        pool = self.pool
        windows = () if pool is None else (*pool.kernel, *pool.stride, *pool.padding, *pool.dilation)
        lines = [",".join([f"{size}" for size in windows]), f"{self.residual}", self.memory, f"{self.skip}"]
        lines += ["" if layer is None else layer.token for layer in (self.projection, self.gate, self.entry)]
        return "\n".join([*lines, *[layer.token for layer in self.layers]])

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(token: str) -> Chain:
        """The chain that a :attr:`token` stands for."""
        pool, residual, memory, skip, projection, gate, entry, *layers = token.split("\n")
        sizes = [int(size) for size in pool.split(",")] if pool else []
        return Chain(
            tuple(Layer.parse(layer) for layer in layers),
            residual == "True",
            Layer.parse(projection) if projection else None,
            Pool(*zip(sizes[::2], sizes[1::2], strict=True)) if sizes else None,
            memory,
            Layer.parse(gate) if gate else None,
            skip == "True",
            Layer.parse(entry) if entry else None,
        )


def shape_behind(layers: tuple[Layer, ...], n: Any, h: Any, w: Any) -> tuple[Any, ...]:
    """Shape of what layers in a row make of ``n`` images of ``h`` x ``w`` pixels; also for symbolic sizes."""
    for layer in layers:
        sizes = zip((h, w), layer.kernel, layer.stride, layer.padding, layer.dilation, strict=True)
        h, w = [output_size(*size) for size in sizes]
    return n, layers[-1].filters, h, w


def _slots(chain: Chain) -> tuple[str, ...]:
    return tuple([layer.slot(role) for layer in chain.weight_layers for role in layer.parameter_roles])


_cached_slots = lru_cache(maxsize=4096)(_slots)  # torch.compile traces past caches, and warns of them
