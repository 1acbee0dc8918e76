"""fuse and unfuse: the model stays the same object with the same state, whatever is done to it afterwards."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
from nets import TINY_LAUNCHES, TinyNet, copies, images, projection, randomise, tiny
from tolerances import relative_error
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

import fused_resnet
from fused_resnet import count_launches, explain, fuse, unfuse

CLOSE = 1e-5


def launches(model: nn.Module, x: torch.Tensor) -> int:
    with count_launches() as log:
        model(x)
    return len(log)


# ------------------------------------------------------------------------------------------- the object


def test_parameters_buffers_and_names_stay() -> None:
    net = tiny()
    before = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    values = {key: value.clone() for key, value in net.state_dict().items()}
    modules = dict(net.named_modules())
    assert fuse(net) is net
    after = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert all(net.get_submodule(name) is module for name, module in modules.items())
    assert list(net.state_dict()) == list(values)
    assert all(torch.equal(value, values[key]) for key, value in net.state_dict().items())


def test_isinstance_holds() -> None:
    net = fuse(tiny())
    assert type(net) is TinyNet, "its own forward is its own"
    assert isinstance(net.basic, BasicBlock) and isinstance(net.bottleneck, Bottleneck) and isinstance(net.stem, nn.Sequential)
    model = fuse(resnet18(num_classes=2))
    assert isinstance(model, ResNet) and "Fused" in type(model).__name__


def test_fused_model_agrees_and_runs_fused() -> None:
    plain, fused = copies(tiny())
    fuse(fused)
    for shape in ((2, 33, 35), (1, 7, 64), (3, 1, 1)):
        x = images(*shape)
        assert relative_error(fused(x), plain(x)) < CLOSE
    assert launches(fused, images()) == TINY_LAUNCHES == explain(fused, show=False).launches


def test_inplace_false_leaves_the_model_alone() -> None:
    net = tiny()
    classes = [type(m) for m in net.modules()]
    memory = [p.stride() for p in net.parameters()]
    fused = fuse(net, inplace=False)
    assert fused is not net
    assert [type(m) for m in net.modules()] == classes and [p.stride() for p in net.parameters()] == memory
    assert launches(net, images()) == 0 and launches(fused, images()) == TINY_LAUNCHES
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in fused.parameters()}


def test_unfuse_gives_everything_back() -> None:
    net = tiny()
    classes = [type(m) for m in net.modules()]
    attributes = [set(m.__dict__) for m in net.modules()]
    x = images()
    expected = net(x)
    fuse(net, backend="cpu")
    net(x)
    assert unfuse(net) is net
    assert [type(m) for m in net.modules()] == classes
    assert [set(m.__dict__) for m in net.modules()] == attributes
    assert launches(net, x) == 0
    assert relative_error(net(x), expected) < 1e-6
    assert launches(fuse(net), x) == TINY_LAUNCHES, "and it can be fused again"


def test_unfuse_our_own_network() -> None:
    model = randomise(fused_resnet.resnet18(num_classes=3)).eval()
    x = images(1)
    expected = model(x)
    unfuse(model)
    assert launches(model, x) == 0
    assert relative_error(model(x), expected) < CLOSE
    assert launches(fuse(model), x) == 21


def test_a_part_of_a_model_can_be_fused() -> None:
    plain, net = copies(tiny())
    fuse(net.basic)
    assert launches(net, images()) == 3
    assert relative_error(net(x := images()), plain(x)) < CLOSE


# ------------------------------------------------------------------------------------------- life afterwards


def test_optimizer_made_before_fuse_trains_as_in_eager() -> None:
    """SGD with momentum, some steps, in train mode: the same weights and running statistics as the eager twin's."""
    plain, fused = copies(tiny().double())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (plain, fused)]
    fuse(fused)
    for _ in range(3):
        x, y = images(4).double(), torch.tensor([0, 1, 2, 3])
        for model, optimizer in zip((plain, fused), optimizers, strict=True):
            model.train()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            model.eval()
        assert relative_error(fused(x), plain(x)) < 1e-10
    for (key, a), (_, b) in zip(fused.state_dict().items(), plain.state_dict().items(), strict=True):
        assert relative_error(a, b) < 1e-10, key


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_fine_tuning_with_frozen_statistics(optimizer: str) -> None:
    """Eval-mode BatchNorms, the first block frozen, every forward after a step sees the new weights."""
    plain, fused = copies(tiny().double())
    fuse(fused)
    made = []
    for model in (plain, fused):
        model.stem.requires_grad_(False)
        made.append(getattr(torch.optim, optimizer)([p for p in model.parameters() if p.requires_grad], lr=0.01))
    for step in range(3):
        x, y = images(4).double(), torch.tensor([0, 1, 2, 3])
        outs = []
        for model, opt in zip((plain, fused), made, strict=True):
            opt.zero_grad()
            outs.append(model(x))
            nn.functional.cross_entropy(outs[-1], y).backward()
            opt.step()
        assert relative_error(outs[1], outs[0]) < 1e-8, step
    assert all(p.grad is None for p in fused.stem.parameters())


def test_train_and_eval_can_be_switched() -> None:
    plain, fused = copies(tiny())
    fuse(fused)
    x = images(4)
    for mode in (False, True, False, True, False):
        plain.train(mode), fused.train(mode)
        assert relative_error(fused(x), plain(x)) < CLOSE
        assert launches(fused, x) == (0 if mode else TINY_LAUNCHES)
        plain(x)
    assert relative_error(fused.basic.bn1.running_var, plain.basic.bn1.running_var) < CLOSE
    assert fused.basic.bn1.num_batches_tracked == plain.basic.bn1.num_batches_tracked == 4


@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "to"])
def test_types_can_be_changed(change: str) -> None:
    """And back: what was folded for one type is not used for another."""
    fused = fuse(tiny())
    x = images()
    fused(x)
    plain = unfuse(copy.deepcopy(fused))
    for model in (plain, fused):
        model.to(torch.float64) if change == "to" else getattr(model, change)()
    dtype = next(fused.parameters()).dtype
    expected, actual = plain(x.to(dtype)), fused(x.to(dtype))
    assert actual.dtype == expected.dtype == dtype
    truth = plain.double()(x.to(dtype).double())
    assert relative_error(actual, truth) <= 2 * max(relative_error(expected, truth), 1e-12)
    fused.float()
    assert relative_error(fused(x), plain.float()(x)) < CLOSE
    assert launches(fused, x) == TINY_LAUNCHES


def test_to_meta_and_back_with_to_empty() -> None:
    fused = fuse(tiny())
    state = fused.state_dict()
    x = images()
    expected = fused(x)
    fused.to("meta").to_empty(device="cpu").load_state_dict({key: value.clone() for key, value in state.items()})
    assert torch.equal(fused(x), expected)


def test_deepcopy_is_independent() -> None:
    fused = fuse(tiny(), backend="cpu")
    x = images()
    expected = fused(x)
    twin = copy.deepcopy(fused)
    assert torch.equal(twin(x), expected) and launches(twin, x) == TINY_LAUNCHES
    with torch.no_grad():
        twin.basic.conv1.weight.mul_(2)
    assert not torch.equal(twin(x), expected)
    assert torch.equal(fused(x), expected)
    unfuse(twin)
    assert launches(fused, x) == TINY_LAUNCHES


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_whole_models_can_be_pickled(how: str) -> None:
    fused = fuse(tiny(), backend="cpu")
    x = images()
    expected = fused(x)
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    else:
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin.basic) is type(fused.basic) and twin.basic.fused_backend == "cpu"
    assert torch.equal(twin(x), expected) and launches(twin, x) == TINY_LAUNCHES
    assert launches(unfuse(twin), x) == 0


def test_pickle_is_read_in_a_fresh_process(tmp_path) -> None:
    """The classes are made at run time: a process that has not called fuse must be able to make them."""
    import os
    import subprocess
    import sys
    from pathlib import Path

    model = fuse(randomise(resnet18(num_classes=2)).eval())
    x = images(1)
    torch.save({"model": model, "x": x, "y": model(x).detach()}, tmp_path / "model.pt")
    code = (
        "import sys, torch; d = torch.load(sys.argv[1], weights_only=False); y = d['model'](d['x']); "
        "assert torch.allclose(y, d['y'], rtol=1e-4, atol=1e-4 * d['y'].abs().max().item()); import fused_resnet; "
        "print(fused_resnet.explain(d['model'], show=False).launches)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(fused_resnet.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "21"


def test_state_dict_goes_through_weights_only_and_into_an_unfused_model(tmp_path) -> None:
    fused = fuse(tiny())
    torch.save(fused.state_dict(), tmp_path / "state.pt")
    plain = TinyNet().eval()
    plain.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert relative_error(fused(x := images()), plain(x)) < CLOSE


# ------------------------------------------------------------------------------------------- never stale


def _change(model: nn.Module, how: str) -> None:
    """Change the state of a TinyNet in one of the ways people do."""
    conv, bn = model.basic.conv1, model.basic.bn1
    with torch.no_grad():
        match how:
            case "weight in place":
                conv.weight.mul_(1.5)
            case "one element of a weight":
                conv.weight[3, 5, 1, 2] += 4
            case "weight through .data":
                conv.weight.data.mul_(1.5)
            case "filter through .data":
                conv.weight.data[3] = 0.5
            case "weight through NumPy":
                conv.weight.numpy(force=True)[...] *= 1.5
            case "weight .data replaced":
                conv.weight.data = conv.weight.data * 1.5
            case "weight replaced":
                conv.weight = nn.Parameter(conv.weight * 1.5)
            case "gamma in place":
                bn.weight.mul_(-1.5)
            case "one gamma through .data":
                bn.weight.data[7] = 3.0
            case "one beta through NumPy":
                bn.bias.numpy(force=True)[11] = 3.0
            case "running mean in place":
                bn.running_mean.add_(1)
            case "running variance through .data":
                bn.running_var.data[:3] = 0.01
            case "running variance replaced":
                bn.running_var = bn.running_var * 4
            case "eps":
                bn.eps = 0.5
            case "projection":
                model.basic.downsample[1].weight.mul_(2)
            case "reset":
                torch.manual_seed(5)
                conv.reset_parameters()
                bn.reset_parameters()
            case "load_state_dict":
                torch.manual_seed(6)
                model.load_state_dict(tiny().state_dict())
            case "load_state_dict assign":
                torch.manual_seed(6)
                model.load_state_dict(tiny().state_dict(), assign=True)
            case "convolution replaced":
                torch.manual_seed(7)
                model.basic.conv1 = nn.Conv2d(8, 16, 3, 2, padding=1)
            case "stride":
                model.bottleneck.conv2.padding, model.bottleneck.conv2.dilation = (2, 2), (2, 2)
            case "vector_to_parameters":
                flat = torch.cat([p.reshape(-1) for p in model.parameters()])
                nn.utils.vector_to_parameters(1.1 * flat, model.parameters())
            case "memory used again":  # the old memory is freed, the new may lie at its address
                conv.weight.data = torch.zeros(0)
                conv.weight.data = torch.full((16, 8, 3, 3), 0.1)


CHANGES = [
    "weight in place", "one element of a weight", "weight through .data", "filter through .data", "weight through NumPy",
    "weight .data replaced", "weight replaced", "gamma in place", "one gamma through .data", "one beta through NumPy",
    "running mean in place", "running variance through .data", "running variance replaced", "eps", "projection", "reset",
    "load_state_dict", "load_state_dict assign", "convolution replaced", "stride", "vector_to_parameters",
    "memory used again",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["no_grad", "grad", "inference_mode"])
@pytest.mark.parametrize("how", CHANGES)
def test_the_next_forward_sees_a_change(how: str, mode: str) -> None:
    """Folded and prepacked filters are never stale."""
    plain, fused = copies(tiny())
    fuse(fused)
    x = images()
    context = {"no_grad": torch.no_grad, "grad": torch.enable_grad, "inference_mode": torch.inference_mode}[mode]
    with context():
        before = fused(x)
    for model in (plain, fused):
        _change(model, how)
    with context():
        expected, after = plain(x), fused(x)
    assert relative_error(before, expected) > 1e-3, "the change shows"
    assert relative_error(after, expected) < CLOSE


@pytest.mark.xfail(reason="a filter's memory is looked at in places: see fused_resnet/backends/derived.py", strict=True)
def test_one_filter_element_changed_behind_pytorchs_back() -> None:
    """A large filter: no write through .data or NumPy is missed, wherever it lands."""
    conv = nn.Conv2d(32, 32, 3, bias=False)
    net = nn.Sequential(conv, nn.BatchNorm2d(32), nn.ReLU()).eval()
    plain, fused = copies(net)
    fuse(fused)
    x = torch.randn(1, 32, 8, 8)
    with torch.no_grad():
        for place in ((0, 0, 0, 0), (31, 31, 2, 2), (3, 17, 1, 2), (11, 4, 0, 1)):
            fused(x)
            for model in (plain, fused):
                model[0].weight.data[place] += 10
            assert relative_error(fused(x), plain(x)) < CLOSE, place


def test_weights_shared_by_two_models_are_folded_for_each() -> None:
    """The same filters behind different BatchNorms."""
    conv = nn.Conv2d(3, 4, 3)
    nets = [randomise(nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU())).eval() for _ in range(2)]
    x = torch.randn(1, 3, 8, 8)
    expected = [net(x) for net in nets]
    for net in nets:
        fuse(net)
    for _ in range(2):
        for net, wanted in zip(nets, expected, strict=True):
            assert relative_error(net(x), wanted) < CLOSE


# ------------------------------------------------------------------------------------------- hooks


def test_hooks_on_the_model_and_on_blocks_fire_and_blocks_stay_fused() -> None:
    net = fuse(tiny())
    seen = []
    net.register_forward_hook(lambda m, args, out: seen.append("model"))
    net.basic.register_forward_pre_hook(lambda m, args: seen.append("before block"))
    net.basic.register_forward_hook(lambda m, args, out: out * 2)
    net.bottleneck.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    plain = unfuse(copy.deepcopy(net))
    x = images()
    out = net(x)
    out.sum().backward()
    assert seen == ["before block", "model", "backward"]
    assert launches(net, x) == TINY_LAUNCHES
    assert relative_error(out, plain(x)) < CLOSE


@pytest.mark.parametrize("place", ["basic.conv1", "basic.bn1", "basic.relu", "basic.downsample", "basic.downsample.1"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_a_hook_inside_a_block_fires_and_takes_only_that_block_out(place: str, kind: str) -> None:
    net = fuse(tiny())
    seen = []
    module = net.get_submodule(place)
    register = {
        "forward": lambda: module.register_forward_hook(lambda m, a, o: seen.append(1)),
        "pre": lambda: module.register_forward_pre_hook(lambda m, a: seen.append(1)),
        "backward": lambda: module.register_full_backward_hook(lambda m, gi, go: seen.append(1)),
    }
    x = images()
    expected = net(x)
    net.basic.relu.inplace = False  # PyTorch's backward hooks and in-place modules do not go together
    handle = register[kind]()
    with count_launches() as log:
        out = net(x)
    assert len(log) == TINY_LAUNCHES - 3
    out.sum().backward()
    assert seen
    assert relative_error(out, expected) < CLOSE
    alone = explain(net, show=False).left_alone
    assert alone[0].name == "basic" and "hook" in alone[0].note
    assert not any("call fuse" in row.note for row in alone), "it is fused: calling fuse again would be refused"
    handle.remove()
    assert launches(net, x) == TINY_LAUNCHES


def test_a_hook_that_changes_an_inner_result_is_obeyed() -> None:
    plain, fused = copies(tiny())
    fuse(fused)
    for model in (plain, fused):
        model.stem[0].register_forward_hook(lambda m, a, o: o + 1)
    assert relative_error(fused(x := images()), plain(x)) < CLOSE


def test_global_module_hooks_see_every_layer() -> None:
    """Profilers and FLOP counters hook all modules at once."""
    net = fuse(tiny())
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(type(m)))
    try:
        net(images())
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) == 7


def test_tensor_hooks_on_parameters_fire() -> None:
    net = fuse(tiny())
    seen = []
    net.basic.conv1.weight.register_hook(lambda g: seen.append(g.shape))
    net.basic.bn1.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    net(images()).sum().backward()
    assert sorted(seen, key=len) == [torch.Size([16]), torch.Size([16, 8, 3, 3])]


# ------------------------------------------------------------------------------------------- what is recognised


class Own(BasicBlock):
    """Somebody's block with another order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x


class Renamed(BasicBlock):
    """Somebody's block that keeps the forward."""


class OwnSequential(nn.Sequential):
    """A Sequential with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def test_a_subclass_with_its_own_forward_is_left_alone() -> None:
    plain, net = copies(nn.Sequential(Own(4, 4), Renamed(4, 4)).eval())
    fuse(net)
    assert type(net[0]) is Own and isinstance(net[1], Renamed)
    assert launches(net, torch.randn(1, 4, 6, 6)) == 2
    assert relative_error(net(x := torch.randn(1, 4, 6, 6)), plain(x)) < CLOSE
    note = explain(net, show=False).left_alone[0].note
    assert "Own overrides the forward of BasicBlock" in note


def test_a_forward_replaced_on_the_object_is_left_alone() -> None:
    block = BasicBlock(4, 4).eval()
    block.forward = lambda x: x * 3
    net = fuse(nn.Sequential(block, BasicBlock(4, 4).eval()))
    x = torch.rand(1, 4, 5, 5)
    assert torch.equal(net[0](x), 3 * x)
    assert any("forward was replaced" in row.note for row in explain(net, show=False).left_alone)


def _with(change: str) -> nn.Module:
    """A BasicBlock that cannot be fused, for one reason."""
    block = randomise(BasicBlock(4, 4)).eval()
    match change:
        case "group norm":
            block.bn1 = nn.GroupNorm(2, 4)
        case "weight norm":
            parametrizations.weight_norm(block.conv1)
        case "old weight norm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nn.utils.weight_norm(block.conv2)
        case "spectral norm":
            parametrizations.spectral_norm(block.conv2)
        case "pruned":
            prune.random_unstructured(block.conv2, "weight", 0.5)
        case "gelu":
            block.relu = nn.GELU()
        case "relu6":
            block.relu = nn.ReLU6()
        case "reflect":
            block.conv1 = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False)
        case "same, even kernel":
            block.conv1 = nn.Conv2d(4, 4, 4, padding="same", bias=False)
        case "subclass of a convolution":
            block.conv1.__class__ = type(
                "Standardised", (nn.Conv2d,), {"forward": lambda self, x: nn.Conv2d.forward(self, x) * 2}
            )
        case "no statistics":
            block.bn1 = nn.BatchNorm2d(4, track_running_stats=False)
        case "instance norm":
            block.bn2 = nn.InstanceNorm2d(4)
        case "average shortcut":
            block.downsample = nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
        case "shortcut with relu":
            block.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        case "shortcut of its own":
            block.downsample = nn.AvgPool2d(1)
    return block


REASONS = {
    "group norm": "GroupNorm", "weight norm": "Parametrized", "old weight norm": "hook", "spectral norm": "Parametrized",
    "pruned": "hook", "gelu": "GELU", "relu6": "ReLU6", "reflect": "reflect", "same, even kernel": "unequally",
    "subclass of a convolution": "Standardised", "no statistics": "running statistics", "instance norm": "InstanceNorm2d",
    "average shortcut": "shortcut", "shortcut with relu": "ReLU", "shortcut of its own": "AvgPool2d",
}  # fmt: skip


@pytest.mark.parametrize("change", REASONS)
def test_what_is_not_understood_runs_as_before_and_explain_says_why(change: str) -> None:
    torch.manual_seed(1)
    plain = nn.Sequential(_with(change), BasicBlock(4, 4).eval())
    torch.manual_seed(1)  # made twice: weight_norm and pruning cannot be copied
    fused = fuse(nn.Sequential(_with(change), BasicBlock(4, 4).eval()))
    x = torch.randn(2, 4, 7, 7)
    assert relative_error(fused(x), plain(x)) < CLOSE
    assert launches(fused, x) == (3 if change in ("average shortcut", "shortcut with relu") else 2), "a part may still be fused"
    notes = [row.note for row in explain(fused, show=False).left_alone if row.name.startswith("0")]
    assert notes and any(REASONS[change] in note for note in notes), notes


SEQUENTIALS = {
    "conv bn": (lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)], 1),
    "conv bn relu": (lambda: [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(True)], 1),
    "conv relu": (lambda: [nn.Conv2d(3, 4, 3), nn.ReLU()], 1),
    "conv bn relu pool": (lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 2),
    "vgg": (
        lambda: [
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(True), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2, 2),
            nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(2, 2),
        ],
        5,
    ),
    "conv first alone": (lambda: [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)], 2),
    "pool ceil mode": (lambda: [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)], None),
    "average pool": (lambda: [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2)], 1),
    "dropout between": (lambda: [nn.Conv2d(3, 4, 3), nn.Dropout(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.ReLU()], 1),
    "relu in front": (lambda: [nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid()], 1),
    "bn relu conv": (lambda: [nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)], 1),
    "nested": (lambda: [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())], 2),
    "same padding": (lambda: [nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU()], 1),
    "same padding, dilated": (lambda: [nn.Conv2d(3, 4, (3, 5), padding="same", dilation=2), nn.ReLU()], 1),
    "valid padding": (lambda: [nn.Conv2d(3, 4, 3, padding="valid"), nn.ReLU()], 1),
    "bias and bn": (lambda: [nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4), nn.ReLU()], 1),
    "frozen bn": (lambda: [nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.ReLU()], 1),
    "sync bn": (lambda: [nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.ReLU()], 1),
    "bn without affine": (lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU()], 1),
    "conv double relu": (lambda: [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ReLU()], 1),
    "grouped, strided": (lambda: [nn.Conv2d(3, 6, (3, 1), (2, 1), (1, 0), (2, 1), groups=3), nn.BatchNorm2d(6)], 1),
    "identity between": (lambda: [nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU()], None),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:fuse found no")
@pytest.mark.parametrize("name", SEQUENTIALS)
def test_sequentials(name: str) -> None:
    build, expected_launches = SEQUENTIALS[name]
    plain, fused = copies(randomise(nn.Sequential(*build())).eval())
    fuse(fused)
    x = torch.randn(2, 3, 13, 14)
    assert relative_error(fused(x), plain(x)) < CLOSE
    if expected_launches is not None:
        assert launches(fused, x) == expected_launches
    plain.train(), fused.train()
    if name not in ("sync bn", "dropout between"):
        assert relative_error(fused(x), plain(x)) < CLOSE, "in train mode"
    with torch.no_grad():
        first, second = x.clone(), x.clone()
        plain.eval()(first), fused.eval()(second)
        assert torch.equal(first, second), "writes to its input as eager does (an in-place ReLU in front), or not at all"


def test_a_module_used_twice_in_one_sequential() -> None:
    """One ReLU object for all is common; one convolution for all is rarer. Both run as often as they stand there."""
    relu, conv, bn = nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    plain, fused = copies(randomise(nn.Sequential(nn.Conv2d(3, 4, 3), relu, conv, bn, relu, conv, bn, relu)).eval())
    fuse(fused)
    x = torch.randn(2, 3, 9, 9)
    assert relative_error(fused(x), plain(x)) < CLOSE
    assert launches(fused, x) == 3 == explain(fused, show=False).launches
    plain(x).sum().backward(), fused(x).sum().backward()
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-5


def test_a_block_used_twice_in_a_model() -> None:
    block = randomise(BasicBlock(4, 4))
    plain, fused = copies(nn.Sequential(block, nn.Tanh(), block).eval())
    fuse(fused)
    assert fused[0] is fused[2]
    x = torch.randn(2, 4, 6, 6)
    assert relative_error(fused(x), plain(x)) < CLOSE
    assert launches(fused, x) == 4
    unfuse(fused)
    assert type(fused[0]) is BasicBlock


def test_sequential_methods_go_on_working() -> None:
    net = fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval())
    net.append(nn.Conv2d(4, 2, 1))
    assert len(net) == 4 and net(torch.randn(1, 3, 5, 5)).shape == (1, 2, 3, 3)
    assert net[:2](torch.randn(1, 3, 5, 5)).shape == (1, 4, 3, 3)
    del net[3]
    assert [type(m) for m in net] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


def test_a_sequential_with_its_own_forward_is_left_alone() -> None:
    net = OwnSequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.warns(UserWarning, match="unchanged"):
        fuse(net)
    assert type(net) is OwnSequential


def test_a_lone_convolution_in_a_sequential_is_left_alone() -> None:
    with pytest.warns(UserWarning, match="unchanged"):
        fuse(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_a_frozen_projection_and_a_bias() -> None:
    """Projection without BatchNorm, convolutions with biases."""
    block = BasicBlock(4, 6, 2, nn.Sequential(nn.Conv2d(4, 6, 1, 2)))
    block.conv1 = nn.Conv2d(4, 6, 3, 2, padding=1, bias=True)
    plain, fused = copies(randomise(block).eval())
    fuse(fused)
    x = torch.randn(1, 4, 7, 7)
    assert relative_error(fused(x), plain(x)) < CLOSE
    assert launches(fused, x) == 3


# ------------------------------------------------------------------------------------------- around it


def test_autocast_is_eagers() -> None:
    plain, fused = copies(tiny())
    fuse(fused)
    x = images()
    truth = plain.double()(x.double())
    plain.float()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            expected, actual = plain(x), fused(x)
            assert fused.basic(fused.stem(x)).dtype == plain.basic(plain.stem(x)).dtype
        assert actual.dtype == expected.dtype
        assert relative_error(actual, truth) <= 2 * relative_error(expected, truth)
        with torch.no_grad():
            for model in (plain, fused):
                model.stem[0].weight.add_(0.5)
            with torch.autocast("cpu", dtype):
                expected, after = plain(x), fused(x)
            assert relative_error(after, expected) < 0.05, "the low-precision copies of the filters follow"
            for model in (plain, fused):
                model.stem[0].weight.sub_(0.5)


def test_gradients_under_autocast() -> None:
    """As near to float64 as eager's, and in the parameters' own type."""
    plain, fused = copies(tiny())
    truth = copy.deepcopy(plain).double()
    fuse(fused)
    x = images(4)
    truth(x.double()).square().sum().backward()
    for model in (plain, fused):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.float().square().sum().backward()

    def errors(model: nn.Module) -> torch.Tensor:
        pairs = zip(model.parameters(), truth.parameters(), strict=True)
        return torch.stack([(a.grad.double() - b.grad).norm() / b.grad.norm().clamp_min(1e-12) for a, b in pairs])

    assert all(p.grad.dtype == torch.float32 for p in fused.parameters())
    assert errors(fused).nanmean() <= 2 * errors(plain).nanmean() + 0.01


def test_functional_call_uses_the_tensors_given() -> None:
    """functional_call puts other tensors in place of the parameters."""
    plain, fused = copies(tiny())
    fuse(fused)
    x = images()
    other = {key: value * 1.5 for key, value in plain.named_parameters()}
    fused(x)
    assert relative_error(torch.func.functional_call(fused, other, x), torch.func.functional_call(plain, other, x)) < CLOSE


def test_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    plain, fused = copies(tiny())
    fuse(fused)
    x = images().requires_grad_()
    plain(x).sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(fused, x, use_reentrant=False).sum().backward()
    assert relative_error(x.grad, expected) < 1e-4


def test_threads_share_a_model_while_its_weights_change() -> None:
    """Between barriers one thread changes the weights; every forward sees the state of its round, none crashes."""
    fused, workers, rounds = fuse(tiny()), 4, 6
    x = images(1)
    plain = unfuse(copy.deepcopy(fused))
    expected = []
    with torch.no_grad():
        for _ in range(rounds):
            expected.append(plain(x))
            plain.basic.conv1.weight.mul_(1.1)
            plain.bottleneck.bn2.running_mean.add_(0.3)
    barrier, errors = threading.Barrier(workers), []

    def work(index: int) -> None:
        try:
            for number in range(rounds):
                barrier.wait(60)
                with torch.no_grad():
                    for _ in range(3):
                        error = relative_error(fused(x), expected[number])
                        if error > CLOSE:
                            errors.append((number, error))
                barrier.wait(60)
                if index == 0:
                    with torch.no_grad():
                        fused.basic.conv1.weight.mul_(1.1)
                        fused.bottleneck.bn2.running_mean.add_(0.3)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_threads_without_barriers_see_the_old_or_the_new_weights() -> None:
    """Two sets of weights are switched as whole tensors while others run forwards: every result is of one of the two."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    weights = [nn.Parameter(torch.randn(8, 3, 3, 3)) for _ in range(2)]
    x = torch.randn(1, 3, 12, 12)
    expected = []
    with torch.no_grad():
        for weight in weights:
            net[0].weight = weight
            expected.append(net(x))
        fuse(net)
        stop, errors = threading.Event(), []

        def run() -> None:
            try:
                while not stop.is_set():
                    with torch.no_grad():
                        out = net(x)
                    if min(relative_error(out, wanted) for wanted in expected) > CLOSE:
                        errors.append("neither")
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(300):
            net[0].weight = weights[number % 2]
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors, errors[:3]


# ------------------------------------------------------------------------------------------- misuse


def test_misuse_is_refused() -> None:
    net = fuse(tiny())
    with pytest.raises(RuntimeError, match="already fused"):
        fuse(net)
    with pytest.raises(RuntimeError, match="already fused"):
        fuse(nn.Sequential(net, nn.Flatten()))
    with pytest.raises(RuntimeError, match="not fused"):
        unfuse(tiny())
    for function in (fuse, unfuse, explain):
        with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
            function("resnet50")
    with pytest.raises(ValueError, match="backend must be one of .*, got 'mps'"):
        fuse(tiny(), backend="mps")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    with pytest.raises(TypeError, match="scripted"):
        fuse(scripted)


def test_a_refused_fuse_changes_nothing() -> None:
    net = tiny()
    with pytest.raises(ValueError):
        fuse(net, backend="nonsense")
    assert launches(net, images()) == 0


def test_nothing_to_fuse_is_a_warning() -> None:
    for net in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Conv2d(3, 4, 3)):
        with pytest.warns(UserWarning, match="unchanged"):
            assert fuse(net) is net


def test_projection_helper_matches_torchvisions() -> None:
    """The helper of these tests is what torchvision builds."""
    assert str(projection(64, 128, 2)) == str(resnet18(num_classes=2).layer2[0].downsample)
