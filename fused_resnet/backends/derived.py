"""Tensors computed from parameters (folded and prepacked filters, low-precision copies), cached and never stale.

An entry is used only while every source is the same tensor object, at the same address, with the same version counter. PyTorch
does not count writes through ``.data`` or NumPy views, so on the CPU the sources' contents are looked at as well: vectors
whole, filters at :data:`SAMPLES` random places spread over their memory. (On a GPU that look would stall the host; version
counters decide there, and the kernels fold BatchNorm from its parameters at each launch, so that little is derived at all.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

#: Values kept for one tensor (batch sizes, types); the oldest goes first.
ENTRIES = 4

#: Least number of places at which a tensor of filters is compared.
SAMPLES = 16


@lru_cache(maxsize=512)
def _places(size: int, strata: int) -> Tensor:
    """One random place in each of ``strata`` equal parts of a memory of ``size`` elements.

    Random, since a regular grid misses writes that are as regular (every second channel).
    """
    generator = torch.Generator().manual_seed(size)
    edges = torch.arange(strata + 1) * size // strata
    return edges[:-1] + (torch.rand(strata, generator=generator) * (edges[1:] - edges[:-1])).long()


def _look(source: Tensor) -> Tensor:
    """The values of a source that are compared."""
    size = source.numel()
    strata = SAMPLES
    dense = source.is_contiguous() or source.is_contiguous(memory_format=torch.channels_last)
    if size <= strata or not dense:
        return source
    return source.as_strided((size,), (1,)).index_select(0, _places(size, strata))


class _Seen(NamedTuple):
    """A source as it was: the object, its address, its version (None for inference tensors) and some of its values."""

    reference: ReferenceType[Tensor]
    address: int
    version: int | None
    values: Tensor | None

    def unchanged(self, source: Tensor) -> bool:
        if self.reference() is not source or self.address != source.data_ptr():
            return False
        if self.version is not None and self.version != source._version:
            return False
        return self.values is None or torch.equal(self.values, source if source.dim() == 1 else _look(source))


def _see(source: Tensor) -> _Seen:
    values = None
    if source.device.type == "cpu":
        values = (source if source.dim() == 1 else _look(source)).clone()
    return _Seen(ref(source), source.data_ptr(), None if source.is_inference() else source._version, values)


_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()  # first source -> {purpose: (sources as they were, value)}
_lock = threading.Lock()


def derived(purpose: Any, sources: Sequence[Tensor], build: Callable[[], Any]) -> Any:
    """``build()``, or what it returned before if no source has changed since.

    Args:
        purpose: hashable; what is derived, and from which kinds of sources. One entry is kept for each, the last
            :data:`ENTRIES` of them.
        sources: all tensors ``build`` reads; the entry dies with the first.
        build: makes the value, under no_grad.
    """
    with torch.no_grad():
        entry = _cache.get(sources[0], {}).get(purpose)
        if entry is not None and all([seen.unchanged(source) for seen, source in zip(entry[0], sources, strict=True)]):
            return entry[1]
        seen = tuple(_see(source) for source in sources)
        value = build()
    with _lock:
        entries = _cache.setdefault(sources[0], {})
        entries.pop(purpose, None)
        while len(entries) >= ENTRIES:
            entries.pop(next(iter(entries)))
        entries[purpose] = (seen, value)
    return value


def channels_last_filters(w: Tensor) -> Tensor:
    """Filters as contiguous [K, R, S, C / groups]; a (cached) copy only where they are laid out otherwise.

    While a CUDA graph is captured the copy is part of the graph, so that a replay sees filters that have changed.
    """
    if w.is_contiguous(memory_format=torch.channels_last):
        return w
    if w.is_cuda and torch.cuda.is_current_stream_capturing():
        return w.detach().contiguous(memory_format=torch.channels_last)
    return derived("channels_last", [w], lambda: w.detach().contiguous(memory_format=torch.channels_last))
