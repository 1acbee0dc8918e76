"""Whether modules are as they were when something was read off them, in a few microseconds a module.

A fused module looks at its modules at each call: one may have been replaced, switched to training, given a hook, its parameters
moved. Reading a chain takes some hundred Python calls; seeing that nothing has changed takes a handful. So what was read is
remembered together with what it was read from (:class:`Watched`), and read again when anything of that differs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import nn

#: The attribute of a fused module that is its :class:`Memory`.
ATTRIBUTE = "fused_seen"
_PLAIN = (type(None), bool, int, float, str)
#: What every module has, of which what matters is looked at one by one; and the memory, which must not refer to itself.
_OWN = frozenset(vars(nn.Module())) | {ATTRIBUTE}
_OFTEN = ("training", "_is_full_backward_hook")  # two at least, so that an itemgetter gives a tuple
#: What the forwards of PyTorch's own classes do not read, sizes that their tensors have anyway. (The last is read where the
#: padding is not of zeros, and says no more than the padding does.) Looking at them took a third of the time.
_IDLE: dict[type[nn.Module], frozenset[str]] = {
    **dict.fromkeys(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        frozenset(
            ("in_channels", "out_channels", "kernel_size", "transposed", "output_padding", "_reversed_padding_repeated_twice")
        ),
    ),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), frozenset(("num_features", "affine"))),
    nn.Linear: frozenset(("in_features", "out_features")),
}


class CannotWatchError(Exception):
    """A module has attributes whose change could not be seen."""


def _copied(value: Any) -> Any:
    """A value that stays as it is, of which ``==`` asks no tensor.

    Raises:
        CannotWatchError: it is no plain value, nor a container of such.
    """
    if type(value) in _PLAIN:
        return value
    if type(value) is tuple:
        copied = tuple([_copied(part) for part in value])
        # Itself, where nothing in it can change: two that are one object are equal at a glance.
        return value if all(copy is part for copy, part in zip(copied, value)) else copied
    if type(value) is list:
        return [_copied(part) for part in value]
    if type(value) is dict:
        return {_copied(key): _copied(part) for key, part in value.items()}
    raise CannotWatchError(type(value).__name__)


def _changes(value: Any) -> bool:
    """Whether an object of this kind may hold other things the next time, being the same object."""
    return isinstance(value, (tuple, list, dict, set, frozenset))


class Watched:
    """One module as it was: its class, plain attributes, objects, children, parameters and buffers, and that nobody hooks in.

    Attributes are compared by value where they are numbers, texts or containers of such, by identity where they are objects;
    tensors by identity, address, shape and strides: a parameter that was moved, cast, cut or turned is the same object. Values
    of parameters are not looked at.
    """

    __slots__ = (
        *("brief", "children", "count", "kind", "names", "objects", "objects_of", "uncalled", "values", "values_of"),
        *("matrices", "tensors", "vectors"),
    )

    def __init__(self, module: nn.Module, uncalled: bool = False, brief: bool = False) -> None:
        """Args:
            module: the module, as it is; not referred to.
            uncalled: it is not called as such, or calls its hooks itself: they do not matter.
            brief: it is called, and others read nothing of it but its class, its plain attributes and its hooks. Not where it
                has children, objects, or a parameter or buffer that is None: whether it is one may be read.

        Raises:
            CannotWatchError: not everything it has can be compared.
        """
        own = module.__dict__
        values = list(_OFTEN)
        objects: list[str] = []
        idle = _IDLE.get(type(module), ())
        for name, value in own.items():
            if name not in _OWN and name not in idle:
                (values if type(value) in _PLAIN or _changes(value) else objects).append(name)
        self.kind = type(module)
        self.count = len(own)
        self.values_of = itemgetter(*values)
        self.values = tuple(_copied(own[name]) for name in values)
        self.objects_of = tuple(objects)
        self.objects = tuple(own[name] for name in objects)
        self.children = dict(own["_modules"])
        self.names = tuple(self.children)
        self.tensors = (*own["_parameters"].items(), *own["_buffers"].items())
        self.uncalled = uncalled
        self.brief = brief and not (self.children or objects or any(tensor is None for _, tensor in self.tensors))
        try:
            tensors = [tensor for _, tensor in self.tensors if tensor is not None]
            places = [(tensor, tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors]
            self.vectors = tuple(place for place in places if len(place[2]) < 2)
            self.matrices = tuple(place for place in places if len(place[2]) >= 2)
        except RuntimeError as error:  # of a transform, or without memory
            raise CannotWatchError(str(error)) from None

    def same(self, module: nn.Module) -> bool:
        """Whether the module is what was watched, or cannot be told from it."""
        return unchanged(((module, self),))


#: Whose places :func:`unchanged` looks at.
ALL, MATRICES, NONE = 2, 1, 0


def unchanged(seen: Iterable[tuple[nn.Module, Watched]], places: int = ALL) -> bool:
    """Whether modules are what was watched, or cannot be told from it.

    One function for all of them: a chain of three layers has ten, and where a network fills the caches each call costs a
    microsecond.

    Args:
        seen: the modules.
        places: whose address, shape and strides are compared: of ``ALL`` tensors, of ``MATRICES``, which have more than one
            dimension, or of ``NONE``, where the caller looks at those of all tensors that matter to him.
    """
    for module, was in seen:
        own = module.__dict__
        if module.__class__ is not was.kind or len(own) != was.count:
            return False
        if was.brief:
            try:
                if was.values_of(own) != was.values or own["_forward_hooks"] or own["_forward_pre_hooks"]:
                    return False
            except KeyError:
                return False
            continue
        children = own["_modules"]
        if children != was.children:
            return False
        if children and tuple(children) != was.names:  # dicts in another order are equal
            return False
        if not was.uncalled and (
            own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        ):
            return False
        try:
            if was.values_of(own) != was.values:
                return False
            if was.objects_of:
                for name, value in zip(was.objects_of, was.objects):
                    if own[name] is not value:
                        return False
        except KeyError:
            return False
        parameters, buffers = own["_parameters"], own["_buffers"]
        if not was.tensors:
            if parameters or buffers:
                return False
            continue
        if len(parameters) + len(buffers) != len(was.tensors):
            return False
        for name, tensor in was.tensors:
            if (parameters[name] if name in parameters else buffers.get(name)) is not tensor:
                return False
        if places:
            for tensor, address, shape, strides in was.matrices:
                if tensor.data_ptr() != address or tensor.shape != shape or tensor.stride() != strides:
                    return False
            if places == ALL:
                for tensor, address, shape, strides in was.vectors:
                    if tensor.data_ptr() != address or tensor.shape != shape or tensor.stride() != strides:
                        return False
    return True


class Children:
    """The children of a module and of those on the way to some inside it, as they were: for what is a matter of speed, and of
    which modules there are.
    """

    __slots__ = ("inner", "own")

    def __init__(self, module: nn.Module, inside: Iterable[nn.Module]) -> None:
        """``module``: not referred to."""
        wanted = set(inside)
        paths = [name.split(".") for name, inner in module.named_modules(remove_duplicate=False) if inner in wanted]
        above = {".".join(names[:depth]) for names in paths for depth in range(1, len(names))}
        self.own = dict(module._modules)
        self.inner = tuple((outer, dict(outer._modules)) for outer in map(module.get_submodule, sorted(above)))

    def same(self, module: nn.Module) -> bool:
        """Whether they are the same modules, in whatever order."""
        return module._modules == self.own and all([outer._modules == children for outer, children in self.inner])


@dataclass(frozen=True, eq=False)
class _Entry:
    value: Any
    itself: Watched
    others: tuple[tuple[nn.Module, Watched], ...]

    def holds(self, module: nn.Module, places: int = ALL) -> bool:
        return unchanged(((module, self.itself), *self.others), places)


class Memory:
    """What was read off a module, by what it is; an attribute of it. Copies and pickles start empty.

    A child is watched as the object it was. So whoever remembers something lists the children on the way to it as well. Where
    one thing differs, all of a module is forgotten.

    Attributes:
        little: how much work the module is, see :class:`fused_resnet.fused.Little`.
        whole: how often it was called, see :class:`fused_resnet.whole.Tries`.
    """

    __slots__ = ("entries", "little", "whole")

    def __init__(self) -> None:
        self.entries: dict[Any, _Entry] = {}
        self.little: Any = None
        self.whole: Any = None

    @staticmethod
    def of(module: nn.Module) -> Memory:
        """The memory of a module, made if it has none. Under torch.jit.trace, to which an attribute more is another class, it
        does not stay.
        """
        memory: Memory | None = module.__dict__.get(ATTRIBUTE)
        if memory is None:
            memory = Memory()
            if torch._C._get_tracing_state() is None:
                module.__dict__[ATTRIBUTE] = memory
        return memory

    def recall(self, what: Any, module: nn.Module, places: int = ALL) -> Any:
        """What was remembered, or None if the module or any of the others differs from what it was; see :func:`unchanged`."""
        entry = self.entries.get(what)
        if entry is None:
            return None
        if entry.holds(module, places):
            return entry.value
        self.entries.clear()
        return None

    def remember(
        self, what: Any, value: Any, module: nn.Module, others: Iterable[nn.Module], called: Iterable[nn.Module] = ()
    ) -> None:
        """Remember ``value`` for as long as the module and the others stay as they are; of those that are ``called`` only what
        is read of them meanwhile, see :class:`Watched`.
        """
        brief = set(called)
        try:
            itself = Watched(module, uncalled=True)
            seen = tuple((other, Watched(other, brief=other in brief)) for other in dict.fromkeys(others))
        except CannotWatchError:
            return
        self.entries[what] = _Entry(value, itself, seen)

    def __deepcopy__(self, memo: Any) -> Memory:
        return Memory()

    def __reduce__(self) -> Any:
        return Memory, ()
