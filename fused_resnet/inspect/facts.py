"""Facts about one compiled kernel: what is read off the compiler's output, as data that can be stored."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from .assembly import Loop, Reading, read


@dataclass(frozen=True)
class Facts:
    """What the compiler made of a kernel for one architecture; *compiled*, nothing ran.

    Attributes:
        kernel: name of the Triton function.
        registers: a thread's (vector registers on AMD).
        spills: bytes of local memory a thread (scratch on AMD).
        shared: bytes of shared memory a program.
        tensor_memory: columns of tensor memory a program, of 512.
        num_warps, num_stages: what the compiler was told.
        stages: buffers in shared memory that the pipelined operands rotate through, the fewest and the most of them; (1, 1)
            where nothing is pipelined through shared memory (on AMD loads in flight wait in registers).
        reading: of the assembly.
    """

    kernel: str
    registers: int
    spills: int
    shared: int
    tensor_memory: int
    num_warps: int
    num_stages: int
    stages: tuple[int, int]
    reading: Reading

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Facts:
        """The inverse of :meth:`as_json`."""
        reading = dict(data["reading"])
        reading["loads"] = tuple(reading["loads"])
        reading["loop"] = Loop(**reading["loop"]) if reading["loop"] else None
        return Facts(**{**data, "stages": tuple(data["stages"]), "reading": Reading(**reading)})

    @property
    def short(self) -> Facts:
        """Without the list of opcodes."""
        loop = self.reading.loop
        return self if loop is None else replace(self, reading=replace(self.reading, loop=replace(loop, opcodes={})))


def facts_of(compiled: Any) -> Facts:
    """What there is to know about a :class:`fused_resnet.backends.triton_compile.CompiledLaunch`."""
    return Facts(
        kernel=compiled.start.kernel.__name__,
        registers=compiled.registers,
        spills=compiled.spills,
        shared=compiled.shared,
        tensor_memory=compiled.tensor_memory,
        num_warps=compiled.num_warps,
        num_stages=compiled.num_stages,
        stages=pipelined_stages(compiled.ttgir),
        reading=read(compiled.assembly),
    )


_BUFFERS = re.compile(r"(%[\w#]+) = ttg\.local_alloc\s*:\s*\(\) -> !ttg\.memdesc<((?:\d+x)+)(\w+),")


def pipelined_stages(ttgir: str) -> tuple[int, int]:
    """The fewest and the most buffers that an operand of the main loop rotates through.

    A pipelined operand is one allocation ``[buffers, rows, columns]`` of which one buffer is taken by its index. Barriers (i64)
    and vectors of channels are not counted.
    """
    indexed = set(re.findall(r"ttg\.memdesc_index (%[\w#]+)\[", ttgir))
    numbers = []
    for name, extents, element in _BUFFERS.findall(ttgir):
        sizes = [int(size) for size in extents.rstrip("x").split("x")]
        if name in indexed and element != "i64" and len(sizes) > 2:
            numbers.append(sizes[0])
    return (min(numbers), max(numbers)) if numbers else (1, 1)
