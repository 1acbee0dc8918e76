"""Modules that take tensors in lists, tuples, dicts: traced when they are called, for the structure of what they are given."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import randomise
from tolerances import CLOSE, relative_error
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from fused_resnet import count_launches, explain, fuse, unfuse
from fused_resnet.counts import fused_share
from fused_resnet.swap.region import WAITING, Regions


class Base(nn.Module):
    """A tower of its own, and a convolution with a bias behind it that a loop calls."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.logits = nn.Conv2d(4, 6, 1)
        self.flag = False


class Head(Base):
    """As RetinaNet's heads: a loop over levels, the results in one tensor."""

    def forward(self, levels: list[Tensor]) -> Tensor:
        found = []
        for x in levels:
            y = self.logits(F.relu(self.bn(self.conv(self.tower(x)))))
            N, _, H, W = y.shape
            found.append(y.view(N, -1, 2, H, W).permute(0, 3, 4, 1, 2).reshape(N, -1, 2))
        return torch.cat(found, dim=1)


class Lists(Base):
    """As a region proposal network's: what a tower makes is read twice, the result is a tuple of lists."""

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        first, second = [], []
        for x in levels:
            y = self.tower(x)
            first.append(self.logits(y))
            second.append(self.bn(self.conv(y)))
        return first, second


class Named(Base):
    """A dict in, a dict with a list and a number in it out, the values looped over twice and counted."""

    def forward(self, levels: dict[str, Tensor]) -> dict[str, Any]:
        assert len(levels) > 0
        names, means = list(levels.keys()), [x.mean() for x in levels.values()]
        made = OrderedDict((f"{name}!", F.relu(self.bn(self.conv(x)))) for name, x in zip(names, levels.values()))
        return {**made, "means": means, "first": self.logits(levels[names[0]]), "count": len(levels)}


class Neck(Base):
    """Sums from the last level to the first, in front of what is made of another tensor."""

    def forward(self, x: Tensor, levels: tuple[Tensor, ...]) -> OrderedDict[str, Tensor]:
        last = self.bn(self.conv(levels[-1]))
        made = [last]
        for index in range(len(levels) - 2, -1, -1):
            last = self.bn(self.conv(levels[index])) + F.interpolate(last, size=levels[index].shape[-2:])
            made.insert(0, last)
        made.append(self.logits(x))
        return OrderedDict((str(index), y) for index, y in enumerate(made))


class OnFlag(Base):
    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [F.relu(self.bn(self.conv(x))) if self.flag else self.bn(self.conv(x)) for x in levels]


class Outer(Base):
    """A child that takes the same list, between layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Head()

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [*(F.relu(self.logits(x)) for x in levels), self.head(levels), self.head([levels[0]])]


def levels(n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 4, 9 - 2 * index, 7 + index, generator=generator) for index in range(n)]


def given(kind: type[Base], n: int = 3) -> tuple[Any, ...]:
    parts = levels(n)
    if kind is Named:
        return ({f"level{index}": x for index, x in enumerate(parts)},)
    return (torch.ones(2, 4, 5, 5) * parts[0].mean(), tuple(parts)) if kind is Neck else (parts,)


def rebuilt(value: Any, change: Any) -> Any:
    """The same containers of other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((key, rebuilt(part, change)) for key, part in value.items())
    return type(value)(rebuilt(part, change) for part in value) if isinstance(value, (list, tuple)) else value


def step(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, list[Tensor]]:
    """The result, and the gradients of all inputs and parameters."""
    args = rebuilt(args, lambda x: x.detach().clone().requires_grad_())
    inputs = tree_leaves(args)
    model.zero_grad()
    result = model(*args)
    generator = torch.Generator().manual_seed(5)
    made = [y for y in tree_leaves(result) if isinstance(y, Tensor)]
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in made]
    sum((y * weight).sum() for y, weight in zip(made, weights)).backward()
    return result, [x.grad if x.grad is not None else torch.zeros_like(x) for x in (*inputs, *model.parameters())]


def same(found: Any, wanted: Any, bound: float = CLOSE) -> None:
    """Equal containers, near tensors."""
    assert type(found) is type(wanted)
    if isinstance(wanted, Tensor):
        assert relative_error(found, wanted) < bound
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        same(list(found.values()), list(wanted.values()), bound)
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted):
            same(one, other, bound)
    else:
        assert found == wanted


def launches(model: nn.Module, *args: Any) -> int:
    """Of one call, without gradients."""
    with count_launches() as log, torch.no_grad():
        model(*args)
    return len(log)


def own_chains(model: nn.Module) -> list[str]:
    """The convolutions of chains that the model itself runs."""
    return [row.name for row in explain(model, show=False).rows if row.fused and not row.name.startswith(("tower", "head"))]


#: Class -> launches of three levels, in eval mode and in training.
KINDS: dict[type[Base], tuple[int, int]] = {
    Head: (9, 9), Lists: (9, 12), Named: (4, 7), Neck: (4, 7), OnFlag: (3, 6), Outer: (15, 15),
}  # fmt: skip


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


def test_attributes_are_read_again_at_each_call() -> None:
    plain = randomise(OnFlag()).eval()
    fused, args = fuse(copy.deepcopy(plain)), levels()
    for flag in (False, True, False):
        plain.flag = fused.flag = flag
        same(fused(args), plain(args))
        assert launches(fused, args) == 3


def test_copies_pickles_and_state_dicts() -> None:
    plain = randomise(Head()).eval()
    args = levels()
    for called in (False, True):
        fused = fuse(copy.deepcopy(plain))
        if called:
            fused(args)
        unpickled = pickle.loads(pickle.dumps(fused))
        for other in (copy.deepcopy(fused), unpickled, copy.copy(fused)):
            waiting = {row.note for row in explain(other, show=False).left_alone}
            assert waiting == (set() if called and other is not unpickled else {WAITING})
            same(other(args), plain(args))
            assert launches(other, args) == 9 and not explain(other, show=False).left_alone
            same(step(copy.deepcopy(other).train(), (args,)), step(copy.deepcopy(plain).train(), (args,)), 1e-4)
    again = fuse(Head().eval())
    again.load_state_dict(fused.state_dict())
    same(again(args), plain(args))
    assert type(unfuse(again)) is Head
    same(again(args), plain(args))


@pytest.mark.parametrize("early", [False, True], ids=["after the first call", "before it"])
@pytest.mark.parametrize("place", ["tower", "tower.0", "conv", "bn", "logits", ""])
def test_a_hook_sees_what_it_saw(place: str, early: bool) -> None:
    plain = randomise(Head()).eval()
    fused, args = fuse(copy.deepcopy(plain)), levels()
    if not early:
        fused(args)
    seen: tuple[list[Tensor], list[Tensor]] = [], []
    handles = [
        model.get_submodule(place).register_forward_hook(lambda m, a, y, i=i: seen[i].append(y.clone()))
        for i, model in enumerate((plain, fused))
    ]
    same(fused(args), plain(args))
    assert len(seen[0]) == (1 if place == "" else 3)
    same(seen[1], seen[0])
    for handle in handles:
        handle.remove()
    same(fused(args), plain(args))
    assert launches(fused, args) == 9


def test_a_replaced_forward_is_called_and_forgotten_when_it_is_gone() -> None:
    plain = randomise(Head()).eval()
    fused, args, calls = fuse(copy.deepcopy(plain)), levels(), []
    for early in (True, False):
        known = fused.forward

        def forward(x: Any, known: Any = known) -> Tensor:
            calls.append(len(x))
            result: Tensor = known(x)
            return result

        fused.forward = forward
        same(fused(args), plain(args))
        assert any("forward was replaced" in row.note for row in explain(fused, show=False).left_alone)
        del fused.forward
        if early:
            same(fused(args), plain(args))
        assert launches(fused, args) == 9
    assert calls == [3, 3]


def test_nothing_is_traced_while_a_hook_looks_into_all_modules() -> None:
    plain = randomise(Head()).eval()
    fused, args, seen = fuse(copy.deepcopy(plain)), levels(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(type(m).__name__))
    for _ in range(5):
        result = fused(args)
    handle.remove()
    same(result, plain(args))
    assert seen.count("Conv2d") == 5 * 9
    assert launches(fused, args) == 9


def test_threads_that_make_the_first_call_together() -> None:
    plain = randomise(Head()).eval()
    args = levels()
    wanted = plain(args)
    for _ in range(5):
        fused = fuse(copy.deepcopy(plain))
        found: list[Any] = []
        barrier = threading.Barrier(3)

        def run(fused: Any = fused, found: list[Any] = found, barrier: Any = barrier) -> None:
            barrier.wait()
            found.append(fused(args))

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3
        for result in found:
            same(result, wanted)
        assert fused.fused_region.tries[False] == 1 and launches(fused, args) == 9


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


def test_torch_compile_takes_what_was_traced_and_traces_nothing() -> None:
    plain = randomise(Head()).eval()
    args = levels()
    with torch.no_grad():
        for called in (False, True):
            fused = fuse(copy.deepcopy(plain))
            if called:
                fused(args)
            torch._dynamo.reset()
            compiled = torch.compile(fused, backend="eager")
            same(compiled(args), plain(args))
            assert launches(compiled, args) == (9 if called else 3)
            assert fused.fused_region.tries[False] == int(called)


def test_export_gives_what_the_modules_compute() -> None:
    plain = randomise(Head()).eval()
    args = levels()
    for called in (False, True):
        fused = fuse(copy.deepcopy(plain))
        if called:
            fused(args)
        program = torch.export.export(fused, (args,))
        same(program.module()(args), plain(args))
        assert not [node for node in program.graph.nodes if "fused_resnet" in str(node.target)], "standard operators"


def test_data_parallel_training_around_a_head(tmp_path: Path) -> None:
    """One process: the first step traces it inside of the wrapper."""
    plain = randomise(Head()).train()
    fused, args, exact = fuse(copy.deepcopy(plain)), levels(), copy.deepcopy(plain).double()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(fused)
        for _ in range(2):
            result, gradients = step(wrapped, (args,))
            wanted, truth = step(exact, (rebuilt(args, Tensor.double),))
            same(result, wanted.float())
            for found, gradient in zip(gradients, truth, strict=True):
                assert relative_error(found, gradient) < 1e-4
        assert launches(wrapped, args) == KINDS[Head][True]
    finally:
        distributed.destroy_process_group()


def test_a_parent_that_is_traced_at_fuse_takes_the_loop_into_its_chains() -> None:
    """As before: what is around it knows the list. The head itself is left as it was."""

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 3, bias=False), Head()

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            result: Tensor = self.head([y, F.max_pool2d(y, 2)])
            return result

    plain = randomise(Parent()).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 3, 12, 14)
    assert type(fused) is not Parent and type(fused.head) is Head
    same(fused(x), plain(x))
    assert launches(fused, x) == 6


def _swapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "fused_region" in vars(module)]


def test_retinanets_heads() -> None:
    """Its heads and nothing around them wait for a call; behind it nearly all convolutions are fused."""
    from torchvision.models.detection import retinanet_resnet50_fpn

    with torch.device("meta"):
        net = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    fuse(net.eval())
    heads = ["head.classification_head", "head.regression_head"]
    assert [name for name in _swapped(net) if not name.startswith("backbone")] == heads
    assert {row.name for row in explain(net, show=False).left_alone} == {f"{heads[0]}.cls_logits", f"{heads[1]}.bbox_reg"}


class Heads(nn.Module):
    """The parts of a detection model with layers, called as it calls them: the choice of boxes needs numbers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        torch.is_grad_enabled()  # which keeps this module itself from being traced
        features = list(self.model.backbone(x).values())
        return self.model.head(features) if hasattr(self.model, "head") else self.model.rpn.head(features)


@pytest.mark.parametrize(
    ("name", "least"), [("retinanet_resnet50_fpn", 0.95), ("fasterrcnn_resnet50_fpn", 0.95), ("retinanet_resnet50_fpn_v2", 0.5)]
)
def test_the_fused_share_of_detection_models(name: str, least: float) -> None:
    from torchvision.models import detection

    with torch.device("meta"):
        net = fuse(Heads(getattr(detection, name)(weights=None, weights_backbone=None, num_classes=91)).eval())
        for model in (net, pickle.loads(pickle.dumps(net))):
            share = fused_share(model, torch.empty(1, 3, 320, 480))
            assert share >= least, share


def test_the_first_call_in_other_modes() -> None:
    """Autocast and inference; tensors without contents: not traced then, but later."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    plain = randomise(OnFlag()).eval()
    args = levels()
    fused = fuse(copy.deepcopy(plain))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert [y.shape for y in fused([torch.empty(2, 4, 5, 7)])] == [(2, 4, 5, 7)]
    assert fused.fused_region.tries[False] == 0 and launches(fused, args) == 3
    fused = fuse(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        same(fused(args), plain(args), 0.02)
    same(fused(args), plain(args))
    fused = fuse(copy.deepcopy(plain))
    with torch.inference_mode():
        fused([x.clone() for x in args])
    same(step(fused, (args,)), step(plain, (args,)), 1e-4)
    assert launches(fused, args) == 3


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
