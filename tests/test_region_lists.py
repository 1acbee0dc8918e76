"""Modules that take tensors in lists, tuples, dicts: traced when they are called, for the structure of what they are given."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lists import KINDS, Base, Head, Lists, Named, given, launches, levels, own_chains, rebuilt, same, step
from nets import randomise
from tolerances import CLOSE, relative_error
from torch import Tensor, nn

from fused_resnet import explain, fuse, unfuse
from fused_resnet.swap.region import WAITING, Regions


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_it_computes_what_it_did(kind: type[Base], training: bool) -> None:
    """The first call, which traces it, and the second; against float64."""
    plain = randomise(kind()).train(training)
    exact, state = copy.deepcopy(plain).double(), list(plain.state_dict())
    fused, args = fuse(copy.deepcopy(plain)), given(kind)
    for _ in range(2):
        result, gradients = step(fused, args)
        wanted, truth = step(exact, rebuilt(args, Tensor.double))
        same(result, rebuilt(wanted, Tensor.float))
        for found, gradient in zip(gradients, truth, strict=True):
            assert relative_error(found, gradient) < 1e-4
        for (key, a), (_, b) in zip(fused.named_buffers(), exact.named_buffers()):
            assert relative_error(a.double(), b.double()) < CLOSE, key
    assert launches(fused, *args) == KINDS[kind][training]
    assert list(fused.state_dict()) == state
    kinds = [type(module) for module in plain.modules()]
    assert [type(module) for module in unfuse(fused).modules()] == kinds
    assert not any(name.startswith("fused_") for module in fused.modules() for name in vars(module))


def test_explain_before_and_after_the_first_call() -> None:
    net, args = fuse(randomise(Head()).eval()), given(Head)
    before = explain(net, show=False)
    assert {row.name: row.note for row in before.left_alone} == dict.fromkeys(("conv", "bn", "logits"), WAITING)
    assert [row.name for row in before.rows if row.fused] == ["tower.0"]
    net(*args)
    after = explain(net, show=False)
    assert not after.left_alone and own_chains(net) == ["conv"] * 3, "a chain a level"
    assert {row.note for row in explain(net.train(), show=False).left_alone} == {WAITING}, "nothing is known of training"
    assert "not fused yet" in explain(Head().eval(), show=False).left_alone[-1].note


def test_other_structures_are_traced_anew_a_few_times() -> None:
    plain = randomise(Head()).eval()
    fused = fuse(copy.deepcopy(plain))
    calls = [levels(3), levels(2), tuple(levels(3)), levels(3), levels(1), levels(2)]
    for args in calls:
        assert launches(fused, args) == 3 * len(args)
        same(fused(args), plain(args))
        assert len(own_chains(fused)) == len(args), "explain tells of the last call"
    for args in (levels(4), tuple(levels(1))):  # the fifth structure, and the sixth
        assert launches(fused, args) == len(args), "its tower alone"
        same(fused(args), plain(args))
        notes = {row.note for row in explain(fused, show=False).left_alone}
        assert len(notes) == 1 and f"another structure than the {Regions.LIMIT}" in notes.pop()
    assert launches(fused, levels(3)) == 9, "those that are known go on"


def test_keys_of_a_dict_are_part_of_the_structure() -> None:
    plain = randomise(Named()).eval()
    fused = fuse(copy.deepcopy(plain))
    first, *others = levels()
    for args in ({"a": first, "b": others[0]}, {"b": first, "a": others[0]}, OrderedDict(a=first, c=others[1])):
        for _ in range(2):
            same(fused(args), plain(args))
        assert launches(fused, args) == 3


class Appends(Base):
    def forward(self, levels: list[Tensor]) -> Tensor:
        levels.append(self.logits(levels[-1]))
        return F.relu(self.bn(self.conv(levels[0]))) * len(levels)


class Replaces(Base):
    def forward(self, levels: list[Tensor]) -> Tensor:
        for index in range(len(levels)):
            levels[index] = F.relu(self.bn(self.conv(levels[index])))
        return levels[0] + 1


class Pops(Base):
    def forward(self, levels: list[Tensor]) -> Tensor:
        y = 0
        while len(levels):
            y = y + self.bn(self.conv(levels.pop())).mean()
        return y


class GivesBack(Base):
    def forward(self, levels: list[Tensor]) -> dict[str, Any]:
        return {"given": levels, "made": [F.relu(self.bn(self.conv(x))) for x in levels]}


class Taker(nn.Module):
    """Empties what it is given, by data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        y = self.conv(levels[-1])
        if y.sum() == y.sum():
            levels.pop()
        return y


class HandsOn(Base):
    def __init__(self) -> None:
        super().__init__()
        self.taker = Taker()

    def forward(self, levels: list[Tensor]) -> Tensor:
        y = self.taker(levels)
        return y.mean() + sum(F.relu(self.bn(self.conv(x))).mean() for x in levels)


class Throws(Base):
    """Nothing to trace: what is in the list decides."""

    def forward(self, levels: list[Tensor]) -> Tensor:
        return sum(F.relu(self.bn(self.conv(x))).mean() for x in levels if x.mean() > 0)


class TakesTensorsApart(Base):
    def forward(self, levels: list[Tensor]) -> Tensor:
        return sum(self.bn(self.conv(x[None])).mean() for images in levels for x in images)


class NothingToFuse(Base):
    """Its own convolution has neither a bias nor anything behind it."""

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.conv(self.tower(x)) for x in levels]


REFUSED = {
    Appends: "changes a list or dict", Replaces: "changes a list or dict", Pops: "changes a list or dict",
    GivesBack: "gives back a list or dict", HandsOn: "hands on a list or dict that it is given, to a Taker",
    Throws: "depends on data", TakesTensorsApart: "takes apart a tensor", NothingToFuse: "holds no chain",
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_is_no_chain_runs_as_it_did(kind: type[Base]) -> None:
    plain = randomise(kind())
    fused, args = fuse(copy.deepcopy(plain)), levels()
    for training in (False, True, True):
        mine, theirs = [list(args) for _ in range(2)]
        found, wanted = fused.train(training)(mine), plain.train(training)(theirs)
        same(found, wanted)
        same(mine, theirs)
        assert found["given"] is mine if kind is GivesBack else True
        for (key, a), (_, b) in zip(fused.named_buffers(), plain.named_buffers()):
            assert relative_error(a.double(), b.double()) < CLOSE, key
    told = [row.note for row in explain(fused, show=False).left_alone if row.name == "conv"]
    assert len(told) == 1 and REFUSED[kind] in told[0], told
    tries = fused.fused_region.tries
    assert max(tries.values()) <= 2, "looked at once a mode"
    assert type(unfuse(fused)) is kind and "fused_region" not in vars(fused)


def test_other_arguments_run_unfused() -> None:
    """Keywords, nothing in the list, what is no tensor, a class of list; errors are the forward's own."""

    class Mine(list[Tensor]):
        pass

    plain = randomise(Lists()).eval()
    fused = fuse(copy.deepcopy(plain))
    same(fused(levels=levels()), plain(levels=levels()))
    same(fused(Mine(levels())), plain(Mine(levels())))
    same(fused([]), plain([]))
    for model in (plain, fused):
        with pytest.raises(TypeError):
            model()
        with pytest.raises(TypeError):
            model([None])
        with pytest.raises(RuntimeError):
            model([torch.zeros(1, 3, 5, 5)])
    batch = torch.randn(2, 1, 4, 6, 6)
    same(fused(batch), plain(batch))
    assert explain(fused, show=False).left_alone[0].note == "its forward takes apart an argument", "which was a tensor"
    assert launches(fused, levels()) == 9


class Either(Base):
    """A tensor or a list of them."""

    def forward(self, x: Any) -> Tensor:
        x = x if isinstance(x, Tensor) else torch.stack(x).sum(0)
        return F.relu(self.bn(self.conv(x)))


class Indexes(Base):
    """A container by its keys alone: nothing says at fuse that it is none of a tensor's."""

    def forward(self, x: Any) -> Tensor:
        return F.relu(self.bn(self.conv(x["first"]) + x["second"]))


def test_what_can_be_traced_for_a_tensor_is_traced_for_a_container_too() -> None:
    x, y = torch.randn(2, 2, 4, 6, 6)
    for kind, calls in ((Either, (x, [x, y], (x, y, x))), (Indexes, ({"first": x, "second": y},))):
        plain = randomise(kind()).eval()
        fused = fuse(copy.deepcopy(plain))
        for call in calls:
            for _ in range(2):
                same(fused(call), plain(call))
            assert launches(fused, call) == 1, call
            assert own_chains(fused) == ["conv"] or own_chains(fused) == [""]


def test_no_sum_is_taken_for_another_tensors() -> None:
    """The same tensor at two places, one of them written to in between."""

    class Twice(Base):
        def forward(self, levels: list[Tensor]) -> Tensor:
            y = self.bn(self.conv(levels[0]))
            levels[1].mul_(2)
            return F.relu(y + levels[0]) + len(levels)

    plain = randomise(Twice()).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        for first, second in ((x, x.clone()), (x, x)):
            mine, theirs = [first.clone(), second.clone()], [first.clone(), second.clone()]
            if second is first:
                mine[1], theirs[1] = mine[0], theirs[0]
            same(fused(mine), plain(theirs))
            same(mine, theirs)


class Adds(Base):
    """Puts what it makes into a list of somebody else's."""

    def forward(self, found: list[Tensor]) -> None:
        found.append(self.logits(F.relu(self.bn(self.conv(found[-1])))))


class AddsBeside(nn.Module):
    """No chain in it looks out of it: it could be one call, which is given a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, found: list[Tensor]) -> Tensor:
        found.append(self.inner(found[-1]) * 2)
        return found[0]


class AddsByData(Adds):
    """Cannot be traced, so it is a call."""

    def forward(self, found: list[Tensor]) -> None:
        y = self.conv(found[-1])
        if y.sum() == y.sum():
            found.append(y)


class Gathers(Base):
    """Has a child put something into its own list."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        found = [F.relu(self.bn(self.conv(x)))]
        self.child(found)
        return found[-1] + 1


@pytest.mark.parametrize(
    ("kind", "expected"), [(Adds, 3), (AddsBeside, 2), (AddsByData, 0)], ids=lambda part: getattr(part, "__name__", "")
)
def test_a_child_that_changes_a_list_of_its_parents(kind: type[nn.Module], expected: int) -> None:
    plain = randomise(Gathers(kind())).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 4, 6, 5)
    for _ in range(2):
        same(fused(x), plain(x))
    assert launches(fused, x) == expected
