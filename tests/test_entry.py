"""Chains that begin with a BatchNorm: pre-activation blocks and dense layers, found by what a forward does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import CHAINS as ALL_CHAINS
from nets import chain_inputs, in_training, launches, plain_chain, randomise, train_step, twin
from tolerances import relative_error
from torch import Tensor, nn
from zoo import PreActivation, PreActivationNet

from fused_resnet import count_launches, explain, fuse, unfuse
from fused_resnet.compiling import fused_resnet as backend
from fused_resnet.functional import chain

CHAINS = {name: row for name, row in ALL_CHAINS.items() if name.startswith("entry")}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


#: Launches of the net's chains in one forward, eval and training: statistics, two convolutions, a projection.
NET = {False: 2 + 3 + 2, True: 3 + 4 + 3}


class DenseBlock(nn.Module):
    """Two dense layers as torchvision's: a list of features, a concatenation, BatchNorms with the activation in front."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(size) for size in (5, 8, 9, 8)])
        self.convs = nn.ModuleList([
            nn.Conv2d(5, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1, bias=False),
            nn.Conv2d(9, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1, bias=False),
        ])  # fmt: skip
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for i in (0, 2):
            y = self.convs[i](self.act(self.norms[i](torch.cat(features, 1))))
            features.append(self.convs[i + 1](self.act(self.norms[i + 1](y))))
        return torch.cat(features, 1)


def _transition() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Conv2d(5, 4, 1, bias=False), nn.AvgPool2d(2))


def _two_in_a_row() -> nn.Sequential:
    first = [nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3, padding=1, bias=False)]
    return nn.Sequential(*first, nn.BatchNorm2d(6, momentum=None), nn.GELU(), nn.Conv2d(6, 3, 1))


def _sequence() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(5), nn.ReLU(), nn.Conv1d(5, 4, 3, padding=1), nn.BatchNorm1d(4))


#: Model, shape of its input, launches in eval mode and in training.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "net": (PreActivationNet, (3, 3, 13, 11), NET[False], NET[True]),
    "dense": (DenseBlock, (3, 5, 7, 6), 4, 6),
    "transition": (_transition, (4, 5, 8, 6), 1, 2),
    "two in a row": (_two_in_a_row, (4, 5, 7, 9), 2, 3),
    "sequence": (_sequence, (4, 5, 17), 1, 3),
    "rows": (lambda: nn.Sequential(nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)), (9, 5), 1, 2),
}


def check(plain: nn.Module, fused: nn.Module, x: Tensor, limit: float) -> None:
    """All that a step gives, against float64; on models of this size no ReLU is on the other side in fp32."""
    truth = train_step(copy.deepcopy(plain).double(), x.double())
    made = train_step(fused, x.to(next(fused.parameters()).dtype))
    made = {key.replace("_orig_mod.", ""): value for key, value in made.items()}  # torch.compile's
    assert made.keys() == truth.keys()
    scale = max(float(value.norm()) for key, value in truth.items() if key.startswith("gradient"))
    for key, value in truth.items():
        assert float((made[key].double() - value.double()).norm()) <= limit * float(value.double().norm()) + 1e-9 * scale, key


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_it_did(name: str, training: bool) -> None:
    make, shape, *expected = MODELS[name]
    plain = randomise(make()).train(training)
    x = torch.randn(shape)
    assert launches(fuse(copy.deepcopy(plain), backend="cpu"), x) == expected[training]
    check(plain, fuse(copy.deepcopy(plain).double()), x, 1e-10)
    for executor in ("reference", "cpu"):
        check(plain, fuse(copy.deepcopy(plain), backend=executor), x, 3e-5)


@pytest.mark.parametrize("memory", ["default", pytest.param("low", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CHAINS)
def test_through_triton(name: str, memory: str) -> None:
    """Every launch of a step, with the batch's statistics, and with the entry's given ones."""
    for how in ("training", "entry frozen") if memory == "default" else ("training",):
        spec, h, w = CHAINS[name]
        spec = in_training(spec, *((2, 1) if how == "entry frozen" else ()), memory=memory)
        x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
        exact = twin([x, *parameters], torch.float64)
        expected = plain_chain(spec, exact[0], exact[1:])
        inputs = [tensor.detach().to(DEVICE).requires_grad_(tensor.requires_grad) for tensor in (x, *parameters)]
        with count_launches() as log:
            out = chain(inputs[0], inputs[1:], spec, "triton")
            dout = torch.randn_like(expected)
            out.backward(dout.float().to(DEVICE))
        assert {runner for runner, _ in log.launches} == {"triton"}
        assert relative_error(out.detach().cpu(), expected.detach()) < 1e-5
        expected.backward(dout)
        for slot, actual, wanted in zip(("x", *spec.parameter_slots), inputs, exact, strict=True):
            if wanted.grad is not None and wanted.grad.abs().max() > 1e-10:
                assert relative_error(actual.grad.cpu(), wanted.grad) < 3e-5, f"{how}: {slot}"
            elif wanted.is_floating_point():
                assert relative_error(actual.detach().cpu(), wanted.detach()) < 1e-5, f"{how}: {slot}"


class ReadElsewhere(PreActivation):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + out  # the shortcut starts behind the activation


class ReadTwice(PreActivation):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        return self.conv1(out) * self.conv2(out)


class NormReadTwice(PreActivation):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(x)
        return self.conv1(F.relu(out)) + out.mean()


class SameNorm(PreActivation):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn1(self.conv1(F.relu(self.bn1(x))))))


class MovedBetween(PreActivation):
    """A live BatchNorm called again between a chain's first and its last module."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        side = self.bn1(x * 2)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + side


class WrittenBetween(PreActivation):
    """The shortcut's tensor is written into behind the BatchNorm that reads it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        out = F.relu(self.bn1(x))
        x.add_(1)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + x


class Renamed(PreActivation):
    """The shortcut passes an Identity; the activation is in place; a size is asked for."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.keep = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        return self.conv2(F.relu(self.bn2(self.conv1(out)), inplace=True)) + self.keep(x)


#: Class -> launches in eval mode and in training.
BLOCKS = {
    PreActivation: (2, 3), Renamed: (2, 3), ReadElsewhere: (2, 2), ReadTwice: (0, 0), NormReadTwice: (0, 0),
    SameNorm: (2, 2), MovedBetween: (2, 2), WrittenBetween: (2, 2),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:fuse found no")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_only_what_the_chain_alone_reads(kind: type[PreActivation], training: bool) -> None:
    plain = randomise(kind(6, 6)).double().train(training)
    fused = fuse(copy.deepcopy(plain))
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64)
    # Eager has no backward of the first; in the second the chain's update of the statistics is one that autograd counts.
    if kind is WrittenBetween or (kind is SameNorm and training):
        with torch.no_grad():
            assert relative_error(fused(x), plain(x)) < 1e-12
            assert all(relative_error(a, b) < 1e-12 for a, b in zip(fused.buffers(), plain.buffers()))
    else:
        check(plain, fused, x, 1e-10)
    assert launches(fused, x) == BLOCKS[kind][training]


def test_explain_names_it() -> None:
    net = fuse(randomise(PreActivationNet()).eval())
    rows = {row.name: row for row in explain(net, show=False).rows}
    assert rows["blocks.1"].what == "bn1 + conv1 + conv2 + shortcut.0"
    assert "conv1: bn_relu + conv + affine + relu" in rows["blocks.1"].note
    assert (rows["blocks.1"].launches, rows["blocks.1"].eager_launches) == (3, 8)
    shared = explain(fuse(randomise(ReadElsewhere(6, 6)).eval()), show=False).left_alone
    assert [row.name for row in shared] == ["bn1"] and "to itself" in shared[0].note
    unfuse(net)
    assert type(net.blocks[0]) is PreActivation


def test_hooks_modes_and_frozen_norms() -> None:
    """The rules of every chain: a hook inside makes its modules run one by one; each BatchNorm's own mode counts."""
    plain = randomise(PreActivation(6, 6)).train()
    plain.bn1.eval(), plain.bn2.requires_grad_(False)
    plain.bn2.momentum = None
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(4, 6, 7, 5)
    check(plain, fused, x, 3e-5)
    assert launches(fused, x) == 2, "no statistics of x are wanted"
    seen: list[int] = []
    handle = fused.bn1.register_forward_hook(lambda *_: seen.append(1))
    assert launches(fused, x) == 0 and seen == [1]
    handle.remove()
    fused.bn1.train(), plain.bn1.train()
    plain.load_state_dict(fused.state_dict())
    check(plain, fused, x, 3e-5)
    assert launches(fused, x) == 3


@torch.no_grad()
def test_inputs_that_come_again_on_the_cpu() -> None:
    """What is prepared for them gives the same bits, and follows values that change; a projection shares the activation."""
    net, x = fuse(randomise(PreActivationNet()).eval(), backend="cpu"), torch.randn(3, 3, 13, 11)
    first = net(x)
    assert torch.equal(net(x), first) and torch.equal(net(x), first)
    net.blocks[0].bn1.running_var.mul_(2), net.blocks[1].bn1.weight.mul_(-1)
    changed = net(x)
    assert relative_error(changed, first) > 1e-2
    assert relative_error(changed, unfuse(copy.deepcopy(net))(x)) < 1e-5


def test_errors_and_empty_inputs_are_those_of_pytorch() -> None:
    plain = randomise(PreActivation(6, 6))
    fused = fuse(copy.deepcopy(plain))
    for x, mode in ((torch.randn(2, 5, 7, 7), False), (torch.randn(1, 6, 1, 1), True), (torch.randn(6, 7, 7), False)):
        with pytest.raises((RuntimeError, ValueError)) as eager:
            plain.train(mode)(x)
        with pytest.raises(type(eager.value)):
            fused.train(mode)(x)
    for executor in ("reference", "cpu", "triton"):
        assert fuse(copy.deepcopy(plain).eval(), backend=executor)(torch.randn(0, 6, 7, 7).to(DEVICE)).shape == (0, 6, 7, 7)


def test_under_autocast_wide_images_are_normalised_as_they_are() -> None:
    """A chain would round them first. Of autocast's type they run fused."""
    plain = randomise(_transition()).eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 5, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert launches(fused, x) == 0 and torch.equal(fused(x), plain(x))
        assert launches(fused, x.bfloat16()) == 1
        assert fused(x.bfloat16()).dtype == torch.bfloat16
        assert relative_error(fused(x.bfloat16()), plain(x.bfloat16())) < 0.02


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_in_the_graph_of_torch_compile(training: bool) -> None:
    torch._dynamo.reset()
    for name in ("net", "dense"):
        make, shape, *expected = MODELS[name]
        plain = randomise(make()).double().train(training)
        compiled = torch.compile(copy.deepcopy(plain), backend=backend, options={"inner": "aot_eager"}, fullgraph=True)
        x = torch.randn(shape, dtype=torch.float64)
        with count_launches() as log:
            compiled(x)
        assert len(log) == expected[training]
        if training:
            plain(x)
        check(plain, compiled, x, 1e-9)


@pytest.mark.parametrize("act", [F.silu, lambda z: F.leaky_relu(z, 0.3)], ids=["silu", "leaky_relu"])
def test_the_activation_is_the_one_in_the_graph(act: Callable[[Tensor], Tensor]) -> None:
    """Behind a convolution and in front of one."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(6)])
            self.convs = nn.ModuleList([nn.Conv2d(4, 6, 3), nn.Conv2d(6, 3, 1)])

        def forward(self, x: Tensor) -> Tensor:
            y = self.convs[0](act(self.norms[0](x)))
            return self.convs[1](act(self.norms[1](y)))

    torch._dynamo.reset()
    plain = randomise(Both()).double().eval()
    compiled = torch.compile(copy.deepcopy(plain), backend=backend, options={"inner": "aot_eager"}, fullgraph=True)
    x = 3 * torch.randn(2, 4, 7, 7, dtype=torch.float64)
    assert launches(compiled, x) == 2
    assert relative_error(compiled(x).detach(), plain(x).detach()) < 1e-12
