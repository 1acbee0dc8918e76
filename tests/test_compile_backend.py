"""torch.compile(model, backend="fused_resnet"): the same patterns in Dynamo's graph."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import projection, randomise
from tolerances import relative_error
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

from fused_resnet import compiling, count_launches, explain, fuse
from fused_resnet.compiling import fused_resnet as backend

if sys.version_info >= (3, 11):
    import tomllib


class Net(nn.Module):
    """A stem, blocks with and without a projection, an activation nobody knows, and a view that counts on its layout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 8, 2, projection(4, 8, 2)))
        self.last = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.last(x).view(x.shape[0], -1)


#: Chains of Net in launches of one forward: eval and training.
LAUNCHES = {False: 1 + 2 + 3 + 1, True: 2 + 3 + 4 + 2}


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_it_computes_what_eager_does(training: bool, inner: str) -> None:
    torch._dynamo.reset()
    plain = randomise(Net()).train(training)
    same = copy.deepcopy(plain)
    compiled = torch.compile(same, backend=backend, options={"inner": inner}, fullgraph=True)
    for images in (2, 3, 5):  # from the second on the batch is dynamic
        x = torch.randn(images, 3, 13, 14)
        first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected = plain(first)
        with count_launches() as log:
            actual = compiled(second)
        assert relative_error(actual, expected) < 1e-5 and len(log) == LAUNCHES[training]
        weights = torch.randn_like(expected)
        plain.zero_grad(), same.zero_grad()
        (expected * weights).sum().backward(), (actual * weights).sum().backward()
        assert relative_error(second.grad, first.grad) < 1e-4
        for (key, a), (_, b) in zip(plain.named_parameters(), same.named_parameters()):
            assert float((b.grad - a.grad).norm()) < 1e-3 * float(a.grad.norm()) + 1e-4, key  # a bias in front of BatchNorm: 0
        for (key, a), (_, b) in zip(plain.named_buffers(), same.named_buffers()):
            assert relative_error(b.double(), a.double()) < 1e-5, key


class Viewed(nn.Module):
    """A chain, something that hands its layout on, and a view that counts on eager's."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.between = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(F.relu(self.bn(self.conv(x))))
        return x.view(x.shape[0], -1)


BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "nothing": (lambda x: x, True),
    "mul": (lambda x: x * 2.0, True),
    "pool and add": (lambda x: F.max_pool2d(x, 2) + 1.0, True),
    "one pixel": (lambda x: F.adaptive_avg_pool2d(x, 1), False),
    "flatten": (lambda x: torch.flatten(x, 1), False),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_a_view_behind_what_hands_the_layout_on(between: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of contiguous tensors, as in eager PyTorch; a copy is made only where somebody counts on that."""
    torch._dynamo.reset()
    function, copied = BETWEEN[between]
    plain = randomise(Viewed(function)).eval()
    x = torch.randn(2, 3, 9, 8)
    graphs: list[torch.fx.GraphModule] = []
    rewrite = compiling.fuse_graph
    monkeypatch.setattr(compiling, "fuse_graph", lambda gm: graphs.append(gm) or rewrite(gm))
    with torch.no_grad():
        actual = torch.compile(copy.deepcopy(plain), backend=backend, options={"inner": "aot_eager"}, fullgraph=True)(x)
    assert relative_error(actual, plain(x)) < 1e-5
    calls = [node for node in graphs[0].graph.nodes if getattr(node.target, "__name__", "") == "run_chain"]
    assert [call.args[3] for call in calls] == [copied]


def test_training_without_images_is_left_to_pytorch() -> None:
    """Which makes no statistics of them, and no error."""
    torch._dynamo.reset()
    plain = randomise(nn.Sequential(Net().stem, *Net().blocks)).train()
    compiled = torch.compile(copy.deepcopy(plain), backend=backend, options={"inner": "aot_eager"}, fullgraph=True)
    before = copy.deepcopy(compiled.state_dict())
    x = torch.randn(0, 3, 12, 12)
    out = compiled(x)
    assert out.shape == plain(x).shape
    out.sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in compiled.state_dict().items() if "running" in key)


def test_without_gradients_and_under_autocast() -> None:
    torch._dynamo.reset()
    plain = randomise(Net()).eval()
    compiled = torch.compile(copy.deepcopy(plain), backend=backend, options={"inner": "aot_eager"}, fullgraph=True)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert relative_error(compiled(x), plain(x)) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = plain(x), compiled(x)
    assert actual.dtype == expected.dtype and relative_error(actual, expected) < 0.05


def test_a_sum_that_broadcasts_and_an_input_that_is_written() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            y = self.bn(self.conv(x))
            x.mul_(3)
            return y + x + (self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True))

    torch._dynamo.reset()
    plain = randomise(Odd()).eval()
    compiled = torch.compile(copy.deepcopy(plain), backend=backend, options={"inner": "aot_eager"})
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        assert relative_error(compiled(x), plain(x)) < 1e-5


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_sums_with_what_is_not_the_input(training: bool) -> None:
    """A pyramid's sum, a shortcut through an average pooling, a pre-activation block; and sums that are other ones."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1, bias=index == 3) for index in range(5)])
            self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(5)])
            self.scale = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            layers = [lambda x, i=i: self.norms[i](self.convs[i](x)) for i in range(5)]
            x = torch.relu(layers[0](x) + layers[1](F.avg_pool2d(x, 3, 1, 1)))
            x = self.convs[2](torch.relu(self.norms[2](x))) + x
            x = self.convs[3](x) + F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:])
            side = x * 2
            side += layers[4](x)
            return side + layers[4](side) + self.scale

    torch._dynamo.reset()
    plain = randomise(Sums()).double().train(training)
    same = copy.deepcopy(plain)
    compiled = torch.compile(same, backend=backend, options={"inner": "aot_eager"}, fullgraph=True)
    for images in (2, 3, 5):
        x = torch.randn(images, 4, 6, 8, dtype=torch.float64)
        first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected = plain(first)
        with count_launches() as log:
            actual = compiled(second)
        assert relative_error(actual, expected) < 1e-11 and len(log) == (10 if training else 6)
        weights = torch.randn_like(expected)
        plain.zero_grad(), same.zero_grad()
        (expected * weights).sum().backward(), (actual * weights).sum().backward()
        assert relative_error(second.grad, first.grad) < 1e-10
        for (key, a), (_, b) in zip(plain.named_parameters(), same.named_parameters()):
            assert (a.grad is None) == (b.grad is None) == key.startswith("norms.3"), key
            assert a.grad is None or relative_error(b.grad, a.grad) < 1e-9, key
        for (key, a), (_, b) in zip(plain.named_buffers(), same.named_buffers()):
            assert relative_error(b.double(), a.double()) < 1e-12, key


def test_a_batch_norm_that_is_called_in_between() -> None:
    """Its statistics move in the order of the calls, so the first call is in no chain that runs at the sum."""

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn(self.first(x)) + self.bn(self.second(x + 1)).flip(3))

    torch._dynamo.reset()
    plain = randomise(Between()).double().train()
    same = copy.deepcopy(plain)
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    actual = torch.compile(same, backend=backend, options={"inner": "aot_eager"})(x)
    assert relative_error(actual, plain(x)) < 1e-11
    assert relative_error(same.bn.running_mean, plain.bn.running_mean) < 1e-12
    assert relative_error(same.bn.running_var, plain.bn.running_var) < 1e-12


class CalledTwice(nn.Module):
    """A BatchNorm behind the convolutions of both branches of a sum, or first by itself and then behind a convolution."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3))
        self.bn, self.other, self.where = nn.BatchNorm2d(4), nn.BatchNorm2d(4), where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "by itself":
            return self.second(torch.relu(self.bn(self.first(torch.relu(self.bn(x))))))
        main = self.bn(self.first(x))
        if self.where == "of two":
            main = self.other(self.third(torch.relu(main)))
        return torch.relu(main + self.bn(self.second(x)))


@pytest.mark.parametrize(("where", "launches"), [("sum", 4), ("of two", 5), ("by itself", 2)])
def test_a_batch_norm_that_is_called_twice(where: str, launches: int) -> None:
    torch._dynamo.reset()
    plain = randomise(CalledTwice(where)).double().train()
    same = copy.deepcopy(plain)
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    with count_launches() as log:
        actual = torch.compile(same, backend=backend, options={"inner": "aot_eager"})(x)
    expected = plain(x)
    assert relative_error(actual, expected) < 1e-11 and len(log) == launches
    for (key, a), (_, b) in zip(plain.named_buffers(), same.named_buffers(), strict=True):
        assert relative_error(b.double(), a.double()) < 1e-12, key
    actual.square().sum().backward(), expected.square().sum().backward()
    for (key, p), (_, q) in zip(plain.named_parameters(), same.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        assert p.grad is None or float((p.grad - q.grad).norm()) < 1e-9 * float(p.grad.norm()) + 1e-9, key


class Layer(nn.Module):
    """A convolution and its BatchNorm, for forwards that torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.calls = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), 0

    def layer(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class OnData(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if y.mean() > 0 else -y


class Counts(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


class Makes(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * torch.tensor([2.0])


class AnyNumber(Layer):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(inputs[0])


@pytest.mark.filterwarnings("ignore:fuse found no")
@pytest.mark.parametrize("kind", [OnData, Counts, Makes, AnyNumber, Net], ids=lambda kind: kind.__name__)
def test_explain_names_it_where_torch_fx_sees_less(kind: type[nn.Module]) -> None:
    plain = randomise(kind()).eval()
    told = explain(fuse(copy.deepcopy(plain)), show=False)
    named = 'torch.compile(model, backend="fused_resnet") may find chains' in str(told)
    assert named == (kind is not Net)
    if kind is Net:
        return
    assert told.left_alone == told.rows, "nothing is fused"
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(plain), backend=backend, options={"inner": "aot_eager"})
    x = torch.randn(2, 4, 9, 8)
    with torch.no_grad(), count_launches() as log:
        actual = compiled(x)
    assert len(log) == 1 and relative_error(actual, plain(x)) < 1e-5


class EarlyReshape(FrozenBatchNorm2d):
    """As in other packages: vectors until the last."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class Learned(EarlyReshape):
    """Given statistics, but weights and biases that are trained."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(channels, eps)
        weight, bias = self.weight, self.bias
        del self.weight, self.bias
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)


class Stem(nn.Module):
    """A frozen stem with its pooling, and a frozen block."""

    def __init__(self, kind: Callable[[int], nn.Module], pool: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.pool = nn.Conv2d(3, 6, 3, 2, bias=False), kind(6), pool
        self.block = BasicBlock(6, 6, norm_layer=kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.pool(F.relu(self.bn(self.conv(x)))))


def compare(plain: nn.Module, x: Tensor, launches: int) -> None:
    """Outputs, and all gradients, of one call behind the backend against float64 eager; launches of the forward."""
    torch._dynamo.reset()
    exact, same = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    compiled = torch.compile(same, backend=backend, options={"inner": "aot_eager"}, fullgraph=True)
    first, second = x.double().requires_grad_(), x.clone().requires_grad_()
    expected = exact(first)
    with count_launches() as log:
        actual = compiled(second)
    assert len(log) == launches and relative_error(actual, expected) < 1e-5
    weights = torch.randn_like(actual)
    (expected * weights.double()).sum().backward(), (actual * weights).sum().backward()
    assert relative_error(second.grad, first.grad) < 1e-4
    for (key, a), (_, b) in zip(exact.named_parameters(), same.named_parameters(), strict=True):
        assert relative_error(b.grad, a.grad) < 1e-4, key
    for (key, a), (_, b) in zip(exact.named_buffers(), same.named_buffers(), strict=True):
        assert relative_error(b.double(), a.double()) < 1e-5, key


#: Launches of Stem's forward: with a frozen BatchNorm the stem is a convolution and a pooling; a block of two layers is two.
FROZEN_LAUNCHES = 2 + 2
POOLS = {
    "3x3": nn.MaxPool2d(3, 2, 1),
    "2x2": nn.MaxPool2d(2),
    "oblong": nn.MaxPool2d((3, 2), (1, 2), (1, 0)),
    "dilated": nn.MaxPool2d(2, 1, dilation=2),
}


@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, EarlyReshape, Learned], ids=lambda kind: kind.__name__)
def test_frozen_batch_norms_that_are_arithmetic(kind: type[nn.Module]) -> None:
    compare(randomise(Stem(partial(kind, eps=0.05), POOLS["3x3"])), torch.randn(3, 3, 21, 18), FROZEN_LAUNCHES)


@pytest.mark.parametrize(
    ("place", "name", "options"),
    [
        ("timm.layers", "FrozenBatchNormAct2d", {"apply_act": False}),
        ("transformers.models.detr.modeling_detr", "DetrFrozenBatchNorm2d", {}),
    ],
    ids=["timm", "transformers"],
)
def test_frozen_batch_norms_of_packages(place: str, name: str, options: dict[str, bool]) -> None:
    pytest.importorskip(place.split(".")[0])
    kind = partial(getattr(import_module(place), name), **options)
    compare(randomise(Stem(kind, POOLS["3x3"])), torch.randn(3, 3, 21, 18), FROZEN_LAUNCHES)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_pooling_behind_a_chain(training: bool, pool: str) -> None:
    compare(
        randomise(Stem(nn.BatchNorm2d, POOLS[pool])).train(training), torch.randn(3, 3, 21, 18), 3 + 2 if training else 2 + 2
    )


def test_pooling_of_sequences() -> None:
    kind = nn.Sequential(nn.Conv1d(3, 6, 3, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(3, 2, 1))
    compare(randomise(kind), torch.randn(4, 3, 17), 2)  # the pooling applies the BatchNorm


class Refused(FrozenBatchNorm2d):
    """Not what it looks like: what keeps each from being a BatchNorm is ``how``."""

    how = ""

    def forward(self, x: Tensor) -> Tensor:
        scale, mean = self.weight * (self.running_var + self.eps).rsqrt(), self.running_mean
        if self.how == "another scale":
            shift = self.bias - mean * (self.weight * 2)
        elif self.how == "the shift from the mean":
            shift = mean * scale - self.bias
        elif self.how == "across the image":
            return x * scale[: x.shape[3]] + (self.bias - mean * scale)[: x.shape[3]]
        elif self.how == "written in between":
            shift = self.bias - mean * scale
            self.weight.mul_(1.5)
            scale = self.weight * (self.running_var + self.eps).rsqrt()
        else:  # the convolution's output is read again
            shift = self.bias - mean * scale
            return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1) + x
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    "how", ["another scale", "the shift from the mean", "across the image", "written in between", "read again"]
)
def test_arithmetic_that_is_no_batch_norm_is_left_to_the_compiler(how: str) -> None:
    torch._dynamo.reset()
    norm = Refused(6)
    norm.how = how
    plain = randomise(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm))
    compiled = torch.compile(copy.deepcopy(plain), backend=backend, options={"inner": "aot_eager"}, fullgraph=True)
    x = torch.randn(2, 3, 9, 8)
    with torch.no_grad(), count_launches() as log:
        actual = compiled(x)
        assert relative_error(actual, plain.double()(x.double())) < 1e-5 and len(log) == 0


def test_pooling_that_is_left_to_the_compiler() -> None:
    """In ceil mode, and of what somebody else reads too."""

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = F.relu(self.bn(self.conv(x)))
            return F.max_pool2d(x, 2), x

    for plain in (Read(), nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.MaxPool2d(3, 2, 1, ceil_mode=True))):
        torch._dynamo.reset()
        x = torch.randn(2, 3, 14, 13)
        compiled = torch.compile(randomise(plain).eval(), backend=backend, options={"inner": "aot_eager"}, fullgraph=True)
        with torch.no_grad(), count_launches() as log:
            actual = compiled(x)
            expected = plain(x)
        assert len(log) == 1
        for a, e in zip(actual, expected, strict=True):
            assert relative_error(a, e) < 1e-5


def test_a_mode_is_refused() -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match="mode must be None"):
        torch.compile(Net().eval(), backend=backend, mode="max-autotune")(torch.randn(2, 3, 12, 12))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is part of Python from 3.11 on")
def test_the_name_is_an_entry_point_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["torch_dynamo_backends"] == {"fused_resnet": "fused_resnet.compiling:fused_resnet"}


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_resnet50_through_inductor(training: bool) -> None:
    torch._dynamo.reset()
    plain = randomise(torchvision.models.resnet50(num_classes=5)).train(training)
    compiled = torch.compile(copy.deepcopy(plain), backend=backend)
    x = torch.randn(4, 3, 64, 64)
    with count_launches() as log:
        actual = compiled(x)
    assert relative_error(actual, plain(x)) < (1e-3 if training else 1e-4)
    assert len(log) > 50
