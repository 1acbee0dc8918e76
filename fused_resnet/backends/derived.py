"""Tensors computed from parameters (folded and prepacked filters, low-precision copies), cached and never stale.

An entry is used only while every source is the same tensor object, at the same address, with the same version counter. PyTorch
does not count writes through ``.data`` or NumPy views, so on the CPU the sources' contents are looked at as well: vectors
whole, filters at :data:`SAMPLES` places spread over their memory. (On a GPU that look would stall the host; version
counters decide there, and the kernels fold BatchNorm from its parameters at each launch, so that little is derived at all:
filters that are not channels_last. A training step copies those itself, and drops what was kept: :func:`forget`.)
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Hashable, Sequence
from math import gcd
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from .workspace import keeps_nothing

#: Values kept for one tensor (batch sizes, types); the oldest goes first.
ENTRIES = 4

#: Places at which a tensor of filters is compared.
SAMPLES = 16


def _stride(size: int) -> int:
    """Distance of the places compared in a memory of ``size`` elements.

    Without small prime factors, so that writes to every second, third ... element or channel fall on some of the places.
    """
    stride = max(1, size // SAMPLES)
    while stride > 1 and gcd(stride, 2 * 3 * 5 * 7) != 1:
        stride -= 1
    return stride


#: Bytes of an element -> how it is read, whatever it stands for.
_WORDS: dict[int, Any] = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}


def _look(source: Tensor) -> Callable[[], Any] | None:
    """What tells the values of a tensor in the CPU's memory, bit by bit: all of a vector, filters at their places.

    Past PyTorch, whose operators take several microseconds each, of which there would be five a layer. The memory may be read
    while the tensor lives and has its address.
    """
    if source.device.type != "cpu":
        return None
    dense = source.is_contiguous() or source.is_contiguous(memory_format=torch.channels_last)
    if not dense or source.element_size() not in _WORDS or not source.numel():
        reference = ref(source)  # the entry dies with its sources
        return lambda: None if (alive := reference()) is None else alive.detach().clone().flatten().tolist()
    words = (_WORDS[source.element_size()] * source.numel()).from_address(source.data_ptr())
    places = _stride(source.numel()) if source.dim() > 1 and source.numel() > SAMPLES else 1
    return memoryview(words)[::places].tobytes


class Entry:
    """A value, and the tensors that it was made of as they were: addresses, versions, shapes, strides, (some) values.

    The version is None for inference tensors, the strides are None for contiguous vectors.
    """

    __slots__ = ("seen", "value")

    def __init__(self, sources: Sequence[Tensor], forget: Callable[[ReferenceType[Tensor]], None]) -> None:
        seen = []
        for index, source in enumerate(sources):
            version = None if source.is_inference() else source._version
            strides = None if source.dim() < 2 and source.is_contiguous() else source.stride()
            look = _look(source)
            was = None if look is None else look()
            seen.append((ref(source, None if index else forget), source.data_ptr(), version, source.shape, strides, look, was))
        self.seen = tuple(seen)
        self.value: Any = None

    def holds(self) -> bool:
        """Whether the tensors are as they were."""
        for reference, address, version, shape, strides, look, was in self.seen:
            source = reference()
            # The same memory may be read otherwise: filters that were given their transpose, or fewer of themselves.
            if (
                source is None
                or source.data_ptr() != address
                or (version is not None and source._version != version)
                or source.shape != shape
                or (not source.is_contiguous() if strides is None else source.stride() != strides)
                or (look is not None and look() != was)
            ):
                return False
        return True

    def holds_for(self, sources: Sequence[Tensor]) -> bool:
        """Whether these tensors are those, as they were."""
        return all([seen[0]() is source for seen, source in zip(self.seen, sources, strict=True)]) and self.holds()


_cache: dict[int, dict[Hashable, Entry]] = {}  # id of the first source -> what is derived, from what -> entry
_lock = threading.Lock()


def derived(purpose: Hashable, sources: Sequence[Tensor], build: Callable[[], Any]) -> Any:
    """``build()``, or what it returned before if no source has changed since.

    Args:
        purpose: what is derived, and from which kinds of sources. One entry is kept for each, the last :data:`ENTRIES` of them.
        sources: all tensors ``build`` reads; the entry dies with the first.
        build: makes the value, under no_grad.

    Nothing is kept where a change could not be seen (inference tensors on a GPU), nor while a CUDA graph is captured: the graph
    makes its own, at each replay; nor in :func:`.workspace.nothing_kept`. A value belongs to the stream it was made on.
    """
    stream = 0
    if sources[0].is_cuda:
        if keeps_nothing() or any(source.is_inference() for source in sources):
            return build()
        stream = torch.cuda.current_stream(sources[0].device).cuda_stream
    return entry_of(purpose, sources, build, stream).value


def entry_of(purpose: Hashable, sources: Sequence[Tensor], build: Callable[[], Any], stream: int = 0) -> Entry:
    """As :func:`derived`, with what tells whether it still holds."""
    key, detail = id(sources[0]), (purpose, id(sources[-1]), stream)  # filters may be shared by several BatchNorms
    entry = _cache.get(key, {}).get(detail)
    if entry is not None and entry.holds_for(sources):
        return entry
    with torch.inference_mode(False), torch.no_grad():  # what is kept may be saved for a backward later

        def gone(_: ReferenceType[Tensor], cache: Any = _cache) -> None:  # with the tensor gone its id may become another's
            cache.pop(key, None)  # a name of the module is gone first at the interpreter's end

        entry = Entry(sources, gone)
        entry.value = build()
    with _lock:
        entries = _cache.setdefault(key, {})
        entries.pop(detail, None)
        while len(entries) >= ENTRIES:
            entries.pop(next(iter(entries)))
        entries[detail] = entry
    return entry


def forget(source: Tensor) -> None:
    """Drop what was derived from a tensor alone, or first: it may be written where that is not seen."""
    _cache.pop(id(source), None)


def channels_last_filters(w: Tensor) -> Tensor:
    """Filters as contiguous [K, R, S, C / groups]; a (cached) copy only where they are laid out otherwise."""
    if w.is_contiguous(memory_format=torch.channels_last):
        return w
    return derived("channels_last", [w], lambda: w.detach().contiguous(memory_format=torch.channels_last))
