"""A chain as a differentiable function: forward and backward run the launches of its plans through one executor.

In eager mode it is an :class:`torch.autograd.Function`. Under torch.compile and torch.export the same forward and backward are
the operators ``fused_resnet::chain`` and ``fused_resnet::chain_backward``, opaque to the compiler, with fake kernels for the
shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from . import backends
from .backends.derived import derived, forget
from .backends.workspace import nothing_kept
from .chain import BUFFERS, Chain
from .describe import Reading
from .inputs import Fitting, as_image, autocasts, check
from .launch import accumulation_dtype
from .plan import Plan, backward_plan, droppable, forward_plan, kept_slots, rebuild_plan, remembered_slots, saved_slots

#: Chains whose forward is running: who counts operators leaves out those by which an executor runs launches.
running: list[Chain] = []


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _images_channels_last(slots: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a backward reads back: x was kept as it came, and hooks on saved tensors may copy into another layout."""
    return {
        slot: _channels_last(tensor) if tensor.dim() == 4 and not slot.endswith(".w") else tensor
        for slot, tensor in slots.items()
    }


def _unseen(tensor: Tensor) -> bool:
    """Whether writes through ``.data``, which some optimizers use, are not seen: see :mod:`.backends.derived`."""
    return tensor.is_cuda


def _turned(slots: dict[str, Tensor], needs: frozenset[str]) -> dict[str, Tensor]:
    """Filters that are trained on a GPU and are not channels_last, copied for one step: for its forward and its backward."""
    made = {}
    for slot, tensor in slots.items():
        if not slot.endswith(".w") or slot not in needs or not _unseen(tensor):
            continue
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            forget(tensor)
            made[slot] = _channels_last(tensor.detach())
    return made


def _needs(chain: Chain, flags: Sequence[bool]) -> frozenset[str]:
    return frozenset(slot for slot, flag in zip(("x", *chain.operand_slots), flags, strict=True) if flag)


def _size(chain: Chain, x: Tensor, operands: Sequence[Tensor]) -> tuple[Any, ...]:
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
    plan, names, keep = _planned(chain, _size(chain, x, operands), x.dtype, needs, donate, drop)
    slots = dict(zip(names, (x, *operands), strict=True))
    for slot in names[: len(chain.inputs)]:
        slots[slot] = _channels_last(slots[slot])
    results = backends.execute(plan, slots, backend)
    return [results["out"], *[results[slot] for slot in keep]]


@lru_cache(maxsize=4096)
def _planned(
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
        size: as :func:`_size`.
        saved: the tensors of :func:`fused_resnet.plan.saved_slots`.
    """
    n, h, w, *skip = size
    plan = backward_plan(chain, n, h, w, dout.dtype, needs, tuple(skip) or None)
    slots = _images_channels_last({**dict(zip(saved_slots(chain, needs), saved, strict=True)), "dout": dout})
    results = backends.execute(plan, slots, backend)
    gradients: list[Tensor] = []
    taken = {tensor.data_ptr() for tensor in slots.values()}
    for slot in plan.results:
        gradient = results[slot] if results[slot].dim() != 4 else _channels_last(results[slot])
        if gradient.data_ptr() in taken:  # such as dbeta of a block and of its projection: each owner gets its own memory
            gradient = gradient.clone()
        taken.add(gradient.data_ptr())
        gradients.append(gradient)
    return gradients


def _remember(
    ctx: Any, chain: Chain, needs: frozenset[str], x: Tensor, operands: Sequence[Tensor], outputs: Sequence[Tensor]
) -> None:
    """Save what the backward reads. PyTorch checks that none of it is written in between."""
    slots = {"x": x, **dict(zip(chain.operand_slots, operands, strict=True)), "out": outputs[0]}
    slots.update(zip(kept_slots(chain, needs), outputs[1:], strict=False))  # the operator hands on running statistics as well
    ctx.save_for_backward(*(slots[slot] for slot in saved_slots(chain, needs)))
    ctx.chain, ctx.needs = chain, needs
    ctx.size = _size(chain, x, operands)


def _spread(chain: Chain, needs: frozenset[str], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients for all inputs of the chain, ``None`` where none is needed."""
    given = iter(gradients)
    return [next(given) if slot in needs else None for slot in ("x", *chain.operand_slots)]


def _said(tensor: Tensor) -> tuple[int, ...] | None:
    """Strides that a gradient is to have as well: those of a contiguous image or filter, else None (channels_last)."""
    return tensor.stride() if tensor.dim() == 4 and tensor.is_contiguous() else None


def _as_said(gradient: Tensor | None, strides: tuple[int, ...] | None) -> Tensor | None:
    """A gradient laid out as its tensor, as eager's is: ``gradient.view(-1)`` is commonly called on those of contiguous models.

    A leaf's would be copied by PyTorch otherwise, when it becomes ``.grad``. 1x1 filters have one layout in memory and two ways
    to say so: DistributedDataParallel warns where they differ.
    """
    if gradient is None or strides is None:
        return gradient
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
        given = _images_channels_last({**slots, **ctx.turned})
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
        needs = _needs(chain, flags)
        ctx.turned = _turned(dict(zip(chain.operand_slots, operands, strict=True)), needs)
        given = [ctx.turned.get(slot, tensor) for slot, tensor in zip(chain.operand_slots, operands, strict=True)]
        outputs = forward(chain, backend, x, given, needs, drop=drop)
        ctx.source, ctx.made, ctx.drop, ctx.version = _dropped(x), None, drop, outputs[0]._version
        slots = {"x": x, **dict(zip(chain.operand_slots, operands, strict=True)), "out": outputs[0]}
        slots.update(zip(kept_slots(chain, needs, drop), outputs[1:], strict=True))
        ctx.remembered = tuple(slot for slot in remembered_slots(chain, needs, drop) if slot != "x" or ctx.source is None)
        ctx.save_for_backward(*(slots[slot] for slot in ctx.remembered))
        ctx.chain, ctx.needs, ctx.backend = chain, needs, backend
        ctx.size, ctx.dtype = _size(chain, x, operands), x.dtype
        ctx.strides = [_said(tensor) for tensor in (x, *operands)]
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
            spread = list(map(_as_said, _spread(ctx.chain, ctx.needs, gradients), ctx.strides))
        if torch.is_grad_enabled():  # create_graph
            spread = _once(spread, [tensor for tensor in (dout, *saved) if tensor.requires_grad])
        return None, None, None, None, *spread


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


def _once(spread: list[Tensor | None], sources: list[Tensor]) -> list[Tensor | None]:
    """Gradients of which a gradient is an error.

    PyTorch's own ``once_differentiable`` asks whether ``dout`` requires a gradient. Behind the last chain of a critic it does
    not, though the filters do: a penalty of the gradient then adds nothing, and nobody is told. And the error does not hang on
    the inputs there, so that ``torch.autograd.grad`` does not come past it.
    """
    gradients = [gradient for gradient in spread if gradient is not None]
    if not sources:  # frozen filters, none of what is kept requires a gradient, but some input does
        sources = [torch.empty(0, requires_grad=True)]
    given = iter(_Once.apply(len(gradients), *gradients, *sources))
    return [None if gradient is None else next(given) for gradient in spread]


def _empty(shape: Sequence[Any], dtype: torch.dtype, like: Tensor) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


@torch.library.custom_op("fused_resnet::chain", mutates_args=())
def _chain_op(x: Tensor, operands: Sequence[Tensor], chain: str, backend: str, flags: Sequence[bool]) -> list[Tensor]:
    """``out``, what the backward reads of what was made, and the running statistics as they are afterwards.

    The compiler wants functions: this one updates copies, and the caller writes them back (:func:`chain`).
    """
    spec = Chain.parse(chain)
    updated = set(spec.buffer_slots)
    named = list(zip(spec.operand_slots, operands, strict=True))
    given = [tensor.clone() if slot in updated else tensor for slot, tensor in named]
    with nothing_kept():
        outputs = forward(spec, backends.resolve(backend or None, x.device), x, given, _needs(spec, flags))
    return [*outputs, *(tensor for (slot, _), tensor in zip(named, given, strict=True) if slot in updated)]


@_chain_op.register_fake
def _(x: Tensor, operands: Sequence[Tensor], chain: str, backend: str, flags: Sequence[bool]) -> list[Tensor]:
    spec = Chain.parse(chain)
    made = spec.made(x.shape[0], x.shape[2], x.shape[3], x.dtype)
    needs = _needs(spec, flags)
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
        return backward(spec, name, _needs(spec, flags), size, dout, saved)


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
    _remember(ctx, spec, _needs(spec, flags), x, operands, output)
    if not backend and type(x) in (Tensor, torch.nn.Parameter):  # running, not traced: as the forward, whatever is set by then
        backend = backends.choose(None, x.device)
    ctx.backend, ctx.flags = backend, flags


def _op_backward(ctx: Any, gradients: list[Tensor]) -> Any:
    result = torch.ops.fused_resnet.chain_backward(
        gradients[0], list(ctx.saved_tensors), ctx.size, ctx.chain.token, ctx.backend, ctx.flags
    )
    x, *operands = _spread(ctx.chain, ctx.needs, result)
    return x, operands, None, None, None


_chain_op.register_autograd(_op_backward, setup_context=_setup_context)


def traced(x: Tensor, operands: Sequence[Tensor], spec: Chain, backend: str | None = None) -> Tensor:
    """As :func:`chain`, as an operator of PyTorch: what compilers trace. The backend is decided when it runs.

    ``operands``: by :attr:`.Chain.operand_slots`. Sequences and rows run as in :func:`read_chain`.
    """
    dimensions = x.dim()
    if dimensions != 4:
        x, named = as_image(x), zip(spec.operand_slots, operands, strict=True)
        operands = [as_image(tensor) if slot == "skip" or slot.endswith(".w") else tensor for slot, tensor in named]
    wanted = list(_flags(spec, x, operands)) if torch.is_grad_enabled() else [False] * (1 + len(operands))
    outputs = torch.ops.fused_resnet.chain(x, list(operands), spec.token, backend or "", wanted)
    _write_back(spec, operands, outputs)
    return _as_it_came(outputs[0], dimensions)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """An input as autocast has it: fp64 and integers stay."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _autocast(chain: Chain, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Under autocast: x, filters and biases in its dtype; BatchNorm's vectors stay as they are (as in eager PyTorch)."""
    dtype = torch.get_autocast_dtype(x.device.type)
    cast = []
    for slot, tensor in zip(chain.parameter_slots, parameters, strict=True):
        if not slot.endswith((".w", ".bias")) or tensor.dtype in (dtype, torch.float64):
            cast.append(tensor)
        elif torch.compiler.is_compiling() or (tensor.requires_grad and torch.is_grad_enabled()):
            cast.append(tensor.to(dtype))
        else:
            cast.append(derived(dtype, [tensor], partial(tensor.detach().to, dtype)))
    return _cast(x, dtype), cast


def _flags(spec: Chain, x: Tensor, operands: Sequence[Tensor]) -> tuple[bool, ...]:
    """Which of x and the operands get gradients; running statistics never do, as in PyTorch."""
    roles = [*spec.inputs[1:], *(role for layer in spec.weight_layers for role in layer.parameter_roles)]
    wanted = [tensor.requires_grad and role not in BUFFERS for role, tensor in zip(roles, operands, strict=True)]
    return (x.requires_grad, *wanted)


def _write_back(spec: Chain, operands: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Running statistics, the last of the operator's outputs, into their buffers."""
    buffers = spec.buffer_slots
    if not buffers:
        return
    slots = dict(zip(spec.operand_slots, operands, strict=True))
    with torch.no_grad():
        for slot, value in zip(buffers, outputs[-len(buffers) :], strict=True):
            slots[slot].copy_(value)


def _filters_as_images(w: Tensor) -> Tensor:
    """Where no gradient goes through it the same view at every call, so that what is derived from it is found again."""
    if torch.compiler.is_compiling() or (w.requires_grad and torch.is_grad_enabled()):
        return as_image(w)
    return derived("as an image", [w], lambda: as_image(w.detach()))


def _as_images(reading: Reading) -> list[Tensor]:
    """The parameters of a chain, filters as images."""
    if reading.dimensions == 4:
        return reading.parameters
    slots = zip(cast(Chain, reading.chain).parameter_slots, reading.parameters, strict=True)
    return [_filters_as_images(tensor) if slot.endswith(".w") else tensor for slot, tensor in slots]


def _as_it_came(out: Tensor, dimensions: int) -> Tensor:
    """What a chain made of :func:`as_image`, with as many dimensions as its input had."""
    return out if dimensions == 4 else out.flatten(1) if dimensions == 2 else out.squeeze(2)


#: For how many kinds of inputs a chain is kept prepared.
READY = 8


def kind_of(x: Tensor, backend: str | None, skip: Tensor | None, donate: bool) -> Any:
    """What a chain is prepared for, of a call without gradients; None where nothing is: see :func:`again`."""
    if not isinstance(x, Tensor) or x.is_meta or torch.is_autocast_enabled(x.device.type) or backends.observed():
        return None
    name = backends.choose(backend, x.device)
    if not backends.prepares(name):
        return None
    return x.shape, x.dtype, x.device, donate, name, None if skip is None else (skip.shape, skip.dtype, skip.device)


def again(reading: Reading, kind: Any, x: Tensor, skip: Tensor | None) -> Tensor | None:
    """The result of a chain for inputs of a kind that it is prepared for, with nothing checked again; else None."""
    ready = reading.ready.get(kind)
    if ready is None:
        return None
    running.append(cast(Chain, reading.chain))
    try:
        given = (x,) if skip is None else (x, skip)
        return _as_it_came(ready.run(*[_channels_last(as_image(tensor)) for tensor in given]), x.dim())
    finally:
        running.pop()


def prepare(reading: Reading, kind: Any, x: Tensor, skip: Tensor | None) -> None:
    """:func:`read_chain` has run for inputs of that kind. The second time the plan is prepared for it."""
    spec = reading.chain
    if spec is None or kind in reading.ready or x.dim() != reading.dimensions:
        return
    if max(len(reading.met), len(reading.ready)) >= READY:
        reading.met.clear()
        reading.ready.clear()
    if kind not in reading.met:
        reading.met.add(kind)
        return
    _, dtype, _, donate, name, _ = kind
    parameters = _as_images(reading)
    operands = parameters if skip is None else (as_image(skip), *parameters)
    plan, _, _ = _planned(spec, _size(spec, as_image(x), operands), dtype, frozenset(), donate, False)
    tensors = dict(zip(spec.parameter_slots, parameters, strict=True))
    reading.ready[kind] = backends.Ready.of(plan, name, spec.inputs, tensors)


def read_chain(
    x: Tensor,
    reading: Reading,
    backend: str | None = None,
    *,
    skip: Tensor | None = None,
    donate: bool = False,
    drop: bool = False,
) -> Tensor:
    """:func:`chain` of what was read off modules: sequences [N, C, L] and rows [N, C] run as images of one row or one pixel.

    Their gradients, and those of their filters, have the shapes the modules have them in. Sequences come out as [N, K, L] with
    neighbouring channels next to each other in memory.
    """
    assert reading.chain is not None
    if reading.dimensions == 4:
        fitting = None if torch.compiler.is_compiling() else reading.fitting
        return _chain(x, reading.parameters, reading.chain, backend, skip, donate, drop, fitting)
    parameters = _as_images(reading)
    second = None if skip is None else as_image(skip)
    out = chain(as_image(x), parameters, reading.chain, backend, skip=second, donate=donate)
    return _as_it_came(out, reading.dimensions)


def chain(
    x: Tensor,
    parameters: Sequence[Tensor],
    spec: Chain,
    backend: str | None = None,
    *,
    skip: Tensor | None = None,
    donate: bool = False,
    drop: bool = False,
) -> Tensor:
    """``pool(act(norm(conv(... x ...)) + shortcut(x)))`` in as few launches as its plan has.

    Running statistics that the chain tracks are updated in place.

    Args:
        x: [N, C, H, W], fp32, fp16, bf16 or fp64; any memory format, channels_last saves a copy.
        parameters: filters [K, C / groups, R, S] and per-filter vectors [K], in the order of ``spec.parameter_slots``.
            Filters and biases in x's dtype, BatchNorm's vectors in x's dtype or fp32.
        spec: what to compute.
        backend: see :func:`fused_resnet.backend`.
        skip: what the shortcut starts from, where ``spec.skip`` says that it is not x; of x's dtype, of the shape of what it is
            added to, or of the projection's input.
        donate: the caller gives ``x`` up; without gradients its memory may then hold the result.
        drop: do not keep the result for the backward, which makes it again, where that takes no convolution that is not
            computed again anyway. The caller hands it to one chain, and changes nothing in it. (Not under ``torch.compile``.)

    Returns:
        [N, K, P, Q] in x's dtype (autocast's where it is on), channels_last. Differentiable once.

    Raises:
        TypeError, ValueError, RuntimeError: as PyTorch does for the same input.
        RuntimeError: the backend cannot run here.
    """
    return _chain(x, parameters, spec, backend, skip, donate, drop, None)


def _chain(
    x: Tensor,
    parameters: Sequence[Tensor],
    spec: Chain,
    backend: str | None,
    skip: Tensor | None,
    donate: bool,
    drop: bool,
    fitting: Fitting | None,
) -> Tensor:
    """:func:`chain`; ``fitting``: see :func:`.inputs.check`."""
    # PyTorch's convolutions take one image without a batch, its BatchNorm does not.
    if isinstance(x, Tensor) and x.dim() == 3 and not any(layer.norm for layer in spec.weight_layers):
        return chain(x.unsqueeze(0), parameters, spec, backend).squeeze(0)
    if isinstance(x, Tensor) and autocasts(x):
        x, parameters = _autocast(spec, x, parameters)
        skip = None if skip is None else _cast(skip, x.dtype)
        fitting = None
    check(spec, x, parameters, skip, fitting)
    operands = parameters if skip is None else (skip, *parameters)
    if torch.compiler.is_compiling():
        return traced(x, operands, spec, backend)
    name = backends.resolve(backend, x.device)
    running.append(spec)
    try:
        if torch.is_grad_enabled():
            flags = _flags(spec, x, operands)
            if any(flags):
                return ChainFunction.apply(spec, name, flags, drop and droppable(spec), x, *operands)
        return forward(spec, name, x, operands, frozenset(), donate)[0]
    finally:
        running.pop()
