"""Forwards that decide by sizes of tensors: traced at their first call, for the sizes that the decisions hang on."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from nets import launches, randomise, train_step
from tolerances import CLOSE, relative_error
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fused_resnet import explain, fuse, unfuse
from fused_resnet.swap.region import WAITING, Regions


class Base(nn.Module):
    def __init__(self, filters: int = 4) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters)
        self.side, self.side_bn = nn.Conv2d(4, filters, 1, bias=False), nn.BatchNorm2d(filters)
        self.flag = False


class Asserts(Base):
    """By the number of dimensions, and by one of the sizes."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4, f"expected images, got {x.dim()} dimensions"
        if x.shape[1] != 4 or x.size(-3) > 4:
            raise ValueError(f"expected 4 channels, got {x.shape[1]}")
        return F.relu(self.bn(self.conv(x)) + x)


class Compares(Base):
    """As people write residual blocks: by the size of what was computed."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if y.shape != x.shape:
            x = self.side_bn(self.side(x))
        return F.relu(y + x)


class Widens(Compares):
    def __init__(self) -> None:
        super().__init__(8)


class Strided(Compares):
    def __init__(self) -> None:
        super().__init__()
        self.conv.stride = self.side.stride = (2, 2)


class Small(Base):
    """Another network for small images, and none at all for none."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x
        if x.size(2) > 6 and x.size()[3] > 6:
            return F.relu(self.bn(self.conv(x)) + x)
        return F.relu(self.side_bn(self.side(x)))


class Unbatched(Base):
    def forward(self, x: Tensor) -> Tensor:
        alone = x.dim() == 3
        if alone:
            x = x.unsqueeze(0)
        y = F.relu(self.bn(self.conv(x)))
        return y.squeeze(0) if y.shape[0] == 1 and alone else y


class Inner(nn.Module):
    """The decisions are those of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.bn = Widens(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(self.first(x))))


class Drops(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training)
        return y if y.shape[2] > 3 else F.relu(self.side_bn(self.side(x)))


IMAGES = [(2, 4, 7, 9), (2, 4, 7, 9), (3, 4, 7, 9), (3, 4, 5, 8), (2, 4, 7, 9)]
#: Class -> sizes of one call after the other; how often it is traced in a mode for them.
CALLS: dict[type[nn.Module], tuple[list[tuple[int, ...]], int]] = {
    Asserts: (IMAGES, 1),
    Compares: (IMAGES, 3),
    Widens: (IMAGES, 3),
    Strided: (IMAGES, 3),
    Small: ([*IMAGES, (5, 4, 12, 20)], 4),
    Unbatched: ([(2, 4, 7, 9), (1, 4, 7, 9), (3, 4, 6, 5), (2, 4, 7, 9)], 3),
    Inner: (IMAGES, 3),
}


def traced(model: nn.Module, training: bool) -> int:
    found = [vars(module).get("fused_region") for module in model.modules()]
    return sum(len(regions.traced[training]) for regions in found if regions is not None and regions.by_sizes[training])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("build", CALLS, ids=lambda build: build.__name__)
def test_it_computes_what_it_did(build: type[nn.Module], training: bool) -> None:
    sizes, times = CALLS[build]
    plain = randomise(build()).train(training)
    fused = fuse(copy.deepcopy(plain))
    assert all(torch.equal(a, b) for a, b in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True))
    for size in sizes:
        x = torch.randn(size)
        torch.manual_seed(3)
        expected = plain(x.clone())
        torch.manual_seed(3)
        assert relative_error(fused(x.clone()), expected) < CLOSE, size
        for (key, value), other in zip(plain.named_buffers(), fused.buffers(), strict=True):
            assert relative_error(other.double(), value.double()) < CLOSE, key
    assert traced(fused, training) == times
    x = torch.randn(sizes[-1])
    assert launches(fused, x.clone()) > 0 and launches(plain, x.clone()) == 0


def test_to_decide_draws_nothing_and_counts_nothing() -> None:
    """Dropouts and BatchNorms are run on the way to a decision, on tensors without memory."""
    plain = randomise(Drops()).train()
    fused, x, after = fuse(copy.deepcopy(plain)), torch.randn(2, 4, 7, 7), []
    for model in (plain, fused):
        torch.manual_seed(3)
        model(x)
        after.append((torch.random.get_rng_state(), model.bn.num_batches_tracked, model.side_bn.num_batches_tracked))
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True)) and traced(fused, True) == 1


@pytest.mark.parametrize("build", [Asserts, Compares, Widens, Strided], ids=lambda build: build.__name__)
def test_a_training_step(build: type[nn.Module]) -> None:
    plain = randomise(build()).train()
    fused = fuse(copy.deepcopy(plain))
    for size in IMAGES:
        x = torch.randn(size)
        expected, actual = train_step(copy.deepcopy(plain).double(), x.double()), train_step(fused, x)
        assert list(actual) == list(expected)
        for what, value in expected.items():
            assert relative_error(actual[what], value) < 1e-4, what
        plain.load_state_dict(fused.state_dict())


def test_errors_are_the_forwards_own() -> None:
    plain = randomise(Asserts()).eval()
    fused, good = fuse(copy.deepcopy(plain)), torch.randn(1, 4, 5, 5)
    for x, error in ((torch.randn(4, 5, 5), AssertionError), (good, None), (torch.randn(1, 3, 5, 5), ValueError)):
        for model in (plain, fused):
            if error is None:
                assert relative_error(model(x), plain(x)) < CLOSE
                continue
            with pytest.raises(error, match="expected") as raised:
                model(x)
            assert str(tuple(x.shape)[-3] if error is ValueError else 3) in str(raised.value)
    assert launches(fused, good) == 1


def test_what_the_decision_hangs_on_is_looked_at_again() -> None:
    """Other layers, and filters cut by hand, with the same sizes of images."""
    plain = randomise(Compares()).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 4, 7, 7)
    assert relative_error(fused(x), plain(x)) < CLOSE

    def stride(model: Compares) -> None:
        model.conv.stride = model.side.stride = (2, 2)

    def wider(model: Compares) -> None:
        torch.manual_seed(1)
        model.conv, model.bn = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6).eval()
        model.side, model.side_bn = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6).eval()

    def cut(model: Compares) -> None:
        for conv, norm in ((model.conv, model.bn), (model.side, model.side_bn)):
            conv.weight, conv.bias = nn.Parameter(conv.weight.detach()[:4]), None
            for name in ("weight", "bias"):
                setattr(norm, name, nn.Parameter(getattr(norm, name).detach()[:4]))
            norm.running_mean, norm.running_var = norm.running_mean[:4].clone(), norm.running_var[:4].clone()

    def back(model: Compares) -> None:
        model.conv.stride = model.side.stride = (1, 1)

    for change in (stride, back, wider, cut, stride):
        for model in (plain, fused):
            change(model)
        for _ in range(2):
            assert relative_error(fused(x), plain(x)) < CLOSE, change.__name__


def test_hooks_that_change_sizes() -> None:
    """There when it is traced: the size behind is not known. Put there afterwards: the graph does not hold."""

    def halve(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
        return result[:, :, ::2, ::2]

    plain, x = randomise(Compares()).eval(), torch.randn(2, 4, 8, 8)
    plain.side.stride = (2, 2)
    fused = fuse(copy.deepcopy(plain))
    assert relative_error(fused(x), plain(x)) < CLOSE and launches(fused, x) == 1
    for model in (plain, fused):
        model.conv.register_forward_hook(halve)
    early = fuse(copy.deepcopy(plain))
    assert plain(x).shape == (2, 4, 4, 4)
    for model in (fused, early):
        for _ in range(2):
            assert relative_error(model(x), plain(x)) < CLOSE
    for model in (plain, fused):
        model.conv._forward_hooks.clear()
    assert relative_error(fused(x), plain(x)) < CLOSE and launches(fused, x) == 1


class OfChildren(Base):
    """By what the layers say of themselves."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        if x.shape[2] > self.conv.kernel_size[0] + 4 or self.side.training or x.shape[1] == self.conv.groups:
            return y
        return F.relu(self.side_bn(self.side(x)))


def test_attributes_of_layers_are_looked_at_again() -> None:
    plain = randomise(OfChildren()).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 4, 8, 8)

    def larger(model: OfChildren) -> None:
        torch.manual_seed(1)
        model.conv = nn.Conv2d(4, 4, 5, padding=2).eval()

    def mode(model: OfChildren) -> None:
        model.side.train(not model.side.training)

    def grouped(model: OfChildren) -> None:
        torch.manual_seed(2)
        model.conv = nn.Conv2d(4, 4, 5, padding=2, groups=4).eval()

    for change in (None, larger, mode, mode, grouped):
        for model in (plain, fused) if change else ():
            change(model)
        for _ in range(2):
            assert relative_error(fused(x), plain(x)) < CLOSE, change
        assert launches(fused, x) > 0


class Checks(Base):
    """What is done behind the decisions is done, though its result is for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4
        torch._assert(x.shape[2] < 8, "too many rows")
        self.meter(x.shape[0])
        x.shape[3] // (x.shape[2] - 5)
        return F.relu(self.bn(self.conv(x)))


class Meter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, count: int) -> None:
        self.seen += count


def test_what_else_is_done_with_sizes_is_done() -> None:
    plain = randomise(Checks()).eval()
    fused = fuse(copy.deepcopy(plain))
    for rows, error in ((7, None), (9, AssertionError), (5, ZeroDivisionError), (6, None), (7, None)):
        x, made = torch.randn(3, 4, rows, 6), []
        for model in (plain, fused):
            with pytest.raises(error) if error is not None else nullcontext():
                made.append(model(x))
        assert not made or relative_error(made[1], made[0]) < CLOSE
        assert plain.meter.seen == fused.meter.seen
    assert launches(fused, x) == 1


class Deep(nn.Module):
    """Each block reads its input twice: as many ways from the input as two to the number of blocks."""

    def __init__(self, blocks: int, by_data: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(blocks))
        self.by_data = by_data

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)) + x)
        if torch.isnan(x).any() if self.by_data else x.shape[2] > 100:
            return x + 1
        return x


@pytest.mark.parametrize("by_data", [False, True])
def test_many_ways_to_a_decision(by_data: bool) -> None:
    plain, x = randomise(Deep(30, by_data)).eval(), torch.randn(1, 4, 3, 3)
    fused = fuse(copy.deepcopy(plain), inplace=False)
    assert relative_error(fused(x), plain(x)) < 1e-4
    assert launches(fused, x) == (0 if by_data else 30)


def test_sizes_that_are_no_numbers() -> None:
    """Under other tracers it runs unfused, and no try is used up."""
    plain = randomise(Compares()).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 4, 7, 7)
    for _ in range(Regions.LIMIT_OF_SIZES + 1):
        traced_again = torch.jit.trace(fused, (x,), check_trace=False)
    assert relative_error(traced_again(x), plain(x)) < CLOSE
    symbolic = make_fx(fused, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    assert relative_error(symbolic(x), plain(x)) < CLOSE
    fused(x)
    assert launches(fused, x) == 1


class ByFlag(Base):
    """Decides by fewer sizes or by more, as an attribute says."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.flag:
            return F.relu(y + x) if x.shape[2] > 6 else F.relu(self.side_bn(self.side(x)))
        return F.relu(y + x) if x.shape[1] == 4 else y


def test_a_graph_for_more_sizes_hides_none_for_fewer() -> None:
    plain = randomise(ByFlag()).eval()
    fused, sizes = fuse(copy.deepcopy(plain)), [(2, 4, 7, 7), (2, 4, 5, 5), (1, 4, 9, 4), (1, 4, 4, 9)]
    for flag in (False, True, False, True):
        plain.flag = fused.flag = flag
        for size in (*sizes, *sizes):
            x = torch.randn(size)
            assert relative_error(fused(x), plain(x)) < CLOSE, (flag, size)


def test_more_sizes_than_it_is_traced_for() -> None:
    plain = randomise(Compares()).eval()
    fused, most = fuse(copy.deepcopy(plain)), Regions.LIMIT_OF_SIZES
    for rows in range(1, most + 4):
        x = torch.randn(1, 4, rows, 3)
        assert relative_error(fused(x), plain(x)) < CLOSE and launches(fused, x) == (1 if rows <= most else 0)
    left = [row.note for row in explain(fused, show=False).left_alone]
    assert left and all(f"a tensor of 1x4x{most + 3}x3) have another structure than the {most}" in note for note in left)
    assert launches(fused, torch.randn(1, 4, 2, 3)) == 1


def test_explain_before_and_after_the_first_call() -> None:
    fused = fuse(randomise(Asserts()).eval())
    assert {row.note for row in explain(fused, show=False).left_alone} == {WAITING}
    fused(torch.randn(1, 4, 5, 5))
    assert [row.launches for row in explain(fused, show=False).rows if row.fused] == [1]


def test_copies_pickles_and_unfuse() -> None:
    plain = randomise(Widens()).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 4, 7, 7)
    expected = plain(x)
    for model in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        for _ in range(2):
            assert relative_error(model(x), expected) < CLOSE
        assert launches(model, x) == 2
        assert launches(copy.deepcopy(model), x) == 2
        assert torch.equal(unfuse(model)(x), expected) and type(model) is Widens


def test_under_a_compiler() -> None:
    """It runs unfused there, and is right."""
    plain = randomise(Widens()).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 4, 7, 7)
    fused(x)
    compiled = torch.compile(fused, backend="eager")
    for size in ((2, 4, 7, 7), (3, 4, 9, 7)):
        x = torch.randn(size)
        assert relative_error(compiled(x), plain(x)) < CLOSE
    exported = torch.export.export(fused, (x,)).module()
    assert relative_error(exported(x), plain(x)) < CLOSE


class Leaf(nn.Module):
    """Small enough to stay a call; what it gives has a size that nobody knows, and so may have what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2]


class BehindLeaf(Base):
    def __init__(self) -> None:
        super().__init__()
        self.leaf = Leaf()

    def forward(self, x: Tensor) -> Tensor:
        y = self.leaf(x)
        return F.relu(self.bn(self.conv(x))) if y.shape[2] > 2 else x


class ByLeafsArgument(BehindLeaf):
    def forward(self, x: Tensor) -> Tensor:
        self.leaf(x)
        return F.relu(self.bn(self.conv(x))) if x.shape[2] > 2 else x


class ByType(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x))) if x.dtype == torch.float32 else x


class ByData(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        return y if x.shape[1] == 4 and y.sum() > 0 else x


class Forever(Base):
    """Decides more often than is looked at."""

    def forward(self, x: Tensor) -> Tensor:
        found = sum(1 for rows in range(99) if x.shape[2] > rows)
        return F.relu(self.bn(self.conv(x))) * found


class InPlace(Base):
    """The argument has other sizes behind the first line: what is asked then is not what was given."""

    def forward(self, x: Tensor) -> Tensor:
        x.transpose_(0, 1)
        y = F.relu(self.bn(self.conv(x.transpose(0, 1))))
        return y if x.shape[1] == 2 else y + 1


class Unpacks(Base):
    """How many there must be, only Python knows."""

    def forward(self, x: Tensor) -> Tensor:
        n, _, _, _ = x.shape
        return F.relu(self.bn(self.conv(x))) if n > 2 else x


class Catches(Base):
    def forward(self, x: Tensor) -> Tensor:
        try:
            known = bool(x.shape[1] == 4)
        except Exception:
            known = False
        return F.relu(self.bn(self.conv(x))) if known else x


class Draws(Base):
    """A number is drawn in each call, though it is for nothing."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape[0])
        return F.relu(self.bn(self.conv(x))) if x.shape[1] == 4 else x + noise


class ByChance(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        return y if torch.rand(x.shape[0]).mean() > 0.5 else y + 1


class Replaced(Compares):
    """A layer whose forward is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Identity()
        self.pool.forward = lambda x: F.max_pool2d(x, 2)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(x)
        return F.relu(self.bn(self.conv(y))) if y.shape != x.shape else x


class Patches(nn.Module):
    """No BatchNorm: not looked at, whatever it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 4
        return self.conv(x).flatten(2)


SIZES, DATA = "depends on sizes or types of tensors", "depends on data"
LEFT_ALONE: dict[type[nn.Module], str] = {
    **dict.fromkeys((BehindLeaf, ByLeafsArgument, ByType, Forever, Patches, InPlace, Draws, Replaced), SIZES),
    **{ByData: DATA, ByChance: DATA, Unpacks: "takes apart the sizes", Catches: "catches errors"},
}


@pytest.mark.filterwarnings("ignore:fuse found no")
@pytest.mark.parametrize("kind", LEFT_ALONE, ids=lambda kind: kind.__name__)
def test_what_cannot_be_told_is_left_alone_with_a_reason(kind: type[nn.Module]) -> None:
    plain = randomise(kind()).eval()
    fused = fuse(copy.deepcopy(plain))
    for size in IMAGES:
        x, made = torch.randn(size), []
        for model in (plain, fused):
            torch.manual_seed(3)
            made.append((model(x.clone()), torch.random.get_rng_state()))
        assert all(torch.equal(a, b) for a, b in zip(*made, strict=True)) and launches(fused, x.clone()) == 0
    notes = [row.note for row in explain(fused, show=False).left_alone]
    assert notes and all(LEFT_ALONE[kind] in note for note in notes), notes
