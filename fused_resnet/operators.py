"""A chain as operators of PyTorch, which torch.compile and torch.export trace: ``fused_resnet::chain``, ``::chain_backward``.

Opaque to the compiler, with fake kernels for the shapes; forward and backward are those of :mod:`.chain_function`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends.workspace import nothing_kept
from .chain import Chain
from .chain_function import as_said, backward, channels_last, flags_of, forward, needs_of, said, size_of, spread
from .inputs import as_image, as_it_came
from .launch import accumulation_dtype
from .plan import kept_slots, saved_slots


def _empty(shape: Sequence[Any], dtype: torch.dtype, like: Tensor) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


@torch.library.custom_op("fused_resnet::chain", mutates_args=())
def _chain_op(x: Tensor, operands: Sequence[Tensor], chain: str, backend: str, flags: Sequence[bool]) -> list[Tensor]:
    """``out``, what the backward reads of what was made, and the running statistics as they are afterwards.

    The compiler wants functions: this one updates copies, and the caller writes them back (:func:`traced`).
    """
    spec = Chain.parse(chain)
    updated = set(spec.buffer_slots)
    named = list(zip(spec.operand_slots, operands, strict=True))
    given = [tensor.clone() if slot in updated else tensor for slot, tensor in named]
    with nothing_kept():
        outputs = forward(spec, backends.resolve(backend or None, x.device), x, given, needs_of(spec, tuple(flags)))
    return [*outputs, *(tensor for (slot, _), tensor in zip(named, given, strict=True) if slot in updated)]


@_chain_op.register_fake
def _(x: Tensor, operands: Sequence[Tensor], chain: str, backend: str, flags: Sequence[bool]) -> list[Tensor]:
    spec = Chain.parse(chain)
    made = spec.made(x.shape[0], x.shape[2], x.shape[3], x.dtype)
    needs = needs_of(spec, tuple(flags))
    slots = ("out", *(kept_slots(spec, needs) if needs else ()))
    buffers = dict(zip(spec.operand_slots, operands, strict=True))
    return [*(_empty(*made[slot], x) for slot in slots), *(torch.empty_like(buffers[slot]) for slot in spec.buffer_slots)]


@torch.library.custom_op("fused_resnet::chain_backward", mutates_args=())
def _chain_backward_op(
    dout: Tensor, saved: Sequence[Tensor], size: Sequence[int], chain: str, backend: str, flags: Sequence[bool]
) -> list[Tensor]:
    spec = Chain.parse(chain)
    name = backends.resolve(backend or backends.context_of_backward(), dout.device)
    with nothing_kept():
        gradients = backward(spec, name, needs_of(spec, tuple(flags)), size, dout, saved)
    return [_as_promised(gradient) for gradient in gradients]


def _as_promised(gradient: Tensor) -> Tensor:
    """Laid out as the fake kernel says. 1x1 filters have one layout in memory and two ways to say so."""
    if gradient.dim() != 4:
        return gradient
    _, c, h, w = gradient.shape
    return channels_last(gradient).as_strided(gradient.shape, (c * h * w, 1, c * w, c))


@_chain_backward_op.register_fake
def _(
    dout: Tensor, saved: Sequence[Tensor], size: Sequence[int], chain: str, backend: str, flags: Sequence[bool]
) -> list[Tensor]:
    spec = Chain.parse(chain)
    n, h, w, *skip = size
    gradients = [_empty((n, spec.layers[0].channels, h, w), dout.dtype, dout)] if flags[0] else []
    if spec.skip and flags[1]:
        channels = dout.shape[1] if spec.projection is None else spec.projection.channels
        gradients.append(_empty((n, channels, *skip), dout.dtype, dout))
    roles = [(layer, role) for layer in spec.weight_layers for role in layer.parameter_roles]
    for (layer, role), flag in zip(roles, flags[len(spec.inputs) :], strict=True):
        if flag and role == "w":
            gradients.append(_empty((layer.filters, layer.channels // layer.groups, *layer.kernel), dout.dtype, dout))
        elif flag:
            gradients.append(dout.new_empty((layer.filters,), dtype=accumulation_dtype(dout.dtype)))
    return gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, operands, chain, backend, flags = inputs
    spec = Chain.parse(chain)
    needs = needs_of(spec, tuple(flags))
    slots = {"x": x, **dict(zip(spec.operand_slots, operands, strict=True)), "out": output[0]}
    slots.update(zip(kept_slots(spec, needs), output[1:], strict=False))  # behind them come running statistics
    ctx.save_for_backward(*(slots[slot] for slot in saved_slots(spec, needs)))
    ctx.chain, ctx.needs, ctx.size = spec, needs, size_of(spec, x, operands)
    if not backend and type(x) in (Tensor, torch.nn.Parameter):  # running, not traced: as the forward, whatever is set by then
        backend = backends.choose(None, x.device)
    ctx.backend, ctx.flags = backend, flags
    ctx.strides = [
        said(tensor) if slot.endswith(".w") else None for slot, tensor in zip(spec.operand_slots, operands, strict=True)
    ]


def _op_backward(ctx: Any, gradients: list[Tensor]) -> Any:
    result = torch.ops.fused_resnet.chain_backward(
        gradients[0], list(ctx.saved_tensors), ctx.size, ctx.chain.token, ctx.backend, ctx.flags
    )
    x, *operands = spread(ctx.chain, ctx.needs, result)
    return x, list(map(as_said, operands, ctx.strides)), None, None, None


_chain_op.register_autograd(_op_backward, setup_context=_setup_context)


def traced(x: Tensor, operands: Sequence[Tensor], spec: Chain, backend: str | None = None) -> Tensor:
    """As :func:`.functional.chain`, as an operator of PyTorch: what compilers trace. The backend is decided when it runs.

    ``operands``: by :attr:`.Chain.operand_slots`. Sequences and rows run as in :func:`.functional.read_chain`.
    """
    dimensions = x.dim()
    if dimensions != 4:
        x, named = as_image(x), zip(spec.operand_slots, operands, strict=True)
        operands = [as_image(tensor) if slot == "skip" or slot.endswith(".w") else tensor for slot, tensor in named]
    wanted = list(flags_of(spec, x, operands)) if torch.is_grad_enabled() else [False] * (1 + len(operands))
    outputs = torch.ops.fused_resnet.chain(x, list(operands), spec.token, backend or "", wanted)
    _write_back(spec, operands, outputs)
    return as_it_came(outputs[0], dimensions)


def _write_back(spec: Chain, operands: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Running statistics, the last of the operator's outputs, into their buffers.

    Unseen by autograd, as eager's BatchNorm does: the same BatchNorm called by itself keeps them for its backward.
    """
    buffers = spec.buffer_slots
    if not buffers:
        return
    slots = dict(zip(spec.operand_slots, operands, strict=True))
    with torch.no_grad():
        for slot, value in zip(buffers, outputs[-len(buffers) :], strict=True):
            slots[slot].data.copy_(value)
