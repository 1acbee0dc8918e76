"""A kernel's arguments: which tensor stands where is found out once a start, and filled in at every call.

Between two calls of a launch nothing but its tensors changes. So the function that names a kernel's arguments (``bind``) is
asked once, about tensors without memory. Each value in its answer is one of them, a descriptor or a tuple of such, or stays as
it is; where they are is :class:`Arguments`. The compiler, ahead of time, is given the same answer (:mod:`.triton_compile`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import Geometry, Launch


def weightless(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A channels_last tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def weightless_operands(launch: Launch, parameters: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The operands of a launch as tensors without memory."""
    g = launch.geometry
    shapes = {role: g.x_shape for role in ("x", "a_previous", "z_previous", "dshortcut")}
    shapes |= {role: g.y_shape for role in ("y", "dy", "dz", "dout", "out", "shortcut", "t", "indices", "raw")}
    if isinstance(g, Geometry):
        shapes["w"] = g.w_shape

    def weightless_operand(role: str) -> Tensor:
        if role in shapes:
            return weightless(shapes[role], torch.uint8 if role == "indices" else launch.dtype)
        if role in ("batches", "count"):
            return torch.empty(1, dtype=torch.int64 if role == "batches" else torch.float32, device="meta")
        channels = g.C if role.startswith("x_") else g.y_shape[1]
        # A mean beside its invstd is of the batch; beside a variance it is a BatchNorm's own.
        made_here = role.endswith(("invstd", "sum", "dot")) or f"{role.removesuffix('mean')}invstd" in launch.roles
        return torch.empty(channels, dtype=torch.float32 if made_here else parameters, device="meta")

    return {role: weightless_operand(role) for role in launch.roles}


#: Whether this Triton's descriptors can round: those of 3.6 cannot.
ROUNDS = "round_f32_to_tf32" in TensorDescriptor.__dataclass_fields__


@dataclass(frozen=True)
class View:
    """A tensor as a descriptor sees it: extents and strides in elements, slowest first, and the block loaded at once.

    Attributes:
        rounded: fp32 elements are rounded to tf32 as they are loaded, by the hardware, for nothing. Where they are factors of a
            product in tf32 as they are: it cuts off what it does not use, which makes all products a little smaller.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    rounded: bool = False

    def of(self, base: Tensor) -> Any:
        """The descriptor of ``base``."""
        rounded = {"round_f32_to_tf32": True} if self.rounded and base.dtype == torch.float32 and ROUNDS else {}
        return TensorDescriptor(base, list(self.shape), list(self.strides), list(self.block), **rounded)


class Arguments:
    """Where a launch's tensors stand among the arguments of its kernel.

    All values lie in one list: the tensors of a call, then what is the same in every call, then what is made of those before
    it: descriptors and tuples. A tuple, and in the end the arguments themselves, are picked from that list by their places.

    Attributes:
        operands, outputs: roles of those that are taken, in order; behind them come those of the workspace that there are.
        vectors: how many operands at the front have one dimension; kernels read these as dense.
    """

    def __init__(
        self,
        names: Sequence[str],
        bound: Mapping[str, Any],
        operands: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        space: Sequence[Tensor | None],
    ) -> None:
        """Find the tensors that follow, all of them without memory, in what ``bind`` says of them.

        Args:
            names: the kernel's parameters.
            bound: its arguments by name.
        """
        vectors = [role for role, tensor in operands.items() if tensor.dim() == 1]
        self.operands = (*vectors, *(role for role in operands if role not in vectors))
        self.outputs, self.vectors = tuple(outputs), len(vectors)
        tensors = self.tensors(operands, outputs, space)
        self._places = {id(tensor): place for place, tensor in enumerate(tensors)}  # two of the workspace may be one
        arguments = tuple(bound[name] for name in names)
        self._constants = list(_constants(arguments))
        self._steps: list[Callable[[list[Any]], Any]] = []
        self._before_steps = len(tensors) + len(self._constants)
        self._pick = self._picked(arguments, iter(range(len(tensors), self._before_steps)))

    def _picked(self, values: tuple[Any, ...], constants: Iterator[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
        """What makes a tuple of the list, as there is a tensor in it. ``constants``: places of the next ones."""
        places = []
        for value in values:
            if isinstance(value, Tensor):
                places.append(self._places[id(value)])
            elif not _has_tensor(value):
                places.append(next(constants))
            else:
                described = isinstance(value, TensorDescriptor)
                step = _described(value, self._places[id(value.base)]) if described else self._picked(value, constants)
                self._steps.append(step)
                places.append(self._before_steps + len(self._steps) - 1)
        pick = itemgetter(*places) if len(places) > 1 else lambda listed, place=places[0]: (listed[place],)
        kind = type(values)
        return pick if kind is tuple else lambda listed: tuple.__new__(kind, pick(listed))  # of whatever NamedTuple it is

    def tensors(
        self, operands: Mapping[str, Tensor], outputs: Mapping[str, Tensor], space: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """All tensors of a call, in order."""
        given = [operands[role] for role in self.operands]
        return (*given, *[outputs[role] for role in self.outputs], *[tensor for tensor in space if tensor is not None])

    def filled(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The arguments in the kernel's order, of these tensors."""
        listed = [*tensors, *self._constants]
        for step in self._steps:
            listed.append(step(listed))
        return self._pick(listed)


def _has_tensor(value: Any) -> bool:
    return isinstance(value, (Tensor, TensorDescriptor)) or (isinstance(value, tuple) and any(map(_has_tensor, value)))


def _constants(values: tuple[Any, ...]) -> Iterator[Any]:
    """What of a tuple, at any depth, is the same in every call, in order."""
    for value in values:
        if not _has_tensor(value):
            yield value
        elif isinstance(value, tuple):
            yield from _constants(value)


def _described(descriptor: Any, place: int) -> Callable[[list[Any]], Any]:
    """What makes such a descriptor of a tensor in the list: the one that was checked when it was made, with another base."""
    fields = dict(vars(descriptor))

    def describe(listed: list[Any]) -> Any:
        base = listed[place]
        if base.data_ptr() % 16:
            raise AssertionError("the base of a descriptor must start at a multiple of 16 bytes")
        made = object.__new__(TensorDescriptor)
        vars(made).update(fields, base=base)
        return made

    return describe
