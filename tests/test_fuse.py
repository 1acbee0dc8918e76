"""fuse and unfuse: the model stays the same object with the same state, whatever is done to it afterwards."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from nets import TINY_LAUNCHES, TINY_TRAINING_LAUNCHES, TinyNet, copies, images, launches, projection, randomise, tiny
from tolerances import CLOSE, relative_error
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fused_resnet
from fused_resnet import explain, fuse, unfuse
from fused_resnet.fused import Fused
from fused_resnet.measure import Timing
from fused_resnet.swap import worth


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
        assert launches(fused, x) == (TINY_TRAINING_LAUNCHES if mode else TINY_LAUNCHES)
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


def test_misuse_is_refused() -> None:
    net = fuse(tiny())
    with pytest.raises(RuntimeError, match="already fused"):
        fuse(net)
    with pytest.raises(RuntimeError, match="already fused"):
        fuse(nn.Sequential(net, nn.Flatten()))
    with pytest.raises(RuntimeError, match="not fused"):
        unfuse(tiny())
    for function in (fuse, unfuse, explain):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
            function("resnet50")
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'mps'"):
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


class Clocked(nn.Module):
    """Pretends to take long where its convolution and BatchNorm are called one by one, or where they are not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.modes: list[bool] = []

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        self.modes.append(self.training or torch.is_grad_enabled())
        return self.body(x if y is None else x + y)


@pytest.mark.parametrize("ratios", [(0.96, 0.96), (0.9, 0.98), (1.2,)], ids=str)
def test_a_model_that_is_slower_on_an_example_is_left_alone(ratios: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are given; what is timed are the model as it was and the fused one, both with its tensors."""
    said, seen = list(ratios), []

    def interleaved(contenders, device, **options):
        outputs = {name: call() for name, call in contenders.items()}
        seen.append(outputs)
        ratio = said.pop(0)
        return {name: Timing((2.0 * (ratio if name == "plain" else 1.0),)) for name in contenders}

    monkeypatch.setattr(worth, "interleaved", interleaved)
    model = randomise(Clocked()).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(2, 2, 3, 9, 8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fuse(model, example=(x, y))
    slow = max(ratios) < 0.97
    assert [str(warning.message)[:37] for warning in told] == ["fused, the model is slower on the exa"] * slow
    assert isinstance(model.body, Fused) != slow
    assert not said and len(seen) == len(ratios)
    assert relative_error(seen[0]["fused"], seen[0]["plain"]) < CLOSE
    assert model.training and model.body[1].training and not any(model.modes), "eval mode, without gradients, and back again"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_is_timed_on_an_example() -> None:
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # who is faster is no matter here
        assert fuse(model, example=images()) is model
        with pytest.raises(RuntimeError, match="channels"):
            fuse(unfused := tiny(), example=torch.randn(1, 4, 9, 9))
    assert not any(isinstance(module, Fused) for module in unfused.modules()), "nothing is left half done"
