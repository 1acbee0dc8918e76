"""What a forward runs on while it is traced: stand-ins for tensors, and for what is asked of them.

torch.fx's own would let a forward decide by what nobody knows yet. These refuse what would be wrong for the real values, and to
``isinstance(x, torch.Tensor)`` they answer as the tensors will that they stand for.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dis import Instruction, get_instructions, stack_effect
from functools import cache
from types import CodeType, FrameType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn

from .harmless import CannotTrace


class Traces(Protocol):
    """Who runs a forward on stand-ins.

    Attributes:
        running: the modules whose forwards run, the root left out.
        attributes: of stand-ins, that were read so far.
    """

    running: list[nn.Module]
    attributes: list[Attribute]

    def runs_here(self) -> bool:
        """Whether the forward runs now, in this thread."""
        ...

    def take_apart(self, obj: fx.Proxy) -> None:
        """Raise if what is counted or looped over is an argument that may be a container."""
        ...


def _unknown(stand_in: fx.Proxy, frame: FrameType) -> type[Any]:
    """The class of a stand-in for nobody knows what. torch.fx may ask."""
    if not _runs_on(stand_in) or not _asks_for_class(frame):
        return type(stand_in)
    if not frame.f_globals.get("__name__", "").startswith(("torch.", "fused_resnet.")):
        raise CannotTrace("its forward asks for the class of a size, or of another value that is not there yet")
    return type(stand_in)


def _runs_on(stand_in: fx.Proxy) -> bool:
    """Whether a forward runs on it here and now. To all others, who find it among all objects, it is what it is."""
    return cast(Traces, stand_in.tracer).runs_here()


class StandIn(fx.Proxy):
    """A stand-in for any value. ``x += y`` stays what it is: torch.fx would make ``x = x + y`` of it, which whoever else has
    the same x does not see.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            raise CannotTrace(f"its forward sets {name} of a tensor")
        super().__setattr__(name, value)

    __class__ = property(lambda self: _unknown(self, sys._getframe(1)))

    def __len__(self) -> int:
        cast(Traces, self.tracer).take_apart(self)
        return super().__len__()

    def __getattr__(self, name: str) -> Any:
        return Attribute(self, name)

    def __hash__(self) -> int:
        if _runs_on(self):
            raise CannotTrace("its forward looks something up by a tensor, or by what a tensor is")
        return id(self)


class Attribute(fx.proxy.Attribute):
    """An attribute of a stand-in, which becomes a node when something is made of it.

    Of what nothing is made, a decision may have been: ``x.dtype is torch.float32``, ``x.grad_fn is None``. Such ones are found
    among :attr:`Traces.attributes`.
    """

    def __init__(self, root: fx.Proxy, name: str) -> None:
        super().__init__(root, name)
        tracer = cast(Traces, self.tracer)
        self.called, self.running = False, tracer.running.copy()
        tracer.attributes.append(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        return super().__call__(*args, **kwargs)

    def __hash__(self) -> int:
        if _runs_on(self):
            raise CannotTrace("its forward looks something up by what a tensor is")
        return id(self)

    __class__ = property(lambda self: _unknown(self, sys._getframe(1)))


def _asks_for_class(frame: FrameType) -> bool:
    """Whether Python code asks an object for its class just now: not a function written in C that it calls.

    Raises:
        CannotTrace: that cannot be told, or it asks for ``torch.FloatTensor`` or its like, which reads the tensor's memory.
    """
    code = frame.f_code
    found = _asking(code).get(frame.f_lasti)
    if found and any(type(getattr(torch, name, None)) is _LEGACY for name in code.co_names):
        raise CannotTrace("its forward asks for an old type of tensors")
    if found is None and not _CLASS_NAMES.isdisjoint(code.co_names):
        raise CannotTrace("its forward asks for a class in a way that is not understood")
    return bool(found)


#: The type of ``torch.FloatTensor``.
_LEGACY = type(torch.FloatTensor)
_CLASS_NAMES = frozenset(("isinstance", "issubclass"))


@cache
def _asking(code: CodeType) -> dict[int, bool | None]:
    """Offset of each instruction that may ask for a class -> whether Python's own functions do; None: it cannot be told."""
    steps = list(get_instructions(code))
    found: dict[int, bool | None] = {}
    for at, step in enumerate(steps):
        if step.opname == "MATCH_CLASS" or (step.opname == "LOAD_ATTR" and step.argval == "__class__"):
            found[step.offset] = True
        elif step.opname.startswith("CALL") and "INTRINSIC" not in step.opname:
            found[step.offset] = _calls_isinstance(steps, at)
        else:
            found[step.offset] = False
    return found


def _calls_isinstance(steps: list[Instruction], at: int) -> bool | None:
    """Whether a call is of isinstance or issubclass, by the instruction that put the first of what it takes on the stack."""
    wanted = 1 - stack_effect(steps[at].opcode, steps[at].arg)
    for step in reversed(steps[:at]):
        if "JUMP" in step.opname:
            return None
        wanted -= stack_effect(step.opcode, step.arg)
        if wanted <= 0:
            return step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in _CLASS_NAMES
    return None


class TensorStandIn(StandIn):
    """A stand-in that says it is a tensor: ``isinstance(x, Tensor)`` must decide as it will for the real one.

    It says so to Python alone. What is written in C would believe it as well, and read memory that is not there.
    """

    __class__ = property(lambda self: Tensor if _runs_on(self) and _asks_for_class(sys._getframe(1)) else type(self))

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            cast(Traces, self.tracer).take_apart(self)  # it may be no tensor
            raise AttributeError(f"a tensor has no {name}")
        return super().__getattr__(name)


def _written(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(StandIn, f"__{_name}__", _written(getattr(operator, _name)))
