"""First do no harm: models that fuse leaves as they are, whole or in parts, compute what they did, and explain says why."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchvision
from nets import launches, randomise
from tolerances import CLOSE, relative_error
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from fused_resnet import count_launches, explain, fuse
from fused_resnet.swap.region import FusedRegion


class Layer(nn.Module):
    """A convolution, its BatchNorm and a ReLU."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def grads(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
def test_videos_are_not_touched(name: str) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models.video, name)(weights=None)
    kinds, values = [type(module) for module in model.modules()], list(model.parameters())
    with pytest.warns(UserWarning, match="unchanged"):
        fuse(model)
    assert [type(module) for module in model.modules()] == kinds
    assert all(a is b for a, b in zip(model.parameters(), values, strict=True))
    notes = {row.note for row in explain(model, show=False).rows}
    assert all("Conv3" in note or note.startswith("a BatchNorm3d is no") for note in notes), notes


#: torchvision's quantizable models -> images of a size that they take. (Its ShuffleNet fails in PyTorch 2.14, unfused too.)
QUANTIZABLE = {
    "resnet18": 32, "resnet50": 32, "resnext101_32x8d": 32, "googlenet": 64, "inception_v3": 96, "mobilenet_v2": 32,
    "mobilenet_v3_large": 32,
}  # fmt: skip
FAST = ("resnet18", "mobilenet_v2")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in QUANTIZABLE])
def test_quantizable_models_are_quantised_as_if_nothing_had_been(name: str) -> None:
    """By torch.ao in eager mode: the model's own fuse_model, observers, conversion."""
    engines = [engine for engine in ("x86", "fbgemm", "qnnpack") if engine in torch.backends.quantized.supported_engines]
    if not engines:
        pytest.skip("this PyTorch has no engine for quantised operators")
    more = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = randomise(getattr(torchvision.models.quantization, name)(weights=None, quantize=False, num_classes=5, **more))
    plain, fused = model.eval(), copy.deepcopy(model).eval()
    fuse(fused)
    assert [type(module) for module in fused.modules()] == [type(module) for module in plain.modules()]
    assert all("made to be quantised: its quant is a QuantStub" in row.note for row in explain(fused, show=False).rows)
    x, before = torch.randn(2, 3, QUANTIZABLE[name], QUANTIZABLE[name]), torch.backends.quantized.engine
    torch.backends.quantized.engine = engines[0]
    try:
        made = []
        for net in (plain, fused):
            net.fuse_model()
            net.qconfig = torch.ao.quantization.get_default_qconfig(engines[0])
            torch.ao.quantization.prepare(net, inplace=True)
            net(x)
            made.append(torch.ao.quantization.convert(net)(x))
    finally:
        torch.backends.quantized.engine = before
    assert torch.equal(made[0], made[1])


def test_a_quantizable_part_of_a_model_is_left_alone_and_the_rest_is_not() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Layer(), torch.ao.quantization.QuantWrapper(nn.Sequential(Layer(), BasicBlock(4, 4)))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) + x

    plain = randomise(Outer()).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 4, 6, 7)
    assert relative_error(fused(x), plain(x)) < CLOSE and launches(fused, x) == 1
    assert type(fused.second.module[0]) is Layer and type(fused.second.module[1]) is BasicBlock
    notes = {row.name: row.note for row in explain(fused, show=False).left_alone}
    assert len(notes) == 6 and set(notes.values()) == {"made to be quantised: its quant is a QuantStub"}, notes


def test_a_module_without_layers_and_an_empty_one() -> None:
    for model in (nn.Sequential(), nn.ModuleList(), nn.Module(), nn.Transformer(8, 2, 1, 1, 8)):
        kinds = [type(module) for module in model.modules()]
        with pytest.warns(UserWarning, match="unchanged"):
            assert fuse(model) is model
        assert [type(module) for module in model.modules()] == kinds


# ------------------------------------------------------------------------------------------------ parts


def test_a_scripted_part_stays_scripted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(randomise(Layer()).eval())
    plain = nn.Sequential(randomise(Layer()), scripted, randomise(BasicBlock(4, 4))).eval()
    fused = nn.Sequential(copy.deepcopy(plain[0]), scripted, copy.deepcopy(plain[2])).eval()
    x = torch.randn(2, 4, 6, 7)
    assert relative_error(fuse(fused)(x), plain(x)) < CLOSE
    assert fused[1] is scripted and isinstance(scripted, torch.jit.ScriptModule) and launches(fused, x) == 3
    for model in (fused, scripted):
        assert "it is scripted or traced: its code is fixed" in str(explain(model, show=False))


class WrittenBehind(nn.Module):
    """What an activation made is written over: Darknet's block."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2), copy.deepcopy(activation))
        self.conv, self.bn, self.activation = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), activation

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn(self.conv(self.first(x))))
        out += x
        return out


@pytest.mark.parametrize("statistics", ["batch", "given"])
@pytest.mark.parametrize("memory", ["default", "less", "low"])
@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.1), nn.ReLU6(), nn.SiLU()], ids=str)
def test_the_output_of_an_activation_that_is_written_over(activation: nn.Module, memory: str, statistics: str) -> None:
    """PyTorch takes the gradient of these at their input, unless they are in place."""
    plain = nn.Sequential(*(randomise(WrittenBehind(copy.deepcopy(activation))) for _ in range(2))).double()
    plain.train(statistics == "batch")
    x = 3 * torch.randn(3, 4, 6, 7, dtype=torch.float64)
    wanted = grads(plain, x)
    for backend in ("cpu", "reference"):
        fused = fuse(copy.deepcopy(plain), backend=backend, memory=memory)
        with count_launches() as log:
            found = grads(fused, x)
        assert len(log) > 0 and wanted.keys() == found.keys()
        for key, gradient in wanted.items():
            assert relative_error(found[key], gradient) < 1e-9, key


class CalledBothWays(nn.Module):
    """A BatchNorm that runs by itself first, then in a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False)
        self.second, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.second(torch.relu(self.bn(self.first(x))))))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batchnorm_that_runs_by_itself_first(momentum: float | None) -> None:
    """It has kept its running statistics for the backward, and PyTorch would say that they were changed."""
    plain = randomise(CalledBothWays()).double().train()
    plain.bn.momentum = momentum
    for backend in ("cpu", "reference"):
        fused, eager = fuse(copy.deepcopy(plain), backend=backend), copy.deepcopy(plain)
        x = torch.randn(3, 4, 6, 7, dtype=torch.float64)
        wanted = grads(eager, x)
        with count_launches() as log:
            found = grads(fused, x)
        assert len(log) > 0 and all(relative_error(found[key], gradient) < 1e-9 for key, gradient in wanted.items())
        for (key, a), (_, b) in zip(eager.named_buffers(), fused.named_buffers(), strict=True):
            assert relative_error(b.double(), a.double()) < 1e-9, key


class TiedFilters(nn.Module):
    """Two layers with the same filters, each with its own BatchNorm; and a third with the filters of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.block = Layer(), Layer(), BasicBlock(4, 4)
        self.second.conv.weight = self.first.conv.weight
        self.block.conv2.weight = self.block.conv1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.second(self.first(x)))


class TiedNorms(nn.Module):
    """One BatchNorm behind two convolutions, one of them in a child that is fused by itself; an affine shared by two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Layer(), Layer(), Layer()
        self.second.bn = self.first.bn
        self.third.bn.weight = self.first.bn.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


class Recurrent(nn.Module):
    """One block, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = BasicBlock(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x


class Shared(nn.Module):
    """Two branches and a sum, whose convolution, or BatchNorm, may be the same module in both."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        flat = shared == "linear"
        self.first, self.second, self.third = (
            nn.Linear(4, 4, bias=False) if flat else nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3)
        )
        self.one, self.two, self.three = ((nn.BatchNorm1d if flat else nn.BatchNorm2d)(4) for _ in range(3))
        self.shared = shared
        self.other = self.one if shared == "norm" else self.first

    def forward(self, x: Tensor) -> Tensor:
        if self.shared == "norm":
            return torch.relu(self.one(self.first(x)) + self.other(self.second(x)))
        if self.shared == "first of two":
            return torch.relu(self.two(self.second(torch.relu(self.one(self.first(x))))) + self.three(self.other(x)))
        if self.shared == "second of two":
            return torch.relu(self.two(self.first(torch.relu(self.one(self.second(x))))) + self.three(self.other(x)))
        if self.shared == "bare":
            return self.other(x) + self.two(self.first(x))
        return torch.relu(self.one(self.first(x)) + self.two(self.other(x)))


SHARED = ("norm", "first of two", "second of two", "bare", "filters", "linear")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", [TiedFilters, TiedNorms, Recurrent, *(partial(Shared, shared) for shared in SHARED)])
def test_modules_and_weights_that_are_used_twice(kind: Callable[[], nn.Module], training: bool) -> None:
    """Gradients of all uses add up, statistics move on once a use, and a step of the optimizer is seen by all of them."""
    plain = randomise(kind()).double().train(training)
    fused = fuse(copy.deepcopy(plain), backend="cpu")  # (rows would run unfused where that is faster)
    assert len(list(fused.parameters())) == len(list(plain.parameters())), "still shared"
    flat = getattr(plain, "shared", "") == "linear"
    x = torch.randn(9, 4, dtype=torch.float64) if flat else torch.randn(3, 4, 6, 7, dtype=torch.float64)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (plain, fused)]
    for _ in range(2):
        wanted = grads(plain, x)
        with count_launches() as log:
            found = grads(fused, x)
        assert wanted.keys() == found.keys() and len(log) > 0
        for key, gradient in wanted.items():
            assert relative_error(found[key], gradient) < 1e-9, key
        for optimizer in optimizers:
            optimizer.step()
    for (key, a), (_, b) in zip(plain.named_buffers(), fused.named_buffers(), strict=True):
        assert relative_error(b.double(), a.double()) < 1e-9, key


def _names_of_ours() -> list[str]:
    return sorted(name for name in {*dir(FusedRegion), "fused_region"} - set(dir(nn.Module)) if not name.startswith("__"))


class Named(nn.Module):
    """A chain beside something of any name, which the forward reads."""

    def __init__(self, name: str, value: object) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        setattr(self, name, value)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        value = getattr(self, self.name)
        y = torch.relu(self.bn(self.conv(x)))
        return value(y) if isinstance(value, nn.Module) else y * value


@pytest.mark.parametrize("kind", ["attribute", "parameter", "child"])
@pytest.mark.parametrize("name", _names_of_ours())
def test_a_module_that_has_a_name_of_ours(name: str, kind: str) -> None:
    """It would be found in place of ours, or ours in its place; and ``fuse`` would have written over some."""
    value = {"attribute": 3, "parameter": nn.Parameter(torch.randn(1)), "child": nn.Conv2d(4, 4, 1)}[kind]
    net = randomise(Named(name, value))
    keys, x = list(net.state_dict()), torch.randn(2, 4, 6, 5)
    for mode in (True, False):
        expected = copy.deepcopy(net).train(mode)(x)
        fused = fuse(copy.deepcopy(net).train(mode))
        assert torch.equal(fused(x), expected) and type(fused) is Named and list(fused.state_dict()) == keys
        assert f"it has {name!r}" in str(explain(fused, show=False))


def test_a_block_of_a_class_we_know_that_has_a_name_of_ours() -> None:

    class Block(BasicBlock):
        small = True

    class Network(torchvision.models.ResNet):
        def run(self, x: Tensor) -> Tensor:
            return self.forward(x)

    net = randomise(Network(Block, [1, 1, 1, 1])).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = net.run(x)
    told = str(explain(fuse(net), show=False))
    assert "it has 'small'" in told and "it has 'run'" in told
    assert type(net) is Network and torch.allclose(net.run(x), expected, rtol=1e-4, atol=1e-5)
