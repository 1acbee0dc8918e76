"""Starts kernels as Triton does on a GPU, up to its launcher: what the process of tests/test_starts.py runs.

Triton must not interpret, and there need not be a GPU: a driver and compiled kernels stand in that keep what they are given.
All between them is Triton's own: binding, specialisation, the caches, hooks. Tensors lie in the CPU's memory, never read.
"""

from __future__ import annotations

import sys
import traceback
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
from nets import TinyNet
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_resnet import count_launches, fuse
from fused_resnet.backends import triton as executor
from fused_resnet.backends import triton_apart, triton_gradients, triton_start, workspace
from fused_resnet.backends.triton_compile import gpu_target
from fused_resnet.launch import Geometry, Launch
from fused_resnet.tuning import Choice, choose
from fused_resnet.tuning.pieces import pieces

CPU = torch.device("cpu")


class Launched(list[Any]):
    """What the launcher was given: ``(compiled kernel, grid, stream, metadata, enter hook, arguments)`` a start."""

    def __init__(self) -> None:
        self.error: Exception | None = None


LAUNCHED = Launched()


class Kernel(CompiledKernel):
    """A compiled kernel without code. Which one it is: its source and its options."""

    def __init__(self, source: Any, options: dict[str, Any]) -> None:
        fields = {"name": source.fn.__name__, "num_warps": options["num_warps"], "num_stages": options["num_stages"]}
        self.metadata = namedtuple("Metadata", fields)(**fields)
        self.packed_metadata, self.src, self.name = tuple(fields.values()), source, fields["name"]
        self.module, self.function = self, id(self)

    def _run(self, *given: Any) -> None:
        x, y, z, stream, function, packed, metadata, enter, leave, *arguments = given
        assert function == self.function and packed == self.packed_metadata
        if LAUNCHED.error is not None:
            raise LAUNCHED.error
        enter(metadata)
        LAUNCHED.append((self, (x, y, z), stream, arguments))
        leave(metadata)

    def _init_handles(self) -> None:
        pass

    def __del__(self) -> None:
        pass


@contextmanager
def as_on(arch: str = "sm_90", gpu: str = "NVIDIA H100 80GB HBM3") -> Iterator[Launched]:
    """Launches are chosen, compiled and started as there, and none was started before; yields what the launcher is given."""
    triton_start._triton_backend.cache_clear()
    LAUNCHED.clear()
    LAUNCHED.error = None
    for module in (executor, triton_gradients, triton_apart):
        module.plan_start.cache_clear()
    target = gpu_target(arch)
    driver = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 5
    )
    compiled = lambda source, target=None, options=None, **_: Kernel(source, options)  # noqa: E731
    triton.runtime.driver.set_active(driver)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(triton.compiler, "compile", compiled)
        for module in (triton_start, executor, triton_gradients, triton_apart):
            for name, stands in {"arch_of": arch, "gpu_of": gpu, "multiprocessors_of": 132}.items():
                if hasattr(module, name):
                    patched.setattr(module, name, lambda _, stands=stands: stands)
        patched.setattr(executor, "check_available", lambda _: None)
        yield LAUNCHED


def same(one: Any, other: Any) -> bool:
    """The same tensors, not equal ones; descriptors of the same; tuples and NamedTuples of such, member by member."""
    if isinstance(one, TensorDescriptor):
        fields = vars(one).keys() - {"base"}
        alike = type(one) is type(other) and all(getattr(one, name) == getattr(other, name) for name in fields)
        return alike and one.base is other.base
    if isinstance(one, tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one is other or (not isinstance(one, Tensor) and type(one) is type(other) and one == other)


def add(dtype: torch.dtype = torch.bfloat16) -> Launch:
    """y and a shortcut, each of which is normalised or added as it is."""
    roles = ("y", "shortcut", "mean", "invstd", "gamma", "beta")
    return Launch(
        "bn_add_relu", "layer", Geometry(2, 4, 4, 32, 32, 1, 1), dtype,
        tuple((role, role) for role in roles), (("out", "out"),), activation="relu", eps=1e-3,
    )  # fmt: skip


def operands_of(launch: Launch, **others: Tensor) -> dict[str, Tensor]:
    made = triton_start.weightless_operands(launch)
    return {role: torch.empty_like(tensor, device=CPU) for role, tensor in made.items()} | others


def misaligned(like: Tensor) -> Tensor:
    """The same values' place, two bytes off."""
    memory = torch.empty(like.numel() + 1, dtype=like.dtype)
    return memory.as_strided(like.shape, like.stride(), 1)


@contextmanager
def counted_by_triton() -> Iterator[list[str]]:
    """Names of the kernels that Triton itself looked up."""
    looked: list[str] = []
    run = JITFunction.run

    def counting(self: Any, *args: Any, **named: Any) -> Any:
        looked.append(self.__name__)
        return run(self, *args, **named)

    with patch.object(JITFunction, "run", counting):
        yield looked


def every_start_of_a_network() -> None:
    """Training and inference, launches whole and taken apart: the launcher gets the same by Triton's look-up and without."""
    kinds: set[str] = set()
    with as_on() as launched, counted_by_triton() as looked, pytest.MonkeyPatch.context() as patched:
        begin = triton_start.begin

        def both(start: Any, tensors: Any, arguments: Any, device: torch.device) -> None:
            space = next(space for at, space in spaces if at is start)
            spaces.clear()
            bound = start.bind(start, start.launch, *given[-1], space)
            assert all(map(same, arguments, [bound[name] for name in start.kernel.arg_names]))
            start.compiled.clear()
            before = len(looked)
            for _ in range(2):
                begin(start, tensors, arguments, device)
            assert len(looked) == before + 1 and len(start.compiled) == 1, "the second did not ask Triton"
            (kernel, *first), (again, *second) = launched[-2:]
            assert kernel is again and first[:2] == second[:2] == [(start.programs, 1, 1), 5]
            assert all(map(same, first[2], second[2])) and all(map(same, first[2], arguments))
            assert len(first[2]) == len(second[2]) == len(arguments)
            kinds.add(f"{start.launch.kind} {start.launch.epilogue}")

        spaces: list[Any] = []
        given: list[Any] = []
        of, start_on = triton_start.Start.workspace, triton_start.start_on

        def keeping(start: Any, device: torch.device) -> Any:
            made = of(start, device)
            if device.type != "meta":
                spaces.append((start, made))
            return made

        def on(start: Any, operands: Any, outputs: Any, *rest: Any) -> None:
            given.append((operands, outputs))
            start_on(start, operands, outputs, *rest)

        patched.setattr(triton_start.Start, "workspace", keeping)
        patched.setattr(triton_start, "begin", both)
        for module in (executor, triton_gradients, triton_apart):
            patched.setattr(module, "start_on", on)
        for how in ("fused", "apart", "vendor"):

            def chosen(launch: Launch, *rest: Any, how: str = how, **options: Any) -> Choice:
                goes = not options.get("whole_only") and how != "fused" and pieces(launch, how) is not None
                return Choice(how if goes else "fused", None, None, "test") if goes else choose(launch, *rest, **options)

            patched.setattr(executor, "choose", chosen)
            model = fuse(TinyNet(), backend="triton").to(torch.bfloat16).to(memory_format=torch.channels_last)
            x = torch.randn(2, 3, 33, 35).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
            with count_launches() as log:
                model.train()(x).sum().backward()
                model.eval()(x).sum().backward()  # given statistics
            with torch.no_grad():
                model.eval()(x)
        for launch in {launch for _, launch in log.launches if launch.kind == "dgrad"}:
            if pieces(launch, "vendor") is not None:
                executor.run(launch, operands_of(launch), how="vendor")
    wanted = {"conv", "dgrad", "wgrad", "bn_add_relu", "bn_add_relu_backward", "max_pool", "max_pool_backward"}
    wanted |= {"conv_end", "dgrad_end", "output_gradient"}
    assert wanted <= {kind.split()[0] for kind in kinds}, kinds


def another_alignment_type_device_or_mode_is_another_kernel() -> None:
    launch = add()
    usual = operands_of(launch)
    shifted = {**usual, "shortcut": misaligned(usual["shortcut"])}
    halves = {**usual, "gamma": usual["gamma"].bfloat16()}
    with as_on() as launched, counted_by_triton() as looked:
        start = executor.plan_start(launch, "sm_90")
        out = triton_start.outputs_of(launch, CPU)

        def kernel_of(operands: dict[str, Tensor], device: torch.device = CPU) -> Any:
            triton_start.start_on(start, operands, out, device)
            return launched[-1][0]

        ways: list[Callable[[], Any]] = [
            lambda: kernel_of(usual),
            lambda: kernel_of(shifted),
            lambda: kernel_of(halves),
        ]
        kernels = [way() for way in ways]
        assert len(set(map(id, kernels))) == 3 == len(looked)
        assert [way() for way in ways] == kernels and len(looked) == 3, "each is remembered"
        assert kernel_of(usual, torch.device("cpu", 1)) is kernels[0] and len(looked) == 4, "every device is asked for"
        with patch.object(triton.knobs.runtime, "debug", True):
            debugged = kernel_of(usual)
        assert debugged not in kernels and kernel_of(usual) is kernels[0] and len(looked) == 5
        with patch.object(triton.knobs.compilation, "instrumentation_mode", "test"):
            assert kernel_of(usual) not in kernels
        attributes = [kernel.src.attrs for kernel in kernels]
        assert attributes[0] != attributes[1], "what the second was compiled for"


def memory_that_32_bits_reach_is_another_kernel_on_amd() -> None:
    """Its compiler is told of tensors in less than 2 GiB of memory."""
    launch = add()
    usual = operands_of(launch)
    memory = torch.empty(1 << 31, dtype=torch.uint8).view(torch.bfloat16)  # never touched
    far = {**usual, "shortcut": memory.as_strided(usual["shortcut"].shape, usual["shortcut"].stride())}
    with as_on("gfx942", "") as launched, counted_by_triton() as looked:
        start = executor.plan_start(launch, "gfx942")
        start.kernel.device_caches.clear()  # they were for another GPU
        for operands in (usual, far, usual, far):
            triton_start.start_on(start, operands, triton_start.outputs_of(launch, CPU), CPU)
        start.kernel.device_caches.clear()
    near, other, *again = (kernel for kernel, *_ in launched)
    assert near is not other and again == [near, other] and len(looked) == 2
    assert near.src.attrs != other.src.attrs


def vectors_that_are_not_dense_are_copied() -> None:
    launch = add()
    every_second = torch.arange(64.0)[::2]
    with as_on() as launched:
        start = executor.plan_start(launch, "sm_90")
        for _ in range(2):
            triton_start.start_on(start, operands_of(launch, gamma=every_second), triton_start.outputs_of(launch, CPU), CPU)
    for _, _, _, arguments in launched:
        gamma = dict(zip(start.kernel.arg_names, arguments, strict=True))["y_bn"][2]
        assert gamma.is_contiguous() and torch.equal(gamma, every_second)


def hooks_are_called() -> None:
    """Of launches (profilers), at every start; whoever hooks into a kernel's starts or the compiler has Triton start it."""
    launch = add()
    operands, out = operands_of(launch), triton_start.outputs_of(launch, CPU)
    entered: list[Any] = []
    with as_on() as launched, counted_by_triton() as looked:
        start = executor.plan_start(launch, "sm_90")
        runtime = triton.knobs.runtime
        triton_start.start_on(start, operands, out, CPU)
        enter = lambda metadata: entered.append(("enter", metadata.get()["name"]))  # noqa: E731
        leave = lambda metadata: entered.append(("exit", len(launched)))  # noqa: E731
        runtime.launch_enter_hook.add(enter)
        runtime.launch_exit_hook.add(leave)
        triton_start.start_on(start, operands, out, CPU)
        assert entered == [("enter", "bn_add_relu"), ("exit", 2)] and len(looked) == 1
        runtime.launch_enter_hook.remove(enter)
        runtime.launch_exit_hook.remove(leave)
        before: list[Any] = []
        start.kernel.add_pre_run_hook(lambda *args, **named: before.append(args))
        for _ in range(2):
            triton_start.start_on(start, operands, out, CPU)
        assert len(before) == 2 and len(looked) == 3
        start.kernel.pre_run_hooks.clear()
        if hasattr(runtime, "add_stages_inspection_hook"):
            with patch.object(runtime, "add_stages_inspection_hook", lambda *_: ("key", "hash")):
                assert triton_start.specialised(start.kernel, list(operands.values())) is None
        triton_start.start_on(start, operands, out, CPU)
        assert len(looked) == 3
        with patch.object(triton_start, "_specialize", None):  # another Triton
            triton_start.start_on(start, operands, out, CPU)
        assert len(looked) == 4


def what_started_is_counted_and_what_failed_forgets_its_counters() -> None:
    launch = Launch(
        "conv", "layer", Geometry(2, 8, 8, 32, 32, 1, 1), torch.bfloat16, (("x", "x"), ("w", "w")),
        (("y", "y"), ("mean", "mean"), ("invstd", "invstd")), epilogue="stats", eps=1e-3,
    )  # fmt: skip
    operands, out = operands_of(launch), triton_start.outputs_of(launch, CPU)
    with as_on() as launched, count_launches() as log:
        start = executor.plan_start(launch, "sm_90")
        for _ in range(3):
            triton_start.start_on(start, operands, out, CPU)
        assert log.kernels == ["conv_forward"] * 3 and workspace._COUNTERS
        launched.error = RuntimeError("out of resources")
        with pytest.raises(RuntimeError, match="out of resources"):
            triton_start.start_on(start, operands, out, CPU)
        assert len(log.kernels) == 3 and not workspace._COUNTERS


CHECKS = (
    every_start_of_a_network,
    another_alignment_type_device_or_mode_is_another_kernel,
    memory_that_32_bits_reach_is_another_kernel_on_amd,
    vectors_that_are_not_dense_are_copied,
    hooks_are_called,
    what_started_is_counted_and_what_failed_forgets_its_counters,
)

if __name__ == "__main__":
    for check in CHECKS:
        try:
            check()
        except BaseException:
            print(f"{check.__name__} failed\n{traceback.format_exc()}")
        else:
            print(f"{check.__name__} passed")
        sys.stdout.flush()
