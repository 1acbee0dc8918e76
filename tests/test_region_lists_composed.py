"""Modules that take lists, with what else there is: copies, hooks, threads, compilers, wrappers, and detection models."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lists import KINDS, Head, OnFlag, before_and_behind_a_call, launches, levels, rebuilt, same, step
from nets import randomise
from tolerances import relative_error
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fused_resnet import explain, fuse, unfuse
from fused_resnet.counts import fused_share
from fused_resnet.swap.region import WAITING


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
    for fused, called in before_and_behind_a_call(plain, args):
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


def test_torch_compile_takes_what_was_traced_and_traces_nothing() -> None:
    plain = randomise(Head()).eval()
    args = levels()
    with torch.no_grad():
        for fused, called in before_and_behind_a_call(plain, args):
            torch._dynamo.reset()
            compiled = torch.compile(fused, backend="eager")
            same(compiled(args), plain(args))
            assert launches(compiled, args) == (9 if called else 3)
            assert fused.fused_region.tries[False] == int(called)


def test_export_gives_what_the_modules_compute() -> None:
    plain = randomise(Head()).eval()
    args = levels()
    for fused, _ in before_and_behind_a_call(plain, args):
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
