"""Memory in which the programs of a launch meet: counters that are zero between launches, and how partials are arranged.

:mod:`fused_resnet.kernels.finish` says what they are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import ceil, isqrt

import torch
from torch import Tensor

#: (device, stream) -> its counters. Launches of one stream run one after another, so they share; streams must not.
_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}

#: Smallest allocation: most launches of a network need fewer, and growing means zeroing again.
_LEAST = 4096

_NOTHING_KEPT: ContextVar[bool] = ContextVar("fused_resnet_nothing_kept", default=False)


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Around what a compiler calls: nothing allocated on a GPU in here is kept for later launches.

    ``torch.compile(mode="reduce-overhead")`` warms up with allocations from its graphs' pool, while no capture is under way,
    and PyTorch refuses memory of that pool that outlives the call.
    """
    token = _NOTHING_KEPT.set(True)
    try:
        yield
    finally:
        _NOTHING_KEPT.reset(token)


def keeps_nothing() -> bool:
    """Whether what is allocated on a GPU now is not to be kept: in :func:`nothing_kept`, or while a graph is captured."""
    return _NOTHING_KEPT.get() or torch.cuda.is_current_stream_capturing()


def counters(device: torch.device, count: int) -> Tensor:
    """``count`` or more zeros, int32, for a launch on the current stream that leaves them zero.

    They are zeroed when they are allocated, once a device and stream: a launch of its own, but never again.

    A CUDA graph that is being captured gets counters of its own. Those of the stream would not do: the graph may be replayed on
    any stream, beside launches that use them. Nor may what is allocated during the capture be kept here for later launches: its
    zeroing is recorded, not run, and its memory belongs to the graph's pool, which goes with the graph (and which the capture,
    or another graph that shares the pool, gives to other tensors once this one is freed). So each captured launch allocates its
    own from the pool, which lives as long as the graph, and the graph carries the zeroing (a memset node of a few hundred
    bytes) in front of it: right for every replay, wherever and after whatever it runs. So do launches in :func:`nothing_kept`.
    """
    stream = 0
    if device.type == "cuda":
        if keeps_nothing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (device, stream)
    found = _COUNTERS.get(key)
    if found is None or found.numel() < count:
        # Whatever still uses a smaller one was queued on this stream before: its memory is not given to others sooner.
        found = torch.zeros(max(count, _LEAST), dtype=torch.int32, device=device)
        _COUNTERS[key] = found
    return found


def forget() -> None:
    """Drop all counters: a launch that was interrupted may have left some that are not zero."""
    _COUNTERS.clear()


def group_of(tiles: int) -> int:
    """How many tiles the first of the two levels of a reduction merges: about the square root, so that both are as long."""
    return max(8, isqrt(max(tiles - 1, 0)) + 1)


def counters_of(tiles: int) -> int:
    """Counters of one column of ``tiles`` that reduce together: one a group, one for the groups."""
    return ceil(tiles / group_of(tiles)) + 1
