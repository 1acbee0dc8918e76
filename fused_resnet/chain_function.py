"""A chain as a differentiable function: forward and backward run the launches of its plans through one executor.

:class:`ChainFunction` is what autograd sees in eager mode. :mod:`.operators` has the same for compilers; modules call
:mod:`.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import backends
from .backends.derived import forget
from .chain import BUFFERS, Chain
from .plan import Plan, backward_plan, forward_plan, kept_slots, rebuild_plan, remembered_slots, saved_slots


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _images_channels_last(slots: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a backward reads back: x was kept as it came, and hooks on saved tensors may copy into another layout."""
    for slot, tensor in slots.items():
        if tensor.dim() == 4 and not slot.endswith(".w"):
            slots[slot] = channels_last(tensor)
    return slots


def _unseen(tensor: Tensor) -> bool:
    """Whether writes through ``.data``, which some optimizers use, are not seen: see :mod:`.backends.derived`."""
    return tensor.is_cuda


def _turned(slots: dict[str, Tensor], needs: frozenset[str]) -> dict[str, Tensor]:
    """Filters that are trained on a GPU and are not channels_last, copied for one step: for its forward and its backward."""
    made: dict[str, Tensor] = {}
    if not any(map(_unseen, slots.values())):
        return made
    for slot, tensor in slots.items():
        if not slot.endswith(".w") or slot not in needs or not _unseen(tensor):
            continue
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            forget(tensor)
            made[slot] = channels_last(tensor.detach())
    return made


@lru_cache(maxsize=4096)
def needs_of(chain: Chain, flags: tuple[bool, ...]) -> frozenset[str]:
    """Slots of what gets gradients."""
    return frozenset(slot for slot, flag in zip(("x", *chain.operand_slots), flags, strict=True) if flag)


def _trained(spec: Chain) -> tuple[bool, ...]:
    """Which operands may get gradients; running statistics never do, as in PyTorch."""
    roles = [*spec.inputs[1:], *[role for layer in spec.weight_layers for role in layer.parameter_roles]]
    return tuple([role not in BUFFERS for role in roles])


_cached_trained = lru_cache(maxsize=4096)(_trained)  # torch.compile traces past caches, and warns of them


def flags_of(spec: Chain, x: Tensor, operands: Sequence[Tensor]) -> tuple[bool, ...]:
    """Which of x and the operands get gradients."""
    trained = (_trained if torch.compiler.is_compiling() else _cached_trained)(spec)
    return (x.requires_grad, *[flag and tensor.requires_grad for tensor, flag in zip(operands, trained, strict=True)])


@lru_cache(maxsize=4096)
def _laid_out(spec: Chain) -> tuple[int, ...]:
    """Where images and filters are among x and the operands: what has a layout."""
    slots = ("x", *spec.operand_slots)
    return tuple(place for place, slot in enumerate(slots) if slot in spec.inputs or slot.endswith(".w"))


def size_of(chain: Chain, x: Tensor, operands: Sequence[Tensor]) -> tuple[Any, ...]:
    """``(n, h, w)`` of a chain's input; behind them rows and columns of its second input, if it has one."""
    return (x.shape[0], *x.shape[2:], *(operands[0].shape[2:] if chain.skip else ()))


def forward(
    chain: Chain,
    backend: str,
    x: Tensor,
    operands: Sequence[Tensor],
    needs: frozenset[str],
    donate: bool = False,
    drop: bool = False,
) -> list[Tensor]:
    """Run a chain's forward: ``out``, then what else the backward for ``needs`` reads of the activations made.

    ``operands``: by :attr:`.Chain.operand_slots`.
    ``donate``: nobody reads ``x`` afterwards, its memory may hold the result. ``drop``: the backward makes ``out`` again.
    """
    plan, names, keep = planned(chain, size_of(chain, x, operands), x.dtype, needs, donate, drop)
    slots = dict(zip(names, (x, *operands), strict=True))
    for slot in names[: len(chain.inputs)]:
        slots[slot] = channels_last(slots[slot])
    results = backends.execute(plan, slots, backend)
    return [results["out"], *[results[slot] for slot in keep]]


@lru_cache(maxsize=4096)
def planned(
    chain: Chain, size: tuple[int, ...], dtype: torch.dtype, needs: frozenset[str], donate: bool, drop: bool
) -> tuple[Plan, tuple[str, ...], tuple[str, ...]]:
    """The plan of a forward, the names of what it is given, and of what it keeps."""
    n, h, w, *skip = size
    keep = kept_slots(chain, needs, drop) if needs else ()
    plan = forward_plan(chain, n, h, w, dtype, keep, ("x",) if donate else (), tuple(skip) or None)
    return plan, ("x", *chain.operand_slots), keep


def backward(
    chain: Chain, backend: str, needs: frozenset[str], size: Sequence[int], dout: Tensor, saved: Sequence[Tensor]
) -> list[Tensor]:
    """Run a chain's backward: the gradients of the slots in ``needs``, in the order of the chain's inputs.

    Args:
        size: as :func:`size_of`.
        saved: the tensors of :func:`fused_resnet.plan.saved_slots`.

    Returns:
        those of images are channels_last, those of filters as the backend laid them out.
    """
    n, h, w, *skip = size
    plan = backward_plan(chain, n, h, w, dout.dtype, needs, tuple(skip) or None)
    slots = _images_channels_last(dict(zip((*saved_slots(chain, needs), "dout"), (*saved, dout), strict=True)))
    results = backends.execute(plan, slots, backend)
    gradients: list[Tensor] = []
    taken = {tensor.data_ptr() for tensor in slots.values()}
    for slot in plan.results:
        gradient = results[slot]
        if gradient.dim() == 4 and not slot.endswith(".w"):
            gradient = channels_last(gradient)
        if gradient.data_ptr() in taken:  # such as dbeta of a block and of its projection: each owner gets its own memory
            gradient = gradient.clone()
        taken.add(gradient.data_ptr())
        gradients.append(gradient)
    return gradients


def spread(chain: Chain, needs: frozenset[str], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients for all inputs of the chain, ``None`` where none is needed."""
    given = iter(gradients)
    return [next(given) if slot in needs else None for slot in ("x", *chain.operand_slots)]


def _no_view(tensor: Tensor) -> Tensor:
    """The tensor, in the same memory, as nobody's view: autograd lets nobody write into a view that a function has made."""
    if not tensor._is_view():
        return tensor
    return tensor.new_empty(0).set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def said(tensor: Tensor) -> tuple[int, ...] | None:
    """Strides that a gradient is to have as well: those of a contiguous image or filter, else None (channels_last)."""
    return tensor.stride() if tensor.dim() == 4 and tensor.is_contiguous() else None


def as_said(gradient: Tensor | None, strides: tuple[int, ...] | None) -> Tensor | None:
    """A gradient laid out as its tensor, as eager's is: ``gradient.view(-1)`` is commonly called on those of contiguous models.

    A leaf's would be copied by PyTorch otherwise, when it becomes ``.grad``. 1x1 filters have one layout in memory and two ways
    to say so: DistributedDataParallel warns where they differ.
    """
    if gradient is None:
        return None
    if strides is None:
        return channels_last(gradient) if gradient.dim() == 4 else gradient
    return gradient.contiguous().as_strided(gradient.shape, strides)


def _dropped(x: Tensor) -> Any:
    """The node whose output ``x`` is, if that node does not keep it but can make it again; else None."""
    node: Any = x.grad_fn
    if node is None or not getattr(node, "drop", False) or node.version != x._version:
        return None
    return node


def _slots_of(ctx: Any) -> dict[str, Tensor]:
    """All that the backward of a node reads, by slot; an output that was dropped is made again, once."""
    made: dict[str, Tensor] | None = ctx.made
    if made is not None and ctx.versions == [tensor._version for tensor in made.values()]:
        return made
    # Something was written in between: unpacking, PyTorch raises its error.
    slots = dict(zip(ctx.remembered, ctx.saved_tensors, strict=True))
    if ctx.source is not None:
        slots["x"] = _slots_of(ctx.source)["out"]
    if ctx.drop:
        given = _images_channels_last({**slots, **ctx.turned})  # (a copy)
        n, h, w, *skip = ctx.size
        plan = rebuild_plan(ctx.chain, n, h, w, ctx.dtype, tuple(skip) or None)
        slots.update(backends.execute(plan, given, ctx.backend))
        # The next block's backward comes first, and asks; the saved tensors are not unpacked twice, so PyTorch does not look at
        # their versions again when the block's own backward comes, which may be in a later call.
        ctx.made, ctx.versions = slots, [tensor._version for tensor in slots.values()]
    return slots


class ChainFunction(torch.autograd.Function):
    """``(chain, backend, flags, drop, x, *operands) -> out``, the operands by :attr:`.Chain.operand_slots`.

    ``flags`` says which of x and the operands need gradients; with ``drop`` the output is not kept for the backward, which
    makes it again, nor by the next chain that reads it.
    """

    @staticmethod
    def forward(
        ctx: Any, chain: Chain, backend: str, flags: tuple[bool, ...], drop: bool, x: Tensor, *operands: Tensor
    ) -> Tensor:
        needs = needs_of(chain, flags)
        slots = dict(zip(chain.operand_slots, operands, strict=True))
        ctx.turned = _turned(slots, needs)
        given = [*{**slots, **ctx.turned}.values()] if ctx.turned else operands
        outputs = forward(chain, backend, x, given, needs, drop=drop)
        outputs[0] = _no_view(outputs[0])
        ctx.source, ctx.made, ctx.drop, ctx.version = _dropped(x), None, drop, outputs[0]._version
        slots.update(zip(("x", "out", *kept_slots(chain, needs, drop)), (x, *outputs), strict=True))
        ctx.remembered = remembered_slots(chain, needs, drop)
        if ctx.source is not None:
            ctx.remembered = tuple(slot for slot in ctx.remembered if slot != "x")
        ctx.save_for_backward(*[slots[slot] for slot in ctx.remembered])
        ctx.chain, ctx.needs, ctx.backend = chain, needs, backend
        ctx.size, ctx.dtype = size_of(chain, x, operands), x.dtype
        tensors = (x, *operands)
        ctx.strides = [(place, said(tensors[place])) for place in _laid_out(chain)]
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if torch._C._functorch.is_legacy_batchedtensor(dout) or torch._C._functorch.is_batchedtensor(dout):
            raise RuntimeError(
                "the gradient of a fused chain's output must be one tensor, got a batch of them (is_grads_batched=True, "
                "jacobian(..., vectorize=True)): ask for one after the other, or unfuse(model)"
            )
        with torch.no_grad():
            # What was made again with the output is there: it is not made a second time.
            spec = replace(ctx.chain, memory="default") if ctx.drop else ctx.chain
            slots = {**_slots_of(ctx), **ctx.turned}
            saved = [slots[slot] for slot in saved_slots(spec, ctx.needs)]
            del slots
            ctx.made = None
            gradients = backward(spec, ctx.backend, ctx.needs, ctx.size, dout, saved)
            given = spread(ctx.chain, ctx.needs, gradients)
            for place, strides in ctx.strides:
                given[place] = as_said(given[place], strides)
        if torch.is_grad_enabled():  # create_graph
            given = _once(given, [tensor for tensor in (dout, *saved) if tensor.requires_grad])
        return None, None, None, None, *given


class _Once(torch.autograd.Function):
    """``(count, *gradients, *sources) -> gradients``, which depend on the sources in a way that nobody has differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.detach() for gradient in tensors[:count])  # a view could not be written to in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise RuntimeError(
            "trying to differentiate twice a fused chain, which is differentiable once (once_differentiable): "
            "unfuse(model) for gradients of gradients"
        )


def _once(gradients: list[Tensor | None], sources: list[Tensor]) -> list[Tensor | None]:
    """Gradients of which a gradient is an error.

    PyTorch's own ``once_differentiable`` asks whether ``dout`` requires a gradient. Behind the last chain of a critic it does
    not, though the filters do: a penalty of the gradient then adds nothing, and nobody is told. And the error does not hang on
    the inputs there, so that ``torch.autograd.grad`` does not come past it.
    """
    there = [gradient for gradient in gradients if gradient is not None]
    if not sources:  # frozen filters, none of what is kept requires a gradient, but some input does
        sources = [torch.empty(0, requires_grad=True)]
    given = iter(_Once.apply(len(there), *there, *sources))
    return [None if gradient is None else next(given) for gradient in gradients]
