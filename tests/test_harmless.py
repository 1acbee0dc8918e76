"""Forwards that do what a graph cannot hold: they are left alone, run as before, and tracing them leaves no trace."""

from __future__ import annotations

import copy
import gc
import logging
import queue
import random
import threading
import weakref
from collections import deque
from functools import cached_property, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import launches, randomise
from tolerances import CLOSE, relative_error
from torch import Tensor, fx, nn

from fused_resnet import fuse, unfuse


class Base(nn.Module):
    """A convolution and its BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def made(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


pytestmark = pytest.mark.filterwarnings("ignore:fuse found no residual block", "ignore:.*torch.jit.script. is deprecated")


def images(size: int = 8) -> Tensor:
    return torch.randn(2, 4, size, size)


# ---- what would end the process


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * torch.sigmoid(x)


ACTIVATIONS = {
    "a function with a backward": Doubled.apply,
    "a script": scripted,
    "as_tensor": torch.as_tensor,
    "nested": lambda x: torch.nested.nested_tensor([x]).unbind()[0],
    "dlpack": lambda x: torch.from_dlpack(torch.utils.dlpack.to_dlpack(x.detach())),
    "legacy": lambda x: x + 1 if isinstance(x, torch.FloatTensor) else x,
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=True),
}


class Activated(Base):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](self.made(x))


def patched() -> list[object]:
    """What is another function while a forward is traced."""
    kinds = torch.inference_mode, torch.autograd.graph.saved_tensors_hooks
    functions = [torch.autograd.function.BackwardCFunction.__init__, torch.jit.ScriptFunction.__call__, torch.is_grad_enabled]
    return [*functions, nn.Module.__setattr__, nn.Module.parameters, *(vars(kind).get("__enter__") for kind in kinds)]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.filterwarnings("ignore")
def test_what_takes_a_stand_in_for_a_tensor_refuses_it(name: str) -> None:
    before = patched()
    plain = randomise(Activated(name)).train()
    fused = fuse(copy.deepcopy(nn.Sequential(plain, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))))[0]
    gradients = []
    for model in (fused, plain):
        y = model(x := images().copy_(torch.linspace(-1, 1, 512).view(2, 4, 8, 8)).requires_grad_())
        if y.requires_grad:
            (y * torch.linspace(0, 1, 512).view(2, 4, 8, 8)).sum().backward()
        gradients.append((y, x.grad, model.bn.weight.grad))
    for found, wanted in zip(*gradients, strict=True):
        assert (found is None) is (wanted is None)
        assert wanted is None or relative_error(found, wanted) < CLOSE
    assert all(one is other for one, other in zip(before, patched(), strict=True))


class Lists(Base):
    """Its books are called hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.my_hooks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.my_hooks.append(x)
        return self.made(x)


def test_a_list_is_written_whatever_its_name() -> None:
    model = fuse(Lists().eval())
    assert model.my_hooks == []
    model(images())
    assert len(model.my_hooks) == 1 and type(model.my_hooks[0]) is Tensor


def test_functions_of_others_run_while_a_forward_is_traced() -> None:
    """In another thread, or scripts of tensors that are there."""

    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            found: list[float] = []
            thread = threading.Thread(target=lambda: found.append(Doubled.apply(torch.ones(1)).item()))
            thread.start()
            thread.join()
            assert found == [2] and scripted(torch.zeros(1)).item() == 0
            assert isinstance(torch.ones(1), torch.FloatTensor)
            return self.made(x)

    assert launches(fuse(Net().eval()), images()) == 1


# ---- what is changed is put back


class Writes(Base):
    """Several things at once that a forward may keep books in."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.history, self.books = what, deque([0], maxlen=3), type("Books", (), {})()
        self.books.count, self.books.last = 0, None
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.made(x)
        if self.what == "buffer":
            self.steps += 1
        elif self.what == "new buffer":
            self.steps = self.steps + 1
        elif self.what == "deque":
            self.history.append(y.mean())
        else:
            self.books.count += 1
            self.books.last = y
        return y


@pytest.mark.parametrize("what", ["buffer", "new buffer", "deque", "object"])
def test_no_stand_in_stays_behind(what: str) -> None:
    model = fuse(Writes(what).eval())
    assert type(model.steps) is Tensor and model.history == deque([0]) and model.books.count == 0
    y = model(images())
    assert model.steps.item() == (1 if "buffer" in what else 0)
    if what == "deque":
        assert torch.equal(model.history[-1], y.mean()) and len(model.history) == 2
    if what == "object":
        assert model.books.count == 1 and model.books.last is y


# ---- random decisions


class Drops(Base):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.torch, self.python = torch.Generator().manual_seed(1), random.Random(1)
        self.numpy, self.old = np.random.default_rng(1), np.random.RandomState(1)

    def forward(self, x: Tensor) -> Tensor:
        drawn = {
            "global": np.random.rand,
            "torch": lambda: torch.rand((), generator=self.torch).item(),
            "python": self.python.random,
            "numpy": self.numpy.random,
            "old": self.old.rand,
        }[self.source]()
        return x if drawn < 0.5 else self.made(x)


@pytest.mark.parametrize("source", ["global", "torch", "python", "numpy", "old"])
def test_random_decisions_stay_random(source: str) -> None:
    np.random.seed(3)
    plain, x = Drops(source), images()
    model = copy.deepcopy(plain)
    if source == "global":
        np.random.seed(3)
    fuse(model)
    found = [model(x) is x for _ in range(40)]
    if source == "global":
        np.random.seed(3)
    assert found == [plain(x) is x for _ in range(40)] and 5 < sum(found) < 35


# ---- modes and decisions


class Frozen(Base):
    """Its first half makes no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            x = self.first(x)
        return self.made(x.clone())


def test_inference_mode_inside_a_forward() -> None:
    model = fuse(Frozen())
    model(images()).sum().backward()
    assert model.first.weight.grad is None and model.conv.weight.grad is not None


def test_hooks_of_saved_tensors_inside_a_forward() -> None:
    packed: list[Tensor] = []

    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
                return self.made(x)

    model = Net()
    model(images())
    wanted = len(packed)
    fuse(model)
    packed.clear()
    model(images())
    assert len(packed) == wanted > 0


DECISIONS = {
    "dtype": lambda x: x.dtype is torch.float32,
    "table": lambda x: {torch.float32: 1}.get(x.dtype),
    "grad_fn": lambda x: x.grad_fn is None,
    "device": lambda x: x.is_cuda is False,
    "shape": lambda x: isinstance(x.shape, tuple),
    "leaf": lambda x: x.is_leaf is True,
    "other": lambda x: not hasattr(x, "tensors"),
    "set of types": lambda x: x.dtype in {torch.float32},
    "set of sizes": lambda x: x.shape[0] in {2, 3},
    "table of sizes": lambda x: {8: True}.get(x.shape[2], False),
    "parts of the shape": lambda x: isinstance(x.shape[-2:], tuple) and isinstance(x.shape, (tuple, list)),
}


class Decides(Base):
    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        y = self.made(x).to(x.dtype)
        return y * 2 if DECISIONS[self.by](x) else y


@pytest.mark.parametrize("by", DECISIONS)
def test_decisions_by_what_a_tensor_is(by: str) -> None:
    plain = randomise(Decides(by).eval())
    fused, x = fuse(copy.deepcopy(plain)), images()
    with torch.no_grad():
        assert relative_error(fused(x), plain(x)) < CLOSE


def test_a_type_or_a_device_that_is_handed_on_is_none() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            n, _, h, w = x.shape
            y = self.made(x).to(x.dtype).to(x.device)
            return y.reshape(n, -1, h, w) + torch.zeros_like(y)

    assert launches(fuse(Net().eval()), images()) == 1


class AsItsParameters(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.made(x.to(next(self.parameters()).dtype)) * (2 if any(p.requires_grad for p in self.parameters()) else 1)


def test_what_parameters_are_is_asked_at_each_call() -> None:
    plain = randomise(AsItsParameters().eval())
    fused, x = fuse(nn.Sequential(copy.deepcopy(plain), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()), images()
    for change in (lambda m: m, lambda m: m.requires_grad_(False), lambda m: m.double()):
        with torch.no_grad():
            found, wanted = change(fused[0])(x), change(plain)(x)
        assert found.dtype == wanted.dtype and relative_error(found, wanted) < CLOSE


# ---- what a trace hangs on


class Scaled(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("gamma", None)
        self.register_buffer("mask", None)
        self.act: Any = partial(F.leaky_relu, negative_slope=0.1)
        self.tree = {"a": {"b": {"c": [{"double": False}]}}}
        self.parts = nn.ModuleDict({"one": nn.Conv2d(4, 4, 1), "two": nn.Conv2d(4, 4, 1)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        for part in self.parts.values():
            y = part(y).tanh()
        y = y if self.gamma is None else y * self.gamma
        y = y if self.mask is None else y * self.mask
        return y * 2 if self.tree["a"]["b"]["c"][0]["double"] else y


def _reorder(model: Any) -> None:
    model.parts["one"] = model.parts.pop("one")


def _deep(model: Any) -> None:
    model.tree["a"]["b"]["c"][0]["double"] = True


CHANGES = {
    "parameter": lambda model: setattr(model, "gamma", nn.Parameter(torch.full((1,), 3.0))),
    "buffer": lambda model: setattr(model, "mask", torch.full((1,), 3.0)),
    "order": _reorder,
    "depth": _deep,
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_it_hung_on_is_seen(change: str, training: bool) -> None:
    plain = randomise(Scaled()).train(training)
    fused, x = fuse(copy.deepcopy(plain)), images()
    assert relative_error(fused(x), plain(x)) < CLOSE
    for model in (plain, fused):
        CHANGES[change](model)
    assert relative_error(fused(x), plain(x)) < CLOSE
    if change == "parameter":
        for model in (plain, fused):
            model.gamma = None
        assert relative_error(fused(x), plain(x)) < CLOSE


def test_an_object_at_the_address_of_another_is_another() -> None:
    plain = randomise(Scaled().eval())
    fused, x = fuse(copy.deepcopy(plain)), images()
    fused(x)
    for slope in (0.2, 0.3, 0.5, 0.7, 0.9, 0.95):
        fused.act = None
        fused.act, plain.act = (partial(F.leaky_relu, negative_slope=slope) for _ in range(2))
        assert relative_error(fused(x), plain(x)) < CLOSE, slope


# ---- what lies between a convolution and its BatchNorm


class SharedNorm(Base):
    """Its statistics move by the second convolution's output first."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x), self.second(x)
        b = torch.relu(self.bn(b))
        return torch.relu(self.bn(a)) + b


class Clamps(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.bn.weight.data.clamp_(0, 0.5)
        return torch.relu(self.bn(y))


class Held(Base):
    """What is written in place by a part of a Sequential, others read too."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.bn(self.conv(x))
        return y + self.act(x)


@pytest.mark.parametrize("kind", [SharedNorm, Clamps, Held], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_what_lies_between(kind: type[Base], training: bool) -> None:
    plain = randomise(kind()).train(training)
    fused, x = fuse(nn.Sequential(copy.deepcopy(plain), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))[0], images()
    fused.train(training)
    with torch.no_grad():
        assert relative_error(fused(x), plain(x)) < CLOSE
    for key, value in plain.state_dict().items():
        assert relative_error(fused.state_dict()[key], value) < CLOSE, key


def test_a_convolution_of_its_own_on_an_instance() -> None:
    def circular(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    plain = randomise(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).eval())
    fused, x = fuse(copy.deepcopy(plain)), images()
    with torch.no_grad():
        fused(x)
        for model in (plain, fused):
            model[0]._conv_forward = circular.__get__(model[0])
        assert relative_error(fused(x), plain(x)) < CLOSE


def test_numbers_of_numpy() -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.scale = np.sqrt(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.made(x) * self.scale / np.float64(3)

    plain = randomise(Net().eval())
    fused, x = fuse(copy.deepcopy(plain)), images()
    assert launches(fused, x) == 1 and relative_error(fused(x), plain(x)) < CLOSE


# ---- sizes and types


@pytest.mark.parametrize("filters", [8, 512])
@pytest.mark.parametrize("sizes", [(1, 2, 1), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_one_pixel_then_more(batch: int, sizes: tuple[int, ...], filters: int) -> None:
    """A 1x1 convolution of one pixel is a matrix product, whose filters are laid out otherwise."""
    plain = randomise(nn.Sequential(nn.Conv2d(filters, filters, 1), nn.BatchNorm2d(filters), nn.ReLU()).eval())
    fused = fuse(copy.deepcopy(plain))
    with torch.no_grad():
        for size in sizes:
            x = torch.randn(batch, filters, size, size)
            assert relative_error(fused(x), plain(x)) < CLOSE


def test_another_default_type_and_device() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, bias=True), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    fused, x = fuse(randomise(net)), images().bfloat16().requires_grad_()
    for module in fused:
        if isinstance(module, nn.Conv2d):
            module.bfloat16()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        fused(x).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert x.grad is not None and x.grad.device.type == "cpu" and fused[0].bias.grad.dtype == torch.bfloat16


def test_unfuse_gives_back_what_was_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Writes("buffer"))
    kinds = [type(part) for part in model.modules()]
    assert [type(part) for part in unfuse(fuse(model)).modules()] == kinds


# ---- what must not cost a fusion, or be decided for good


class Config:
    def __init__(self) -> None:
        self.lazy = None

    @cached_property
    def scale(self) -> float:
        return 2.0

    def width(self) -> int:
        self.lazy = self.lazy or 3
        return self.lazy


class Logs(Base):
    def __init__(self) -> None:
        super().__init__()
        self.config, self.log, self.queue = Config(), logging.getLogger("fused_resnet.tests"), queue.Queue()

    def forward(self, x: Tensor) -> Tensor:
        self.log.debug("of %s", x.shape)
        assert hasattr(x, "permute") and isinstance(x, Tensor) and isinstance(x * 1.0, Tensor) and isinstance(x[:, :2], Tensor)
        return self.made(x) * self.config.scale + self.config.width()


def test_books_of_others_and_questions_about_tensors_are_no_hindrance() -> None:
    plain = randomise(Logs().eval())
    fused, x = fuse(Logs().eval()), images()
    fused.load_state_dict(plain.state_dict())
    assert launches(fused, x) == 1 and relative_error(fused(x), plain(x)) < CLOSE


def test_what_other_threads_put_in_meanwhile_stays() -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.queue: queue.Queue[int] = queue.Queue()

        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: (self.queue.put(1), self.bn.register_forward_pre_hook(print)))
            thread.start()
            thread.join()
            return self.made(x)

    model = fuse(Net().eval())
    assert model.queue.qsize() > 0 and len(model.bn._forward_pre_hooks) > 0


class OneDecides(nn.Module):
    """Only one of its parts cannot be traced."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.first, self.one, self.last = Made(), Decides(by) if by in DECISIONS else AsItsParameters(), Made()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.one(torch.relu(self.first(x) + x))) + x


class Made(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.made(x)


@pytest.mark.parametrize("by", ["dtype", "parameters"])
def test_who_decides_is_to_blame(by: str) -> None:
    plain = randomise(OneDecides(by).eval())
    fused, x = fuse(copy.deepcopy(plain)), images()
    with torch.no_grad():
        assert launches(fused, x) == 2 and relative_error(fused(x), plain(x)) < CLOSE


def test_an_array_is_no_number() -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.scale = np.array([2.0])

        def forward(self, x: Tensor) -> Tensor:
            return self.made(x) * self.scale

    plain = randomise(Net().eval())
    fused, x = fuse(copy.deepcopy(plain)), images()
    with torch.no_grad():
        assert fused(x).dtype == plain(x).dtype
        fused.scale[0] = plain.scale[0] = 5
        assert relative_error(fused(x), plain(x)) < CLOSE


def test_a_guard_keeps_nothing_alive() -> None:
    model, x = fuse(Scaled().eval()), images()
    model(x)
    kept = weakref.ref(model.act)
    model.act = partial(F.leaky_relu, negative_slope=0.3)
    model(x)
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("name", ["asarray", "new_tensor", "full", "scalar_tensor", "func", "trace"])
@pytest.mark.filterwarnings("ignore")
def test_functions_in_c_beside_a_question(name: str) -> None:
    """In a function that asks for classes too; what they make of a stand-in is refused."""

    def made(x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        made = {
            "asarray": lambda: torch.asarray(x) if isinstance(x, Tensor) else x,
            "new_tensor": lambda: x.new_tensor(x) if isinstance(x, Tensor) else x,
            "full": lambda: torch.full((2,), x.sum()).sum() * x if isinstance(x, Tensor) else x,
            "scalar_tensor": lambda: torch.scalar_tensor(x.sum()) * x if isinstance(x, Tensor) else x,
            "func": lambda: torch.func.grad(lambda y: (y * y).sum())(x),
            "trace": lambda: torch.jit.trace(torch.tanh, (x,))(x),
        }
        return made[name]()

    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            return made(self.made(x).detach())

    plain = randomise(Net().eval())
    fused, x = fuse(copy.deepcopy(plain)), images()
    assert relative_error(fused(x), plain(x)) < CLOSE


SEEN: list[object] = []


def test_stand_ins_that_outlive_their_trace_are_plain_objects() -> None:
    """Memory profilers ask all objects of a process whether they are tensors, and meet stand-ins that somebody kept."""

    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            SEEN.extend([x, x.shape, x.size(0), x + 1, x.dtype])
            return self.made(x)

    SEEN.clear()
    fuse(Net().eval())
    kept = [one for one in SEEN if issubclass(type(one), fx.Proxy)]
    assert kept
    assert not any(isinstance(one, Tensor) for one in kept)
    assert len(set(kept)) == len({id(one) for one in kept})
    SEEN.clear()


def test_a_message_tells_the_size_that_came() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            h = x.shape[2]
            torch._assert(h == 8, f"expected 8 rows, got {h}")
            return self.made(x)

    fused = fuse(Net().eval())
    assert fused(images()).shape == (2, 4, 8, 8)
    with pytest.raises(AssertionError, match=r"expected 8 rows, got 9$"):
        fused(images(9))


def test_tables_that_pytorch_makes_once_are_of_its_own_functions() -> None:
    """Not of those that listen while a forward is traced, which knew the model, and kept it for good."""
    for table in (torch.overrides.get_ignored_functions, torch.overrides.get_testing_overrides):
        table.cache_clear()
    net = fuse(nn.Sequential(Activated(next(iter(ACTIVATIONS))), nn.Sequential(Activated(next(iter(ACTIVATIONS))))))
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None
    assert torch.is_grad_enabled in torch.overrides.get_ignored_functions()
