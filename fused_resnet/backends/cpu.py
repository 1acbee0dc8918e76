"""The default without a GPU: oneDNN's convolutions and PyTorch's vectorised BatchNorm, through PyTorch's own operators.

Inference is in :mod:`.cpu_inference`.

Training: a convolution here reads memory, so what a GPU computes on load is written first and forgotten after its last use. It
is shared by the launches of a plan that need it: the activation behind a BatchNorm by wgrad and by the mask of dgrad, the
gradient in front of one by wgrad and dgrad (PyTorch makes it together with its sums). How convolutions and their gradients are
computed is in :mod:`.cpu_convolution`. What is kept between forward and backward is what the plan keeps on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS, from_output
from ..launch import Geometry, Launch, PoolGeometry, index_dtype
from . import cpu_convolution, cpu_inference, cpu_norm, reference

Operands = dict[str, Tensor]
#: Temporary tensors of one plan, by the slot they belong to; and what is left for :func:`finish`.
Shared = dict[str, Any]


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
    g = launch.geometry
    if launch.kind not in _KINDS:
        return f"the CPU executor has no {launch.kind}"
    if "count" in launch.roles or launch.outputs[-1][0] == "var":
        return "ranks share the batch: the CPU executor's BatchNorm is of one process"
    if launch.kind in ("max_pool", "max_pool_backward") and launch.prologue == "identity" and "indices" not in launch.roles:
        return None if launch.kind == "max_pool" else "the CPU executor pools backward with indices"
    if launch.kind == "conv" and isinstance(g, Geometry) and g.C == 1 and g.Q == 1 and g.stride[0] != g.stride[1]:
        return "oneDNN's prepacked convolution of one channel is wrong for such strides (PyTorch 2.14)"
    if launch.dtype not in _onednn_dtypes():
        return f"oneDNN on this processor has no {launch.dtype} convolution"
    return None


# ---------------------------------------------------------------------------------------------------------------- training


def _activated(launch: Launch, operands: Operands, activation: str, slope: float, shared: Shared) -> Tensor:
    """The activation of ``x``, behind a BatchNorm where its vectors are there; kept for the next launch that reads it."""
    slot = launch.reads["x"]
    if slot not in shared:
        if "x_mean" in operands:
            z = cpu_norm.normalised(operands["x"], operands, "x_", launch.x_eps)
            shared[slot] = ACTIVATIONS[activation].in_place(z, slope)
        else:
            shared[slot] = ACTIVATIONS[activation].function(operands["x"], slope)
    return shared[slot]


def _input(launch: Launch, operands: Operands, shared: Shared) -> Tensor:
    if launch.prologue == "identity":
        return operands["x"]
    return _activated(launch, operands, launch.x_activation, launch.x_slope, shared)


#: Epilogues of convolutions into which nothing is folded: what training computes, and computes again, to the same bits.
_PLAIN = frozenset(("store", "bias", "stats"))


def _training_conv(launch: Launch, g: Geometry, operands: Operands, shared: Shared) -> Tensor | tuple[Tensor, ...]:
    x = _input(launch, operands, shared)
    alone = launch.epilogue in _PLAIN  # the others add the bias themselves
    bias = operands.get("bias") if alone else None
    y = cpu_convolution.forward(g, x, operands["w"], bias)
    if launch.epilogue == "stats":
        return y, *cpu_norm.statistics(launch, operands, y, shared)
    if not alone:
        z = reference.EPILOGUES[launch.epilogue](y.to(torch.float32), operands, launch.eps)
        y = z.to(launch.dtype)
    return ACTIVATIONS[launch.activation].in_place(y, launch.slope)


def _bn_add_relu(launch: Launch, operands: Operands) -> Tensor:
    return ACTIVATIONS[launch.activation].in_place(_summed(operands), launch.slope)


def _summed(operands: Operands) -> Tensor:
    """What a ``bn_add_relu`` gives its activation, in a new tensor."""
    y = operands["y"]
    z = cpu_norm.normalised(y, operands, "") if "mean" in operands else y.clone(memory_format=torch.channels_last)
    if "shortcut" in operands:
        shortcut = operands["shortcut"]
        z.add_(cpu_norm.normalised(shortcut, operands, "shortcut_") if "shortcut_mean" in operands else shortcut)
    return z


def _masked(launch: Launch, gradient: Tensor, z: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient in front of the activation, from its input or, where that suffices, its output; into ``out`` if given."""
    return ACTIVATIONS[launch.activation].backward(gradient, z, launch.slope, out)


def _sums(
    launch: Launch, operands: Operands, shared: Shared, dz: Tensor, roles: tuple[tuple[str, str, str], ...]
) -> dict[str, Tensor]:
    """The sums a launch lists, by role: of dz, and for each ``(y, prefix, dot)`` of its product with the normalised y."""
    sums: dict[str, Tensor] = {}
    slots = launch.makes
    for y, prefix, dot in roles:
        if dot in slots:
            dy, sums[dot], total = cpu_norm.sums(dz, operands[y], operands, prefix, launch.x_eps)
            if dy is not None:
                shared[slots[dot]] = dy
            sums["sum"] = sums["sum_previous"] = total
    if not sums:
        sums["sum"] = sums["sum_previous"] = dz.sum((0, 2, 3), dtype=torch.float32)
    return sums


def _bn_add_relu_backward(
    launch: Launch, operands: Operands, donated: frozenset[str], shared: Shared
) -> Tensor | tuple[Tensor, ...]:
    dz = operands["dout"]
    if "out" in operands:
        dz = _masked(launch, dz, operands["out"])
    elif launch.activation != "identity":
        z = _summed(operands) if len(launch.operands) > 2 else operands["y"]
        dz = _masked(launch, dz, z, z if z is not operands["y"] else None)
    made = _sums(launch, operands, shared, dz, (("y", "", "dot"), ("shortcut", "shortcut_", "shortcut_dot")))
    return _listed(launch, {"dz": dz, **made})


def _listed(launch: Launch, made: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
    """What a launch lists of what was made, in its order."""
    outputs = tuple([made[role] for role in launch.makes])
    return outputs if len(outputs) > 1 else outputs[0]


def _mixed(launch: Launch, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """What a gate mixes: the branch behind its activation, the shortcut, and how far the gate is open. The branch is ours."""
    y, side = operands["y"], operands["shortcut"]
    h = cpu_norm.normalised(y, operands, "") if "mean" in operands else y.clone(memory_format=torch.channels_last)
    if "shortcut_mean" in operands:
        side = cpu_norm.normalised(side, operands, "shortcut_")
    if "mean" in operands or launch.kind == "gate":  # backward, without statistics, y is what the activation gave
        h = ACTIVATIONS[launch.activation].in_place(h, launch.slope)
    return h, side, torch.sigmoid(operands["t"])


def _gate(launch: Launch, operands: Operands) -> Tensor:
    if launch.dtype != torch.float32:  # operators of their own would round in between
        return reference.gate(launch, operands)
    h, side, opened = _mixed(launch, operands)
    return h.mul_(opened).addcmul_(opened.neg_().add_(1), side)


def _gate_backward(launch: Launch, operands: Operands, donated: frozenset[str], shared: Shared) -> Tensor | tuple[Tensor, ...]:
    if launch.dtype != torch.float32 or not from_output(launch.activation, launch.slope):
        return reference.gate_backward(launch, operands)
    h, side, opened = _mixed(launch, operands)
    dout = operands["dout"]
    dz = dout * opened
    dside = dout - dz
    dt = (h - side).mul_(opened.neg_().add_(1)).mul_(dz)  # dout * (h - side) * T * (1 - T)
    dz = _masked(launch, dz, h, dz)
    made = {"dz": dz, "dt": dt, "dside": dside, "dt_sum": dt.sum((0, 2, 3))}
    slots = launch.makes
    ends = (("dz", "y", "", "sum", "dot"), ("dside", "shortcut", "shortcut_", "dside_sum", "shortcut_dot"))
    for gradient, role, prefix, total, dot in ends:
        if dot in slots:
            dy, made[dot], made[total] = cpu_norm.sums(made[gradient], operands[role], operands, prefix)
            if dy is not None:
                shared[slots[dot]] = dy
        elif total in slots:
            made[total] = made[gradient].sum((0, 2, 3))
    return _listed(launch, made)


def _output_gradient(launch: Launch, operands: Operands, donated: frozenset[str], shared: Shared) -> Tensor:
    """Gradient behind the convolution (where statistics are given, but for a factor per filter)."""
    if launch.gradient != "bn_backward":
        return operands["dz"]
    slot = launch.reads["dot"]
    if slot not in shared:
        shared[slot] = cpu_norm.gradient(operands["dz"], operands["y"], operands, "dz" in donated)
    return shared[slot]


def _through_norm(launch: Launch, operands: Operands, donated: frozenset[str], shared: Shared) -> Tensor:
    """The gradient in front of a BatchNorm, plus the shortcut's: one pass, where the dgrad has made it with its sums."""
    shortcut = operands.get("dshortcut")
    if launch.gradient == "bn_backward":
        dy = _output_gradient(launch, operands, donated, shared)
        del shared[launch.reads["dot"]]
        return dy if shortcut is None else dy.add_(shortcut)
    scale = reference.given_scale(operands, launch.eps, torch.float32).to(launch.dtype).view(1, -1, 1, 1)
    return operands["dz"] * scale if shortcut is None else torch.addcmul(shortcut, operands["dz"], scale)


def _dgrad(launch: Launch, operands: Operands, donated: frozenset[str], shared: Shared) -> Tensor | tuple[Tensor, ...]:
    g = launch.geometry
    assert isinstance(g, Geometry)
    dy, w = _output_gradient(launch, operands, donated, shared), operands["w"]
    if launch.gradient == "scale":
        scale = reference.given_scale(operands, launch.eps, torch.float32)
        w = (w.to(torch.float32) * scale.view(-1, 1, 1, 1)).to(launch.dtype)
    dx, _ = cpu_convolution.gradients(g, dy, None, w)
    assert dx is not None
    return _behind_dgrad(launch, operands, shared, dx)


def _behind_dgrad(launch: Launch, operands: Operands, shared: Shared, dx: Tensor) -> Tensor | tuple[Tensor, ...]:
    """What a dgrad does with the gradient of its convolution's input."""
    if launch.gradient == "bn_backward":
        del shared[launch.reads["dot"]]  # a layer's wgrad runs before its dgrad
    if "dshortcut" in operands:
        dx.add_(operands["dshortcut"])
    if launch.epilogue == "store":
        return dx
    if launch.epilogue == "mask":
        dx = _masked(launch, dx, operands["a_previous" if "a_previous" in operands else "z_previous"], dx)
        shared.pop(launch.reads.get("z_previous", ""), None)
        return _listed(launch, {"dx": dx, **_sums(launch, operands, shared, dx, ())})
    if launch.activation != "identity":
        dx = _masked(launch, dx, _differentiated_at(launch, operands, shared), dx)
    shared.pop(launch.reads["x"], None)
    return _listed(launch, {"dx": dx, **_sums(launch, operands, shared, dx, (("x", "x_", "dot_previous"),))})


def _differentiated_at(launch: Launch, operands: Operands, shared: Shared) -> Tensor:
    """Behind a BatchNorm what :func:`_masked` is told: the activation, which wgrad has made, or the BatchNorm's output."""
    if from_output(launch.activation, launch.slope):
        return _activated(launch, operands, launch.activation, launch.slope, shared)
    return cpu_norm.normalised(operands["x"], operands, "x_", launch.x_eps)


def _no_gradient_of_bias(launch: Launch, dz: Tensor) -> dict[str, Tensor]:
    """In front of a BatchNorm by the batch's statistics a bias changes nothing."""
    if "dbias" not in launch.makes:
        return {}
    return {"dbias": torch.zeros(launch.geometry.y_shape[1], dtype=torch.float32, device=dz.device)}


def _wgrad(launch: Launch, operands: Operands, donated: frozenset[str], shared: Shared) -> Tensor | tuple[Tensor, ...]:
    if launch.gradient != "bn_backward":
        return reference.run(launch, operands)
    g = launch.geometry
    assert isinstance(g, Geometry)
    made = _no_gradient_of_bias(launch, operands["dz"])
    if "x" in operands:
        dy, x = _output_gradient(launch, operands, donated, shared), _input(launch, operands, shared)
        _, dw = cpu_convolution.gradients(g, dy, x, None)
        assert dw is not None
        made["dw"] = dw
    return _listed(launch, made)


def join(first: Launch, second: Launch) -> Callable[..., Any] | None:
    """A layer's wgrad and the dgrad behind it: oneDNN's two kernels by one call.

    *Measured* on 2 threads of an AMD EPYC with AVX2, PyTorch 2.14.1, 2026-11-25: a step of cifar_resnet20 at a batch of 128
    takes 401 ms joined, 413 ms not (medians of 24 rounds in turn).
    """
    g = first.geometry
    fits = (first.kind, second.kind) == ("wgrad", "dgrad") and first.reads["dz"] == second.reads["dz"]
    if not fits or g != second.geometry or {first.gradient, second.gradient} != {"bn_backward"} or "x" not in first.roles:
        return None
    return _gradients


def _gradients(
    first: Launch, second: Launch, operands: Operands, donated: frozenset[str], shared: Shared
) -> tuple[Tensor, ...]:
    """A wgrad and a dgrad."""
    g = first.geometry
    assert isinstance(g, Geometry)
    dy = _output_gradient(first, operands, donated, shared)
    dx, dw = cpu_convolution.gradients(g, dy, _input(first, operands, shared), operands["w"])
    assert dx is not None and dw is not None
    of_filters = _listed(first, {"dw": dw, **_no_gradient_of_bias(first, dy)})
    of_input = _behind_dgrad(second, operands, shared, dx)
    return (*_several(of_filters), *_several(of_input))


def _several(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (made,) if isinstance(made, Tensor) else made


def _max_pool(launch: Launch, g: PoolGeometry, operands: Operands) -> Tensor | tuple[Tensor, Tensor]:
    if len(launch.outputs) == 1 and launch.prologue == "identity":
        return F.max_pool2d(operands["x"], g.kernel, g.stride, g.padding, g.dilation)
    return reference.pooled(launch, g, _input(launch, operands, {}))


def _max_pool_backward(
    launch: Launch, operands: Operands, donated: frozenset[str], shared: Shared
) -> Tensor | tuple[Tensor, ...]:
    g = launch.geometry
    assert isinstance(g, PoolGeometry)
    dy = _masked(launch, operands["dy"], operands["out"]) if "out" in operands else operands["dy"]
    dx = reference.scattered(g, dy, operands["x"], operands["indices"])
    if launch.activation != "identity" and "out" not in operands:
        z = cpu_norm.normalised(operands["x"], operands, "x_") if "x_mean" in operands else operands["x"]
        dx = _masked(launch, dx, z, dx)
    return _listed(launch, {"dx": dx, **_sums(launch, operands, shared, dx, (("x", "x_", "dot"),))})


#: :func:`run` takes what launches of one plan share.
shares = True
#: Behind a plan's last launch.
finish = cpu_norm.update_running


def prepare(
    launch: Launch, parameters: Mapping[str, Tensor], donated: frozenset[str]
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """:func:`.cpu_inference.prepare`, with a BatchNorm and an activation in front."""
    if launch.prologue == "identity":
        return cpu_inference.prepare(launch, parameters, donated)
    step = cpu_inference.prepare(launch, parameters, donated) if "x_var" in parameters else None
    if step is None:
        return None
    activate, operands = ACTIVATIONS[launch.x_activation].in_place, dict(parameters)
    if launch.dtype != torch.float32:
        return lambda x, shortcut: step(
            activate(cpu_norm.normalised(x, operands, "x_", launch.x_eps), launch.x_slope), shortcut
        )
    entry = cpu_norm.given(operands, "x_", launch.x_eps)

    def behind_norm(x: Tensor, shortcut: Tensor | None) -> Tensor:
        nonlocal entry
        now = entry  # another thread may find another
        if not now.holds():
            entry = now = cpu_norm.given(operands, "x_", launch.x_eps)
        return step(activate(cpu_norm.scaled(x, *now.value), launch.x_slope), shortcut)

    return behind_norm


def run(launch: Launch, operands: Operands, donated: frozenset[str], shared: Shared) -> Tensor | tuple[Tensor, ...]:
    """Run one launch.

    Args:
        launch: of a kind :func:`supports` knows.
        operands: tensors by role.
        donated: roles whose memory may be written over.
        shared: what launches of the same plan left for each other.
    """
    g = launch.geometry
    if launch.kind == "conv":
        assert isinstance(g, Geometry)
        if "x_invstd" not in operands and launch.epilogue not in _PLAIN:
            if g.N == 0:
                return operands["x"].new_empty(g.y_shape, dtype=launch.dtype)
            if launch.prologue != "identity":
                operands = {**operands, "x": _input(launch, operands, shared)}
            return cpu_inference.conv(launch, g, operands, donated)
        return _training_conv(launch, g, operands, shared)
    if launch.kind == "max_pool":
        assert isinstance(g, PoolGeometry)
        if g.N == 0:  # PyTorch's operator refuses it
            empty = operands["x"].new_empty(g.y_shape, dtype=launch.dtype)
            return empty if len(launch.outputs) == 1 else (empty, empty.to(index_dtype(g.kernel)))
        return _max_pool(launch, g, operands)
    if launch.kind == "statistics":
        return cpu_norm.statistics(launch, operands, operands["x"], shared)
    if launch.kind in _ELEMENTWISE:
        return _ELEMENTWISE[launch.kind](launch, operands)
    return _BACKWARD[launch.kind](launch, operands, donated, shared)


_ELEMENTWISE: dict[str, Callable[[Launch, Operands], Tensor]] = {
    "bn_add_relu": _bn_add_relu,
    "gate": _gate,
    "zero_pad": reference.zero_pad,
    "zero_pad_backward": reference.zero_pad_backward,
}
_BACKWARD = {
    "bn_add_relu_backward": _bn_add_relu_backward,
    "gate_backward": _gate_backward,
    "max_pool_backward": _max_pool_backward,
    "dgrad": _dgrad,
    "wgrad": _wgrad,
    "output_gradient": _through_norm,
}
_KINDS = frozenset(("conv", "statistics", "max_pool", *_ELEMENTWISE, *_BACKWARD))
