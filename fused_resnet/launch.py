"""A launch, described by data.

One :class:`Launch` says what a kernel computes (kind, geometry, prologue, epilogue, activation) and which tensors it reads and
writes (slots of the plan it stands in). That one description is what executors run, what the compiler is given ahead of time,
what counts FLOPs and bytes, what a tile is chosen for and what :func:`fused_resnet.explain` prints.

Notation: activations ``x[N, H, W, C]`` (channels_last memory), filters ``w[K, R, S, C / groups]``, outputs ``y[N, P, Q, K]``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from math import prod
from typing import Any

import torch

from .activations import ACTIVATIONS as _ACTIVATIONS

Pair = tuple[int, int]


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Extent of a convolution's or pooling's output along one axis (floor mode)."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


class HashedOnce:
    """For frozen dataclasses that are looked up at every call: the hash is computed once an object."""

    @cached_property
    def hash(self) -> int:
        """Hash of the fields that are compared."""
        return hash(tuple(getattr(self, entry.name) for entry in fields(self) if entry.compare))  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        # Not what was computed once: hashes of text differ between processes.
        return {entry.name: self.__dict__[entry.name] for entry in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Geometry:
    """Sizes of one 2-D convolution; the only place where its output size is computed.

    Raises:
        RuntimeError: ``groups`` does not divide the channels or filters, or the output would have no pixels
            (PyTorch raises the same type for both).
    """

    N: int
    H: int
    W: int
    C: int
    K: int
    R: int
    S: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        if self.groups < 1 or self.C % self.groups or self.K % self.groups:
            raise RuntimeError(
                f"groups={self.groups} must divide the input channels ({self.C}) and the filters ({self.K}) of a convolution"
            )
        if min(self.stride) < 1 or min(self.dilation) < 1 or min(self.padding) < 0:
            raise RuntimeError(
                f"stride and dilation must be positive and padding not negative, got stride={self.stride}, "
                f"dilation={self.dilation}, padding={self.padding}"
            )
        if self.P < 1 or self.Q < 1:
            raise RuntimeError(
                f"input of {self.H}x{self.W} with padding {self.padding} is smaller than the {self.R}x{self.S} kernel with "
                f"dilation {self.dilation}: the output would be {self.P}x{self.Q}, expected at least 1x1"
            )

    @cached_property
    def P(self) -> int:
        """Output rows."""
        return output_size(self.H, self.R, self.stride[0], self.padding[0], self.dilation[0])

    @cached_property
    def Q(self) -> int:
        """Output columns."""
        return output_size(self.W, self.S, self.stride[1], self.padding[1], self.dilation[1])

    @cached_property
    def x_shape(self) -> tuple[int, int, int, int]:
        """Logical (NCHW) shape of the input."""
        return (self.N, self.C, self.H, self.W)

    @cached_property
    def w_shape(self) -> tuple[int, int, int, int]:
        """Logical (KCRS) shape of the filters."""
        return (self.K, self.C // self.groups, self.R, self.S)

    @cached_property
    def y_shape(self) -> tuple[int, int, int, int]:
        """Logical (NCHW) shape of the output."""
        return (self.N, self.K, self.P, self.Q)

    @property
    def flops(self) -> int:
        """Two for each multiply-add, padding taps included (the usual convention)."""
        return 2 * self.N * self.P * self.Q * self.K * self.R * self.S * (self.C // self.groups)

    @property
    def pointwise(self) -> bool:
        """1x1, stride 1, no padding: a plain GEMM over the pixels."""
        return (self.R, self.S, self.stride, self.padding) == (1, 1, (1, 1), (0, 0))


def index_dtype(kernel: Pair) -> torch.dtype:
    """What tells places of a pooling's window, ``r * S + s``: one byte where that does."""
    return torch.uint8 if kernel[0] * kernel[1] <= 256 else torch.int32


@dataclass(frozen=True)
class PoolGeometry:
    """Sizes of one 2-D max-pooling (floor mode, as :class:`torch.nn.MaxPool2d` with ``ceil_mode=False``)."""

    N: int
    H: int
    W: int
    C: int
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def __post_init__(self) -> None:
        if any(2 * pad > spread * (k - 1) + 1 for pad, spread, k in zip(self.padding, self.dilation, self.kernel, strict=True)):
            raise RuntimeError(f"padding should be at most half of the pooling's kernel {self.kernel}, got {self.padding}")
        if self.P < 1 or self.Q < 1:
            raise RuntimeError(
                f"input of {self.H}x{self.W} is too small for max-pooling with kernel {self.kernel}, padding {self.padding} "
                f"and dilation {self.dilation}: the output would be {self.P}x{self.Q}, expected at least 1x1"
            )

    @property
    def P(self) -> int:
        """Output rows."""
        return output_size(self.H, self.kernel[0], self.stride[0], self.padding[0], self.dilation[0])

    @property
    def Q(self) -> int:
        """Output columns."""
        return output_size(self.W, self.kernel[1], self.stride[1], self.padding[1], self.dilation[1])

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        """Logical (NCHW) shape of the input."""
        return (self.N, self.C, self.H, self.W)

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        """Logical (NCHW) shape of the output."""
        return (self.N, self.C, self.P, self.Q)

    @property
    def flops(self) -> int:
        """Comparisons are not counted."""
        return 0


#: Functions applied last, after the shortcut: :mod:`fused_resnet.activations`, and their twins in the kernels.
ACTIVATIONS: tuple[str, ...] = tuple(_ACTIVATIONS)

_VECTORS = ("x_mean", "x_invstd", "x_gamma", "x_beta", "x_var")
#: Prologue of a ``conv``, ``wgrad`` or ``max_pool`` -> the roles of the vectors [C] it reads besides ``x``. ``bn`` is BatchNorm
#: with the batch's statistics, ``(x - mean) * (invstd * gamma) + beta``; gamma and beta may be absent. With given statistics
#: ``x_var`` stands in the place of ``x_invstd``, which is ``1 / sqrt(x_var + x_eps)``. ``bn_relu`` is an activation behind it,
#: ``relu`` the activation alone; so for all of them.
PROLOGUES: dict[str, tuple[str, ...]] = {
    "identity": (),
    "bn": _VECTORS,
    **{f"bn_{name}": _VECTORS for name in ACTIVATIONS if name != "identity"},
    **{name: () for name in ACTIVATIONS if name != "identity"},
}

#: Epilogue of a ``conv`` -> the roles of the operands it reads besides the accumulator. Per filter unless the role is
#: ``shortcut`` (a tensor of the output's shape) or ``batches`` (one number). ``affine`` is BatchNorm with given statistics:
#: ``gamma * (acc + bias - mean) / sqrt(var + eps) + beta``; ``bias``, ``gamma`` and ``beta`` may be absent there. ``stats``
#: stores ``y = acc + bias``, makes the statistics of the stored y, and updates the running ones in place, where present.
EPILOGUES: dict[str, tuple[str, ...]] = {
    "store": (),
    "bias": ("bias",),
    "affine": ("gamma", "beta", "mean", "var", "bias"),
    "add": ("shortcut",),
    "bias_add": ("bias", "shortcut"),
    "affine_add": ("gamma", "beta", "mean", "var", "bias", "shortcut"),
    "stats": ("bias", "running_mean", "running_var", "batches"),
}

#: How the gradient ``dy`` of a convolution's output follows from ``dz``, the gradient behind its BatchNorm -> the roles read.
#: ``scale`` (given statistics): ``gamma / sqrt(var + eps) * dz``. ``bn_backward`` (the batch's), with m values a channel:
#: ``gamma * invstd * (dz - sum / m - (y - mean) * invstd * dot / m)``. gamma may be absent; ``count`` is m, if ranks share it.
GRADIENTS: dict[str, tuple[str, ...]] = {
    "identity": (),
    "scale": ("gamma", "var"),
    "bn_backward": ("y", "mean", "invstd", "gamma", "sum", "dot", "count"),
}

#: Epilogue of a ``dgrad`` -> roles read. ``mask`` and ``bn_mask`` end in front of the previous layer's activation, from its
#: output ``a_previous`` or its input ``z_previous``, or from what its BatchNorm reads, ``x``, and the statistics; both make the
#: sum over the pixels, ``bn_mask`` also ``dot``, the sum of ``dx * (x - x_mean) * x_invstd``. ``dshortcut`` is added in front.
DGRAD_EPILOGUES: dict[str, tuple[str, ...]] = {
    "store": ("dshortcut",),
    "mask": ("a_previous", "z_previous"),
    "bn_mask": ("x", *_VECTORS, "dshortcut"),
}

_SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
#: Element types of activations and filters.
DTYPES = frozenset(_SHORT)


@dataclass(frozen=True)
class Launch(HashedOnce):
    """One kernel launch.

    Attributes:
        kind: ``conv``; ``bn_add_relu``, ``gate`` and ``max_pool`` behind it; ``zero_pad`` in a shortcut; each of these with
            ``_backward``, ``dgrad`` and ``wgrad`` for gradients; ``statistics`` of a chain's input, and ``output_gradient``
            from behind a BatchNorm to in front of it, where no convolution does that; ``sync_statistics``, ``sync_sums``
            between the ranks of a SyncBatchNorm.
        layer: name of the weight layer it belongs to, for people and for tuning tables.
        geometry: sizes of the convolution (or pooling) the launch is about; for dgrad and wgrad those of the forward.
        dtype: element type of activations and filters. Accumulation is always in fp32 (fp64 for fp64).
        operands: ``(role, slot)`` pairs: what the launch calls the tensor, what the plan calls it.
        outputs: ``(role, slot)`` pairs of what it writes.
        prologue: key of :data:`PROLOGUES`, applied to ``x``.
        gradient: key of :data:`GRADIENTS`, applied to ``dz``.
        epilogue: key of :data:`EPILOGUES` (``conv``) or :data:`DGRAD_EPILOGUES` (``dgrad``).
        activation: one of :data:`ACTIVATIONS`; of a dgrad, that of the layer in front of it.
        slope: of a LeakyReLU that ``activation`` is; ``x_slope``: of one that ``prologue`` ends in.
        eps: BatchNorm's, where an epilogue or the backward needs it; ``x_eps``: of one with given statistics in ``prologue``,
            or in front of whose activation a dgrad ends.
        momentum: BatchNorm's; None is the cumulative average.
        group: name of the process group of a SyncBatchNorm.
    """

    kind: str
    layer: str
    geometry: Geometry | PoolGeometry
    dtype: torch.dtype
    operands: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    prologue: str = "identity"
    gradient: str = "identity"
    epilogue: str = "store"
    activation: str = "identity"
    eps: float = 0.0
    momentum: float | None = 0.0
    group: str = ""
    slope: float = 0.0
    x_slope: float = 0.0
    x_eps: float = 0.0
    #: Bytes of each operand and output by role, each counted once (the algorithmic traffic).
    sizes: tuple[tuple[str, int], ...] = field(default=(), compare=False)

    def __hash__(self) -> int:
        return self.hash

    @cached_property
    def roles(self) -> frozenset[str]:
        """Roles of the operands present."""
        return frozenset(role for role, _ in self.operands)

    @cached_property
    def reads(self) -> dict[str, str]:
        """What the plan calls each operand, by role."""
        return dict(self.operands)

    @cached_property
    def makes(self) -> dict[str, str]:
        """What the plan calls each output, by role."""
        return dict(self.outputs)

    @cached_property
    def x_activation(self) -> str:
        """The activation in the prologue, a key of :data:`ACTIVATIONS`."""
        return self.prologue.removeprefix("bn").removeprefix("_") or "identity"

    @property
    def flops(self) -> int:
        """Floating-point operations of the contraction (epilogues are not counted)."""
        return self.geometry.flops if self.kind in ("conv", "dgrad", "wgrad") else 0

    @property
    def bytes(self) -> int:
        """Algorithmic bytes: every operand read once and every output written once."""
        return sum(size for _, size in self.sizes)

    @property
    def signature(self) -> str:
        """What the launch computes and on which sizes, without names: launches of one signature take the same time.

        ``conv bf16 N256 56x56 C64 K64 3x3 s1x1 p1x1 d1x1 g1 bn_relu/identity/stats/identity x,w,... -> y,mean,invstd``. The key
        of tuning tables and results.
        """
        g = self.geometry
        sizes = f"N{g.N} {g.H}x{g.W} C{g.C}"
        if isinstance(g, Geometry):
            (sh, sw), (ph, pw), (dh, dw) = g.stride, g.padding, g.dilation
            sizes += f" K{g.K} {g.R}x{g.S} s{sh}x{sw} p{ph}x{pw} d{dh}x{dw} g{g.groups}"
        else:
            pairs = zip("kspd", (g.kernel, g.stride, g.padding, g.dilation))
            sizes += "".join(f" {letter}{a}x{b}" for letter, (a, b) in pairs)
        ends = "/".join((self.prologue, self.gradient, self.epilogue, self.activation))
        roles = ",".join(role for role, _ in self.operands) + " -> " + ",".join(role for role, _ in self.outputs)
        return f"{self.kind} {_SHORT.get(self.dtype, str(self.dtype))} {sizes} {ends} {roles}"

    def __str__(self) -> str:
        ends = [self.kind]
        for end in (self.prologue, self.gradient):
            if end != "identity":
                ends.insert(0, end)
        if self.epilogue != "store":
            ends.append(self.epilogue)
        if self.activation != "identity":
            ends.append(self.activation)
        return f"{self.layer}: {' + '.join(ends)}"


def tensor_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a dense tensor."""
    return prod(shape) * dtype.itemsize


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision sums are made in: fp32 for fp16 and bf16, else the type itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
