"""Layers that a forward calls as functions with tensors of its own: found, fused, and followed when these tensors change."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import images, launches, randomise, train_step
from tolerances import CLOSE, relative_error
from torch import Tensor, nn

from fused_resnet import explain, fuse, unfuse


class ConvOf(nn.Conv2d):
    """A convolution with what comes behind it, as detectron2 writes it."""

    def __init__(self, *sizes: int, norm: nn.Module | None = None, activation: Any = None, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


def conv_of(channels: int, filters: int, kernel: int, stride: int = 1) -> ConvOf:
    norm = nn.BatchNorm2d(filters)
    return ConvOf(channels, filters, kernel, stride=stride, padding=kernel // 2, bias=False, norm=norm)


class Bottleneck(nn.Module):
    """A residual block of such convolutions."""

    def __init__(self, channels: int = 6, filters: int = 9, stride: int = 2) -> None:
        super().__init__()
        self.shortcut = conv_of(channels, filters, 1, stride)
        self.conv1, self.conv2, self.conv3 = conv_of(channels, 4, 1), conv_of(4, 4, 3, stride), conv_of(4, filters, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv2(F.relu_(self.conv1(x))))
        out = self.conv3(out)
        out += self.shortcut(x)
        return F.relu_(out)


class Detector(nn.Module):
    """Stem and blocks of a backbone as detectron2 writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_of(3, 6, 7, 2)
        self.res2 = nn.Sequential(Bottleneck(), Bottleneck(9, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu_(self.stem(x)), kernel_size=3, stride=2, padding=1)
        return self.res2(x)


class Leaf(nn.Module):
    """A convolution of somebody's own, without a class of PyTorch's."""

    def __init__(self, channels: int, filters: int, bias: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(filters, channels // groups, 3, 3) / 5)
        self.bias = nn.Parameter(torch.randn(filters)) if bias else None
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding="same", groups=self.groups)


class Counting(nn.BatchNorm2d):
    """A BatchNorm that writes its forward out."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


class Leaves(nn.Module):
    """Both, behind each other, and called by a helper."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = Leaf(3, 8, bias=False), Counting(8, eps=1e-3, momentum=0.3)
        self.grouped, self.plain = Leaf(8, 6, groups=2), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.plain(self.grouped(F.relu(self.norm(self.conv(x))))))


class Tensors(nn.Module):
    """Parameters and buffers of the model itself; a BatchNorm that learns nothing, and one without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(*shape) / 4 for shape in ((5, 3, 3, 3), (7, 5, 1, 1), (7, 7, 1, 1)))
        self.scale, self.shift = nn.Parameter(torch.rand(7) + 0.5), nn.Parameter(torch.randn(7))
        self.register_buffer("mean", torch.randn(5))
        self.register_buffer("var", torch.rand(5) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.conv2d(x, self.weights[0], stride=(2, 1), padding=(2, 1), dilation=2)
        x = F.leaky_relu(F.batch_norm(x, self.mean, self.var, training=self.training), 0.2)
        x = F.batch_norm(F.conv2d(x, self.weights[1]), None, None, self.scale, self.shift, training=True)
        return x + F.hardswish(F.conv2d(x, weight=self.weights[2], bias=self.shift))


class Before(nn.Module):
    """BatchNorm and ReLU in front of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = Counting(3), Counting(5)
        self.conv1, self.conv2 = Leaf(3, 5), Leaf(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class Signals(nn.Module):
    """Convolutions of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 4, 5) / 4), nn.Parameter(torch.randn(4, 6, 1) / 2)
        self.norm1, self.norm2 = nn.BatchNorm1d(6), nn.BatchNorm1d(4)

    def normalised(self, norm: Any, x: Tensor) -> Tensor:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training, 0.2, 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.normalised(self.norm1, F.conv1d(x, self.first, padding=2)))
        return F.relu(x + self.normalised(self.norm2, F.conv1d(y, self.second)))


class Table(Signals):
    """Linears of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 4) / 2), nn.Parameter(torch.randn(4, 6) / 2)
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.normalised(self.norm1, F.linear(x, self.first, self.bias)))
        return F.relu(x + self.normalised(self.norm2, F.linear(y, self.second)))


#: Model -> its input's shape, launches of a forward in eval mode and in training.
NETS: dict[type[nn.Module], tuple[tuple[int, ...], int, int]] = {
    Detector: ((2, 3, 37, 33), 10, 12),
    Leaves: ((2, 3, 9, 7), 2, 3),
    Tensors: ((2, 3, 9, 11), 4, 5),
    Before: ((2, 3, 9, 7), 2, 3),
    Signals: ((3, 4, 11), 2, 3),
    Table: ((9, 4), 2, 3),
}


def net(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(7)
    return randomise(kind())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_they_are_fused_and_right(kind: type[nn.Module], backend: str) -> None:
    shape, inferring, training = NETS[kind]
    plain, x = net(kind), torch.randn(shape)
    exact, fused = copy.deepcopy(plain).double().eval(), fuse(copy.deepcopy(plain).eval(), backend=backend)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        for _ in range(4):  # also as a whole
            assert relative_error(fused(x), exact(x.double())) < CLOSE
        assert launches(fused, x) == inferring
    got, wanted = train_step(fused.train(), x), train_step(exact.train(), x.double())
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.removeprefix("gradient of ") in ("grouped.bias", "conv1.bias", "bias"):
            continue  # nothing comes through a BatchNorm of the batch
        assert relative_error(got[name], value) < 20 * CLOSE, name
    assert launches(fused, x) == training


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_unfuse_gives_back_the_classes(kind: type[nn.Module]) -> None:
    plain = net(kind)
    fused = unfuse(fuse(copy.deepcopy(plain)))
    assert [type(module) for module in fused.modules()] == [type(module) for module in plain.modules()]


@pytest.mark.parametrize("how", ["in place", "replaced", "loaded", "moved", "copied", "pickled", "attribute", "without bias"])
def test_tensors_and_attributes_that_change_are_seen(how: str) -> None:
    plain = net(Leaves).eval()
    fused, x = fuse(copy.deepcopy(plain)), images(2, 9, 8)
    with torch.no_grad():
        for _ in range(4):
            fused(x)
    for model in (plain, fused):
        leaf: Any = model.grouped
        if how == "in place":
            leaf.weight.data.mul_(-2)
        elif how == "replaced":
            leaf.weight = nn.Parameter(leaf.weight.detach().flip(0) * 3)
        elif how == "loaded":
            flipped = {name: value.flip(0) for name, value in model.state_dict().items() if value.dim()}
            model.load_state_dict(flipped, strict=False)
        elif how == "moved":
            leaf.weight.data = leaf.weight.data.clone() + 1
        elif how == "attribute":
            leaf.groups, leaf.weight = 1, nn.Parameter(torch.ones(6, 8, 3, 3))
        elif how == "without bias":
            leaf.bias = None
    if how == "copied":
        fused = copy.deepcopy(fused)
    elif how == "pickled":
        fused = pickle.loads(pickle.dumps(fused))
    with torch.no_grad():
        assert relative_error(fused(x), plain(x)) < CLOSE
        assert launches(fused, x) == 2


def test_a_hook_on_a_module_of_such_a_layer_runs() -> None:
    fused, x, seen = fuse(net(Leaves).eval()), images(2, 9, 8), []
    handle = fused.grouped.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    expected = unfuse(copy.deepcopy(fused))(x)
    seen.clear()
    with torch.no_grad():
        assert relative_error(fused(x), expected) < CLOSE
    assert seen == [torch.Size((2, 6, 9, 8))]
    assert any("a hook looks into" in row.note for row in explain(fused, show=False).rows)
    handle.remove()
    with torch.no_grad():
        assert launches(fused, x) == 2


def test_gradients_of_frozen_filters_are_not_made() -> None:
    fused = fuse(net(Detector)).train()
    fused.stem.weight.requires_grad_(False)
    train_step(fused, images())
    assert fused.stem.weight.grad is None
    assert fused.res2[0].conv1.weight.grad is not None


class Shared(nn.Module):
    """One convolution by its module and by a function, with other padding; one BatchNorm likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        x = F.relu(n(self.conv(x)))
        x = F.conv2d(x, self.conv.weight, padding=2, dilation=2)
        x = F.relu(F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, self.training, n.momentum, n.eps))
        return F.relu(F.batch_norm(F.conv2d(x, self.conv.weight), n.running_mean, n.running_var, training=self.training))


def test_tensors_that_are_shared() -> None:
    plain = net(Shared)
    exact, fused, x = copy.deepcopy(plain).double(), fuse(copy.deepcopy(plain)), torch.randn(2, 4, 9, 8)
    got, wanted = train_step(fused, x), train_step(exact, x.double())
    for name, value in wanted.items():
        assert relative_error(got[name], value) < 20 * CLOSE, name
    assert relative_error(fused.eval()(x), exact.eval()(x.double())) < CLOSE


class Standardised(nn.Module):
    """Filters that are computed first: no tensor of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.relu(self.norm(F.conv2d(x, weight)))


class Transposed(nn.Module):
    """Functions that are no layer of a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(3, 4, 3, 3)), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(F.conv_transpose2d(x, self.weight)))


class Written(nn.Module):
    """The filters are written between two layers that use them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(3, 3, 3, 3)), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(F.conv2d(x, self.weight, padding=1)))
        self.weight.mul_(0.5)
        return y + F.relu(F.conv2d(x, self.weight, padding=1))


@pytest.mark.filterwarnings("ignore:fuse found no")
@pytest.mark.parametrize("kind", [Standardised, Transposed, Written])
def test_what_is_not_understood_is_left_alone_and_right(kind: type[nn.Module]) -> None:
    plain = net(kind).eval()
    exact, x = copy.deepcopy(plain), images(2, 9, 8)
    with torch.no_grad():
        fused = fuse(plain)
        for _ in range(4):
            assert relative_error(fused(x), exact(x)) < CLOSE


class Alone(nn.Module):
    """One layer that is fused, and one that stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = Leaf(3, 4), nn.BatchNorm2d(4)
        self.last = nn.Parameter(torch.randn(2, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(F.conv2d(torch.tanh(self.norm(self.conv(x))), self.last))


def test_explain_names_functions() -> None:
    rows = {row.name: row for row in explain(fuse(net(Alone).eval()), show=False).rows}
    assert rows.keys() == {"conv", "last"}
    assert rows["conv"].fused
    assert rows["last"].note == "stands alone: behind it is sigmoid, nothing to fuse with"
    rows = {row.name: row for row in explain(fuse(net(Detector).eval()), show=False).rows}
    assert rows.keys() == {"stem", "res2.0", "res2.1"}
    assert all(row.fused for row in rows.values())


@pytest.mark.parametrize("kind", [Detector, Leaves, Before], ids=lambda kind: kind.__name__)
def test_torch_compile(kind: type[nn.Module]) -> None:
    plain, x = net(kind).eval(), torch.randn(NETS[kind][0])
    fused = fuse(copy.deepcopy(plain))
    with torch.no_grad():
        fused(x)
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        assert relative_error(compiled(x), plain(x)) < CLOSE
        exported = torch.export.export(fused, (x,)).module()
        assert relative_error(exported(x), plain(x)) < CLOSE


def test_copies_do_not_share_tensors() -> None:
    fused, x = fuse(net(Leaves).eval()), images(2, 9, 8)
    before = fused(x).detach()
    other = copy.deepcopy(fused)
    other.conv.weight.data.zero_()
    assert torch.equal(fused(x), before)
    assert not torch.equal(other(x), before)


class NamedLikeNodes(nn.Module):
    """Children whose names torch.fx gives to calls of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.max_pool2d = nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(3, 1, 1)
        self.weight2, self.batch_norm = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.BatchNorm2d(4, eps=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.max_pool2d(F.relu(self.conv(F.max_pool2d(x, 2))))
        x = F.relu(F.batch_norm(F.conv2d(x, self.weight2), None, None, training=True))
        return F.relu(self.batch_norm(F.conv2d(x, self.weight2)))


class Constant(nn.Module):
    """The input of a chain, and of a projection, is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.const = nn.Parameter(torch.randn(1, 3, 8, 8))
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.side, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(F.conv2d(self.const, self.conv.weight, padding=1))) + x
        return self.norm(self.conv(x)) + self.other(self.side(self.const))


class LikeGradients(nn.Module):
    """A layer of the name by which plans call the gradient of another."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.norm = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.BatchNorm2d(4)
        self.d = nn.ParameterDict({"w": torch.randn(4, 4, 1, 1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(F.relu(F.conv2d(x, self.w)), self.d["w"]))


class ReadBetween(nn.Module):
    """Statistics that are read, or moved by a call that is not understood, between a convolution and its BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.live = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        read = self.norm.running_mean.sum()
        y = F.relu(self.norm(y)) + read
        z, n = F.conv2d(y, self.conv.weight), self.live
        moved = F.batch_norm(input=x + 1, running_mean=n.running_mean, running_var=n.running_var, training=self.training)
        return F.relu(F.batch_norm(z, n.running_mean, n.running_var, training=self.training)) + moved


@pytest.mark.parametrize("kind", [NamedLikeNodes, Constant, LikeGradients, ReadBetween], ids=lambda kind: kind.__name__)
def test_what_a_review_found(kind: type[nn.Module]) -> None:
    plain = net(kind).double()
    fused, x = fuse(copy.deepcopy(plain), backend="reference"), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for _ in range(2):
        got, wanted = train_step(fused, x), train_step(plain, x)
        for name, value in wanted.items():
            assert (got[name].double() - value).norm() <= 1e-9 * value.double().norm() + 1e-9, name
    plain.eval(), fused.eval()
    with torch.no_grad():
        for _ in range(4):
            assert relative_error(fused(x), plain(x)) < 1e-10
    explain(fused, show=False)


class Tied(nn.Module):
    """Two layers whose filters, and statistics, may be one."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(3, 3, 3, 3)) for _ in range(2))
        self.register_buffer("mean1", torch.randn(3))
        self.register_buffer("mean2", torch.randn(3))
        self.register_buffer("var", torch.rand(3) + 0.5)
        if tied:
            self.second, self.mean2 = self.first, self.mean1

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.batch_norm(F.conv2d(x, self.first, padding=1), self.mean1, self.var))
        return F.relu(F.batch_norm(F.conv2d(x, self.second, padding=1), self.mean2, self.var))


def test_tensors_of_several_names() -> None:
    plain = nn.Sequential(Tied(True), Tied(False)).eval()
    fused, x = fuse(copy.deepcopy(plain)), images(2, 9, 8)
    assert relative_error(fused(x), plain(x)) < CLOSE, "one is not like the other"
    other = plain[1].second.detach().clone()
    for model in (plain, fused):
        model[0].second = nn.Parameter(other.clone())
        model[1].second = model[1].first
    assert relative_error(fused(x), plain(x)) < CLOSE, "tied and untied since"
    moved = plain[0].mean2 + 1
    for model in (plain, fused):
        model[0].mean2 = moved.clone()
    with torch.no_grad():
        for _ in range(4):
            assert relative_error(fused(x), plain(x)) < CLOSE


class AnyRank(nn.Module):
    """A BatchNorm as a function takes one image as well, whose rows are then its channels, and vectors of any shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.scale, self.shift = nn.Parameter(torch.rand(shape) + 0.5), nn.Parameter(torch.randn(shape))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(self.conv(x), self.mean, self.var, self.scale, self.shift))


@pytest.mark.parametrize("shape", [(8,), (1, 8, 1, 1), (8, 1, 1)])
def test_what_batch_norm_takes_as_a_function(shape: tuple[int, ...]) -> None:
    plain = AnyRank(*shape)
    fused = fuse(copy.deepcopy(plain))
    for x in (torch.randn(2, 3, 8, 8), torch.randn(3, 8, 8)):
        with torch.no_grad():
            for _ in range(4):
                assert relative_error(fused(x), plain(x)) < CLOSE


def test_filters_that_are_not_made_yet() -> None:
    class Lazy(Alone):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = nn.LazyConv2d(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(super().forward(x), self.lazy.weight)

    fused = fuse(net(Lazy).eval())
    assert [row.name for row in explain(fused, show=False).rows if row.fused] == ["conv"]


@pytest.mark.parametrize("options", [{"padding": -1}, {"stride": 0}, {"padding": "same", "stride": 2}], ids=str)
def test_errors_are_pytorchs(options: dict[str, Any]) -> None:
    class Invalid(Leaf):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.conv2d(x, self.weight, self.bias, **options))

    fused = fuse(nn.ModuleList([Invalid(3, 4), Leaf(3, 4)]))
    explain(fused, show=False)
    with pytest.raises(RuntimeError, match=r"negative padding|non-positive stride|padding='same' is not supported"):
        fused[0](images())


class Conv2d(ConvOf):
    """detectron2's class by the same name, as it is written since it takes empty inputs: it asks for them."""

    __module__ = "detectron2.layers.wrappers"

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            with warnings.catch_warnings(record=True):
                if x.numel() == 0 and self.training and isinstance(self.norm, nn.SyncBatchNorm):
                    raise AssertionError("no empty inputs")  # not by the statement, which pytest writes again
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


Conv2d.forward.__module__ = "detectron2.layers.wrappers"


class FrozenBatchNorm2d(nn.Module):
    """detectron2's, which asks whether gradients are wanted."""

    __module__ = "detectron2.layers.batch_norm"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-3
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        vectors = self.weight, self.bias, self.running_mean, self.running_var
        if x.requires_grad:
            return torch.batch_norm(x, *vectors, False, 0.1, self.eps, torch.backends.cudnn.enabled)
        return F.batch_norm(x, *vectors[2:], *vectors[:2], training=False, eps=self.eps)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
@pytest.mark.parametrize("more", [False, True])
def test_detectron2(norm: Any, more: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its classes written again, since it comes without a package; of a version that does more nothing is assumed."""
    if more:
        known = Conv2d.forward

        def forward(self: Any, x: Tensor) -> Tensor:
            if x.numel() == 0:
                return x.sigmoid()
            return known(self, x)

        forward.__module__, forward.__qualname__ = known.__module__, known.__qualname__
        monkeypatch.setattr(Conv2d, "forward", forward)
    torch.manual_seed(3)
    plain: Any = Detector()
    for name, module in list(plain.named_modules()):
        if isinstance(module, ConvOf):
            options = {key: getattr(module, key) for key in ("stride", "padding", "dilation", "groups")}
            sizes = module.in_channels, module.out_channels, module.kernel_size
            made = Conv2d(*sizes, bias=False, norm=norm(module.out_channels), **options)
            plain.set_submodule(name, made)
    plain = randomise(plain)
    exact, fused, x = copy.deepcopy(plain).double(), fuse(copy.deepcopy(plain)), images(2, 37, 33)
    got, wanted = train_step(fused, x), train_step(exact, x.double())
    for name, value in wanted.items():
        assert relative_error(got[name], value) < 20 * CLOSE, name
    with torch.no_grad():
        assert relative_error(fused.eval()(x), exact.eval()(x.double())) < CLOSE
        assert launches(fused, x) == (0 if more else NETS[Detector][1])
    empty = x[:0]
    assert fused(empty).shape == plain.eval()(empty).shape
