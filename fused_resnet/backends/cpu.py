"""The default without a GPU: oneDNN's convolutions, prepacked and folded, through PyTorch's own operators.

BatchNorm is folded into the filters and a bias, the filters are laid out once the way oneDNN wants them (its weight cache is
ours: :mod:`.derived`). The shortcut is added by the convolution where it may be written over, else by ``add_``; ReLU works in
place; activations are channels_last. Why so: docs/decisions/007-relu-and-sums-on-the-cpu.md.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import EPILOGUES, Geometry, Launch, PoolGeometry
from . import reference
from .derived import derived


def check_available(device: torch.device) -> None:
    """Raise unless ``device`` is the CPU."""
    if device.type != "cpu":
        raise RuntimeError(f"backend='cpu' runs on CPU tensors, got a tensor on {device}; choose 'triton' or 'reference' there")


@cache
def _onednn_dtypes() -> frozenset[torch.dtype]:
    """Element types whose convolutions oneDNN computes natively on this processor."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return frozenset()
    dtypes = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.add(torch.bfloat16)
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        dtypes.add(torch.float16)
    return frozenset(dtypes)


def supports(launch: Launch) -> str | None:
    """``None`` or the reason why not."""
    if launch.kind == "max_pool" and launch.prologue == "identity":
        return None
    if launch.kind != "conv":
        return f"the CPU executor has no {launch.kind} yet"
    if launch.epilogue not in EPILOGUES or launch.epilogue == "stats" or launch.prologue != "identity":
        return f"the CPU executor has no {launch.prologue} + conv + {launch.epilogue} + {launch.activation} yet"
    if launch.dtype not in _onednn_dtypes():
        return f"oneDNN on this processor has no {launch.dtype} convolution"
    return None


def _dilation(g: Geometry) -> tuple[int, int]:
    """1 where a kernel is one tap wide: oneDNN crashes on some dilations of such, with prepacked filters (PyTorch 2.14)."""
    return g.dilation[0] if g.R > 1 else 1, g.dilation[1] if g.S > 1 else 1


@lru_cache(maxsize=4096)
def _purpose(launch: Launch) -> str:
    """What folded filters depend on besides the tensors. (Text, whose hash is computed once.)"""
    g = launch.geometry
    assert isinstance(g, Geometry)
    # oneDNN lays filters out differently for batches: packed for one image they are a tenth slower for eight.
    return repr(("cpu", g.N == 1, launch.dtype, launch.eps, g.stride, g.padding, g.dilation, g.groups, sorted(launch.roles)))


def _folded(launch: Launch, g: Geometry, operands: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Filters times scale, prepacked, and the shift. Folded in fp32, rounded once."""
    w = operands["w"]
    roles = tuple(role for role in ("w", "bias", "gamma", "beta", "mean", "var") if role in operands)

    def build() -> tuple[Tensor, Tensor | None]:
        weight, shift = w.detach(), operands.get("bias")
        if "var" in operands:
            scale, shift = reference.scale_and_shift(operands, launch.eps, torch.float32)
            weight = weight.to(torch.float32) * scale.view(-1, 1, 1, 1)
        weight = weight.to(launch.dtype).contiguous(memory_format=torch.channels_last)
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            weight, g.padding, g.stride, _dilation(g), g.groups, list(g.x_shape)
        )
        return packed, None if shift is None else shift.detach().to(launch.dtype)

    return derived(_purpose(launch), [operands[role] for role in roles], build)


def _conv(launch: Launch, g: Geometry, operands: dict[str, Tensor], donated: frozenset[str]) -> Tensor:
    x = operands["x"]
    shortcut = operands.get("shortcut")
    weight, shift = _folded(launch, g, operands)
    where = (g.padding, g.stride, _dilation(g), g.groups)
    in_place = "shortcut" in donated  # nobody reads it afterwards: the convolution adds to it where it is
    if shortcut is not None and (in_place or launch.dtype != torch.float32):  # a sum of its own would round fp16 and bf16 twice
        y = shortcut if in_place else shortcut.clone(memory_format=torch.channels_last)
        torch.ops.mkldnn._convolution_pointwise_.binary(y, x, weight, shift, *where, "add", 1.0, None, [], None)
    else:
        y = torch.ops.mkldnn._convolution_pointwise(x, weight, shift, *where, "none", [], "")
        if shortcut is not None:  # faster than oneDNN's sum into a third tensor (ResNet-50, batch 8: 356 against 379 ms)
            y.add_(shortcut)
    # Not oneDNN's own ReLU: it turns NaN into 0 (in PyTorch 2.11 and 2.14), and a diverged network must be seen to be one.
    return y.relu_() if launch.activation == "relu" else y


def run(launch: Launch, operands: dict[str, Tensor], donated: frozenset[str]) -> Tensor:
    """Run one ``conv`` or ``max_pool``."""
    g = launch.geometry
    if g.N == 0:
        return operands["x"].new_empty(g.y_shape, dtype=launch.dtype)
    if isinstance(g, PoolGeometry):
        return F.max_pool2d(operands["x"], g.kernel, g.stride, g.padding, g.dilation)
    return _conv(launch, g, operands, donated)
