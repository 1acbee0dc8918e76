"""Networks that are looked at once a call: what they give, what of them is seen to change, and which are left as they were."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import random
import time
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from nets import randomise
from tolerances import CLOSE, relative_error
from torch import Tensor, nn

from fused_resnet import count_launches, explain, fuse, fused, plain, plain_paper, unfuse, watch, whole
from fused_resnet.swap import analysis, trusted
from fused_resnet.watch import ATTRIBUTE


def _layer(channels: int, filters: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    padding = kernel // 2
    return [nn.Conv2d(channels, filters, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(filters)]


class Squeeze(nn.Module):
    """A squeeze-and-excitation, which is no chain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Hardsigmoid()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def scale(self, x: Tensor) -> Tensor:
        return self.gate(self.fc2(torch.relu(self.fc1(self.pool(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(x)


class Inverted(nn.Module):
    """MobileNetV3's block, with a sum in place, and a parameter that is read."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        act = nn.Hardswish()
        self.expand = nn.Sequential(*_layer(channels, wide), act, *_layer(wide, wide, 3, groups=wide), act)
        self.squeeze = Squeeze(wide)
        self.project = nn.Sequential(*_layer(wide, channels))
        self.gamma = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.factors = [0.5, 1.0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.squeeze(self.expand(x))) * self.gamma
        y += x * self.factors[1]
        return y


class Net(nn.Module):
    """A stem, blocks of three kinds, a pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_layer(3, 8, 3, 2), nn.ReLU())
        self.blocks = nn.Sequential(Inverted(8, 24), Inverted(8, 16))
        self.stage = nn.Sequential(*[plain.BasicBlock(8, 8) for _ in range(3)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(nn.Linear(8, 12), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage(self.blocks(self.stem(x)))
        return self.head(torch.flatten(self.pool(x), 1))


#: A network's chains: the stem, two of a block before and behind its squeeze each, three blocks.
CHAINS = 1 + 2 * 2 + 3


def _pair(make: Callable[[], nn.Module] = Net) -> tuple[Any, Any]:
    torch.manual_seed(0)
    net = randomise(make()).eval()
    return net, fuse(copy.deepcopy(net), backend="cpu")


def _images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 21, 19)


def _looked(net: nn.Module) -> bool:
    """Whether all of it is looked at in one go."""
    return ATTRIBUTE in vars(net) and whole.LOOK in vars(net)[ATTRIBUTE].entries


@pytest.fixture(autouse=True)
def _without_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And the classes of this file are taken for those of a model zoo."""
    monkeypatch.setattr(trusted, "ZOOS", trusted.ZOOS | {__name__})
    with torch.no_grad():
        yield


@pytest.fixture
def somebodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not."""
    monkeypatch.setattr(trusted, "ZOOS", trusted.ZOOS - {__name__})


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many modules are looked at, look by look."""
    found: list[int] = []
    unchanged = watch.unchanged

    def counted(seen: Any, places: int = watch.ALL) -> bool:
        seen = tuple(seen)
        found.append(len(seen))
        return unchanged(seen, places)

    monkeypatch.setattr(watch, "unchanged", counted)
    return found


def test_one_look_a_call(looks: list[int]) -> None:
    """From the third call on; with the same bits."""
    net, fused_net = _pair()
    x, wanted = _images(), copy.deepcopy(net).double()
    assert type(fused_net).__name__ == "FusedNet" and isinstance(fused_net, Net)
    found = []
    for call in range(6):
        looks.clear()
        found.append(fused_net(x))
        assert _looked(fused_net) is (call >= whole.FIRST - 1)
        assert call < whole.FIRST or len(looks) == 1
    assert looks[0] > 3 * CHAINS
    assert all(torch.equal(found[0], one) for one in found)
    assert relative_error(found[0], wanted(x.double())) < CLOSE
    readings = vars(fused_net)[ATTRIBUTE].entries[whole.LOOK].value.readings
    assert len(readings) == CHAINS and all(len(reading.ready) == 1 for reading in readings)


def test_inputs_of_other_sizes_types_and_kinds() -> None:
    net, fused_net = _pair()
    for n in (2, 2, 2, 1, 3, 2, 1, 3, 1):
        x = torch.randn(n, 3, 17 + 2 * n, 19)
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            assert relative_error(fused_net(given), net(given)) < CLOSE
    assert _looked(fused_net)
    assert relative_error(fused_net(x=x), net(x)) < CLOSE
    with pytest.raises(RuntimeError, match="channels"):
        fused_net(torch.randn(2, 4, 9, 9))
    with pytest.raises(TypeError):
        fused_net()
    with pytest.raises(TypeError):
        fused_net(x, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_net(x).dtype == torch.bfloat16
    with count_launches() as log:
        fused_net(x)
    assert len(log) > CHAINS
    net.double(), fused_net.double()
    for _ in range(8):
        assert relative_error(fused_net(x.double()), net(x.double())) < 1e-12


def test_with_gradients_it_trains_as_ever() -> None:
    net, fused_net = _pair()
    x = _images()
    for _ in range(5):
        fused_net(x)
    with torch.enable_grad():
        for model in (net.train(), fused_net.train()):
            model.head[2].eval()
            model(x).square().sum().backward()
    for (name, mine), its in zip(fused_net.named_parameters(), net.parameters()):
        assert mine.grad is not None and relative_error(mine.grad, its.grad) < 1e-3, name
    net.eval(), fused_net.eval()
    for _ in range(2 * 2 * whole.FIRST):
        assert relative_error(fused_net(x), net(x)) < CLOSE, "statistics have moved"
    assert _looked(fused_net)


class Scaling(nn.Module):
    """A pooling by a factor."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.mean((2, 3), keepdim=True)


class Twice(nn.Module):
    """Hooked in: what goes through is doubled."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.pool(x)


def _set(module: Any, name: str, value: Any) -> None:
    setattr(module, name, value)


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda _m, _x, y: y * 1.5)


def _without_counting(tensor: Tensor) -> None:
    tensor.numpy()[...] *= 1.5


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a layer replaced": lambda net: net.head.__setitem__(3, nn.Linear(12, 5)),
    "a pooling replaced": lambda net: _set(net, "pool", Twice(net.pool)),
    "an activation replaced": lambda net: net.head.__setitem__(1, nn.ReLU()),
    "a layer appended": lambda net: net.head.append(nn.Tanh()),
    "a block appended": lambda net: net.blocks.append(randomise(Inverted(8, 8)).eval()),
    "a block taken away": lambda net: net.blocks.pop(1),
    "blocks swapped": lambda net: net.blocks.__init__(net.blocks[1], net.blocks[0]),
    "a hook on a pooling": lambda net: _hook(net.pool),
    "a hook on a layer of the head": lambda net: _hook(net.head[0]),
    "a hook on the head": lambda net: _hook(net.head),
    "a hook on a block": lambda net: _hook(net.blocks[0]),
    "a hook on a residual block": lambda net: _hook(net.stage[1]),
    "a hook on a stage": lambda net: _hook(net.stage),
    "a hook on a convolution": lambda net: _hook(net.stage[1].conv2),
    "a pre-hook": lambda net: net.blocks[1].squeeze.register_forward_pre_hook(lambda _m, x: (x[0] * 2,)),
    "a hook on the network": _hook,
    "forward replaced on a pooling": lambda net: _set(net.pool, "forward", lambda x: 2 * x.mean((2, 3), keepdim=True)),
    "forward replaced on a block": lambda net: _set(net.blocks[0], "forward", lambda x: 2 * x),
    "forward replaced on a residual block": lambda net: _set(net.stage[1], "forward", lambda x: 2 * x),
    "forward replaced on the network": lambda net: _set(net, "forward", lambda x: x.mean((2, 3))),
    "a parameter that is read": lambda net: _set(net.blocks[0], "gamma", nn.Parameter(torch.rand(8, 1, 1))),
    "a parameter that is read, in place": lambda net: net.blocks[0].gamma.data.mul_(3),
    "a plain attribute": lambda net: net.blocks[1].factors.__setitem__(1, 3.0),
    "an attribute of a layer": lambda net: _set(net.pool, "output_size", (1, 2)) or _set(net, "head", nn.Linear(16, 3)),
    "a BatchNorm in training mode": lambda net: net.stage[0].bn1.train(),
    "dropout in training mode": lambda net: _set(net.head[2], "p", 1.0) or net.head[2].train(),
    "filters": lambda net: net.stage[2].conv1.weight.mul_(1.5),
    "filters, not counted": lambda net: _without_counting(net.blocks[0].expand[0].weight.detach()),
    "statistics elsewhere": lambda net: _set(net.stem[1].running_mean, "data", net.stem[1].running_mean + 1),
    "a layer's weights": lambda net: net.head[3].weight.mul_(1.5),
    "weight norm": lambda net: nn.utils.parametrizations.weight_norm(net.head[0]).parametrizations.weight.original0.mul_(2),
    "pruning": lambda net: nn.utils.parametrize.register_parametrization(net.stage[0].conv2, "weight", nn.Tanh()),
}


def _check_seen(make: Callable[[], nn.Module], change: Callable[[Any], Any]) -> None:
    """A change of a network that is looked at: at the next call, and at those behind it."""
    net, fused_net = _pair(make)
    x = _images()
    for _ in range(5):
        before = fused_net(x)
    assert _looked(fused_net)
    for model in (net, fused_net):
        torch.manual_seed(1)
        change(model)
    expected = net(x)
    assert before.shape != expected.shape or relative_error(before, expected) > 3 * CLOSE, "the change shows"
    for _ in range(2 * 2 * whole.FIRST):
        expected = net(x)
        assert relative_error(fused_net(x), expected) < CLOSE


@pytest.mark.parametrize("how", CHANGES)
def test_what_changes_is_seen(how: str) -> None:
    _check_seen(Net, CHANGES[how])


def test_another_backend_for_a_part() -> None:
    """It decides for its part; and where it is the whole network's again, all is looked at once again."""
    _, fused_net = _pair()
    x = _images()
    for _ in range(5):
        before = fused_net(x)
    fused_net.stage[1].fused_backend = "reference"
    with count_launches() as log:
        fused_net(x)
    assert {backend for backend, _ in log.launches} == {"cpu", "reference"}
    for _ in range(8):
        assert relative_error(fused_net(x), before) < CLOSE
    assert not _looked(fused_net)
    fused_net.stage[1].fused_backend = "cpu"
    for _ in range(2 * 2 * 2 * whole.FIRST):
        fused_net(x)
    assert _looked(fused_net)


class Reads(nn.Module):
    """Chains whose inputs and results are read by others too, or handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(*[plain.BasicBlock(4, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, second, third = self.stage
        a = first(x)
        b = second(a)
        view = b[:, 1:]
        return a, third(a), third(b), view


class Donated(Reads):
    """Each result is read once."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.stage(x),)


@pytest.mark.parametrize("make", [Reads, Donated])
def test_what_others_read_is_not_written_over(make: Callable[[], nn.Module]) -> None:
    """A sum is made in the memory of a block's input, where nobody else has it: never in the caller's."""
    net, fused_net = _pair(make)
    x = torch.randn(2, 4, 9, 7).contiguous(memory_format=torch.channels_last)
    given = x.clone()
    expected = copy.deepcopy(net).double()(x.double())
    kept = []
    for _ in range(6):
        kept.append(fused_net(x))
        assert torch.equal(x, given)
    for found in kept:  # all of them, behind the last call
        for mine, its in zip(found, expected):
            assert relative_error(mine, its) < CLOSE
    look = vars(fused_net)[ATTRIBUTE].entries[whole.LOOK].value
    donated = [kind[2] for reading in look.readings for kind in reading.ready]
    assert donated == ([False, True, True] if make is Donated else [False] * 4)


def test_results_of_blocks_that_ran_one_by_one_are_not_written_over() -> None:
    """A chain that refuses its input is called as its modules: what they give may be somebody's."""
    net, fused_net = _pair(Donated)
    x = torch.randn(2, 4, 9, 7)
    for _ in range(4):
        fused_net(x)
    kept: list[Tensor] = []
    for model in (net, fused_net):
        model.stage[0].bn2.register_forward_hook(lambda _m, _x, y: kept.append(y))
    for _ in range(8):
        kept.clear()
        assert relative_error(fused_net(x)[0], net(x)[0]) < CLOSE
        assert relative_error(kept[0], kept[1]) < CLOSE


class Scaled(nn.Module):
    """What a program may set is asked of a module that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0


class ReadsChildren(Net):
    """A network that reads its children, without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled, self.extra, self.few, self.drop = Scaled(), nn.ModuleList(), nn.Sequential(), nn.Dropout(0.9)
        self.up, self.plainly = nn.Upsample(scale_factor=2), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stage(self.blocks(self.stem(x))) * self.scaled.factor
        for layer in self.extra:
            y = layer(y)
        if len(self.few):
            y = y * 2
        y = F.dropout(self.up(y), self.drop.p, self.drop.training)
        if self.up.scale_factor > 2:
            y = y * 10
        if self.stem[0].stride == (1, 1):
            y = y + 1
        y = self.plainly(y.mean((2, 3)))
        if self.plainly.bias is not None:
            y = y * 2
        return F.linear(y, self.head[0].weight[:, : self.head[0].in_features])


READ: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda net: _set(net.scaled, "factor", 3.0),
    "a list": lambda net: net.extra.append(nn.Tanh()),
    "a Sequential": lambda net: net.few.append(nn.Tanh()),
    "a mode": lambda net: _set(net.drop, "p", 1.0) or net.drop.train(),
    "an attribute of a layer": lambda net: _set(net.up, "scale_factor", 3),
    "an attribute of a convolution": lambda net: _set(net.stem[0], "stride", (1, 1)),
    "a bias that was none": lambda net: _set(net.plainly, "bias", nn.Parameter(torch.ones(8))),
    "a parameter": lambda net: _set(net.head, "0", nn.Linear(8, 3)),
}


@pytest.mark.parametrize("how", READ)
def test_what_is_read_of_children_is_seen(how: str) -> None:
    _check_seen(ReadsChildren, READ[how])


# ---- what is somebody's own


class Counts(nn.Module):
    """A module without layers, that does more than compute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(time.time())
        return x


FLAG = {"factor": 1.0}


class Asks(Net):
    """A network whose forward asks what is not in it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * FLAG["factor"]


class Says(Net):
    """A network that prints, in a method."""

    def forward(self, x: Tensor) -> Tensor:
        return self._through(x)

    def _through(self, x: Tensor) -> Tensor:
        print("said")
        return super().forward(x)


class Called(plain.BasicBlock):
    """A block that counts its calls."""

    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        Called.calls += 1
        return super().__call__(*args, **kwargs)


@pytest.mark.usefixtures("somebodys")
def test_a_forward_of_somebodys_own_runs_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    net, fused_net = _pair(Asks)
    assert any(isinstance(module, fused.Fused) for module in fused_net.modules())
    x = _images()
    for _ in range(5):
        before = fused_net(x)
    monkeypatch.setitem(FLAG, "factor", 3.0)
    for _ in range(9):
        assert relative_error(fused_net(x), 3 * before) < CLOSE and relative_error(fused_net(x), net(x)) < CLOSE
    assert not _looked(fused_net) and type(fused_net) is Asks


@pytest.mark.usefixtures("somebodys")
def test_a_forward_that_prints_does_so_at_each_call(capsys: pytest.CaptureFixture[str]) -> None:
    """And no more often: it is not traced meanwhile."""
    _, fused_net = _pair(Says)
    capsys.readouterr()  # it was traced for its chains
    for _ in range(26):
        fused_net(_images())
    assert capsys.readouterr().out.count("said") == 26


@pytest.mark.usefixtures("somebodys")
def test_a_call_of_somebodys_own_is_called() -> None:
    net, fused_net = _pair(lambda: nn.Sequential(Called(3, 3), Called(3, 3), nn.Flatten()))
    for _ in range(13):
        x, Called.calls = _images(), 0
        assert relative_error(fused_net(x), net(x)) < CLOSE and Called.calls == 4


def test_a_method_that_somebody_has_put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an instance, or of a class: in front of the look and behind it."""
    for put in ("instance", "class"):
        for calls in (0, 5):
            net, fused_net = _pair()
            x = _images()
            for _ in range(calls):
                fused_net(x)
            with monkeypatch.context() as patch:
                other = _of_nobody(lambda self, x, forward=Net.forward: forward(self, x) * FLAG["factor"])
                if put == "class":
                    patch.setattr(Net, "forward", other)
                else:
                    patch.setitem(vars(fused_net), "forward", functools.partial(other, fused_net))
                    patch.setitem(vars(net), "forward", functools.partial(other, net))
                for factor in (1.0, 1.0, 1.0, 1.0, 2.0, 3.0):
                    patch.setitem(FLAG, "factor", factor)
                    assert relative_error(fused_net(x), net(x)) < CLOSE


@pytest.mark.parametrize("calls", [0, 7])
@pytest.mark.parametrize("how", ["function", "mock", "object", "decorated", "class", "method of a class"])
def test_something_of_somebodys_own_on_a_module_inside(how: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In front of the look, and behind it: it is called each time, and gives what it gives."""
    net, fused_net = _pair()
    x = _images()
    for _ in range(calls):
        fused_net(x)
    made: list[Tensor] = []

    def spy(z: Tensor) -> Tensor:
        made.append(z)
        return 2 * z

    class Spy:
        __module__ = "nobodys"

        def __call__(self, z: Tensor) -> Tensor:
            return spy(z)

    nobodys: Any = _of_nobody(spy)
    kinds = {"function": nobodys, "mock": mock.Mock(side_effect=spy), "object": Spy(), "decorated": torch.no_grad()(nobodys)}
    for model in (net, fused_net):
        if how == "class":
            monkeypatch.setattr(Squeeze, "forward", lambda self, x: spy(x))
        elif how == "method of a class":
            monkeypatch.setattr(Squeeze, "scale", lambda self, x: spy(x))
        else:
            model.blocks[1].squeeze.scale = kinds[how]
    for _ in range(13):
        made.clear()
        expected = net(x)
        eagers = len(made)
        assert relative_error(fused_net(x), expected) < CLOSE
        assert "class" in how or len(made) == 2 * eagers == 2


class Own(nn.Module):
    """A region of somebody's own."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        if FLAG["factor"] > 1:
            self.last = y
        return y


class Twofold(Own):
    """One that is called otherwise."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 2


@pytest.mark.usefixtures("somebodys")
@pytest.mark.parametrize("make", [Own, Twofold])
def test_a_region_of_somebodys_own_is_looked_at_by_itself(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was traced for its chains: it is not traced again, in a network around it neither."""
    layers = [*_layer(3, 8, 3), nn.ReLU()]
    net, fused_net = _pair(lambda: nn.Sequential(nn.Sequential(*layers), make(), make(), nn.AvgPool2d(2), nn.Flatten()))
    monkeypatch.setitem(FLAG, "factor", 2.0)
    x = _images()
    for _ in range(13):
        assert relative_error(fused_net(x), net(x)) < CLOSE
    assert not _looked(fused_net) and _looked(fused_net[1]) and "last" not in vars(fused_net[1])


def _of_nobody(function: Any) -> Any:
    """The same function, written in another module."""
    names = {**function.__globals__, "__name__": "nobodys"}
    return types.FunctionType(function.__code__, names, "forward", function.__defaults__, function.__closure__)


def test_parts_of_a_network_that_is_not_looked_at_as_a_whole_are(looks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's module in it is called at each call; a stage beside it is looked at once."""
    net, fused_net = _pair()
    monkeypatch.setattr(Counts, "__module__", "somebodys")
    x = _images()
    for model in (net, fused_net):
        model.blocks.insert(1, Counts())
    for call in range(7):
        looks.clear()
        assert relative_error(fused_net(x), net(x)) < CLOSE
        assert len(fused_net.blocks[1].calls) == call + 1
    assert not _looked(fused_net) and _looked(fused_net.stage)
    assert len(looks) == 1 + 2 * 2 + 1, "the stem, two chains of a block each, and the stage"


# ---- when it is traced


def test_nothing_is_put_back_when_it_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the third call other threads may draw random numbers, and set attributes."""
    _, fused_net = _pair()
    x = _images()
    fused_net(x), fused_net(x)
    trace = analysis.trace

    def traced(*args: Any, **kwargs: Any) -> Any:
        found = trace(*args, **kwargs)
        drawn.append((random.random(), float(torch.rand(()))))
        fused_net.step = len(drawn)
        return found

    drawn: list[tuple[float, float]] = []
    state = random.getstate(), torch.get_rng_state()
    monkeypatch.setattr(analysis, "trace", traced)
    fused_net(x)
    after = random.random(), float(torch.rand(()))
    random.setstate(state[0]), torch.set_rng_state(state[1])
    assert len(drawn) == 1 and [(random.random(), float(torch.rand(()))) for _ in range(2)] == [drawn[0], after]
    assert fused_net.step == 1


def test_it_dies_with_its_last_reference() -> None:
    """No cycle: not behind a look, nor behind a trace."""
    _, fused_net = _pair()
    gc.collect()
    gc.disable()
    try:
        for _ in range(6):
            fused_net(_images())
        assert _looked(fused_net)
        alive = weakref.ref(fused_net)
        del fused_net
        assert alive() is None
    finally:
        gc.enable()


def test_parts_that_are_unfused_or_fused_again() -> None:
    """What was unfused runs as it was written; and what is replaced can be fused."""
    net, fused_net = _pair()
    x = _images()
    for _ in range(5):
        expected = fused_net(x)
    unfuse(fused_net.stage)
    for _ in range(2 * 2 * whole.FIRST):
        assert relative_error(fused_net(x), expected) < CLOSE
    with count_launches() as log:
        fused_net(x)
    assert not _looked(fused_net)
    fuse(fused_net, backend="cpu")
    assert isinstance(fused_net.stage, fused.Fused)
    for _ in range(8 * 2 * whole.FIRST):
        assert relative_error(fused_net(x), expected) < CLOSE
    assert _looked(fused_net)
    with count_launches() as again:
        fused_net(x)
    assert len(again) == len(log) + 3 * 2
    for model in (net, fused_net):
        torch.manual_seed(1)
        model.blocks[0] = randomise(Inverted(8, 24)).eval()
    for _ in range(2 * 2 * whole.FIRST):
        assert relative_error(fused_net(x), net(x)) < CLOSE
    fuse(fused_net, backend="cpu")
    for _ in range(32 * 2 * whole.FIRST):
        assert relative_error(fused_net(x), net(x)) < CLOSE
    assert _looked(fused_net)
    with pytest.raises(RuntimeError, match="already fused"):
        fuse(fused_net)
    for model in (net, fused_net):
        model.stage[1] = randomise(plain.BasicBlock(8, 8)).eval()
    net.load_state_dict(fused_net.state_dict())
    for _ in range(32 * 2 * whole.FIRST):
        assert relative_error(fused_net(x), net(x)) < CLOSE
    assert not _looked(fused_net), "one block in its stage is not fused"


def test_it_is_not_traced_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be looked at: at the third call, and behind twice as many each time."""
    tried = []
    network = analysis.Analysis.network

    def counted(self: Any, module: nn.Module) -> Any:
        tried.append(module)
        return network(self, module)

    monkeypatch.setattr(analysis.Analysis, "network", counted)
    net, fused_net = _pair()
    x = _images()
    seen: list[Any] = []
    hook = fused_net.pool.register_forward_hook(lambda *given: seen.append(given))
    for _ in range(3 + 6 + 12 + 5):
        assert relative_error(fused_net(x), net(x)) < CLOSE
    assert len(seen) == 26 and sum(module is fused_net for module in tried) == 1, "it is kept, and does not hold for the hook"
    hook.remove()
    for _ in range(24):
        fused_net(x)
    assert _looked(fused_net) and len(seen) == 26 and sum(module is fused_net for module in tried) == 1
    tried.clear()
    monkeypatch.setattr(Squeeze, "__module__", "somebodys")
    other = copy.deepcopy(fused_net)
    for _ in range(3 + 6 + 12 + 24):
        other(x)
    assert not _looked(other) and sum(module is other for module in tried) == 1, "nothing has changed"
    other.pool = Scaling()
    for _ in range(48):
        assert relative_error(other(x), 2 * fused_net(x)) < 1
    assert sum(module is other for module in tried) == 2


def test_copies_pickles_and_unfused_ones() -> None:
    net, fused_net = _pair()
    x = _images()
    for _ in range(5):
        expected = fused_net(x)
    copied, unpickled = copy.deepcopy(fused_net), pickle.loads(pickle.dumps(fused_net))
    for other in (copied, unpickled):
        assert type(other) is type(fused_net) and not _looked(other)
        with torch.no_grad():
            other.head[3].bias.add_(1)
        for _ in range(5):
            assert relative_error(other(x), expected + 1) < CLOSE
        assert _looked(other)
    assert torch.equal(fused_net(x), expected)
    assert list(fused_net.state_dict()) == list(net.state_dict())
    unfuse(fused_net)
    assert type(fused_net) is Net and vars(fused_net).keys() == vars(net).keys()
    assert not any(isinstance(module, fused.Fused) for module in fused_net.modules())
    assert relative_error(fused_net(x), net(x)) < CLOSE


def test_explain_tells_of_its_chains_alone() -> None:
    """Nothing is said of the network itself, which holds no chain; and of what stands alone in it what was said before."""
    _, fused_net = _pair()
    alone = fuse(randomise(Net()).eval().blocks, backend="cpu")
    rows = {row.name: row for row in explain(fused_net, show=False).rows}
    assert sum(row.fused for row in rows.values()) == CHAINS
    inner = {row.name: row.note for row in explain(alone, show=False).rows}
    assert {name.removeprefix("blocks."): row.note for name, row in rows.items() if name.startswith("blocks.")} == inner


def test_a_class_that_cannot_be_derived_from_stays() -> None:
    """Where its chains are those of modules inside nothing is lost but the one look."""

    class Final(Net):
        def __init_subclass__(cls) -> None:
            raise TypeError("final")

    net, fused_net = _pair(Final)
    assert type(fused_net) is Final and vars(fused_net).keys() == vars(net).keys()
    x = _images()
    for _ in range(4):
        assert relative_error(fused_net(x), net(x)) < CLOSE
    with count_launches() as log:
        fused_net(x)
    assert len(log) > CHAINS


def test_within_another_network_it_is_part_of_that() -> None:
    """A network that was fused, in one that is fused around it; and in one that is not."""
    _, fused_net = _pair()
    around = randomise(nn.Sequential(nn.Sequential(*_layer(3, 3, 3), nn.ReLU()), fused_net)).eval()
    plainly = unfuse(copy.deepcopy(around))
    fuse(around, backend="cpu")
    x = _images()
    for _ in range(5):
        assert relative_error(around(x), plainly(x)) < CLOSE
    assert _looked(around)
    assert not _looked(fused_net)


def test_a_block_whose_shortcut_is_gated_stays_one_chain() -> None:
    class Highway(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(*_layer(3, 4, 3), nn.ReLU())
            self.blocks = nn.Sequential(plain_paper.HighwayBlock(4, 4), plain_paper.HighwayBlock(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.stem(x)).sigmoid()

    net, fused_net = _pair(Highway)
    x, wanted = _images(), copy.deepcopy(net).double()
    for _ in range(6):
        assert relative_error(fused_net(x), wanted(x.double())) < CLOSE
    assert _looked(fused_net)
    assert len(vars(fused_net)[ATTRIBUTE].entries[whole.LOOK].value.readings) == 3


def test_a_view_of_what_a_chain_gives() -> None:
    """Chains give channels_last: a view that needs contiguous tensors becomes a reshape, or the network is left as it was."""

    class Views(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.blocks(self.stem(x))
            return y.view(y.shape[0], -1)

    class Written(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.blocks(self.stem(x)).contiguous()
            y.view(-1).mul_(2)
            return y

    for make in (Views, Written):
        net, fused_net = _pair(make)
        x = _images()
        for _ in range(6):
            assert relative_error(fused_net(x), net(x)) < CLOSE
        assert _looked(fused_net) is (make is Views)


def test_an_identity_in_front_of_a_block_with_a_shortcut() -> None:
    """As in timm's MobileNetV4: the shortcut starts in front of it."""

    class Block(nn.Module):
        def __init__(self, first: nn.Module) -> None:
            super().__init__()
            self.first, self.last = first, nn.Identity()
            self.one, self.two = nn.Sequential(*_layer(3, 6), nn.ReLU()), nn.Sequential(*_layer(6, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.two(self.one(self.first(x)))) + x

    for first in (nn.Identity(), nn.Sequential()):
        net, fused_net = _pair(lambda first=first: Block(first))  # type: ignore[misc]
        x, wanted = _images(), copy.deepcopy(net).double()
        for _ in range(6):
            assert relative_error(fused_net(x), wanted(x.double())) < CLOSE
        assert [row.eager_launches for row in explain(fused_net, show=False).rows if row.fused] == [6]
        with torch.enable_grad():
            for model in (net, fused_net):
                model(x).square().sum().backward()
        assert relative_error(fused_net.one[0].weight.grad, net.one[0].weight.grad) < CLOSE
        for model in (net, fused_net):
            model.first = nn.Tanh()
        assert relative_error(fused_net(x), net(x)) < CLOSE
