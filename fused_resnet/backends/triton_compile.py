"""Compiles launches ahead of time, for any GPU and on a machine without one.

The arguments are those that :mod:`.triton` would start the kernel with (:func:`.triton.plan_start`, :func:`.triton.bind`), on
tensors without memory; here they are only turned into the compiler's signature. Triton must not be interpreting: run this in a
process without TRITON_INTERPRET.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, get_cache_invalidating_env_vars, get_cache_key, make_backend
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import Launch
from ..tuning import Tile
from ..tuning.tile import Strip
from . import triton_apart
from .cubin import read_cubins
from .triton import GRADIENTS, plan_start, supports
from .triton_arguments import weightless_operands
from .triton_start import Start, outputs_of

_DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class CompiledLaunch:
    """What the compiler made of a launch.

    Attributes:
        target: ``sm_90``, ``gfx942`` ...
        registers: a thread's (vector registers on AMD).
        spills: bytes of local memory a thread (scratch on AMD).
        shared: bytes of shared memory a program.
        num_warps, num_stages: what it was compiled with.
        tensor_memory: columns of tensor memory a program (sm_100; of 512).
        assembly: SASS, or AMD's assembly.
        ttgir: Triton's last form in front of the target's own, where buffers and layouts can be read.
        start: the kernel, its constants and its grid.
    """

    target: str
    registers: int
    spills: int
    shared: int
    num_warps: int
    num_stages: int
    tensor_memory: int
    assembly: str
    ttgir: str
    start: Start

    def count(self, pattern: str) -> int:
        """Occurrences of an instruction, a regular expression, in the assembly."""
        return len(re.findall(rf"\b(?:{pattern})", self.assembly))

    @property
    def tensor_core_instructions(self) -> int:
        """Matrix instructions of any generation: HMMA, HGMMA, UTCHMMA (and relatives), MFMA, WMMA."""
        return self.count(r"HMMA|[QIO]MMA|[HQI]GMMA|UTC\w*MMA|v_s?mfma|v_s?wmma")

    @property
    def tma_loads(self) -> int:
        """Bulk tensor loads (Hopper and later)."""
        return self.count("UTMALDG")


def gpu_target(arch: str) -> GPUTarget:
    """Triton's name for ``sm_90``, ``gfx942`` ...

    Raises:
        ValueError: it is neither ``sm_`` and a number nor ``gfx`` and a name.
    """
    if re.fullmatch(r"sm_\d{2,3}", arch):
        return GPUTarget("cuda", int(arch[3:]), 32)
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", arch):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ValueError(f"target must look like 'sm_90' or 'gfx942', got {arch!r}")


@dataclass(frozen=True)
class Prepared:
    """A launch as the compiler gets it.

    Attributes:
        gpu, source, options: what :func:`triton.compile` takes.
        start: the kernel, its constants and its grid.
    """

    gpu: GPUTarget
    source: ASTSource
    options: Mapping[str, Any]
    start: Start

    @property
    def key(self) -> str:
        """Triton's own: the same for launches that are one compiled kernel, another after a change of the kernel's source, its
        constants or options, or of Triton.
        """
        backend = make_backend(self.gpu)
        options = backend.parse_options(dict(self.options))
        key = get_cache_key(self.source, backend, options, env_vars=get_cache_invalidating_env_vars())
        return hashlib.sha256(key.encode()).hexdigest()


def unsupported(launch: Launch) -> str | None:
    """None, or why there is no kernel for a launch, or a piece of one."""
    return None if launch.kind in triton_apart.KINDS else supports(launch)


def prepare(
    launch: Launch,
    target: str,
    tile: Tile | Strip | None = None,
    *,
    tf32: bool = False,
    parameters: torch.dtype = torch.float32,
) -> Prepared:
    """A launch made ready for the compiler; arguments and errors are those of :func:`compile_launch`."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("compile_launch needs Triton's compiler; TRITON_INTERPRET is set in this process")
    gpu = gpu_target(target)
    start, arguments = _start_of(launch, target, tile, tf32, parameters)
    options = {"num_warps": start.num_warps, "num_stages": start.num_stages}
    return Prepared(gpu, source_of(start.kernel, arguments, gpu.backend), options, start)


def compile_launch(
    launch: Launch,
    target: str,
    tile: Tile | Strip | None = None,
    *,
    tf32: bool = False,
    parameters: torch.dtype = torch.float32,
) -> CompiledLaunch:
    """Compile the kernel of a launch for ``target``.

    Args:
        launch: of a kind :func:`.triton.supports`.
        target: ``sm_80``, ``sm_90``, ``gfx942`` ...
        tile: instead of the one the rule chooses for the target.
        tf32: as if PyTorch's settings allowed tf32.
        parameters: type of the per-filter vectors.

    Raises:
        RuntimeError: Triton is interpreting in this process.
        ValueError: unknown target.
    """
    return compile_prepared(prepare(launch, target, tile, tf32=tf32, parameters=parameters), target)


def compile_prepared(prepared: Prepared, target: str) -> CompiledLaunch:
    """Compile what :func:`prepare` made for ``target``."""
    return read_built([(prepared, build(prepared))], target)[0]


def build(prepared: Prepared) -> Any:
    """Triton's compiled kernel, not read yet."""
    with _as_if_on(prepared.gpu):
        return triton.compile(prepared.source, target=prepared.gpu, options=dict(prepared.options))


def read_built(built: Sequence[tuple[Prepared, Any]], target: str) -> list[CompiledLaunch]:
    """Read what :func:`build` made, all for one target."""
    if target.startswith("sm_"):
        read = [
            (cubin.registers, cubin.stack, cubin.assembly) for cubin in read_cubins([c.asm["cubin"] for _, c in built], target)
        ]
    else:
        read = [_read_amd(compiled.asm["amdgcn"]) for _, compiled in built]
    return [
        CompiledLaunch(
            target=target,
            registers=registers,
            spills=spills,
            shared=compiled.metadata.shared,
            num_warps=prepared.start.num_warps,
            num_stages=prepared.start.num_stages,
            tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
            assembly=assembly,
            ttgir=compiled.asm["ttgir"],
            start=prepared.start,
        )
        for (prepared, compiled), (registers, spills, assembly) in zip(built, read, strict=True)
    ]


def _read_amd(assembly: str) -> tuple[int, int, str]:
    """Registers and bytes of scratch of a thread, and the assembly, which states both."""
    numbers = [re.search(rf"\.{name}:\s+(\d+)", assembly) for name in ("vgpr_count", "private_segment_fixed_size")]
    assert all(numbers), "registers and scratch are not in the compiler's output"
    registers, scratch = (int(number[1]) for number in numbers if number)
    return registers, scratch, assembly


@dataclass(frozen=True)
class _Elsewhere:
    """Stands where Triton keeps the driver of this machine's GPU."""

    gpu: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.gpu


@contextmanager
def _as_if_on(gpu: GPUTarget) -> Iterator[None]:
    """Kernels that ask what they are compiled for (``triton.language.target_info``) are told ``gpu``, not this machine's."""
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Elsewhere(gpu))
    try:
        yield
    finally:
        driver._active = before


def _start_of(
    launch: Launch, target: str, tile: Tile | Strip | None, tf32: bool, parameters: torch.dtype
) -> tuple[Start, dict[str, Any]]:
    """The start of a launch and its arguments, on tensors without memory."""
    if launch.kind in triton_apart.KINDS:
        assert tile is None or isinstance(tile, Strip)
        start = triton_apart.plan_start(launch, target, tile)
    elif launch.kind in GRADIENTS:
        from . import triton_gradients as gradients

        assert tile is None or isinstance(tile, Tile)
        start = gradients.plan_start(launch, target, tile, tf32=tf32)
    else:
        start = plan_start(launch, target, tile, tf32=tf32)
    operands, meta = weightless_operands(launch, parameters), torch.device("meta")
    return start, dict(start.bind(start, launch, operands, outputs_of(launch, meta), start.workspace(meta)))


def tile_of(start: Start) -> Tile | Strip | None:
    """The tile that a start was planned with (a pointwise convolution's as one row); None for a kernel that has none."""
    constants = start.constants
    if "TILE" in constants:
        tile: Tile = constants["TILE"]
        return replace(tile, splits=start.numbers.get("shares", 1))  # they change with the batch: no constant
    if "CHANNELS" in constants:
        return Strip(constants["PIXELS"], constants["CHANNELS"], constants.get("STEPS", 1), start.num_warps)
    return None


def source_of(kernel: Any, arguments: dict[str, Any], backend: str = "cuda") -> ASTSource:
    """A kernel and the types of its arguments, specialised as Triton's launcher would.

    1 is a constant, a multiple of 16 is known to be one unless the kernel asks not to be told, and AMD's backend knows of
    tensors under 2 GiB that 32-bit offsets do.
    """
    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[str | int]]] = {}

    def describe(value: Any, path: tuple[int, ...], aligned: bool) -> Any:
        if isinstance(value, tuple):
            members = [describe(member, (*path, i), aligned) for i, member in enumerate(value)]
            return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{_DTYPES[value.base.dtype]}{list(value.block_shape)}>"
        if isinstance(value, Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            if backend == "hip" and value.numel() * value.dtype.itemsize < 1 << 31:
                attributes[path].append(["tt.pointer_range", 32])
            return f"*{_DTYPES[value.dtype]}"
        if isinstance(value, float):
            return "fp32"
        if value is None or value == 1:
            constants[path] = value
            return "constexpr"
        if value % 16 == 0 and aligned:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if value < 1 << 31 else "i64"

    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        if parameter.is_constexpr:
            constants[(i,)] = arguments[name]
            types[name] = "constexpr"
        else:
            types[name] = describe(arguments[name], (i,), not parameter.do_not_specialize_on_alignment)
    return ASTSource(kernel, types, constants, attributes)
