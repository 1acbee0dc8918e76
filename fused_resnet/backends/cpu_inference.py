"""Convolutions with given statistics on the CPU: folded, prepacked, and prepared for the calls to come.

BatchNorm is folded into the filters and a bias, the filters are laid out once the way oneDNN wants them (its weight cache is
ours: :mod:`.derived`). The shortcut is added by the convolution where it may be written over, else by ``add_``; ReLU works in
place; activations are channels_last. Why so: docs/decisions/007-relu-and-sums-on-the-cpu.md.

A small network's convolutions take some 100 us each, as long as looking up by name all that belongs to them. So for tensors
that are given again and again :func:`prepare` does that once, and leaves what must be done at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS
from ..launch import Geometry, Launch, PoolGeometry
from . import OtherParametersError, cpu_convolution, cpu_winograd, reference
from .derived import Entry, entry_of

#: Calls in a row with images of another size, behind which filters are laid out for that one.
REPEATS = 3
#: Elements of an input up to which PyTorch 2.11 to 2.14 takes its own convolution.
SMALL = 20480
#: Multiplications, elements of the filters, and pixels times taps times channels, up to which it is faster. *Measured* on 2
#: threads of an AMD EPYC with AVX-512, PyTorch 2.14.1, 2026-11-29, medians of 60: 1x1 64 to 64 at 16x16 (1.0 M multiplications)
#: 18 us (oneDNN, laid out, 37), 80 to 480 at 7x7 (1.9 M) 33 (44), 160 to 960 (7.5 M) 112 (97); 3x3, of 2.4 M each, 64 at 8x8 37
#: (46), 32 at 16x16 40 (47), but 16 at 32x32 59 (49), and 512 at 1x1, whose filters come from memory, 156 (36). Six layers in
#: turn: 192 of 3 taps on 16 samples (110,592 elements) 41 (44), 512 to 256 at 4x4 (131,072) 47 (48), 3x3 128 at 4x4 (147,456)
#: 52 (46), 480 to 480 at 3x3 (230,400) 81 (56).
MOST_WORK, MOST_FILTERS, MOST_READ = 5 * 2**19, 2**17, 2**17
#: Elements of the filters and multiplications up to which PyTorch's matrix product of pixels is done before oneDNN's 1x1
#: convolution. *Measured* likewise, eight in turn, oneDNN's, the product's: 64 to 64 at 7x7 57, 22, at 28x28 (3.2 M) 104, 72;
#: 240 to 40 at 14x14 96, 57; 16 to 64 at 56x56 (3.2 M) 75, 69; 256 to 256 at 7x7 (3.2 M) 91, 92; eight images, 64 to 64 at 7x7
#: 44, 32. But 512 to 256 at 7x7 107, 126; 128 to 512 at 14x14 (13 M) 229, 301.
MOST_FILTERS_OF_ONE_TAP, MOST_PRODUCT = 2**16, 13 * 2**18
#: Elements of a Linear's filters from which they are laid out for oneDNN. *Measured* likewise, twelve Linears in turn, us each,
#: PyTorch's product, oneDNN's: 256 to 256 features, 1 row 10, 26; 16 rows 29, 31; 128 rows 149, 140. 512 to 512: 142, 114; 173,
#: 91; 570, 410. 1024 to 1024: 298, 198; 661, 288; 2097, 1315. 2048 to 2048: 898, 618; 2279, 987; 8405, 5634.
MOST_ROWS = 2**18


def dilation(g: Geometry) -> tuple[int, int]:
    """1 where a kernel is one tap wide: oneDNN crashes on some dilations of such, with prepacked filters (PyTorch 2.14)."""
    return g.dilation[0] if g.R > 1 else 1, g.dilation[1] if g.S > 1 else 1


class Inference:
    """What follows from a launch alone, of a convolution with given statistics.

    Attributes:
        purpose: what folded filters depend on besides the tensors. (Text, whose hash is computed once.)
        sources: roles of the tensors that filters and shift are folded from.
        native: PyTorch's own convolution or matrix product instead of oneDNN's, whose filters are laid out.
        rows: it is a Linear.
        product: it is a matrix product, of rows or of pixels.
        tiles: by :mod:`.cpu_winograd`.
        where: padding, stride, dilation and groups.
        end: the activation, in place; None for the identity.
    """

    __slots__ = ("end", "native", "product", "purpose", "rows", "slope", "sources", "tiles", "where")

    def __init__(self, launch: Launch) -> None:
        g, roles = launch.geometry, launch.roles
        assert isinstance(g, Geometry)
        self.where = (g.padding, g.stride, dilation(g), g.groups)
        self.rows = cpu_convolution.is_rows(g, launch.dtype)
        of_pixels = launch.dtype == torch.float32 and is_small_product(g)
        self.product = self.rows or of_pixels
        self.native = g.K * g.C < MOST_ROWS if self.rows else of_pixels or (launch.dtype == torch.float32 and is_small(g))
        self.tiles = cpu_winograd.suits(g, launch.dtype)
        # oneDNN lays filters out differently for batches: packed for one image they are a tenth slower for eight.
        how = (g.N == 1, self.native, self.rows, self.product, self.tiles)
        self.purpose = repr(("cpu", *how, launch.dtype, launch.eps, *self.where, g.dilation, sorted(roles)))
        self.sources = tuple(role for role in ("w", "bias", "gamma", "beta", "mean", "var") if role in roles)
        self.end = None if launch.activation == "identity" else ACTIVATIONS[launch.activation].in_place
        self.slope = launch.slope


inference = lru_cache(maxsize=4096)(Inference)


def is_small(g: Geometry) -> bool:
    """Whether PyTorch would not call oneDNN, each of whose calls costs some 30 us, and is done sooner."""
    if g.N != 1 or g.groups != 1 or min(g.R, g.S) > 3 or g.C * g.H * g.W > SMALL:
        return False
    read = g.C * g.R * g.S
    return read * g.K <= MOST_FILTERS and read * g.P * g.Q <= MOST_READ and read * g.P * g.Q * g.K <= MOST_WORK


def is_small_product(g: Geometry) -> bool:
    """Whether it is a product of pixels [N H W, C] by filters [C, K], and a small one."""
    one_tap = g.R == g.S == 1 and g.stride == (1, 1) and g.padding == (0, 0) and g.groups == 1
    return one_tap and g.K * g.C <= MOST_FILTERS_OF_ONE_TAP and g.N * g.H * g.W * g.K * g.C <= MOST_PRODUCT


class Packed:
    """Filters as oneDNN lays them out for images of one size, or so many rows, or as they are for others; and the shift.

    oneDNN may want another layout for another size, and would then make it at each call: 256 filters of 3x3 on 5x8 pixels take
    20 ms instead of 0.4. So a size that is not the first gets the filters as they are, until it has come :data:`REPEATS` times
    in a row. (The heads of a detector see five sizes in turn.)
    """

    def __init__(self, weight: Tensor, g: Geometry | None, shift: Tensor | None) -> None:
        """``g``: what to lay out for; None: they stay as they are, for PyTorch's own convolution or product."""
        self.shift = shift
        self.plain = weight if g is None else None
        self.dense: Tensor | None = None
        if g is not None:
            self.now = laid_out(weight, g), _size(weight, g)  # in one piece: another thread may read them
            self.other, self.times = _size(weight, g), 0

    def weight(self, g: Geometry) -> Tensor:
        """The filters for a convolution of that size."""
        if self.plain is not None:
            return self.plain
        packed, size = self.now
        wanted = _size(packed, g)
        if wanted == size:
            self.times = 0
            return packed
        self.times = self.times + 1 if self.other == wanted else 1
        self.other = wanted
        with torch.inference_mode(False), torch.no_grad():
            dense = self.dense
            if dense is None:
                self.dense = dense = _dense(packed)
            if self.times >= REPEATS:
                self.now = laid_out(dense, g), wanted
        return dense


def _size(weight: Tensor, g: Geometry) -> tuple[int, int]:
    """What oneDNN lays filters out for: a Linear's for so many rows, others for so many pixels."""
    return (g.N, 1) if weight.dim() == 2 else (g.H, g.W)


def _dense(packed: Tensor) -> Tensor:
    dense = packed.to_dense()
    return dense.t() if dense.dim() == 2 else dense.contiguous(memory_format=torch.channels_last)


def laid_out(weight: Tensor, g: Geometry) -> Tensor:
    """Filters, or those of a Linear, [C, K], as oneDNN wants them."""
    if weight.dim() == 2:
        return torch.ops.mkldnn._reorder_linear_weight(weight.t(), g.N)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, g.padding, g.stride, dilation(g), g.groups, list(g.x_shape))


def _folded(launch: Launch, g: Geometry, operands: Mapping[str, Tensor]) -> Entry:
    """Filters times scale, and the shift: :class:`Packed`, or :class:`.cpu_winograd.Filters`. Folded in fp32, rounded once."""
    known = inference(launch)

    def build() -> Packed | cpu_winograd.Filters:
        w = operands["w"]
        weight, shift = w.detach(), operands.get("bias")
        if "var" in operands:
            scale, shift = reference.scale_and_shift(dict(operands), launch.eps, torch.float32)
            weight = weight.to(torch.float32) * scale.view(-1, 1, 1, 1)
        weight = weight.to(launch.dtype).contiguous(memory_format=torch.channels_last)
        shift = None if shift is None else shift.detach().to(launch.dtype)
        if known.product:
            weight = weight.flatten(1).t()
            weight = weight.contiguous() if known.native else weight
        return cpu_winograd.Filters(weight, g, shift) if known.tiles else Packed(weight, None if known.native else g, shift)

    return entry_of(known.purpose, [operands[role] for role in known.sources], build)


def _product(x: Tensor, weight: Tensor, shift: Tensor | None) -> Tensor:
    """[N, C] by [C, K], or by oneDNN's own layout, and a shift."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, shift, "none", [], "")
    # What F.linear does, which takes a microsecond more; and a tenth more where it is given [K, C].
    return x.mm(weight) if shift is None else torch.addmm(shift, x, weight)


def _multiplied(g: Geometry, x: Tensor, weight: Tensor, shift: Tensor | None) -> Tensor:
    """Rows [N, C], or pixels [N, C, H, W] in memory as [N, H, W, C]: [N, K], or [N, K, H, W] likewise."""
    if x.dim() == 2:
        return _product(x, weight, shift)
    if weight.is_mkldnn:
        return _product(x.flatten(1), weight, shift)[:, :, None, None]
    y, out = cpu_convolution.new(x, g.y_shape)
    if shift is None:
        torch.mm(cpu_convolution.rows(x), weight, out=out)
    else:
        torch.addmm(shift, cpu_convolution.rows(x), weight, out=out)
    return y


def _added(x: Tensor, weight: Tensor, shift: Tensor | None, shortcut: Tensor) -> Tensor:
    """The shortcut, channels_last, with the product added to it in its memory."""
    rows = cpu_convolution.rows(shortcut).addmm_(cpu_convolution.rows(x), weight)
    if shift is not None:
        rows.add_(shift)
    return shortcut


def _convolve(
    known: Inference,
    g: Geometry,
    packed: Packed | cpu_winograd.Filters,
    x: Tensor,
    shortcut: Tensor | None,
    in_place: bool,
) -> Tensor:
    """``in_place``: nobody reads the shortcut afterwards, the convolution adds to it where it is."""
    if isinstance(packed, cpu_winograd.Filters):
        y = cpu_winograd.convolve(g, packed, x)
        if shortcut is not None:
            y.add_(shortcut)
        return y if known.end is None else known.end(y, known.slope)
    weight, shift = packed.weight(g), packed.shift
    if known.product or known.native:
        if known.product and known.native and in_place and shortcut is not None and shortcut.dim() == 4:
            y = _added(x, weight, shift, shortcut)
            return y if known.end is None else known.end(y, known.slope)
        if known.product:
            y = _multiplied(g, x, weight, shift)
        else:
            padding, stride, spread, groups = known.where
            y = torch.conv2d(x, weight, shift, stride, padding, spread, groups).contiguous(memory_format=torch.channels_last)
        if shortcut is not None:
            y.add_(shortcut)
    elif shortcut is not None and (in_place or x.dtype != torch.float32):  # a sum of its own would round fp16 and bf16 twice
        y = shortcut if in_place else shortcut.clone(memory_format=torch.channels_last)
        torch.ops.mkldnn._convolution_pointwise_.binary(y, x, weight, shift, *known.where, "add", 1.0, None, [], None)
    else:
        y = torch.ops.mkldnn._convolution_pointwise(x, weight, shift, *known.where, "none", [], "")
        if shortcut is not None:  # faster than oneDNN's sum into a third tensor (ResNet-50, batch 8: 356 against 379 ms)
            y.add_(shortcut)
    # Not oneDNN's own ReLU: it turns NaN into 0 (in PyTorch 2.11 and 2.14), and a diverged network must be seen to be one.
    return y if known.end is None else known.end(y, known.slope)


def conv(launch: Launch, g: Geometry, operands: Mapping[str, Tensor], donated: frozenset[str]) -> Tensor:
    """Run a convolution with given statistics, its input as it is to be read."""
    packed = _folded(launch, g, operands).value
    return _convolve(inference(launch), g, packed, operands["x"], operands.get("shortcut"), "shortcut" in donated)


class _Prepared:
    """A convolution and its parameters; called with ``x`` and the shortcut, or None.

    ``rows``: it takes rows [N, C] as well, and gives [N, K].

    Raises:
        OtherParametersError: a parameter has another shape or type than it had.
    """

    __slots__ = ("entry", "g", "in_place", "kinds", "known", "launch", "parameters", "rows")

    def __init__(self, launch: Launch, g: Geometry, parameters: Mapping[str, Tensor], donated: frozenset[str]) -> None:
        self.launch, self.g, self.parameters = launch, g, parameters
        self.known, self.in_place = inference(launch), "shortcut" in donated
        self.rows = self.known.rows
        self.entry = _folded(launch, g, parameters)
        self.kinds = self._kinds()

    def _kinds(self) -> list[tuple[torch.Size, torch.dtype]]:
        return [(tensor.shape, tensor.dtype) for tensor in self.parameters.values()]

    def __call__(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        entry = self.entry
        if not entry.holds():
            if self._kinds() != self.kinds:
                raise OtherParametersError
            self.entry = entry = _folded(self.launch, self.g, self.parameters)
        return _convolve(self.known, self.g, entry.value, x, shortcut, self.in_place)


def _pooled(g: PoolGeometry, x: Tensor, shortcut: Tensor | None) -> Tensor:
    return F.max_pool2d(x, g.kernel, g.stride, g.padding, g.dilation)


def _padded(launch: Launch, x: Tensor, shortcut: Tensor | None) -> Tensor:
    return reference.zero_pad(launch, {"x": x})


def prepare(
    launch: Launch, parameters: Mapping[str, Tensor], donated: frozenset[str]
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """What is left of a launch at each call, ``(x, shortcut) -> y``, where its other operands stay the same tensors; behind its
    prologue.

    None where it has to be run as ever: it reads or writes more than that.

    Args:
        launch: what the CPU executor supports.
        parameters: the operands that stay, by role. Their values may change.
        donated: roles whose memory may be written over.
    """
    g = launch.geometry
    if g.N == 0 or len(launch.outputs) != 1:
        return None
    if launch.kind == "max_pool" and isinstance(g, PoolGeometry):
        return partial(_pooled, g)
    if launch.kind == "zero_pad":
        return partial(_padded, launch)
    if launch.kind == "conv" and launch.epilogue != "stats" and isinstance(g, Geometry):
        return _Prepared(launch, g, parameters, donated)
    return None
