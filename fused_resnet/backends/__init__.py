"""The one place that decides which executor runs a launch.

An executor is a module with two functions::

    supports(launch) -> str | None        None, or why it cannot run the launch
    run(launch, operands, donated) -> Tensor | tuple[Tensor, ...]     one tensor per output of the launch, in its order

and ``check_available(device)``, which raises where the backend cannot run at all. ``operands`` maps the launch's roles to
tensors; ``donated`` names the roles whose memory nobody reads afterwards. A module with ``shares = True`` gets one more
argument, a dict that lives as long as the plan runs: what its launches leave for each other, and under :func:`before_slot`
what the running statistics were that a launch has updated (fp32 [2, K]: mean, variance). One with a function
``finish(shared)`` has it called behind a plan's last launch, and updates the running statistics there, all of them or none.
One with a function ``prepare(launch, parameters, donated)`` tells what is left to do where the parameters stay the same, see
:class:`Ready`; one with ``join(first, second)`` gives what runs two neighbouring launches as one, ``(first, second, operands,
donated, shared)``, or None. A launch the chosen executor does not support goes to the ``reference`` executor, and
:func:`fused_resnet.explain` says so.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..chain import UPDATED
from ..launch import Launch
from ..plan import Plan

#: Backend -> its module, imported when it is first used.
BACKENDS: dict[str, str] = {
    "triton": "fused_resnet.backends.triton",
    "cpu": "fused_resnet.backends.cpu",
    "reference": "fused_resnet.backends.reference",
}

_DEVICE_DEFAULT = {"cuda": "triton", "cpu": "cpu"}
_context: ContextVar[str | None] = ContextVar("fused_resnet_backend", default=None)


def check_name(name: str, source: str = "backend") -> str:
    """Return ``name`` if it is a backend.

    Raises:
        ValueError: it is not; the message names ``source`` and the choices.
    """
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run fused modules on the backend ``name`` inside this context (for this thread or task).

    A backend given to :func:`fused_resnet.fuse` or to a block wins over the context; the context wins over the environment
    variable ``FUSED_RESNET_BACKEND``, and that over the default by the tensor's device.

    Raises:
        ValueError: unknown name.
    """
    reset = _context.set(check_name(name))
    try:
        yield
    finally:
        _context.reset(reset)


_VARIABLE = "FUSED_RESNET_BACKEND"
_KEY = os.environ.encodekey(_VARIABLE)


def _environment() -> str | None:
    """The backend that the environment names. Where there is none, which is so in nearly every call, in a fifth of the time of
    ``os.environ.get``: that takes 10 us where it is not in the caches, in front of a block of 200.
    """
    environment = os.environ
    raw = getattr(environment, "_data", None)  # CPython's, and no part of its interface
    return environment.get(_VARIABLE) if raw is None or _KEY in raw else None


def chosen(requested: str | None) -> str | None:
    """The backend that somebody has chosen: argument, context, environment; None: nobody."""
    if requested is not None:
        return check_name(requested)
    name = _context.get()
    if name is not None:
        return name
    name = _environment()
    return check_name(name, _VARIABLE) if name else None


def choose(requested: str | None, device: torch.device) -> str:
    """The backend for tensors on ``device``: argument, context, environment, else by the device."""
    return chosen(requested) or _DEVICE_DEFAULT.get(device.type, "reference")


#: Dimensions of a chain's input, rows [N, C] or signals [N, C, L] -> multiplications of its layers up to which a training step
#: on a CPU is done sooner with its modules one by one: an autograd function of ours takes some hundred microseconds. *Measured*
#: on 2 threads of an AMD EPYC with AVX-512, PyTorch 2.14.1, 2026-11-29, six residual blocks of two layers, eager's time over
#: the fused: 64 features of 8 rows 0.36, 512 of 512 (268 M a block) 0.92, 1024 of 1024 (2.1 G) 1.02; 16 channels of 16 samples
#: 0.31, 64 of 1000 (25 M) 0.84, 16 of 32 times 1000 (49 M) 1.46. (Not images: what their training saves is memory, of any
#: size.)
_ALONE = {2: 5 * 10**8, 3: 4 * 10**7}


def leaves_alone(requested: str | None, dimensions: int, multiplications: float) -> bool:
    """Whether a chain on a CPU, by nobody's choice of a backend, where autograd records, is so little work that its modules are
    called one by one, as they were.

    Args:
        requested: as for :func:`choose`.
        dimensions: of the chain's input.
        multiplications: of its layers.
    """
    if multiplications > _ALONE.get(dimensions, -1):
        return False
    return chosen(requested) is None


def alone_up_to(dimensions: int) -> str:
    """What :func:`leaves_alone` says of such chains, for people."""
    most = _ALONE[dimensions] // 10**6
    return f"unfused on a CPU where autograd records, up to {most} M multiplications, unless a backend or a memory is chosen"


def context_of_backward() -> str | None:
    """The :func:`backend` context in which ``backward()`` was called.

    On a GPU autograd runs in a thread of its own, where context variables are as nobody has set them; PyTorch hands it a copy
    of the caller's (``torch.autograd.graph._engine_run_backward``, which its compiled functions read too).
    """
    name = _context.get()
    if name is None and torch._C._is_key_in_tls("context"):
        handed: Context = torch._C._get_obj_in_tls("context")
        name = handed.get(_context)
    return name


@cache
def executor(name: str) -> ModuleType:
    """The executor's module.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend's compiler is not installed here.
    """
    try:
        return importlib.import_module(BACKENDS[check_name(name)])
    except ImportError as error:
        raise RuntimeError(
            f"backend={name!r} cannot be used here: Triton is not installed or does not import ({error}). "
            "PyTorch brings it on Linux; elsewhere choose backend='cpu' or 'reference'"
        ) from error


@lru_cache(maxsize=64)
def _check_available(name: str, device: torch.device) -> None:
    executor(name).check_available(device)


def resolve(requested: str | None, device: torch.device) -> str:
    """The backend that :func:`choose` names, known to run on ``device``.

    Raises:
        ValueError: unknown name.
        RuntimeError: it cannot run here: what is missing, and what to choose instead.
    """
    name = choose(requested, device)
    _check_available(name, device)
    return name


@lru_cache(maxsize=8192)
def assign(launch: Launch, name: str) -> tuple[str, str | None]:
    """The backend that will run ``launch`` when ``name`` is chosen, and why it is another one if it is."""
    reason = executor(name).supports(launch)
    return (name, None) if reason is None else ("reference", reason)


@dataclass(eq=False)
class LaunchLog:
    """What ran while a :func:`count_launches` context was open.

    Attributes:
        launches: ``(backend, launch)`` in the order in which they ran.
        kernels: names of the Triton kernels started, one entry a start.
    """

    launches: list[tuple[str, Launch]] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.launches)


_logs: list[LaunchLog] = []  # open contexts; a list, since autograd runs backward launches in threads of its own


@contextmanager
def count_launches() -> Iterator[LaunchLog]:
    """Record every launch that runs, of all threads, while the context is open."""
    log = LaunchLog()
    _logs.append(log)
    try:
        yield log
    finally:
        _logs.remove(log)


@dataclass(eq=False)
class _Clock:
    """An open :func:`clock_launches` context: the clock, and what it has seen."""

    now: Callable[[], Any]
    seen: list[tuple[Launch, Any, Any]] = field(default_factory=list)


_clocks: list[_Clock] = []


@contextmanager
def clock_launches(now: Callable[[], Any]) -> Iterator[list[tuple[Launch, Any, Any]]]:
    """``(launch, before, behind)`` of every launch while the context is open: what ``now()`` gave around it."""
    clock = _Clock(now)
    _clocks.append(clock)
    try:
        yield clock.seen
    finally:
        _clocks.remove(clock)


def record_kernel(name: str) -> None:
    """An executor started a Triton kernel."""
    for log in tuple(_logs):
        log.kernels.append(name)


@dataclass(frozen=True, eq=False)
class _Step:
    """What a plan's run does at a time: a launch, or two that the executor runs as one.

    Attributes:
        launches: one or two.
        runner: the backend.
        run: its function; ``shares``: it takes what launches of one plan leave for each other.
        donated: roles of what is given up. ``dead``: slots forgotten afterwards. ``last``: those it was the last to read.
    """

    launches: tuple[Launch, ...]
    runner: str
    run: Callable[..., Any]
    shares: bool
    donated: frozenset[str]
    dead: frozenset[str]
    last: frozenset[str]

    @cached_property
    def operands(self) -> tuple[tuple[str, str], ...]:
        """``(role, slot)`` of all that is read. Launches that are joined mean the same by the same role."""
        return tuple(dict.fromkeys(named for launch in self.launches for named in launch.operands))

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Slots of all that is made."""
        return tuple(slot for launch in self.launches for _, slot in launch.outputs)

    def then(self, after: _Step) -> _Step | None:
        """This one and the next as one, if the executor runs them so."""
        join = getattr(executor(self.runner), "join", None) if self.runner == after.runner else None
        run = None if join is None else join(*self.launches, *after.launches)
        if run is None:
            return None
        launches, dead = (*self.launches, *after.launches), self.dead | after.dead
        return _Step(launches, self.runner, run, True, _given_up(launches, dead), dead, self.last | after.last)


def _given_up(launches: Sequence[Launch], dead: frozenset[str]) -> frozenset[str]:
    """Roles whose memory may be written over. What is read under two roles cannot be written over under one."""
    operands = dict.fromkeys(named for launch in launches for named in launch.operands)
    read = [slot for _, slot in operands]
    return frozenset(role for role, slot in operands if slot in dead and read.count(slot) == 1)


@lru_cache(maxsize=4096)
def _program(plan: Plan, name: str, joined: bool = False) -> tuple[_Step, ...]:
    """What runs; with ``joined``, launches together where the executor has them so."""
    steps: list[_Step] = []
    for launch, dead, last in zip(plan.launches, plan.dead_after, plan.last_read, strict=True):
        runner, _ = assign(launch, name)
        donated = _given_up((launch,), dead)
        module = executor(runner)
        step = _Step((launch,), runner, module.run, getattr(module, "shares", False), donated, dead, last)
        pair = steps[-1].then(step) if joined and steps and len(steps[-1].launches) == 1 else None
        steps[len(steps) - (pair is not None) :] = [step if pair is None else pair]
    return tuple(steps)


def execute(plan: Plan, tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Run a plan's launches.

    Where one raises, the running statistics and counts of the whole plan are put back to what they were, bit by bit. In the
    CPU's memory they are copied first, or written when all else is done, by executors that ``finish``: whatever was interrupted
    is made good. On a GPU each copy would be a launch of its own, in every step, for a failure that hardly ever comes: a Triton
    kernel that updates them writes aside what they were instead. (To make all launches ready before the first one starts would
    not do: memory can run out at any of them.)

    Args:
        plan: what to run.
        tensors: the tensors the plan reads, by slot.
        name: the chosen backend.

    Returns:
        The plan's results and the slots it keeps, by slot.
    """
    slots = _copied(plan, tensors, name) if plan.updated else ()
    copied = [(tensors[slot], tensors[slot].clone()) for slot in slots]
    shared: dict[str, Any] = {}
    try:
        with _own_types(next(iter(tensors.values())).device.type):
            results = _run(plan, dict(tensors), name, shared)
            for finish in _updates(plan, name)[1] if plan.updated else ():
                finish(shared)
            return results
    except BaseException:  # an interrupt from the keyboard, too
        with torch.no_grad():
            _put_back(plan, tensors, shared)
            for tensor, value in copied:
                tensor.copy_(value)
        raise


def _own_types(device: str) -> AbstractContextManager[Any]:
    """No autocast: launches say their types. A backward may be called inside it, and compute convolutions again."""
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def before_slot(launch: Launch) -> str:
    """Where an executor that ``shares`` leaves what the running statistics were that ``launch`` has updated."""
    return "before " + next(slot for role, slot in launch.operands if role in UPDATED)


@lru_cache(maxsize=4096)
def _updates(plan: Plan, name: str) -> tuple[tuple[tuple[str, bool], ...], tuple[Callable[[dict[str, Any]], None], ...]]:
    """``(slot, shares)`` of what launches update at once, by executors that share or do not; and what is called behind them."""
    at_once, behind = [], {}
    for step in _program(plan, name):
        finish = getattr(executor(step.runner), "finish", None)
        if finish is None:
            at_once += [(slot, step.shares) for role, slot in step.operands if role in UPDATED]
        else:
            behind[step.runner] = finish
    return tuple(at_once), tuple(behind.values())


def _copied(plan: Plan, tensors: Mapping[str, Tensor], name: str) -> Sequence[str]:
    """The slots that no kernel writes aside, or not surely (an interpreted one can stop halfway)."""
    return [slot for slot, shares in _updates(plan, name)[0] if not shares or tensors[slot].device.type == "cpu"]


def _put_back(plan: Plan, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> None:
    """What launches have left under :func:`before_slot`; the last one first, since two may update the same tensors."""
    for launch in reversed(plan.launches):
        updated = {role: tensors[slot] for role, slot in launch.operands if role in UPDATED}
        if not updated or before_slot(launch) not in shared:
            continue
        for role, value in zip(("running_mean", "running_var"), shared[before_slot(launch)].chunk(2), strict=True):
            if role in updated:
                updated[role].copy_(value)
        if "batches" in updated:
            updated["batches"].sub_(1)


def _run(plan: Plan, slots: dict[str, Tensor], name: str, shared: dict[str, Tensor]) -> dict[str, Tensor]:
    for step in _program(plan, name, joined=not _clocks):  # whoever clocks launches wants the time of each
        began = [(clock, clock.now()) for clock in _clocks] if _clocks else ()
        operands = {role: slots[slot] for role, slot in step.operands}
        outputs = step.run(*step.launches, operands, step.donated, *((shared,) if step.shares else ()))
        for clock, start in began:
            clock.seen.append((*step.launches, start, clock.now()))
        for log in tuple(_logs) if _logs else ():
            log.launches.extend((step.runner, launch) for launch in step.launches)
        for slot in step.dead:
            del slots[slot]
        if shared:
            for slot in step.last:
                shared.pop(slot, None)
        if isinstance(outputs, Tensor):
            slots[step.outputs[0]] = outputs
        else:
            slots.update(zip(step.outputs, outputs, strict=True))
    for result, slot in plan.aliases:
        slots[result] = slots[slot]
    return {slot: slots[slot] for slot in (*plan.results, *plan.keep)}


class OtherParametersError(Exception):
    """What a plan was prepared with has other shapes or types now: it is to be made anew."""


class Ready:
    """A plan with all tensors it reads but its inputs: what follows from them alone is done.

    Values of the tensors may change, and where they lie; they are looked at as ever.

    Attributes:
        rows: it takes rows [N, C] as they are, which need not be made images of one pixel.
    """

    __slots__ = ("in_turn", "inputs", "rows", "steps")

    def __init__(self, inputs: tuple[str, ...], steps: tuple[Any, ...]) -> None:
        self.inputs, self.steps = inputs, steps
        self.rows = all(getattr(call, "rows", False) for call, *_ in steps)
        self.in_turn = self._in_turn()

    def _in_turn(self) -> tuple[tuple[Any, bool], ...] | None:
        """The steps with whether the input is the shortcut, where each reads what the one before has made."""
        before = self.inputs[0]
        for _, x, shortcut, out, _ in self.steps:
            if x != before or shortcut not in (None, self.inputs[0]):
                return None
            before = out
        return tuple((call, shortcut is not None) for call, _, shortcut, *_ in self.steps) if before == "out" else None

    @staticmethod
    def of(plan: Plan, name: str, inputs: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Ready | None:
        """``tensors``: what is read besides the ``inputs``, by slot. None where a launch has to be run as ever."""
        steps = []
        loaded = [launch.reads.get("x") for launch in plan.launches if launch.prologue != "identity"]
        if len(set(loaded)) != len(loaded):  # what one makes of it on load is shared with the other
            return None
        for step in _program(plan, name):
            slots = dict(step.operands)
            moving = [role for role, slot in slots.items() if slot not in tensors]
            prepare = getattr(executor(step.runner), "prepare", None)
            if prepare is None or not {"x"} <= {*moving} <= {"x", "shortcut"}:
                return None
            given = {role: tensors[slot] for role, slot in slots.items() if slot in tensors}
            call = prepare(*step.launches, given, step.donated)
            if call is None:
                return None
            steps.append((call, slots["x"], slots.get("shortcut"), step.outputs[0], tuple(step.dead)))
        return Ready(inputs, tuple(steps)) if plan.results == ("out",) and not plan.keep and not plan.aliases else None

    def run(self, *inputs: Tensor) -> Tensor:
        """The plan's result.

        Raises:
            OtherParametersError: what it says; no input has been written to.
        """
        images = inputs[0].dim() == 4
        if self.in_turn is not None:
            x = inputs[0].contiguous(memory_format=torch.channels_last) if images else inputs[0]
            y = x
            for call, adds in self.in_turn:
                y = call(y, x if adds else None)
            return y
        given = [x.contiguous(memory_format=torch.channels_last) for x in inputs] if images else inputs
        slots = dict(zip(self.inputs, given, strict=True))
        for call, x, shortcut, out, dead in self.steps:
            y = call(slots[x], None if shortcut is None else slots[shortcut])
            for slot in dead:
                del slots[slot]
            slots[out] = y
        return slots["out"]


#: The backend whose executor has something to prepare: a launch of Triton's is begun in a handful of microseconds as it is.
PREPARES = "cpu"


def prepares(requested: str | None) -> bool:
    """Whether launches on the CPU may run as they were prepared: nobody counts or clocks them, which then run one by one, nor
    has chosen another backend. (As :func:`chosen`, in one function: asked in front of each chain.)
    """
    if _logs or _clocks:
        return False
    name = requested
    if name is None:
        name = _context.get() or _environment() or PREPARES
    return name == PREPARES or chosen(requested) == PREPARES
