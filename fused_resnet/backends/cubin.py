"""Reads NVIDIA's compiled kernels with the tools in Triton's wheel, many at a time."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton


@dataclass(frozen=True)
class Cubin:
    """A kernel: registers of a thread, bytes of its stack, and its SASS."""

    registers: int
    stack: int
    assembly: str


def read_cubins(cubins: Sequence[bytes], arch: str) -> list[Cubin]:
    """Registers, stack and SASS of kernels for one architecture, ``sm_90`` ...

    The disassembler takes a third of a second to begin and a twentieth for a kernel: all code goes through it at once, end to
    end, as plain instructions (``tests/test_inspect_compiling.py`` holds the result to what it says of a kernel alone).
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel")
        numbers = []
        for cubin in cubins:
            path.write_bytes(cubin)
            usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
            numbers.append((_field(usage, r"REG:(\d+)"), _field(usage, r"STACK:(\d+)")))
        codes = [code_of(cubin) for cubin in cubins]
        path.write_bytes(b"".join(codes))
        binary = f"SM{arch.removeprefix('sm_')}{'a' if int(arch.removeprefix('sm_')) >= 90 else ''}"
        listing = _tool("nvdisasm", "-b", binary, str(path))
    texts = split_listing(listing, [len(code) for code in codes])
    return [Cubin(*pair, text) for pair, text in zip(numbers, texts, strict=True)]


def code_of(cubin: bytes) -> bytes:
    """The section of an ELF file with the kernel's instructions: ``.text.`` and its name."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * index) for index in range(number)]
    strings = sections[names][4]
    for name, _, _, _, offset, length in sections:
        if cubin.startswith(b".text.", strings + name):
            return cubin[offset : offset + length]
    raise ValueError("no code in the compiler's output")


_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/(.*)$")
#: How an instruction is scheduled, which Triton 3.6's disassembler writes behind those of sm_120: ``&req={1} &wr=0x0 ?trans5``.
_SCHEDULE = re.compile(r"(?:\s+(?:&\w+=(?:\{[\d,]*\}|\w+)|\?\w+))+\s*;")
#: What may name an address of the code.
_JUMP = re.compile(r"\b(?:BRA|JMP|CALL|BSSY|BRX|WARPSYNC\.COLLECTIVE)\S*\s.*?\b0x([0-9a-f]+)\s*;")


def split_listing(listing: str, lengths: Sequence[int]) -> list[str]:
    """A listing of several kernels laid end to end, ``lengths`` bytes each, as one listing a kernel.

    Addresses begin at 0 again, and places that are jumped to get labels, ``.L_0``, as the disassembler gives them where it is
    shown one kernel.
    """
    lines = [(int(match[1], 16), match[2]) for match in map(_LINE.match, listing.splitlines()) if match]
    texts, base, at = [], 0, 0
    for length in lengths:
        own = []
        while at < len(lines) and lines[at][0] < base + length:
            own.append((lines[at][0] - base, _SCHEDULE.sub(" ;", lines[at][1])))
            at += 1
        texts.append(_with_labels(own, base))
        base += length
    return texts


def _with_labels(lines: Sequence[tuple[int, str]], base: int) -> str:
    jumps = {}
    addresses = {address for address, _ in lines}
    for address, text in lines:
        jump = _JUMP.search(text)
        if jump and int(jump[1], 16) - base in addresses:
            jumps[address] = int(jump[1], 16) - base
    labels = {target: f".L_{number}" for number, target in enumerate(sorted(set(jumps.values())))}
    out = []
    for address, text in lines:
        if address in labels:
            out.append(f"{labels[address]}:")
        if address in jumps:
            text = re.sub(r"\b0x[0-9a-f]+(\s*;)", rf"`({labels[jumps[address]]})\1", text, count=1)
        out.append(f"        /*{address:04x}*/{text}")
    return "\n".join(out) + "\n"


def _tool(name: str, *arguments: str) -> str:
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _field(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in the compiler's output"
    return int(match[1])
