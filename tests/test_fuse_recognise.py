"""What fuse recognises, what it leaves alone and why: blocks of others, Sequentials of every order, shared modules."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from nets import copies, launches, randomise, train_step
from tolerances import CLOSE, relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

from fused_resnet import count_launches, explain, fuse, unfuse
from fused_resnet.compiling import fused_resnet as backend


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


def test_a_subclass_with_its_own_forward_is_fused_by_what_it_does() -> None:
    """Own has no ReLU behind the sum: it is not known by its base class."""
    plain, net = copies(randomise(nn.Sequential(Own(4, 4), Renamed(4, 4))).eval())
    fuse(net)
    assert isinstance(net[0], Own) and isinstance(net[1], Renamed)
    assert launches(net, torch.randn(1, 4, 6, 6)) == 4
    assert relative_error(net(x := torch.randn(1, 4, 6, 6)), plain(x)) < CLOSE
    assert "affine_add;" not in explain(net, show=False).rows[0].note and (net[0](x) < 0).any()
    assert type(unfuse(net)[0]) is Own


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
        case "mish":
            block.relu = nn.Mish()
        case "elu":
            block.relu = nn.ELU()
        case "reflect":
            block.conv1 = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False)
        case "same, even kernel":
            block.conv1 = nn.Conv2d(4, 4, 4, padding="same", bias=False)
        case "subclass of a convolution":
            block.conv1.__class__ = type(
                "Standardised", (nn.Conv2d,), {"forward": lambda self, x: nn.Conv2d.forward(self, x) * 2}
            )
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
    "pruned": "hook", "mish": "", "elu": "", "reflect": "reflect", "same, even kernel": "unequally",
    "subclass of a convolution": "Standardised", "instance norm": "InstanceNorm2d",
    "average shortcut": "", "shortcut with relu": "", "shortcut of its own": "",
}  # fmt: skip
#: Launches of the changed block: the chains around what is not understood.
AROUND = {
    "group norm": 1, "weight norm": 1, "old weight norm": 0, "spectral norm": 1, "pruned": 0, "mish": 2, "elu": 2,
    "reflect": 1, "same, even kernel": 1, "subclass of a convolution": 1, "instance norm": 2, "average shortcut": 3,
    "shortcut with relu": 3, "shortcut of its own": 2,
}  # fmt: skip


@pytest.mark.parametrize("change", REASONS)
def test_what_is_not_understood_runs_as_before_and_explain_says_why(change: str) -> None:
    torch.manual_seed(1)
    plain = nn.Sequential(_with(change), BasicBlock(4, 4).eval())
    torch.manual_seed(1)  # made twice: weight_norm and pruning cannot be copied
    fused = fuse(nn.Sequential(_with(change), BasicBlock(4, 4).eval()))
    x = torch.randn(2, 4, 7, 7)
    assert relative_error(fused(x), plain(x)) < CLOSE
    assert launches(fused, x) == 2 + AROUND[change]
    notes = [row.note for row in explain(fused, show=False).left_alone if row.name.startswith("0")]
    assert any(REASONS[change] in note for note in notes) if REASONS[change] else not notes, notes


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
    "pool ceil mode": (lambda: [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)], 1),
    "average pool": (lambda: [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2)], 1),
    "dropout between": (lambda: [nn.Conv2d(3, 4, 3), nn.Dropout(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.ReLU()], 2),
    "bias alone": (lambda: [nn.Conv2d(3, 4, 3), nn.Sigmoid()], 1),
    "behind a global pooling": (
        lambda: [nn.Conv2d(3, 4, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)],
        0,
    ),
    "relu in front": (lambda: [nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid()], 1),
    "bn relu conv": (lambda: [nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)], 1),
    "nested": (
        lambda: [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())],
        2,
    ),
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
        for (key, a), (_, b) in zip(fused.named_buffers(), plain.named_buffers(), strict=True):
            assert relative_error(a, b) < CLOSE, key
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


def test_a_sequential_with_its_own_forward_is_fused_by_what_it_does() -> None:
    net = OwnSequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)
    assert launches(fuse(net), x) == 1 and isinstance(net, OwnSequential)
    assert relative_error(net(x), expected) < CLOSE


def test_a_lone_convolution_in_a_sequential_is_left_alone_unless_it_has_a_bias() -> None:
    with pytest.warns(UserWarning, match="unchanged"):
        fuse(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)))
    assert launches(fuse(nn.Sequential(nn.Conv2d(3, 4, 3))), torch.randn(1, 3, 5, 5)) == 1


def test_a_frozen_projection_and_a_bias() -> None:
    """Projection without BatchNorm, convolutions with biases."""
    block = BasicBlock(4, 6, 2, nn.Sequential(nn.Conv2d(4, 6, 1, 2)))
    block.conv1 = nn.Conv2d(4, 6, 3, 2, padding=1, bias=True)
    plain, fused = copies(randomise(block).eval())
    fuse(fused)
    x = torch.randn(1, 4, 7, 7)
    assert relative_error(fused(x), plain(x)) < CLOSE
    assert launches(fused, x) == 3


class _Conv(nn.Conv2d):
    """Its own construction, and nothing else."""

    def __init__(self, filters: int) -> None:
        super().__init__(4, filters, 3, padding=1, bias=False)
        self.note = "mine"


class _Norm(nn.BatchNorm2d):
    pass


class _Twice(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(x, weight, bias)


class _Mixed:
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)  # type: ignore[misc]


class _MixedConv(_Mixed, nn.Conv2d):
    pass


class _OneStride(nn.Conv2d):
    @property  # type: ignore[override]
    def stride(self) -> tuple[int, int]:
        return (1, 1)

    @stride.setter
    def stride(self, value: object) -> None:
        pass


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("where", ["sequential", "forward"])
@pytest.mark.parametrize("kind", [_Conv, _Twice, _MixedConv, _OneStride])
def test_subclasses_of_layers(kind: type[nn.Conv2d], where: str, training: bool) -> None:
    """They are what they are derived from if they add nothing but their construction, else what their forward calls."""

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self[1](self[0](x)) + x)

    conv = _Conv(4) if kind is _Conv else kind(4, 4, 3, padding=1, stride=1)
    plain = randomise((nn.Sequential if where == "sequential" else Net)(conv, _Norm(4), nn.ReLU())).train(training)
    x = torch.randn(3, 4, 6, 7)
    wanted = copy.deepcopy(plain)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = fuse(copy.deepcopy(plain))
    with count_launches() as log:
        assert relative_error(fused(x), wanted) < CLOSE
    assert len(log) > 0
    left = [row.what for row in explain(fused, show=False).left_alone]
    assert left == ([] if kind in (_Conv, _OneStride) else ["_Norm"]), "what is doubled in between is no chain"


class Written(nn.Module):
    """A chain with its pooling, and what is done to the result."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        self.pool, self.act, self.how = nn.MaxPool2d(2), nn.ReLU6(inplace=True), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn(self.conv(x))))
        if self.how == "sum":
            x += 1
        elif self.how == "module":
            x = self.act(x)
        elif self.how == "view":
            x = x.flatten(1)
            x.mul_(2)
        else:
            x = x * 2
        return x.flatten(1)


def in_a_row(act: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Identity(), act, nn.Flatten()
    )


#: Modules, and whether the pooling is in the chain.
WRITTEN: dict[str, tuple[nn.Module, bool]] = {
    **{how: (Written(how), False) for how in ("sum", "module", "view")},
    "nothing": (Written("nothing"), True),
    "in a row": (in_a_row(nn.ReLU6(inplace=True)), False),
    "in a row, not written": (in_a_row(nn.ReLU6()), True),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["fuse", "compile"])
@pytest.mark.parametrize("how", WRITTEN)
def test_what_is_written_into_behind_a_pooling(how: str, compiled: bool) -> None:
    """The chain's backward would read it, eager's does not: the pooling stays by itself where that is seen."""
    plain, pooled = copy.deepcopy(WRITTEN[how])
    plain = randomise(plain).double().train()
    x = torch.randn(2, 3, 10, 9).double()
    truth = train_step(copy.deepcopy(plain), x)
    fused: nn.Module = copy.deepcopy(plain)
    torch._dynamo.reset()
    fused = torch.compile(fused, backend=backend, options={"inner": "aot_eager"}) if compiled else fuse(fused)
    with count_launches() as log:
        fused(x)
    assert [launch.kind for _, launch in log.launches] == ["conv", "max_pool" if pooled else "bn_add_relu"]
    getattr(fused, "_orig_mod", fused).load_state_dict(plain.state_dict())
    found = {key.replace("_orig_mod.", ""): value for key, value in train_step(fused, x).items()}
    for what, expected in truth.items():
        assert relative_error(found[what], expected) < 1e-10, what
