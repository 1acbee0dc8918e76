"""Tensors computed from parameters (folded and prepacked filters, low-precision copies), cached and never stale.

An entry is used only while every source is the same tensor object, at the same address, with the same version counter. PyTorch
does not count writes through ``.data`` or NumPy views, so on the CPU the sources' contents are looked at as well: vectors whole,
filters at :data:`SAMPLES` places spread over their memory. (On a GPU that look would stall the host; version counters decide
there, and the kernels fold BatchNorm from its parameters at each launch, so that little is derived at all.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import threading
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

#: Places at which a filter's memory is compared. 61 is prime: a write to every k-th element is met for small k.
SAMPLES = 61


class _Seen(NamedTuple):
    """A source as it was: the object, its address, its version (None for inference tensors) and some of its values."""

    reference: ReferenceType[Tensor]
    address: int
    version: int | None
    places: tuple[tuple[int], tuple[int]] | None
    values: Tensor | None

    def unchanged(self, source: Tensor) -> bool:
        if self.reference() is not source or self.address != source.data_ptr():
            return False
        if self.version is not None and self.version != source._version:
            return False
        if self.values is None:
            return True
        return torch.equal(self.values, source if self.places is None else source.as_strided(*self.places))


def _see(source: Tensor) -> _Seen:
    places = None
    if source.dim() > 1:  # spread over the memory, whatever the layout
        count = min(SAMPLES, source.numel())
        places = (count,), (max(1, (source.numel() - 1) // max(1, count - 1)),)
    values = None
    if source.device.type == "cpu":
        values = (source if places is None else source.as_strided(*places)).clone()
    return _Seen(ref(source), source.data_ptr(), None if source.is_inference() else source._version, places, values)


_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()  # first source -> {purpose: (sources as they were, value)}
_lock = threading.Lock()


def derived(purpose: Any, sources: Sequence[Tensor], build: Callable[[], Any]) -> Any:
    """``build()``, or what it returned before if no source has changed since.

    Args:
        purpose: hashable; what is derived, and from which kinds of sources. One entry is kept a purpose and first source.
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
        _cache.setdefault(sources[0], {})[purpose] = (seen, value)
    return value


def channels_last_filters(w: Tensor) -> Tensor:
    """Filters as contiguous [K, R, S, C / groups]; a (cached) copy only where they are laid out otherwise."""
    if w.is_contiguous(memory_format=torch.channels_last):
        return w
    return derived("channels_last", [w], lambda: w.detach().contiguous(memory_format=torch.channels_last))
