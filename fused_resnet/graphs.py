"""CUDA graphs for small batches: what the host needs to start launches is spent once, when they are recorded."""

from __future__ import annotations

from collections import Counter
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .describe import hooked, hooks_everywhere

#: Different reasons that :attr:`Graphed.calls` tells apart; inputs of ever new sizes do not make it grow.
REASONS = 32


class _Recording:
    """A forward that was recorded, its input and its output in memory of their own. One thread at a time may call it."""

    @torch.inference_mode(False)  # tensors made in that mode could not be written by a call outside of it
    def __init__(self, model: nn.Module, example: Tensor) -> None:
        device = example.device
        # Where no stream is given, torch.cuda.graph records on one a process, of the device that was current at first.
        with torch.cuda.device(device):
            self.x = example.clone(memory_format=torch.preserve_format)
            here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
            side.wait_stream(here)
            # Around the recording too: where the model raises, torch.cuda.graph may leave its stream the current one.
            with torch.cuda.stream(side), torch.no_grad():
                for _ in range(3):  # what is compiled, chosen or cached at the first call is none of the recording's business
                    model(self.x)
                self.graph = torch.cuda.CUDAGraph()
                # Other threads may allocate and synchronise meanwhile.
                with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
                    self.out = model(self.x)
            here.wait_stream(side)
        self.last = here
        self.behind = torch.cuda.Event()

    def __call__(self, x: Tensor) -> Any:
        stream = torch.cuda.current_stream(self.x.device)
        if stream != self.last:  # the input and the output are the previous call's until its copies are through
            stream.wait_event(self.behind)
        try:
            self.x.copy_(x)
            self.graph.replay()
            return tree_map_only(Tensor, Tensor.clone, self.out)  # the next replay writes over the recording's own
        finally:
            self.behind.record(stream)
            self.last = stream


def _check(model: Any, example: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(example, Tensor):
        raise TypeError(f"example must be a Tensor of shape [N, C, H, W], got {type(example).__name__}")
    if example.device.type != "cuda":
        raise RuntimeError(
            f"graphed records CUDA graphs, and example is on {example.device}: call the model itself there, "
            "or move both to a GPU"
        )
    if example.layout != torch.strided:
        raise TypeError(f"example must be a dense Tensor (torch.strided), got layout {example.layout}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != example.device:
            raise RuntimeError(f"{name} of model is on {tensor.device}, and example is on {example.device}: expected one GPU")


class _Seen(NamedTuple):
    """What a call asks of a model's parts. ``places``: where parameters and buffers lie, since a recording reads there."""

    training: bool
    wants_gradients: bool
    hooked: bool
    places: tuple[int, ...]


def _see(model: nn.Module) -> _Seen:
    """Look at a model once. PyTorch's own iterators would take ten times as long, and each would do it anew."""
    training = wants_gradients = found = False
    places = []
    parts, seen = [model], {model}
    for part in parts:
        training = training or part.training
        found = found or hooked(part)
        for tensor in part._parameters.values():
            if tensor is not None:
                wants_gradients = wants_gradients or tensor.requires_grad
                places.append(tensor.data_ptr())
        places += [tensor.data_ptr() for tensor in part._buffers.values() if tensor is not None]
        for child in part._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                parts.append(child)
    return _Seen(training, wants_gradients, found, tuple(places))


class Graphed(nn.Module):
    """A model whose forward is replayed where that is what a call would do; made by :func:`graphed`.

    Attributes:
        module: the model. It may be used beside this.
        calls: how often a call was replayed, and how often it was not, by the reason; behind the first :data:`REASONS` of
            them all others are "another reason".
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        super().__init__()
        _check(module, example)
        self.module = module
        self.calls: Counter[str] = Counter()
        self._like = (tuple(example.shape), example.stride(), example.dtype, example.device)
        self._example = example.detach()
        self._recording: Any = None
        self._failed: str | None = None
        self._places: tuple[int, ...] = ()
        self._lock = Lock()
        self.training = module.training  # not by train(), which would bring frozen parts of the model into its mode

    def reason(self, x: Any) -> str | None:
        """Why a call with ``x`` would run the model itself now; None if it would be replayed."""
        return self._reason(x, _see(self.module))

    def _reason(self, x: Any, seen: _Seen) -> str | None:
        if not isinstance(x, Tensor):
            return f"the input is a {type(x).__name__}"
        like = (tuple(x.shape), x.stride(), x.dtype, x.device)
        if like != self._like:
            names = ("shape", "strides", "dtype", "device")
            differs = next(name for name, a, b in zip(names, like, self._like) if a != b)
            index = names.index(differs)
            return f"another {differs} than the example's: {like[index]}, not {self._like[index]}"
        if seen.training:
            return "the model, or a part of it, is in training mode"
        if torch.is_grad_enabled() and (x.requires_grad or seen.wants_gradients):
            return "gradients are wanted: call it under torch.no_grad() or torch.inference_mode()"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on: convert the model instead"
        if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return "it is being compiled or recorded itself"
        if hooks_everywhere() or seen.hooked:
            return "a hook looks into the model, which a replay does not call"
        if self._failed is not None and self._places == seen.places:
            return self._failed
        return None

    def _record(self, places: tuple[int, ...]) -> str | None:
        """See that there is a recording that reads the parameters where they are now; why there is none, or None."""
        if places != self._places or (self._recording is None and self._failed is None):
            self._recording, self._failed, self._places = None, None, places
            try:
                self._recording = _Recording(self.module, self._example)
            except Exception as error:
                cause = error.__context__ or error  # behind an error of the model there is one of the recording's end
                first = next(iter(str(cause).splitlines()), "")
                self._failed = f"it could not be recorded: {type(cause).__name__}: {first}"
        return self._failed

    def forward(self, x: Tensor) -> Any:
        """As the model's: replayed for inputs like the example, else the model itself. What comes back is the caller's own."""
        seen = _see(self.module)
        reason = self._reason(x, seen)
        with self._lock:
            reason = reason or self._record(seen.places)
            what = reason or "replayed"
            known = reason is None or what in self.calls or len(self.calls) < REASONS
            self.calls[what if known else "another reason"] += 1
            if reason is None:
                return self._recording(x)
        return self.module(x)

    def explain(self) -> str:
        """How often calls were replayed, and why others were not."""
        return "\n".join(f"{count} x {what}" for what, count in self.calls.most_common()) or "not called yet"

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or what comes out of a pickle, records anew.
        state = {**self.__dict__, "_recording": None, "_failed": None}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = Lock()


def graphed(model: nn.Module, example: Tensor) -> Graphed:
    """A model whose inference is replayed as one CUDA graph for inputs like ``example``; safe with all others.

    For small batches, where starting the launches takes longer than running them. A call is replayed if its input has the
    example's shape, strides, type and device, the model is in eval mode and no gradient is wanted; any other runs the model
    itself, and :meth:`Graphed.explain` tells why. Parameters may change in place (``load_state_dict``, ``optimizer.step``);
    where they were moved or replaced, the next call records anew. The recording happens at the first call that can be replayed,
    and holds the activations' memory. Host code in the model (prints, random choices) is not run in a replay. A model that
    cannot be recorded (the host waits for the device in it) is called itself, and ``explain`` tells the error; it is tried
    again once parameters were moved. Threads and streams may share it: their replays follow one another.

    Args:
        model: fused or not, on a GPU.
        example: [N, C, H, W] on the same GPU; its contents do not matter.

    Raises:
        TypeError: not a module, not a dense tensor.
        RuntimeError: ``example`` is not on a GPU: there is no graph to record on a CPU; or the model is not where it is.
    """
    return Graphed(model, example)
