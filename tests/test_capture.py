"""What the capture of a CUDA graph forbids on the host's side, looked for without a GPU.

Tensors on PyTorch's device ``meta``, which have no memory, stand for those on the GPU: a value that the host asks for is an
error there. The Triton plan is chosen for an H100 and runs as it would there, up to the start of each kernel, whose arguments
are looked at, and so is every operator of PyTorch that runs besides. What a capture does with all that is not seen here:
tests/test_gpu.py does it on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import pytest
import torch
from nets import TINY_LAUNCHES, TINY_TRAINING_LAUNCHES, TinyNet, look_at_launches
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_resnet import count_launches, fuse
from fused_resnet.backends import record_kernel, workspace

pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_resnet.backends import triton as executor
from fused_resnet.backends import triton_apart, triton_gradients, triton_start
from fused_resnet.backends.derived import channels_last_filters
from fused_resnet.backends.triton_arguments import View

GPU = torch.device("meta")
Step = Callable[[nn.Module, Tensor], None]

#: Functions that bring what Python has to the device. What they do is not seen as operators.
FROM_PYTHON = ("tensor", "as_tensor", "asarray", "new_tensor", "from_numpy", "frombuffer")

#: Operators that wait for the device, or have a result whose size the values decide.
FORBIDDEN = (
    "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "unique", "_unique2",
    "unique_consecutive", "unique_dim", "bincount", "lift", "lift_fresh", "lift_fresh_copy", "_pin_memory", "is_pinned",
    "record_stream", "set_data", "repeat_interleave.Tensor",
)  # fmt: skip


@dataclass
class Seen:
    """What ran: names of operators and of kernels in order, and what of it a capture forbids."""

    ran: list[str] = field(default_factory=list)
    kernels: int = 0
    forbidden: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]


class Watch(TorchDispatchMode):
    """Writes down every operator."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.name().removeprefix("aten::")
        self.seen.ran.append(name)
        if name in FORBIDDEN or name.split(".")[0] in FORBIDDEN:
            self.seen.forbidden.append(name)
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.device != GPU:
                self.seen.forbidden.append(f"{name} of a tensor on {tensor.device}")
        return result


class WatchPython(TorchFunctionMode):
    """Notes tensors that are made from Python's data."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in FROM_PYTHON:
            self.seen.forbidden.append(function.__name__)
        return function(*args, **(kwargs or {}))


def on_the_host(value: Any) -> list[str]:
    """What of a kernel's argument is not a number, a function, or a tensor on the GPU (or a descriptor of one).

    A tensor's descriptor is made by Triton's launcher and handed over among the kernel's parameters: nothing is copied.
    """
    if isinstance(value, TensorDescriptor):
        value = value.base
    if isinstance(value, Tensor):
        return [] if value.device == GPU else [f"a tensor on {value.device}"]
    if isinstance(value, tuple):
        return [found for member in value for found in on_the_host(member)]
    plain = value is None or isinstance(value, (int, float, str)) or callable(value) or is_dataclass(value)
    return [] if plain else [type(value).__name__]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """As on an H100 that captures; its kernels are not started."""
    found = Seen()

    def begin(start: triton_start.Start, _: Sequence[Tensor], arguments: Sequence[Any], device: torch.device) -> None:
        assert device == GPU
        found.kernels += 1
        found.ran.append(start.kernel.__name__)
        found.forbidden += [
            f"{name} of {start.kernel.__name__}: {what}"
            for name, value in zip(start.kernel.arg_names, arguments, strict=True)
            for what in on_the_host(value)
        ]
        record_kernel(start.kernel.__name__)

    def address(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata * 16 + tensor.storage_offset() * tensor.element_size()

    for module in (triton_start, triton_gradients, triton_apart, executor):
        for name, stands in {"begin": begin, "arch_of": lambda _: "sm_90", "gpu_of": lambda _: "NVIDIA H100 80GB HBM3"}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stands)
    monkeypatch.setattr(executor, "check_available", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: found.forbidden.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: tensor.device == GPU))
    monkeypatch.setattr(Tensor, "data_ptr", address)  # else all are at 0
    return found


def steady(
    seen: Seen, model: nn.Module, step: Step, dtype: torch.dtype, layout: torch.memory_format, memory: str = "default"
) -> int:
    """Run a step three times: the second and the third must be the same, with nothing forbidden. Launches of one of them."""
    model = fuse(model, backend="triton", memory=memory).to(GPU, dtype).to(memory_format=layout)
    x = torch.empty(2, 3, 33, 35, dtype=dtype, device=GPU, memory_format=torch.channels_last)
    step(model, x)
    ran = []
    for _ in range(2):
        seen.clear()
        with count_launches() as log, WatchPython(seen), Watch(seen):
            step(model, x)
        assert {backend for backend, _ in log.launches} == {"triton"}
        assert seen.kernels == len(log.kernels) >= len(log.launches)
        assert not seen.forbidden
        ran.append(list(seen.ran))
    assert ran[0] == ran[1], "two steps in a row do the same"
    return len(log.launches)


def train(model: nn.Module, x: Tensor) -> None:
    """Forward, backward, and the parameters' update."""
    model.train().zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1, foreach=True).step()


@torch.no_grad()
def infer(model: nn.Module, x: Tensor) -> None:
    model.eval()(x)


CASES = pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, torch.channels_last),
        (torch.float32, torch.contiguous_format),
        (torch.bfloat16, torch.channels_last),
    ],
    ids=str,
)


@CASES
def test_a_training_step(dtype: torch.dtype, layout: torch.memory_format, seen: Seen) -> None:
    """Backward: 2 launches of the stem (x needs no gradient), 7 of a BasicBlock with a projection, 7 of a Bottleneck."""
    assert steady(seen, TinyNet(), train, dtype, layout) == TINY_TRAINING_LAUNCHES + 2 + 7 + 7


@CASES
def test_inference(dtype: torch.dtype, layout: torch.memory_format, seen: Seen) -> None:
    assert steady(seen, TinyNet(), infer, dtype, layout) == TINY_LAUNCHES


@pytest.mark.parametrize("memory", ["less", "low"])
def test_training_in_less_memory(memory: str, seen: Seen) -> None:
    assert steady(seen, TinyNet(), train, torch.float32, torch.channels_last, memory) > TINY_TRAINING_LAUNCHES


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense|item"),
        (lambda x: bool((x == x).all()), "_local_scalar_dense|is_nonzero|item"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.cpu(), "on cpu|Cannot copy out of meta"),
        (lambda x: torch.tensor([1.0, 2.0], device=x.device), "'tensor'"),
        (lambda x: x.new_tensor([1.0]), "new_tensor"),
        (lambda x: torch.arange(3), "on cpu"),
        (lambda x: torch.cuda.synchronize(), "synchronize"),
    ],
)
def test_what_is_forbidden_is_seen(
    what: Callable[[Tensor], object], message: str, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by itself in front of every launch."""
    look_at_launches(monkeypatch, lambda _, operands: what(next(iter(operands.values()))))
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)) as caught:
        steady(seen, TinyNet(), infer, torch.float32, torch.channels_last)
    assert re.search(message, f"{caught.value} {seen.forbidden}"), caught.value


def test_what_a_kernel_is_given_is_looked_into() -> None:
    view = View((4, 4), (4, 1), (2, 2))
    on_gpu, here = torch.empty(16, device=GPU), torch.empty(16)
    assert not on_the_host((on_gpu, None, 3, 0.5, (view.of(on_gpu), "ieee"), on_the_host))
    assert on_the_host((on_gpu, (1, here))) == ["a tensor on cpu"] == on_the_host(view.of(here))
    assert on_the_host([1, 2]) == ["list"] and on_the_host(((here.numpy(),),)) == ["ndarray"]


def test_counters_of_a_captured_launch_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeroed within the graph, at every replay, and kept nowhere else."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(workspace, "_COUNTERS", {})
    seen = Seen()
    with FakeTensorMode(), Watch(seen):
        first, second = (workspace.counters(torch.device("cuda", 0), 40) for _ in range(2))
    assert seen.ran == ["zeros"] * 2 and first is not second and not workspace._COUNTERS
    assert first.device.type == "cuda" and first.numel() == 40


def test_what_a_compiler_calls_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor warms its graphs up in their pool with no capture under way: counters are allocated each time."""
    monkeypatch.setattr(workspace, "_COUNTERS", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    asked: list[bool] = []
    real = workspace.counters

    def counters(device: torch.device, count: int) -> Tensor:
        asked.append(workspace.keeps_nothing())
        return real(device, count)

    monkeypatch.setattr(workspace, "counters", counters)
    model = fuse(TinyNet().basic, backend="triton").train()
    x = torch.randn(1, 8, 7, 5, requires_grad=True)
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        loss = model(x).sum()
    forward = len(asked)
    loss.backward()
    assert len(asked) > forward > 0 and all(asked) and not workspace.keeps_nothing()
    asked.clear()
    model(x).sum().backward()
    assert asked and not any(asked), "an eager call keeps its counters"
    with FakeTensorMode(), workspace.nothing_kept():
        workspace._COUNTERS.clear()
        first, second = (workspace.counters(torch.device("cuda", 0), 40) for _ in range(2))
        w = torch.empty(4, 3, 3, 3, device="cuda")
        turned = [channels_last_filters(w) for _ in range(2)]
    assert first is not second and not workspace._COUNTERS and turned[0] is not turned[1]
