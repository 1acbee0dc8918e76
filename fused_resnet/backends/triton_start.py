"""What all Triton launches share: a start, the memory around it, and where it happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels import epilogues
from ..kernels.finish import Shares
from ..launch import Launch
from . import before_slot, record_kernel, workspace

#: Roles of outputs that are a number a channel; all others but these are activations. fp32, like all sums and statistics.
PER_CHANNEL = frozenset({"mean", "invstd", "var", "sum", "dot", "shortcut_dot", "dt_sum", "dside_sum"})


class Space(NamedTuple):
    """Memory of one launch on the current stream: what :class:`Start` says it needs, None where that is nothing."""

    counters: Tensor | None = None
    partials: Tensor | None = None
    before: Tensor | None = None


@dataclass(frozen=True)
class Start:
    """All of a kernel start that does not change from call to call.

    Attributes:
        kernel: the ``@triton.jit`` function.
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
    """

    kernel: Any
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

    def workspace(self, device: torch.device) -> Space:
        """Memory for one launch on the current stream."""
        if not self.counters:
            return Space()
        partials = torch.empty(self.partials, dtype=torch.float32, device=device)
        before = torch.empty(self.before, dtype=torch.float32, device=device) if self.before else None
        if device.type == "meta":
            return Space(torch.empty(self.counters, dtype=torch.int32, device=device), partials, before)
        return Space(workspace.counters(device, self.counters), partials, before)


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
        """For :attr:`Start.numbers`; :func:`shares_of` reads them."""
        names = {"shares": self.splits, "tiles": self.tiles}
        return names | {"counters_behind": whole_lines(self.counters), "partials_behind": whole_lines(self.partials)}


def whole_lines(elements: int) -> int:
    """Elements of 4 bytes, rounded up so that what follows starts at a whole line of the caches."""
    return ceil(elements / 32) * 32


def shares_of(start: Start, space: Space) -> Shares | None:
    """The kernel's ``shares``."""
    numbers = start.numbers
    counters, partials, _ = space
    if numbers["shares"] == 1 or counters is None or partials is None:
        return None
    behind = partials[numbers["partials_behind"] :], counters[numbers["counters_behind"] :]
    return Shares(numbers["shares"], numbers["tiles"], *behind)


@dataclass(frozen=True)
class View:
    """A tensor as a descriptor sees it: extents and strides in elements, slowest first, and the block loaded at once."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]

    def of(self, base: Tensor) -> Any:
        """The descriptor of ``base``."""
        return TensorDescriptor(base, list(self.shape), list(self.strides), list(self.block))


def outputs_of(launch: Launch, device: torch.device) -> dict[str, Tensor]:
    """New tensors for the outputs of a launch of the forward or of a strip, by role."""
    g = launch.geometry
    outputs = {}
    for role, _ in launch.outputs:
        if role in PER_CHANNEL:
            outputs[role] = torch.empty(g.y_shape[1], dtype=torch.float32, device=device)
        else:
            shape = g.x_shape if role == "dx" else g.y_shape
            dtype = torch.uint8 if role == "indices" else launch.dtype
            outputs[role] = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    return outputs


def begin(start: Start, arguments: Mapping[str, Any], device: torch.device) -> None:
    """Start a kernel on the current stream of ``device``. Where every kernel is started."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            begin(start, arguments, device)
        return
    try:
        start.kernel[(start.programs,)](**arguments, num_warps=start.num_warps, num_stages=start.num_stages)
    except BaseException:
        if start.counters:  # interpreted programs that never arrived
            workspace.forget()
        raise
    record_kernel(start.kernel.__name__)


def begin_updating(
    start: Start,
    bind: Callable[[Start, Launch, Mapping[str, Tensor], Mapping[str, Tensor], Space], Mapping[str, Any]],
    launch: Launch,
    operands: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    device: torch.device,
    shared: dict[str, Tensor] | None,
) -> None:
    """:func:`begin`, for a kernel that may update running statistics.

    The kernel itself puts aside what they were, since a copy in front of it would be a launch of its own. That is left in
    ``shared`` once it has started, and not sooner: of a kernel that did not start there is nothing to put back.
    """
    # What a kernel writes in place has to lie densely.
    strided = {role: operands[role] for role in epilogues.IN_PLACE if role in operands and not operands[role].is_contiguous()}
    operands = {**operands, **{role: tensor.contiguous() for role, tensor in strided.items()}}
    space = start.workspace(device)
    begin(start, bind(start, launch, operands, outputs, space), device)
    if shared is not None and space.before is not None:
        shared[before_slot(launch)] = space.before
    for role in epilogues.IN_PLACE:
        if role in strided:
            strided[role].copy_(operands[role])
        elif role in operands and not operands[role].is_inference():
            torch.autograd.graph.increment_version(operands[role])  # autograd cannot see what a kernel writes


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
