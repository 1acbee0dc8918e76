"""Tensors computed from parameters (folded and prepacked filters, low-precision copies), cached and never stale.

An entry is used only while every source is the same tensor object, at the same address, with the same version counter. PyTorch
does not count writes through ``.data`` or NumPy views, so on the CPU the sources' contents are looked at as well: vectors whole,
filters at :data:`SAMPLES` places spread over their memory. (On a GPU that look would stall the host; version counters decide
there, and the kernels fold BatchNorm from its parameters at each launch, so that little is derived at all.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import threading
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

#: Places at which a filter's memory is compared. 61 is prime: a write to every k-th element is met for small k.
SAMPLES = 61

_Entry = tuple[tuple[ReferenceType[Tensor], ...], tuple[tuple[int, int], ...], tuple[Tensor, ...], Any]

_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()  # first source -> {purpose: entry}
_lock = threading.Lock()


def _stamp(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _sample(tensor: Tensor) -> Tensor:
    if tensor.dim() == 1:
        return tensor
    count = min(SAMPLES, tensor.numel())
    step = max(1, (tensor.numel() - 1) // max(1, count - 1))
    return tensor.as_strided((count,), (step,))  # over the memory, whatever the layout


def _unchanged(entry: _Entry, sources: Sequence[Tensor]) -> bool:
    references, stamps, samples, _ = entry
    if len(references) != len(sources):
        return False
    for reference, stamp, source in zip(references, stamps, sources, strict=True):
        if reference() is not source or _stamp(source) != stamp:
            return False
    return all(torch.equal(sample, _sample(source)) for sample, source in zip(samples, sources, strict=False))


@torch.no_grad()
def derived(purpose: Any, sources: Sequence[Tensor], build: Callable[[], Any]) -> Any:
    """``build()``, or what it returned before if no source has changed since.

    Args:
        purpose: hashable; what is derived and for which sizes. At most one entry is kept a purpose and first source.
        sources: all tensors ``build`` reads; the entry dies with the first.
        build: makes the value, under no_grad.
    """
    entries = _cache.get(sources[0])
    if entries is not None:
        entry = entries.get(purpose)
        if entry is not None and _unchanged(entry, sources):
            return entry[3]
    stamps = tuple(_stamp(source) for source in sources)
    samples = tuple(_sample(source).clone() for source in sources) if sources[0].device.type == "cpu" else ()
    value = build()
    with _lock:
        _cache.setdefault(sources[0], {})[purpose] = (tuple(ref(source) for source in sources), stamps, samples, value)
    return value


def channels_last_filters(w: Tensor) -> Tensor:
    """Filters as contiguous [K, R, S, C / groups]; a (cached) copy only where they are laid out otherwise."""
    if w.is_contiguous(memory_format=torch.channels_last):
        return w
    return derived("channels_last", [w], lambda: w.detach().contiguous(memory_format=torch.channels_last))
