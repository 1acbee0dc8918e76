"""Modules of any class: what is fused by tracing their forward, what is left alone, and that both compute what they did."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import random
import threading

import pytest
import torch
import torch.nn.functional as F
from nets import launches, randomise
from tolerances import CLOSE, relative_error
from torch import Tensor, nn

from fused_resnet import count_launches, explain, fuse, unfuse

HOOK = "a hook looks into"


class Base(nn.Module):
    """A convolution, its BatchNorm, and more of them for those that want more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.flag, self.names = False, ["a"]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)


class Residual(Base):
    """A residual block by functions."""


class SumFirst(Base):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn1(self.conv1(x))).relu()


class IntoInput(Base):
    """The sum is made in the input: nobody else's memory."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        z = self.bn1(self.conv1(y))
        y += z
        return y


class WrittenBetween(Base):
    """The input changes between the convolution and the sum."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x.mul_(2)
        return F.relu(y + x)


class ReadElsewhere(Base):
    """What the first BatchNorm makes is wanted."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn1(self.conv1(x))
        return F.relu(y), self.bn2(self.conv2(y))


class OneNormTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class OneConvTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv1(F.relu(self.bn1(self.conv1(x))))) + x)


class OnMode(Base):
    """Another order in training."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        if self.training:
            return F.relu(self.bn2(self.conv2(F.relu(y))))
        return self.bn2(self.conv2(y)) + x


class OnData(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return F.relu(y) if y.mean() > 0 else y


class OnSize(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return F.relu(y) if x.shape[1] == y.shape[1] and y.dim() < 5 else y


class Suppresses(Base):
    """What a trace raises is caught."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        with contextlib.suppress(Exception):
            if y.mean() > 0:
                y = y + 1
        return y


class Raises(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.names:
            raise ValueError("not this one")
        return F.relu(self.bn1(self.conv1(x)))


class CatchesAChild(Base):
    """What a child has computed, when it raises, is not what is given back."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Raises()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        try:
            return self.child(x)
        except ValueError:
            return F.relu(self.bn2(self.conv2(x)))


class OnAttribute(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return F.relu(y) if self.flag or "b" in self.names else y


class OnType(Base):
    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        x = x if isinstance(x, Tensor) else torch.stack(x).sum(0)
        return F.relu(self.bn1(self.conv1(x)))


class OnNone(Base):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return y if skip is None else y + skip


class OnGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return F.relu(y) if torch.is_grad_enabled() else y


class Counts(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.flag = not self.flag
        return F.relu(self.bn1(self.conv1(x))) if self.flag else self.bn1(self.conv1(x))


class Notes(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.names.append("b")
        return F.relu(self.bn1(self.conv1(x))) * len(self.names)


class Draws(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x))) * (1 + random.random() + torch.rand(1).item())


class Makes(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x))) * torch.tensor([2.0])


class Dropped(Base):
    """Stochastic depth, as people write it in a forward."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.training:
            y = y * torch.empty(x.shape[0], 1, 1, 1, device=x.device).fill_(2.0)
        return F.relu(y + x)


class Dense(Base):
    def __init__(self) -> None:
        super().__init__()
        self.conv2, self.bn2 = nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(F.relu(self.bn2(torch.cat([x, F.relu(self.bn1(self.conv1(x)))], 1))))], 1)


class InPlaceInput(Base):
    """A pre-activation block whose first ReLU writes into what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(x, inplace=True)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + x


#: Class -> launches in eval mode and in training, of one call.
MODULES = {
    Residual: (2, 3), SumFirst: (1, 2), IntoInput: (1, 2), WrittenBetween: (2, 3), ReadElsewhere: (2, 4), OneNormTwice: (2, 4),
    OneConvTwice: (2, 4), OnMode: (2, 3), OnData: (0, 0), OnSize: (0, 0), Suppresses: (0, 0), CatchesAChild: (0, 0),
    OnAttribute: (1, 2), OnType: (1, 2), OnNone: (1, 2),
    OnGradient: (0, 0), Counts: (0, 0), Notes: (0, 0), Makes: (0, 0), Dropped: (2, None), Dense: (2, 4), InPlaceInput: (2, 2),
}  # fmt: skip


def _tensors(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


@pytest.mark.filterwarnings("ignore:fuse found no")
@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_it_computes_what_it_did(kind: type[Base]) -> None:
    for training, expected in zip((False, True), MODULES[kind]):
        plain = randomise(kind()).train(training)
        fused = fuse(copy.deepcopy(plain))
        assert vars(fused)["flag"] is False and vars(fused)["names"] == ["a"], "tracing leaves no trace"
        x = torch.randn(3, 4, 7, 9)
        given = [x.clone().requires_grad_(kind is not InPlaceInput) for _ in range(2)]
        results = [_tensors(model(part)) for model, part in zip((plain, fused), given)]
        for first, second in zip(*results):
            assert relative_error(second, first) < CLOSE
            weights = torch.randn_like(first)
            for result in (first, second) if kind not in (IntoInput, WrittenBetween) else ():  # which eager cannot either
                (result * weights).sum().backward(retain_graph=True)
        assert torch.equal(given[0].detach(), given[1].detach()), "writes into its input as eager does"
        for (key, a), (_, b) in zip(plain.named_parameters(), fused.named_parameters()):
            assert (a.grad is None) == (b.grad is None) and (a.grad is None or relative_error(b.grad, a.grad) < 1e-4), key
        for (key, a), (_, b) in zip(plain.named_buffers(), fused.named_buffers()):
            assert relative_error(b.double(), a.double()) < CLOSE, key
        if expected is not None:
            assert launches(fused, x.clone()) == expected


REASONS = {
    OnData: "control flow of its forward depends on data", OnSize: "depends on sizes or types of tensors",
    OnGradient: "asks torch.is_grad_enabled", Counts: "sets attributes", Notes: "sets attributes",
    Draws: "random", Makes: "makes or reads a tensor", Suppresses: "depends on data",
}  # fmt: skip


@pytest.mark.parametrize("kind", REASONS, ids=lambda kind: kind.__name__)
def test_what_cannot_be_traced_is_left_alone_with_a_reason(kind: type[Base]) -> None:
    module = kind()
    with pytest.warns(UserWarning, match="unchanged"):
        state = random.getstate(), torch.random.get_rng_state()
        fuse(module)
    assert type(module) is kind and random.getstate() == state[0] and torch.equal(torch.random.get_rng_state(), state[1])
    notes = [row.note for row in explain(module, show=False).left_alone]
    assert len(notes) == 4 and all(REASONS[kind] in note for note in notes), notes


class DrawsAndDecides(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x))) * (1 + random.random() + torch.rand(1).item())
        return y if y.mean() > 0 else x


def test_a_trace_that_fails_draws_nothing() -> None:
    module = DrawsAndDecides()
    state = random.getstate(), torch.random.get_rng_state()
    with pytest.warns(UserWarning, match="unchanged"):
        fuse(module)
    assert random.getstate() == state[0] and torch.equal(torch.random.get_rng_state(), state[1])


def test_attributes_are_read_again_at_each_call() -> None:
    plain = randomise(OnAttribute()).eval()
    fused = fuse(copy.deepcopy(plain))
    x = torch.randn(2, 4, 6, 6)
    for change in ("", "flag", "names", "back", "class"):
        for model in (plain, fused):
            if change == "flag":
                model.flag = True
            elif change == "names":
                model.flag = False
                model.names.append("b")
            elif change == "back":
                model.names.pop()
            elif change == "class":
                model.bn1 = nn.Identity()
        assert relative_error(fused(x), plain(x)) < CLOSE, change
        assert launches(fused, x) == (0 if change == "class" else 1), change


def test_an_attribute_that_always_changes_ends_the_tracing() -> None:
    plain = randomise(OnAttribute()).eval()
    fused = fuse(copy.deepcopy(plain))
    x = torch.randn(1, 4, 5, 5)
    for index in range(9):
        plain.flag = fused.flag = index + 1
        assert relative_error(fused(x), plain(x)) < CLOSE
    assert launches(fused, x) == 0
    assert any("flag" in row.note for row in explain(fused, show=False).left_alone)


def test_arguments_it_was_not_traced_for_run_unfused() -> None:
    plain = randomise(OnNone()).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(1, 4, 5, 5)
    assert relative_error(fused(x), plain(x)) < CLOSE and launches(fused, x) == 1
    assert relative_error(fused(x, x), plain(x, x)) < CLOSE
    assert relative_error(fused(x=x), plain(x)) < CLOSE
    other = fuse(randomise(OnType()).eval())
    same = unfuse(copy.deepcopy(other))
    assert relative_error(other([x, x]), same([x, x])) < CLOSE


class Nested(nn.Module):
    """Convolutions in children of their own, the shortcut around both, an identity where others have a DropPath."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.second(self.first(x)))
        y += x
        return self.act(y)


@pytest.mark.parametrize("place", ["first", "first.0", "first.1", "second", "drop", "act", ""])
def test_a_hook_sees_what_it_saw(place: str) -> None:
    plain = randomise(Nested()).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 4, 6, 7)
    assert launches(fused, x) == 2
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    handles = [
        model.get_submodule(place).register_forward_hook(lambda m, a, y, i=i: seen[i].append(y.clone()))
        for i, model in enumerate((plain, fused))
    ]
    assert relative_error(fused(x), plain(x)) < CLOSE
    assert len(seen[0]) == len(seen[1]) == 1 and relative_error(seen[1][0], seen[0][0]) < CLOSE
    told = explain(fused, show=False)
    assert any(HOOK in row.note for row in told.rows) is (place != "")
    for handle in handles:
        handle.remove()
    assert launches(fused, x) == 2 and not explain(fused, show=False).left_alone


def test_a_hook_that_was_there_before_fuse() -> None:
    plain = randomise(Nested()).eval()
    fused, calls = copy.deepcopy(plain), []
    handle = fused.first.register_forward_hook(lambda m, a, y: calls.append(type(y)))
    fuse(fused)
    assert calls == [], "tracing runs no hooks"
    x = torch.randn(1, 4, 5, 5)
    assert relative_error(fused(x), plain(x)) < CLOSE and calls == [Tensor]
    handle.remove()
    assert relative_error(fused(x), plain(x)) < CLOSE


def test_copies_pickles_and_state_dicts() -> None:
    plain = randomise(Nested()).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(1, 4, 5, 5)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), copy.copy(fused)):
        assert launches(other, x) == 2 and relative_error(other(x), plain(x)) < CLOSE
        assert relative_error(other.train()(x), plain.train()(x)) < CLOSE
        plain.eval(), other.eval()
        plain.load_state_dict(fused.state_dict())
    stream = io.BytesIO()
    torch.save(fused.state_dict(), stream)
    stream.seek(0)
    again = fuse(Nested().eval())
    again.load_state_dict(torch.load(stream, weights_only=True))
    assert relative_error(again(x), fused(x)) < CLOSE
    unfuse(again)
    assert type(again) is Nested and type(again.first) is nn.Sequential and "fused_region" not in vars(again)


def test_modes_mixed_in_one_region() -> None:
    """Frozen BatchNorms in a model that trains, and a child in another mode than its parent."""
    plain = randomise(Nested()).train()
    plain.first.eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 4, 6, 6)
    assert relative_error(fused(x), plain(x)) < CLOSE
    for (key, a), (_, b) in zip(plain.named_buffers(), fused.named_buffers()):
        assert relative_error(b.double(), a.double()) < CLOSE, key


def test_threads_that_run_other_models_while_one_is_traced() -> None:
    other, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU())), torch.randn(1, 3, 8, 8)
    expected, wrong, end = other(x), [], threading.Event()

    def serve() -> None:
        while not end.is_set():
            try:
                if not torch.equal(other(x), expected):
                    wrong.append("differs")
            except Exception as error:
                wrong.append(repr(error))

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(20):
        fuse(Nested())
    end.set()
    thread.join()
    assert wrong == []


def test_a_model_on_meta_is_fused_without_a_number() -> None:
    with torch.device("meta"):
        net = fuse(Nested().eval())
        assert explain(net, show=False).launches == 2 and net(torch.empty(2, 4, 6, 6)).shape == (2, 4, 6, 6)


def test_lazy_and_quantized_modules_are_left_alone() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

    with pytest.warns(UserWarning, match="unchanged"):
        net = fuse(Lazy())
    assert net(torch.randn(2, 3, 6, 6)).shape == (2, 4, 4, 4)
    assert launches(fuse(net), torch.randn(2, 3, 6, 6)) == 2


@pytest.mark.filterwarnings("ignore")
def test_torchvision_feature_extraction_traces_a_fused_model() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    plain = randomise(nn.Sequential(Nested(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))).eval()
    x = torch.randn(1, 4, 6, 6)
    expected = create_feature_extractor(plain, ["0.first.1", "1"])(x)
    extractor = create_feature_extractor(fuse(copy.deepcopy(plain)), ["0.first.1", "1"])
    refused = fuse(unfuse(extractor)) if any("fused" in type(m).__module__ for m in extractor.modules()) else fuse(extractor)
    for model in (extractor, refused):
        for key, value in model(x).items():
            assert relative_error(value, expected[key]) < CLOSE, key


class Scaled(Base):
    def forward(self, x: Tensor, side: Tensor, scale: float = 1.0) -> Tensor:
        return torch.relu(self.bn1(self.conv1(x))) * scale - side


def test_tensors_given_by_name() -> None:
    """By place or by name is the same; another value of what is no tensor runs unfused."""
    net = randomise(Scaled()).eval()
    x, side = torch.randn(2, 2, 4, 6, 5)
    plain, fused = copy.deepcopy(net), fuse(net)
    calls = (
        ((x, side), {}, 1),
        ((x,), {"side": side}, 1),
        ((), {"side": side, "x": x}, 1),
        ((x, side), {"scale": 3.0}, 0),
        ((), {"x": x, "side": side, "scale": 1.0}, 0),
    )
    for args, kwargs, count in calls:
        with count_launches() as log, torch.no_grad():
            fused(*args, **kwargs)
        assert len(log) == count, kwargs
        assert relative_error(fused(*args, **kwargs), plain(*args, **kwargs).double()) < CLOSE
    with pytest.raises(TypeError, match="x"):
        fused(x, side, x=x)
    with pytest.raises(TypeError, match="other"):
        fused(x, side, other=x)


def test_an_attribute_in_front_of_one_of_the_class_is_seen() -> None:
    """A method put on an instance behind the trace, and a value."""

    class Methods(nn.Module):
        factor = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def end(self, y: Tensor) -> Tensor:
            return torch.relu(y)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(self.bn(self.conv(x))) * self.factor

    x = torch.randn(2, 3, 9, 7)
    for name, value in (("end", torch.tanh), ("factor", 3.0)):
        net = randomise(Methods()).eval()
        fused = fuse(copy.deepcopy(net))
        with torch.no_grad():
            for _ in range(6):
                assert relative_error(fused(x), net(x)) < CLOSE
            for model in (net, fused):
                model.other = 3  # nothing of the class's
            assert relative_error(fused(x), net(x)) < CLOSE
            for model in (net, fused):
                setattr(model, name, value)
            for calls in range(12):
                assert relative_error(fused(x), net(x)) < CLOSE, calls
        assert launches(fused, x) > 0
