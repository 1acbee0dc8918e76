"""What modules call: a chain of given tensors, or of what was read off modules, in eager mode or traced by a compiler.

In eager mode with gradients it is :class:`.chain_function.ChainFunction`, without them its forward alone, prepared for inputs
that come again (:func:`kind_of`, :func:`again`, :func:`prepare`). Under torch.compile and torch.export it is :mod:`.operators`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from . import backends
from .backends.derived import derived
from .chain import Chain
from .chain_function import ChainFunction, flags_of, forward, planned, size_of
from .describe import Reading
from .inputs import Fitting, as_image, as_it_came, autocasts, check
from .operators import traced
from .plan import droppable

#: Chains whose forward is running: who counts operators leaves out those by which an executor runs launches.
running: list[Chain] = []


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


#: For how many kinds of inputs a chain is kept prepared.
READY = 8


def kind_of(x: Any, skip: Tensor | None, donate: bool) -> Any:
    """What a chain is prepared for where it may be (:meth:`.fused.Fused.prepares`), of a call without gradients; None where
    nothing is.

    Asked in front of each chain of a small network, whose layers take 50 us. A device or its name would be a new object: 5 us
    where nothing of it is in the caches.
    """
    if type(x) is not Tensor or not x.is_cpu:
        return None
    if skip is None:
        return x.shape, x.dtype, donate
    return (x.shape, x.dtype, donate, skip.shape, skip.dtype) if type(skip) is Tensor and skip.is_cpu else None


def again(reading: Reading, kind: Any, x: Tensor, skip: Tensor | None) -> Tensor | None:
    """The result of a chain for inputs of a kind that it is prepared for, with nothing checked again but where and what its
    parameters are; else None.
    """
    ready: backends.Ready | None = reading.ready.get(kind)
    if ready is None:
        return None
    assert reading.chain is not None
    running.append(reading.chain)
    try:
        dimensions = x.dim()
        if dimensions == 4 or (ready.rows and dimensions == 2):
            return ready.run(x) if skip is None else ready.run(x, skip)
        out = ready.run(as_image(x)) if skip is None else ready.run(as_image(x), as_image(skip))
        return as_it_came(out, dimensions)
    except backends.OtherParametersError:
        reading.ready.clear()
        return None
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
    _, dtype, donate, *_ = kind
    parameters = _as_images(reading)
    operands = parameters if skip is None else (as_image(skip), *parameters)
    plan, _, _ = planned(spec, size_of(spec, as_image(x), operands), dtype, frozenset(), donate, False)
    tensors = dict(zip(spec.parameter_slots, parameters, strict=True))
    reading.ready[kind] = backends.Ready.of(plan, backends.PREPARES, spec.inputs, tensors)


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
    fitting = None if torch.compiler.is_compiling() else reading.fitting
    if reading.dimensions == 4:
        return _chain(x, reading.parameters, reading.chain, backend, skip, donate, drop, fitting)
    second = None if skip is None else as_image(skip)
    out = _chain(as_image(x), _as_images(reading), reading.chain, backend, second, donate, False, fitting)
    return as_it_came(out, reading.dimensions)


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
            flags = flags_of(spec, x, operands)
            if any(flags):
                return ChainFunction.apply(spec, name, flags, drop and droppable(spec), x, *operands)
        return forward(spec, name, x, operands, frozenset(), donate)[0]
    finally:
        running.pop()
