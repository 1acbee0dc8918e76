"""Watches what interpreted programs do with memory: what lies outside of the tensors they were given, and races.

Interpreted programs run one after another, in memory of the CPU: a load past a tensor's end whose value is dropped, or a store
that another program's load would have met on a GPU, gives the right numbers here. So both are looked for, address by address.

Two accesses of different programs to one byte, one of them a store, are a race unless one *happens before* the other. Only
arrivals make that so: whoever adds to a counter knows all that those who added before it had done (vector clocks).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

_builder = interpreter.interpreter_builder


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, tuple):
        for member in argument:
            yield from _tensors(member)
    elif isinstance(argument, TensorDescriptor):
        yield argument.base
    elif isinstance(argument, torch.Tensor) and argument.numel():
        yield argument


class Watched:
    """The memory of one launch, and who did what to each byte of it, and when.

    Times are counted by each program for itself, in arrivals. ``known[a, b]``: up to which of its times program a knows b's.
    """

    def __init__(self, arguments: tuple[Any, ...], programs: int) -> None:
        # All tensors here are dense.
        spans = sorted({(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in _tensors(arguments)})
        joined: list[list[int]] = []
        for start, end in spans:
            if joined and start < joined[-1][1]:
                joined[-1][1] = max(end, joined[-1][1])
            else:
                joined.append([start, end])
        self.starts, self.ends = (np.array(side, dtype=np.uint64) for side in zip(*joined, strict=True))
        self.before = np.concatenate([[0], np.cumsum((self.ends - self.starts).astype(np.int64))])
        size = int(self.before[-1])
        self.writer, self.written = np.full(size, -1, np.int32), np.zeros(size, np.int8)
        self.read = np.zeros((programs, size), np.int8)  # each program's time, since the last store
        self.known = np.zeros((programs, programs), np.int8)
        self.now = np.ones(programs, np.int8)
        self.left: dict[int, Any] = {}  # counter -> what those who have arrived know

    def places(self, addresses: Any, size: int) -> Any:
        """Of the first byte of each element, among all bytes watched."""
        addresses = addresses.astype(np.uint64).ravel()
        span = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        outside = (span < 0) | (addresses + np.uint64(size) > self.ends[np.maximum(span, 0)])
        assert not outside.any(), f"{int(outside.sum())} of {addresses.size} elements are outside of every tensor"
        return self.before[span] + (addresses - self.starts[span]).astype(np.int64)

    def _behind_stores(self, places: Any, what: str) -> None:
        me = _builder.grid_idx[0]
        writer, written = self.writer[places], self.written[places]
        race = (writer >= 0) & (writer != me) & (self.known[me][writer] < written)
        assert not race.any(), f"program {me} {what} what program {writer[race][0]} stored, and has not waited for it"

    def load(self, places: Any) -> None:
        self._behind_stores(places, "reads")
        me = _builder.grid_idx[0]
        self.read[me, places] = self.now[me]

    def store(self, places: Any) -> None:
        self._behind_stores(places, "writes over")
        me = _builder.grid_idx[0]
        behind = self.read[:, places] <= self.known[me][:, None]
        behind[me] = True
        assert behind.all(), f"program {me} writes over what program {np.argmin(behind.all(axis=1))} may still read"
        self.read[:, places] = 0
        self.writer[places], self.written[places] = me, self.now[me]

    def arrive(self, place: int) -> None:
        self._behind_stores(np.array([place]), "arrives at")
        me = _builder.grid_idx[0]
        if place in self.left:
            np.maximum(self.known[me], self.left[place], out=self.known[me])
        self.known[me][me] = self.now[me]
        self.left[place] = self.known[me].copy()
        self.now[me] += 1


@contextmanager
def watched() -> Iterator[list[Watched]]:
    """Every launch that is interpreted meanwhile; the list fills with them."""
    launches: list[Watched] = []
    kind, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    begin, load, store, rmw = executor._init_args_hst, kind.create_masked_load, kind.create_masked_store, kind.create_atomic_rmw

    def begun(self: Any, arguments: Any, named: Any) -> Any:
        given = begin(self, arguments, named)
        launches.append(Watched((*given[0], *given[1].values()), self.grid[0]))
        return given

    def selected(pointers: Any, mask: Any) -> Any:
        there = np.broadcast_to(np.asarray(getattr(mask, "data", mask)), pointers.data.shape).astype(bool)
        return launches[-1].places(pointers.data[there], pointers.get_element_ty().primitive_bitwidth // 8)

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **how: Any) -> Any:
        launches[-1].load(selected(pointers, mask))
        return load(self, pointers, mask, *rest, **how)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].store(selected(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    def atomic_rmw(self: Any, operation: Any, pointer: Any, *rest: Any) -> Any:
        (place,) = launches[-1].places(pointer.data, 4)
        launches[-1].arrive(int(place))
        return rmw(self, operation, pointer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_init_args_hst", begun)
        patch.setattr(kind, "create_masked_load", masked_load)
        patch.setattr(kind, "create_masked_store", masked_store)
        patch.setattr(kind, "create_atomic_rmw", atomic_rmw)
        yield launches
