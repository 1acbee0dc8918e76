"""What is read off modules is remembered while they stay as they are, and read again as soon as anything differs."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from nets import randomise, tiny
from tolerances import CLOSE, relative_error
from torch import Tensor, nn

from fused_resnet import blocks, count_launches, functional, fuse, fused, plain, unfuse, watch, whole
from fused_resnet.watch import ATTRIBUTE, CannotWatchError, Children, Memory, Watched


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Chains read off modules, as they are read."""
    seen: list[Any] = []
    read = fused.read

    def counted(parts: Any, memory: str) -> Any:
        seen.append(parts)
        return read(parts, memory)

    for module in (blocks, fused):
        monkeypatch.setattr(module, "read", counted)
    return seen


class Sum(nn.Module):
    """A forward that is traced: two branches, an attribute of plain values, one in a list, and a container."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.ModuleDict({"second": nn.Conv2d(8, 8, 1, bias=False), "norm": nn.BatchNorm2d(8)})
        self.act = nn.LeakyReLU(0.1)
        self.scales = [1.0, 2.0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.first(x)))
        return self.act(self.inner["norm"](self.inner["second"](y)) + x) * self.scales[0]


def _net() -> nn.Module:
    """A block, a Sequential and a traced forward."""
    net = nn.Sequential(
        tiny().basic,
        nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)),
        Sum(),
    )
    return randomise(net).eval()


def _x() -> Tensor:
    return torch.randn(2, 8, 9, 7)


def test_read_once_in_a_mode(reads: list[Any]) -> None:
    net = fuse(_net())
    x = _x()
    with torch.no_grad():
        net(x)
        assert len(reads) == 3
        net(x)
    x.requires_grad_()
    net(x).sum().backward()
    assert len(reads) == 3
    net.train()
    net(x).sum().backward()
    assert len(reads) == 6
    net(x).sum().backward()  # statistics, counters and gradients have changed in place
    assert len(reads) == 6


def _in_place_of(module: Any, name: str, value: Any) -> None:
    setattr(module, name, value)


def _last_six(net: Any) -> list[Tensor]:
    """The second convolution of the Sequential and its BatchNorm, whose filters go on into a module of that many channels."""
    net[2] = nn.Identity()
    norm = net[1][4]
    return [net[1][3].weight, net[1][3].bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "activation replaced": lambda net: _in_place_of(net[0], "relu", nn.LeakyReLU(0.5)),
    "activation's slope": lambda net: _in_place_of(net[2].act, "negative_slope", 0.7),
    "kind of GELU": lambda net: _in_place_of(net[1][2], "approximate", "tanh"),
    "class of the activation": lambda net: _in_place_of(net[2].act, "__class__", nn.ReLU),
    "eps": lambda net: _in_place_of(net[1][1], "eps", 0.9),
    "one BatchNorm in training mode": lambda net: net[0].bn2.train(),
    "no running statistics": lambda net: [_in_place_of(net[1][4], name, None) for name in ("running_mean", "running_var")],
    "buffer replaced": lambda net: _in_place_of(net[1][1], "running_var", net[1][1].running_var * 9),
    "bias taken away": lambda net: _in_place_of(net[1][0], "bias", None),
    "bias added": lambda net: _in_place_of(net[0].conv1, "bias", nn.Parameter(torch.randn(16))),
    "filters cut in place": lambda net: [
        _in_place_of(net[1][0].weight, "data", net[1][0].weight.data[:, :, :2, :2]),
        _in_place_of(net[1][0], "padding", (0, 1)),
    ],
    "fewer filters in place": lambda net: (
        [
            _in_place_of(tensor, "data", tensor.data[:4])
            for module, names in (
                (net[1][0], ("weight", "bias")),
                (net[1][1], ("weight", "bias", "running_mean", "running_var")),
            )
            for tensor in (getattr(module, name) for name in names)
        ]
        + [_in_place_of(net[1][3].weight, "data", net[1][3].weight.data[:, :4])]
    ),
    "fewer filters of a bare convolution in place": lambda net: [
        _in_place_of(tensor, "data", tensor.data[:6]) for tensor in _last_six(net)
    ],
    "filters turned in place": lambda net: _in_place_of(net[1][0].weight, "data", net[1][0].weight.data.transpose(2, 3)),
    "padding": lambda net: _in_place_of(net[1][0], "padding", (0, 2)),
    "padding in words": lambda net: _in_place_of(net[1][0], "padding", "valid"),
    "padding mode": lambda net: _in_place_of(net[1][0], "padding_mode", "circular"),
    "projection's BatchNorm replaced": lambda net: net[0].downsample.__setitem__(1, nn.BatchNorm2d(16).eval()),
    "projection longer": lambda net: net[0].downsample.append(nn.Tanh()),
    "layers swapped": lambda net: net[1].__init__(net[1][0], net[1][1], net[1][2], net[1][4], net[1][3]),
    "layer added": lambda net: net[1].append(nn.ReLU()),
    "layer in between": lambda net: net[1].insert(2, nn.Sigmoid()),
    "an attribute of a forward": lambda net: net[2].scales.__setitem__(0, 3.0),
    "a container's child": lambda net: net[2].inner.update({"norm": nn.BatchNorm2d(8).eval()}),
    "forward replaced on a convolution": lambda net: _in_place_of(net[2].first, "forward", lambda x: 2 * x),
    "forward hook": lambda net: net[1][1].register_forward_hook(lambda _m, _x, y: y + 1),
    "forward pre-hook": lambda net: net[2].inner["second"].register_forward_pre_hook(lambda _m, x: (x[0] * 2,)),
    "double": lambda net: net.double(),
}


@pytest.mark.parametrize("calls", [1, 4])
@pytest.mark.parametrize("how", CHANGES)
def test_a_change_is_seen(how: str, calls: int) -> None:
    """Outputs are those of a copy that was fused after the change, and of the plain model. From the third call on the launches
    are prepared.
    """
    torch.manual_seed(0)
    plain, fused = _net(), _net()
    fused.load_state_dict(plain.state_dict())
    fuse(fused)
    x = _x()
    with torch.no_grad():
        for _ in range(calls):
            before = fused(x)
        for net in (plain, fused):
            torch.manual_seed(1)
            CHANGES[how](net)
        x = x.to(next(plain.parameters()).dtype)
        expected, after, again = plain(x), fused(x), fused(x)
    if how not in ("double", "projection's BatchNorm replaced"):
        assert before.shape != expected.shape or relative_error(before, expected) > 3 * CLOSE, "the change shows"
    assert relative_error(after, expected) < CLOSE and relative_error(again, expected) < CLOSE


class Whole(nn.Module):
    """A forward that is one chain and nothing else: two layers and a shortcut."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if dimensions == 4 else nn.BatchNorm1d
        kinds: Any = {2: (nn.Linear, ()), 3: (nn.Conv1d, (3, 1, 1)), 4: (nn.Conv2d, (3, 1, 1))}
        kind, rest = kinds[dimensions]
        self.first, self.norm = kind(8, 8, *rest), norm(8)
        self.inner = nn.ModuleDict({"second": kind(8, 8, *rest), "norm": norm(8)})

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return torch.relu(x + self.inner["norm"](self.inner["second"](y)))


class Fork(Whole):
    """A forward of two chains, one behind the other, and functions of PyTorch's."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return torch.cat([y, torch.relu(self.inner["norm"](self.inner["second"](y * 2)))], 1).mul(0.5)


def _in_a_row(dimensions: int) -> nn.Module:
    """A Sequential that is one chain and nothing else."""
    own = Whole(dimensions)
    return nn.Sequential(own.first, own.norm, nn.ReLU(), own.inner["second"], own.inner["norm"])


def _second(net: nn.Module, kind: str) -> Any:
    """The second convolution, or the second BatchNorm."""
    leaves = [module for module in net.modules() if hasattr(module, "weight")]
    return [module for module in leaves if hasattr(module, "running_var") is (kind == "norm")][1]


def _write(kind: str, name: str, how: str, net: nn.Module) -> None:
    tensor = getattr(_second(net, kind), name)
    if how == "in place":
        tensor.detach().mul_(1.5)
    elif how == "elsewhere":
        tensor.data = tensor.detach() * 1.5
    else:
        tensor.detach().numpy()[...] *= 1.5


def _turn(net: nn.Module) -> None:
    filters = _second(net, "conv").weight
    filters.data = filters.detach().transpose(0, 1)


ROLES = [("conv", "weight"), ("conv", "bias"), *(("norm", name) for name in ("weight", "bias", "running_mean", "running_var"))]
WRITES: dict[str, Callable[[nn.Module], Any]] = {
    **{
        f"{kind}.{name} {how}": partial(_write, kind, name, how)
        for kind, name in ROLES
        for how in ("in place", "elsewhere", "uncounted")
    },
    "training mode": lambda net: net.train(),
    "filters turned": _turn,
    "hook": lambda net: next(iter(net.children())).register_forward_hook(lambda _m, _x, y: y + 1),
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("dimensions", [2, 3, 4])
@pytest.mark.parametrize("make", [Whole, Fork, _in_a_row], ids=["one chain", "two chains", "Sequential"])
def test_a_module_that_is_nothing_but_chains_sees_what_changes(
    make: Callable[[int], nn.Module], dimensions: int, how: str
) -> None:
    """It asks in one go whether all is as it was, without a look at the vectors' places: its launches look for themselves."""
    torch.manual_seed(0)
    plain = randomise(make(dimensions)).eval()
    fused = fuse(copy.deepcopy(plain))
    x = torch.randn(4, 8, *(5, 6)[: dimensions - 2])
    with torch.no_grad():
        for _ in range(4):
            before = fused(x)
        assert isinstance(fused, nn.Sequential) or whole.LOOK in vars(fused)[ATTRIBUTE].entries
        assert len(_prepared(fused)) == (2 if make is Fork else 1)
        with count_launches() as log:
            fused(x)
        assert len(log) == 2
        for net in (plain, fused):
            WRITES[how](net)
        expected, after, again = plain(x), fused(x), fused(x)
    assert relative_error(before, expected) > 3 * CLOSE, "the change shows"
    assert relative_error(after, expected) < CLOSE
    assert relative_error(again, plain(x) if how == "training mode" else expected) < CLOSE


@pytest.mark.parametrize("dimensions", [2, 3, 4])
@pytest.mark.parametrize("make", [Whole, Fork], ids=["one chain", "two chains"])
def test_one_look_is_enough_for_all_chains(
    make: Callable[[int], nn.Module], dimensions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where a chain is not prepared for its input, that one and those behind it are called as ever."""
    torch.manual_seed(0)
    plain = randomise(make(dimensions)).eval()
    fused: Any = fuse(copy.deepcopy(plain), backend="cpu")
    x = torch.randn(4, 8, *(5, 6)[: dimensions - 2])
    looks: list[Any] = []
    unchanged = watch.unchanged
    monkeypatch.setattr(watch, "unchanged", lambda *given: looks.append(given) or unchanged(*given))  # type: ignore[func-returns-value]
    with torch.no_grad():
        expected = plain(x)
        for call in range(6):
            looks.clear()
            if call == 4:
                _readings(fused)[-1].ready.clear()
            assert relative_error(fused(x), expected) < CLOSE
            assert call < 3 or (len(looks) == 1) is (call != 4)


@pytest.mark.parametrize("calls", [1, 4])
@pytest.mark.parametrize("make", [Whole, Fork], ids=["one chain", "two chains"])
def test_what_is_replaced_behind_another_change_is_seen(make: Callable[[int], nn.Module], calls: int) -> None:
    """Where a chain is read anew, in the middle of a call, it lists the modules on the way to its own."""
    torch.manual_seed(0)
    plain: Any = randomise(make(4)).eval()
    fused: Any = fuse(copy.deepcopy(plain), backend="cpu")
    x, norm = torch.randn(4, 8, 5, 6), randomise(nn.BatchNorm2d(8)).eval()
    with torch.no_grad():
        for _ in range(5):
            fused(x)
        for net in (plain, fused):
            net.norm.eps = 0.5
        for _ in range(calls):
            assert relative_error(fused(x), plain(x)) < CLOSE
        before = plain(x)
        for net in (plain, fused):
            net.inner["norm"] = copy.deepcopy(norm)
        expected = plain(x)
        assert relative_error(before, expected) > 3 * CLOSE, "the change shows"
        for _ in range(2 * 2 * whole.FIRST):  # the third look at the whole of it
            assert relative_error(fused(x), expected) < CLOSE
        assert whole.LOOK in vars(fused)[ATTRIBUTE].entries


class _Changes(torch.overrides.TorchFunctionMode):
    """Puts a BatchNorm in training mode when a tensor is multiplied."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.mul, Tensor.mul, Tensor.__mul__):
            self.norm.train()
        return function(*args, **(kwargs or {}))


def test_modes_that_change_a_module_meanwhile() -> None:
    torch.manual_seed(0)
    plain: Any = randomise(Fork(4)).eval()
    fused: Any = fuse(copy.deepcopy(plain), backend="cpu")
    x = torch.randn(4, 8, 5, 6)
    with torch.no_grad():
        for _ in range(5):
            before = fused(x)
        found = []
        for net in (plain, fused):
            with _Changes(net.inner["norm"]):
                found.append(net(x))
    assert relative_error(before, found[0]) > 3 * CLOSE, "the change shows"
    assert relative_error(found[1], found[0]) < CLOSE


def test_a_chain_that_is_never_prepared_is_not_looked_at_twice() -> None:
    """In training mode it moves statistics."""
    net: Any = fuse(randomise(Fork(4)).train(), backend="cpu")
    with torch.no_grad():
        for _ in range(5):
            net(torch.randn(4, 8, 5, 6))
    assert whole.LOOK not in vars(net)[ATTRIBUTE].entries


def _readings(net: nn.Module) -> list[Any]:
    return list(vars(net)[ATTRIBUTE].entries[whole.LOOK].value.readings)


class Structured(Whole):
    """The same in what ``kind`` makes of it."""

    def __init__(self, kind: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__(2)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(super().forward(x), x)


@pytest.mark.parametrize(
    "kind", [lambda y, x: {"out": y}, lambda y, x: (y,), lambda y, x: (y, x), lambda y, x: [y, y], lambda y, x: x]
)
def test_a_chain_in_a_structure_stays_there(kind: Callable[[Tensor, Tensor], Any]) -> None:
    plain = randomise(Structured(kind)).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(4, 8)
    with torch.no_grad():
        for _ in range(5):
            torch.testing.assert_close(fused(x), plain(x))


def test_the_order_of_children_is_seen() -> None:
    plain = randomise(_in_a_row(4)).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(4, 8, 5, 6)
    with torch.no_grad():
        for _ in range(4):
            fused(x)
        for net in (plain, fused):
            norm = net._modules.pop("1")
            net._modules["1"] = norm
        assert relative_error(fused(x), plain(x)) < CLOSE


@pytest.mark.parametrize("dimensions", [2, 4])
def test_vectors_that_lie_otherwise_in_the_same_memory(dimensions: int) -> None:
    plain = randomise(Whole(dimensions)).eval()
    memory = torch.rand(8, 2) + 0.5
    plain.norm.running_var = memory.flatten()[:8]
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(4, 8, *(5, 6)[: dimensions - 2])
    with torch.no_grad():
        for _ in range(4):
            fused(x)
        other = fused.norm.running_var.as_strided((8,), (2,))
        assert other.data_ptr() == fused.norm.running_var.data_ptr()
        fused.norm.running_var.data = other
        plain.norm.running_var = memory[:, 0]
        assert relative_error(fused(x), plain(x)) < CLOSE


def test_same_padding_goes_by_the_filters() -> None:
    """As in eager PyTorch, which does not ask for the attribute ``kernel_size``."""
    plain = randomise(nn.Sequential(nn.Conv2d(8, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU())).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 8, 9, 7)
    other = nn.Parameter(torch.randn(8, 8, 5, 5))
    with torch.no_grad():
        for _ in range(4):
            fused(x)
        plain[0].weight, fused[0].weight = other, other
        assert relative_error(fused(x), plain(x)) < CLOSE


def test_what_is_called_with_a_list_in_between_is_told_as_it_was_called_last() -> None:
    class Either(Whole):
        def forward(self, x: Any) -> Tensor:
            return super().forward(x[0] if isinstance(x, list) else x)

    net, x = fuse(randomise(Either(2)).eval()), torch.randn(4, 8)
    with torch.no_grad():
        for given in (x, x, x, x, [x], x):
            net(given)
    assert net.fused_region.called[False] is None


def test_what_hooks_see_comes_back_with_their_end(reads: list[Any]) -> None:
    net, x, calls = fuse(_net()), _x(), []
    with torch.no_grad():
        net(x)
        handle = nn.modules.module.register_module_forward_hook(lambda module, _x, _y: calls.append(type(module)))
        net(x)
        assert nn.GELU in calls and nn.LeakyReLU in calls
        handle.remove()
        calls.clear()
        count = len(reads)
        net(x)
    assert not calls and len(reads) == count


def test_parameters_of_a_functional_call() -> None:
    plain, fused = _net(), _net()
    fused.load_state_dict(plain.state_dict())
    fuse(fused)
    x = _x()
    other = {name: tensor.detach() * 1.5 for name, tensor in plain.named_parameters()}
    with torch.no_grad():
        first = fused(x)
        called = torch.func.functional_call(fused, other, (x,))
        expected = torch.func.functional_call(plain, other, (x,))
        assert relative_error(called, expected) < CLOSE and relative_error(fused(x), first) == 0


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "replica"])
def test_copies_read_their_own_modules(how: str) -> None:
    """A replica, of DataParallel's kind, shares all attributes of the original but its children and parameters."""
    net = fuse(_net())[0]
    x = _x()
    with torch.no_grad():
        first = net(x)
    if how == "replica":
        other = copy.copy(net)
        other.__dict__ = {**net.__dict__, "_modules": {name: copy.deepcopy(child) for name, child in net._modules.items()}}
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        other = copy.deepcopy(net) if how == "deepcopy" else copy.copy(net)
    with torch.no_grad():
        other.conv1.weight.mul_(2)
        same = relative_error(net(x), first) == 0
        assert same is (how != "copy")
        assert relative_error(other(x), unfuse(copy.deepcopy(net if how == "copy" else other))(x)) < CLOSE


def test_a_model_dies_with_its_last_reference() -> None:
    """What is remembered makes no cycle, which would keep a model's memory until Python looks for such."""
    net = fuse(_net())
    net(_x())
    alive = [weakref.ref(part) for part in (net, net[0], net[0].conv1, net[1], net[2], net[2].inner["norm"].weight)]
    gc.collect()  # tracing a forward leaves cycles
    gc.disable()
    try:
        del net
        assert [part() for part in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_unfuse_forgets() -> None:
    net = fuse(_net())
    net(_x())
    assert ATTRIBUTE in vars(net[0])
    unfuse(net)
    assert all(ATTRIBUTE not in vars(module) for module in net.modules())


def test_modules_that_cannot_be_watched_are_read_each_time(reads: list[Any]) -> None:
    net = fuse(_net())
    net[0].conv1.marks = {1, 2}
    with pytest.raises(CannotWatchError):
        Watched(net[0].conv1)
    with torch.no_grad():
        net(_x()), net(_x())
    assert len(reads) == 3 + 1


def test_a_watched_module_is_the_same_until_it_differs() -> None:
    module = nn.Conv2d(4, 4, 3)
    watched = Watched(module)
    assert watched.same(module) and not watched.same(nn.Conv2d(4, 4, 3))
    module.note = "new"
    assert not watched.same(module)
    del module.note
    assert watched.same(module)
    handle = module.register_forward_hook(print)
    assert not watched.same(module) and Watched(module, uncalled=True).same(module)
    handle.remove()
    del module.stride
    module.other = 1  # as many attributes as before
    assert not watched.same(module)


def test_children_are_the_same_until_one_on_the_way_is_replaced() -> None:
    module = Whole(2)
    seen = Children(module, [module.inner["norm"]])
    assert seen.same(module) and not seen.same(Whole(2))
    module.first.weight.data = torch.zeros(2, 8)
    module.eval()
    assert seen.same(module), "no matter of which modules there are"
    module.inner["norm"] = nn.SyncBatchNorm(8)
    assert not seen.same(module)
    seen = Children(module, [module.inner["norm"]])
    assert seen.same(module)
    module.norm = nn.BatchNorm1d(8)
    assert not seen.same(module)


def test_memory_holds_what_it_was_told() -> None:
    module, other, memory = nn.ReLU(), nn.BatchNorm2d(2), Memory()
    memory.remember("what", 5, module, [other])
    memory.remember("inside", 6, module, [])
    assert memory.recall("what", module) == 5 and memory.recall("else", module) is None
    assert memory.recall("inside", module) == 6
    other.eval()
    assert memory.recall("what", module) is None
    other.train()
    assert memory.recall("what", module) is None and memory.recall("inside", module) is None, "all is forgotten"
    assert not copy.deepcopy(memory).entries and not pickle.loads(pickle.dumps(memory)).entries


def test_images_of_another_kind_are_still_checked() -> None:
    """Parameters are checked against x's type and device once a type and device."""
    net, x = fuse(_net()), _x()
    with torch.no_grad():
        net(x)
        with pytest.raises(RuntimeError, match="weight type"):
            net(x.double())
        with pytest.raises(RuntimeError, match="channels"):
            net(torch.randn(2, 5, 9, 7))


def _prepared(net: Any) -> list[Any]:
    """What is prepared in a model, or in its modules where it is not looked at as a whole, by kind of input."""
    memories = [vars(module)[ATTRIBUTE] for module in net.modules() if ATTRIBUTE in vars(module)]
    if ATTRIBUTE in vars(net) and whole.LOOK in vars(net)[ATTRIBUTE].entries:
        memories = [vars(net)[ATTRIBUTE]]
    values = [entry.value for memory in memories for entry in memory.entries.values()]
    readings = [reading for value in values for _, reading in (value if isinstance(value, list) else [(None, value)])]
    return [
        ready for reading in {id(one): one for one in readings}.values() for ready in getattr(reading, "ready", {}).values()
    ]


def test_prepared_for_inputs_that_come_again() -> None:
    """On the CPU, without gradients, from the second time on; with the same bits as the first time."""
    net, x = fuse(_net(), backend="cpu"), _x()
    with torch.no_grad():
        first = net(x)
        assert not _prepared(net)
        second, third = net(x), net(x)
        assert len(_prepared(net)) == 3 and None not in _prepared(net)
        assert torch.equal(first, second) and torch.equal(first, third)
        other = torch.randn(3, 8, 12, 5)
        expected = net(other)
        assert torch.equal(net(other), expected) and len(_prepared(net)) == 6
        with count_launches() as log:  # then they run one by one
            net(x)
        assert len(log) == 3 + 2 + 2
        net[1][0].weight.data.mul_(2)
        changed = net(x)
    assert relative_error(changed, unfuse(copy.deepcopy(net))(x)) < CLOSE and relative_error(changed, first) > 0.01
    net(x).sum().backward()
    assert net[0].conv1.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.bfloat16


def test_a_block_whose_shortcut_is_padded_is_prepared() -> None:
    block = plain.BasicBlock(4, 6, stride=2, downsample=plain.ZeroPad(4, 6, 2))
    eager = randomise(block.double()).float().eval()
    net, x = fuse(copy.deepcopy(eager), backend="cpu"), torch.randn(1, 4, 7, 5)
    with torch.no_grad():
        first, second, third = net(x), net(x), net(x)
        assert len(_prepared(net)) == 1 and None not in _prepared(net)
        assert torch.equal(first, second) and torch.equal(first, third)
        assert relative_error(third, eager.double()(x.double())) < CLOSE


def test_few_kinds_of_inputs_are_kept_prepared() -> None:
    net = fuse(_net(), backend="cpu")
    with torch.no_grad():
        for width in range(5, 5 + 2 * functional.READY):
            x = torch.randn(1, 8, 6, width)
            assert torch.equal(net(x), net(x)) and len(_prepared(net)) <= 3 * functional.READY


def test_a_donated_input_is_written_over_in_prepared_stages_too() -> None:
    """Blocks of a stage add to what the block before has made, and never to what the caller gave."""
    torch.manual_seed(0)
    stage = nn.Sequential(*[plain.BasicBlock(8, 8) for _ in range(3)])
    net = randomise(nn.Sequential(stage)).eval()
    fused, x = fuse(copy.deepcopy(net), backend="cpu"), torch.randn(2, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        for _ in range(3):
            y = fused(x)
            assert relative_error(y, net.double()(x.double())) < CLOSE and torch.equal(x, before)
        assert len(_prepared(fused)) == 3


def test_what_begins_with_a_batchnorm_is_prepared_too() -> None:
    """Its vectors are read at each call."""
    torch.manual_seed(0)
    net = randomise(nn.Sequential(nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU())).eval()
    fused, x = fuse(copy.deepcopy(net), backend="cpu"), _x()
    with torch.no_grad():
        first = [fused(x) for _ in range(3)]
        assert len(_prepared(fused)) == 1 and None not in _prepared(fused)
        assert relative_error(first[2], net.double()(x.double())) < CLOSE and torch.equal(first[0], first[2])
        for model in (net, fused):
            model[0].weight.data.mul_(3)
        assert relative_error(fused(x), net(x.double())) < CLOSE
