"""What all Triton launches share: a start, the memory around it, and where it happens.

Triton's own start of a kernel (``kernel[grid](...)``) binds the arguments' names, asks of each what it specialises on, and
looks the compiled kernel up by the text of all of that. With some twenty compile-time arguments this is most of what a launch
costs the host. A :class:`Start` fixes all of it but the tensors. So it keeps what Triton gave back the first time, by what
Triton itself says of the tensors (types, and which addresses are multiples of 16 bytes), and a later call starts that compiled
kernel with the same arguments: :func:`begin`. tests/test_starts.py holds the two ways to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import ceil, prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.compiler.compiler import make_backend
from triton.runtime import JITFunction, jit

from ..kernels import epilogues
from ..kernels.boxes import EXTENTS, Depths
from ..kernels.finish import Memory
from ..launch import Geometry, Launch
from . import before_slot, record_kernel, workspace
from .derived import channels_last_filters
from .triton_arguments import Arguments, View, weightless_operands

#: Roles of outputs that are a number a channel; all others but these are activations. fp32, like all sums and statistics.
PER_CHANNEL = frozenset(
    {"mean", "invstd", "var", "sum", "dot", "shortcut_dot", "dt_sum", "dside_sum", "sum_previous", "dot_previous"}
    | {"dbias", "dgamma", "dbeta"}
)


class Space(NamedTuple):
    """Memory of one launch on the current stream: what :class:`Start` says it needs, None where that is nothing.

    ``counters_behind`` and ``partials_behind`` are parts of the first two.
    """

    counters: Tensor | None = None
    partials: Tensor | None = None
    before: Tensor | None = None
    counters_behind: Tensor | None = None
    partials_behind: Tensor | None = None


_NOTHING = Space()

#: Triton's rule of what it makes different kernels of (3.6 to 3.8). Where there is no such function Triton starts all kernels.
_specialize: Any = getattr(jit, "native_specialize_impl", None)


@dataclass(frozen=True)
class Start:
    """All of a kernel start that does not change from call to call.

    Attributes:
        kernel: the ``@triton.jit`` function.
        launch: what is started.
        bind: ``(start, launch, operands, outputs, space) -> dict``, the kernel's arguments by name.
        programs: size of the grid.
        constants: its compile-time arguments.
        sizes: extents as the kernel sees them (a pointwise convolution has one long row).
        x_view, w_view: shape, strides and block of the descriptors of x and w; None for plain pointers.
        num_warps, num_stages: for the compiler.
        counters, partials: int32 zeros and fp32 numbers its programs need to finish together, see :mod:`.workspace`.
        group: tiles that the first level of that merges.
        before: fp32 numbers for the running statistics as they were, where it updates them. Not among the partials: they are
            kept until the whole plan is through, and are small.
        numbers: what else the kernel is given that is neither constant nor tensor.
        counters_behind, partials_behind: where a second part of the counters and of the partials begins; None: there is none.
    """

    kernel: Any
    launch: Launch
    bind: Callable[..., Mapping[str, Any]]
    programs: int
    constants: Mapping[str, Any]
    sizes: Any
    x_view: View | None
    w_view: View | None
    num_warps: int
    num_stages: int
    counters: int = 0
    partials: int = 0
    group: int = 0
    before: int = 0
    numbers: Mapping[str, int] = field(default_factory=dict)
    counters_behind: int | None = None
    partials_behind: int | None = None

    def workspace(self, device: torch.device) -> Space:
        """Memory for one launch on the current stream."""
        if not self.counters:
            return _NOTHING
        partials = torch.empty(self.partials, dtype=torch.float32, device=device)
        before = torch.empty(self.before, dtype=torch.float32, device=device) if self.before else None
        if device.type == "meta":
            counters = torch.empty(self.counters, dtype=torch.int32, device=device)
        else:
            counters = workspace.counters(device, self.counters)
        return Space(counters, partials, before, _from(counters, self.counters_behind), _from(partials, self.partials_behind))

    @cached_property
    def arguments(self) -> Arguments:
        """Where the tensors of a call stand among the kernel's arguments."""
        meta = torch.device("meta")
        operands, outputs, space = weightless_operands(self.launch), outputs_of(self.launch, meta), self.workspace(meta)
        bound = self.bind(self, self.launch, operands, outputs, space)
        return Arguments(self.kernel.arg_names, bound, operands, outputs, space)

    @cached_property
    def compiled(self) -> dict[Hashable, CompiledKernel]:
        """Triton's compiled kernels by :func:`specialised`."""
        return {}


@dataclass(frozen=True)
class Meeting:
    """What the programs of a convolution's launch need to finish together: for its tiles' shares, and behind its tiles.

    In the workspace the sums' counters and partials come first, behind them those of the shares, at a whole line of the caches:
    the compiler is told that pointers are multiples of 16 bytes.

    Attributes:
        splits: programs that share the sum of a tile.
        tiles: tiles of the output.
        size: accumulators of a tile.
        counters, partials: what is behind the tiles needs.
    """

    splits: int
    tiles: int
    size: int
    counters: int = 0
    partials: int = 0

    @property
    def all_counters(self) -> int:
        """Of both."""
        return whole_lines(self.counters) + self.tiles if self.splits > 1 else self.counters

    @property
    def all_partials(self) -> int:
        """Of both."""
        return whole_lines(self.partials) + self.splits * self.tiles * self.size if self.splits > 1 else self.partials

    def numbers(self) -> dict[str, int]:
        """For :attr:`Start.numbers`; :func:`shared_by` reads them."""
        return {"shares": self.splits, "tiles": self.tiles}

    @property
    def counters_behind(self) -> int | None:
        """Where those of the shares begin."""
        return whole_lines(self.counters) if self.splits > 1 else None

    @property
    def partials_behind(self) -> int | None:
        """Where those of the shares begin."""
        return whole_lines(self.partials) if self.splits > 1 else None


def whole_lines(elements: int) -> int:
    """Elements of 4 bytes, rounded up so that what follows starts at a whole line of the caches."""
    return ceil(elements / 32) * 32


def _from(tensor: Tensor, offset: int | None) -> Tensor | None:
    return tensor[offset:] if offset else None if offset is None else tensor


def sized(start: Start) -> dict[str, Any]:
    """The kernel's sizes, by name."""
    sizes = start.sizes
    return {**{name: getattr(sizes, name) for name in EXTENTS}, "depths": Depths(sizes.C, sizes.K)}


def shared_by(start: Start, space: Space) -> dict[str, Any]:
    """The kernel's ``shares``, ``tiles`` and ``memory``, all None where a program makes a whole tile."""
    shares = start.numbers["shares"]
    if shares == 1:
        return {"shares": None, "tiles": None, "memory": None}
    memory = Memory(space.partials_behind, space.counters_behind)
    return {"shares": shares, "tiles": start.numbers["tiles"], "memory": memory}


def outputs_of(launch: Launch, device: torch.device) -> dict[str, Tensor]:
    """New tensors for the outputs of a launch, by role."""
    return {role: torch.empty(**how, device=device) for role, how in _new_outputs(launch)}


@lru_cache(maxsize=4096)
def _new_outputs(launch: Launch) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Role, and how :func:`torch.empty` makes it; named arguments are read twice as fast as a tuple of sizes in front."""
    g = launch.geometry
    shapes = {"dx": g.x_shape, "dw": g.w_shape if isinstance(g, Geometry) else ()}
    channels = (g.x_shape if launch.kind == "dgrad" else g.y_shape)[1]

    def how(role: str) -> dict[str, Any]:
        if role in PER_CHANNEL:
            return {"size": (channels,), "dtype": torch.float32}
        dtype = torch.uint8 if role == "indices" else launch.dtype
        return {"size": shapes.get(role, g.y_shape), "dtype": dtype, "memory_format": torch.channels_last}

    return tuple((role, how(role)) for role, _ in launch.outputs)


@lru_cache(maxsize=4096)
def emptiness(launch: Launch) -> tuple[bool, bool]:
    """Whether one of the operands has no elements, and whether one of the outputs has none."""
    operands, outputs = weightless_operands(launch), outputs_of(launch, torch.device("meta"))
    return (not all(tensor.numel() for tensor in operands.values()), not all(tensor.numel() for tensor in outputs.values()))


def channels_last(operands: Mapping[str, Tensor], *roles: str) -> Mapping[str, Tensor]:
    """Operands with some of them, where they are there, laid out as kernels read them."""
    for role in roles:
        if role in operands:
            given = operands[role]
            laid = channels_last_filters(given) if role == "w" else given.contiguous(memory_format=torch.channels_last)
            if laid is not given:
                operands = {**operands, role: laid}
    return operands


def start_on(
    start: Start,
    operands: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    device: torch.device,
    shared: dict[str, Tensor] | None = None,
) -> None:
    """Start a kernel on a launch's tensors.

    It may update running statistics. What they were the kernel itself puts aside, since a copy in front of it would be a launch
    of its own. That is left in ``shared`` once it has started, and not sooner: of a kernel that did not start there is nothing
    to put back.
    """
    arguments, space = start.arguments, start.workspace(device)
    tensors = arguments.tensors(operands, outputs, space)
    if not all([tensor.is_contiguous() for tensor in tensors[: arguments.vectors]]):
        vectors = [tensor.contiguous() for tensor in tensors[: arguments.vectors]]
        tensors = (*vectors, *tensors[arguments.vectors :])
    begin(start, tensors, arguments.filled(tensors), device)
    if not start.before:
        return
    if shared is not None and space.before is not None:
        shared[before_slot(start.launch)] = space.before
    for role in epilogues.IN_PLACE:
        if role not in operands:
            continue
        written = tensors[arguments.operands.index(role)]
        if written is not operands[role]:
            (operands[role] if role == "batches" else operands[role].data).copy_(written)
        elif role == "batches" and not written.is_inference():  # of statistics autograd is not told by eager PyTorch, either
            torch.autograd.graph.increment_version(written)  # autograd cannot see what a kernel writes


def begin(start: Start, tensors: Sequence[Tensor], arguments: Sequence[Any], device: torch.device) -> None:
    """Start a kernel on the current stream of ``device``: where every kernel is started.

    Args:
        tensors: all among the arguments.
        arguments: in the kernel's order.
    """
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            begin(start, tensors, arguments, device)
        return
    try:
        key = specialised(start.kernel, tensors)
        compiled = None if key is None else start.compiled.get((device, key))
        if compiled is not None:
            compiled[(start.programs, 1, 1)](*arguments)
        else:
            made = start.kernel[(start.programs,)](*arguments, num_warps=start.num_warps, num_stages=start.num_stages)
            if key is not None and isinstance(made, CompiledKernel):  # not one that another thread still compiles
                start.compiled[(device, key)] = made
    except BaseException:
        if start.counters:  # interpreted programs that never arrived
            workspace.forget()
        raise
    record_kernel(start.kernel.__name__)


def specialised(kernel: Any, tensors: Sequence[Tensor]) -> Hashable:
    """What Triton makes different kernels of for arguments that are the same but for their tensors, by Triton's own rule.

    None where only Triton itself can start the kernel: it interprets, or somebody looks into its starts or its compiler.
    """
    runtime = triton.knobs.runtime
    hooked = getattr(kernel, "pre_run_hooks", None) or getattr(runtime, "add_stages_inspection_hook", None)
    if _specialize is None or not isinstance(kernel, JITFunction) or hooked:
        return None
    types = _specialize(_triton_backend(), tuple(tensors), False, True, True)
    return types, runtime.debug, triton.knobs.compilation.instrumentation_mode


@lru_cache(maxsize=1)
def _triton_backend() -> Any:
    """Triton's own description of the kind of GPU."""
    return make_backend(triton.runtime.driver.active.get_current_target())


def updates(launch: Launch) -> int:
    """:attr:`Start.before` of a launch."""
    return 2 * launch.geometry.y_shape[1] if launch.roles.intersection(epilogues.IN_PLACE) else 0


@lru_cache(maxsize=64)
def arch_of(device: torch.device) -> str:
    """``sm_90``, ``gfx942`` ... or ``interpreter``: what tiles are chosen for."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> str:
    """The GPU's name, for which measured choices are looked up; empty for the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and not triton.knobs.runtime.interpret else ""


@lru_cache(maxsize=64)
def multiprocessors_of(device: torch.device) -> int:
    """How many the GPU has; 0 for the interpreter."""
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def slope_of(launch: Launch) -> float | None:
    """What an activation's function is given beside z: a LeakyReLU's slope."""
    return float(launch.slope) if launch.activation == "leaky_relu" else None


def numbers_of(launch: Launch) -> dict[str, float | None]:
    """What a launch's functions are given beside tensors and sizes, by name."""
    x_eps = float(launch.x_eps) if "x_var" in launch.roles else None
    return {"slope": slope_of(launch), "x_slope": launch.x_slope, "x_eps": x_eps, "eps": launch.eps}


def needs_wide_offsets(*shapes: tuple[int, ...]) -> bool:
    """Whether any tensor has 2^31 elements or more."""
    return any(prod(shape) >= 1 << 31 for shape in shapes)
