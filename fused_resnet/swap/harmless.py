"""Whether the forward of others does no more than compute, while it runs once on stand-ins for tensors.

What it asks and enters is noticed, what it changes is put back, and what would lose something on stand-ins refuses them.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_leaves

from .. import watch
from .guards import printed


class Looks(Protocol):
    """Who traces, as far as this module cares."""

    looking: bool
    running: list[nn.Module]


class CannotTrace(Exception):
    """Why a forward cannot be traced, in a sentence without a full stop."""


#: What other threads, which run the module meanwhile, may keep in it: hooks, and what is ours.
_OURS = frozenset(key for key in vars(nn.Module()) if "_hooks" in key) | {"_modules", "fused_region", watch.ATTRIBUTE}


def _plain(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in module.__dict__.items() if key not in _OURS}


#: How the state of a generator is read and set.
Source = tuple[Callable[[], Any], Callable[[Any], Any]]

#: Containers whose contents are put back.
_CONTAINERS = (list, deque, dict, OrderedDict, defaultdict, Counter, set)


def _put_back(value: Any, copy: Any) -> None:
    """Give a container its contents again."""
    value.clear()
    getattr(value, "extend" if isinstance(value, (list, deque)) else "update")(copy)


def _same_contents(value: Any, copy: Any) -> bool:
    """Whether a container holds the same objects; asked by identity, since stand-ins and tensors have another ``==``."""
    if len(value) != len(copy):
        return False
    if isinstance(value, dict):
        return all(key in value and value[key] is part for key, part in copy.items())
    if isinstance(value, set):
        return all(part in value for part in copy)
    return all(one is other for one, other in zip(value, copy, strict=True))


#: Modules of classes whose objects other threads may work on, or that are nobody's books.
_SHARED = (
    *("torch", "fused_resnet", "queue", "_queue", "threading", "_thread", "logging"),
    *("concurrent", "multiprocessing", "asyncio"),
)


def _completed(state: Mapping[str, Any], copy: Mapping[str, Any]) -> bool:
    """Whether an object has only found something that it keeps for later, as a cached property does, of no tensor."""
    kept = all(key in state and (state[key] is part or part is None) for key, part in copy.items())
    return kept and not any(issubclass(type(leaf), fx.Proxy) for leaf in tree_leaves(dict(state)))


def _objects(state: Mapping[str, Any]) -> Iterator[Any]:
    """Attributes that are objects with attributes of their own, of nobody's class that is known."""
    for value in state.values():
        known = isinstance(value, (nn.Module, Tensor, type, FunctionType, ModuleType, watch.Memory))
        if not known and hasattr(value, "__dict__") and not type(value).__module__.startswith(_SHARED):
            yield value


def _generators(state: Mapping[str, Any]) -> Iterator[Source]:
    """How the state of each generator of random numbers among attributes is read, and set."""
    for value in state.values():
        if isinstance(value, torch.Generator):
            yield value.get_state, value.set_state
        elif isinstance(value, random.Random):
            yield value.getstate, value.setstate
        elif isinstance(value, np.random.RandomState):
            yield partial(value.get_state, legacy=False), value.set_state
        elif isinstance(value, np.random.Generator):
            yield partial(getattr, value.bit_generator, "state"), partial(setattr, value.bit_generator, "state")


def _listed(state: Any) -> Any:
    """A state of a generator in values that can be compared."""
    if isinstance(state, dict):
        return {key: _listed(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, (np.ndarray, Tensor)) else state


#: What a forward may enter that a graph does not know of.
_ENTERED = (torch.inference_mode, torch.autograd.graph.saved_tensors_hooks)
#: What reads parameters for real: the graph would not see that they are of another type or frozen later.
_READ = ("parameters", "named_parameters", "buffers", "named_buffers", "state_dict")


@contextmanager
def _spied(tracer: Looks) -> Iterator[list[tuple[str, list[nn.Module]]]]:
    """A list of what the code of others asks or enters in this thread, while it runs on stand-ins, and in which modules."""
    asked: list[tuple[str, list[nn.Module]]] = []
    thread = threading.get_ident()
    undo: list[tuple[Any, str, Any, bool]] = []

    def put(owner: Any, name: str, new: Any) -> None:
        own = vars(owner)
        undo.append((owner, name, own.get(name), name in own))
        setattr(owner, name, new)

    def asking(owner: Any, name: str, called: str) -> None:
        function = getattr(owner, name)

        def spied(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                asked.append((called, tracer.running.copy()))
            return function(*args, **kwargs)

        put(owner, name, spied)

    def reading(name: str) -> None:
        function = getattr(nn.Module, name)

        def spied(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if threading.get_ident() == thread and not tracer.looking and not caller.startswith(("torch.", "fused_resnet.")):
                asked.append((f"its module for {name}", tracer.running.copy()))
            return function(self, *args, **kwargs)

        put(nn.Module, name, spied)

    call_script: Any = torch.jit.ScriptFunction.__call__

    def script(self: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs)) if threading.get_ident() == thread else ()
        if any(issubclass(type(leaf), fx.Proxy) for leaf in leaves):
            raise CannotTrace("its forward gives a tensor to a scripted function")
        return call_script(self, *args, **kwargs)

    start_context: Any = BackwardCFunction.__init__

    def context(self: Any, *args: Any, **kwargs: Any) -> None:
        # torch.autograd.Function.apply, written in C, makes one and runs the forward: that would be traced, the backward lost.
        if threading.get_ident() == thread:
            raise CannotTrace("its forward calls a torch.autograd.Function")
        start_context(self, *args, **kwargs)

    # Tables of PyTorch's that are made once, of the functions as they are then: not while others stand in their places.
    (
        torch.overrides.get_ignored_functions(),
        torch.overrides.get_testing_overrides(),
        torch.overrides.get_overridable_functions(),
    )
    try:
        for name in ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"):
            asking(torch, name, f"torch.{name}()")
        for kind in _ENTERED:
            asking(kind, "__enter__", f"for {kind.__name__}")
        for name in _READ:
            reading(name)
        put(torch.jit.ScriptFunction, "__call__", script)
        put(BackwardCFunction, "__init__", context)
        yield asked
    finally:
        for owner, name, old, there in reversed(undo):
            if there:
                setattr(owner, name, old)
            else:
                delattr(owner, name)


@contextmanager
def listened(tracer: Looks) -> Iterator[None]:
    """Raise if what runs inside asks or enters what a graph does not know of. Nothing is put back.

    Raises:
        CannotTrace: it does.
    """
    with _spied(tracer) as asked:
        yield
    _refuse(asked, tracer)


def _refuse(asked: list[tuple[str, list[nn.Module]]], tracer: Looks) -> None:
    for what, tracer.running in asked:  # the module that asks is to blame
        raise CannotTrace(f"its forward asks {what}")


@contextmanager
def watched(module: nn.Module, tracer: Looks) -> Iterator[None]:
    """Raise if what runs inside does more than compute: attributes set, random numbers drawn, the gradient mode read.

    What was changed is put back.

    Args:
        module: whose forward runs.
        tracer: tells when it is not the forward that asks but the tracer itself.

    Raises:
        CannotTrace: it does.
    """
    before = [(part, dict(part.__dict__), printed(_plain(part))) for part in module.modules()]
    objects = [(value, dict(vars(value))) for _, state, _ in before for value in _objects(state)]
    states = [_plain(part) for part, _, _ in before] + [state for _, state in objects]
    lists = [(value, value.copy()) for state in states for value in state.values() if type(value) in _CONTAINERS]
    children = [(part._modules, part._modules.copy()) for part, _, _ in before]
    of_numpy = partial(np.random.get_state, legacy=False), np.random.set_state
    sources: list[Source] = [(random.getstate, random.setstate), of_numpy]
    sources += [pair for state in states for pair in _generators(state)]
    drawn = [(read, put, deepcopy(read())) for read, put in sources]
    of_torch = torch.random.get_rng_state()
    switched: list[nn.Module] = []
    set_attribute: Any = nn.Module.__setattr__
    thread = threading.get_ident()

    def setting(self: nn.Module, name: str, value: Any) -> None:
        if name == "training" and threading.get_ident() == thread:
            switched.append(self)  # in this mode it may be what it was
        set_attribute(self, name, value)

    patched: Any = nn.Module
    patched.__setattr__ = setting
    try:
        with _spied(tracer) as asked:
            yield
    finally:
        patched.__setattr__ = set_attribute
        moved = [(put, state) for read, put, state in drawn if _listed(read()) != _listed(state)]
        if not torch.equal(torch.random.get_rng_state(), of_torch):
            moved.append((torch.random.set_rng_state, of_torch))
        for put, state in moved:
            put(state)
        changed: list[Any] = [part for part, _, mark in before if printed(_plain(part)) != mark]
        for value, copy in lists:
            if not _same_contents(value, copy):
                changed += [part for part, state, _ in before if any(own is value for own in state.values())]
                _put_back(value, copy)
        for value, copy in children:
            if not _same_contents(value, copy):
                _put_back(value, copy)
        for value, copy in objects:
            if not _same_contents(vars(value), copy) and not _completed(vars(value), copy):
                changed.append(value)
                vars(value).clear()
                vars(value).update(copy)
        for part, state, _ in before:
            if any(part is one for one in changed):
                part.__dict__.clear()
                part.__dict__.update(state)
    changed += switched
    if changed:
        raise CannotTrace(f"the forward of its {type(changed[0]).__name__} sets attributes")
    if moved:
        raise CannotTrace("its forward draws random numbers")
    _refuse(asked, tracer)
