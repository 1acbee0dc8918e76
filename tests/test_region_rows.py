"""Rows [N, C] and sequences [N, C, L] in modules of any class: Linear and Conv1d with BatchNorm1d, found in traced forwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import randomise, train_step
from tolerances import relative_error
from torch import Tensor, nn

from fused_resnet import count_launches, explain, fuse, unfuse
from fused_resnet.compiling import fused_resnet as backend


class Rows(nn.Module):
    """A residual MLP for tables: two Linears, their BatchNorms, and what some blocks have besides."""

    def __init__(self, channels: int = 7, hidden: int = 13) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(channels, hidden), nn.BatchNorm1d(hidden)
        self.fc2, self.bn2 = nn.Linear(hidden, channels, bias=False), nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.fc2(F.relu(self.bn1(self.fc1(x)))))


class Projected(Rows):
    """The shortcut is a Linear as well, and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Sequential(nn.Linear(7, 7, bias=False), nn.BatchNorm1d(7))
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn2(self.fc2(self.act(self.bn1(self.fc1(x))))) + self.short(x))


class PreActivation(Rows):
    """The last Linear has no BatchNorm, but a sum behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm1d(7), nn.BatchNorm1d(13)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.bn2(self.fc1(F.silu(self.bn1(x)))))) + x


class PreActivationProjected(PreActivation):
    """The shortcut starts behind the first activation, and no BatchNorm is behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(x))
        return self.fc2(F.relu(self.bn2(self.fc1(x)))) + self.short(x)


class Beside(Rows):
    """The shortcut is another tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.tanh(x) + self.bn2(self.fc2(F.relu(self.bn1(self.fc1(x))))))


class Classifier(Rows):
    """Dropout between the layers, and a Linear behind the last, with which there is nothing to fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.last = nn.Dropout(0.0), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu6(self.bn1(self.fc1(x))))
        return self.last(F.relu(self.bn2(self.fc2(x))))


class Size(Rows):
    """The size is asked in front of the sum."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.fc1(x))
        return F.relu(y + torch.cat([x, x], 1)[:, : y.shape[1]] * y.size(0))


class Waves(nn.Module):
    """A residual block for signals; ``stride`` other than 1: with a projection."""

    def __init__(self, channels: int = 6, filters: int = 6, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, filters, 3, stride, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm1d(filters), nn.BatchNorm1d(filters)
        self.conv2 = nn.Conv1d(filters, filters, 5, padding=4, dilation=2, groups=2)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv1d(channels, filters, 1, stride, bias=False), nn.BatchNorm1d(filters))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ProjectedWaves(Waves):
    def __init__(self) -> None:
        super().__init__(6, 10, 2)


class PreActivationWaves(Waves):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(6, 6, 4, padding=3, dilation=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.gelu(self.bn2(self.conv1(F.gelu(self.bn1(x)))))) + x


class Pyramid(Waves):
    """The sum is made in the size of what comes from below."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(6, 6, 3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        lateral = self.bn1(self.conv1(x))
        return lateral + F.interpolate(F.avg_pool1d(x, 4) / lateral.shape[1], size=lateral.shape[-1:], mode="nearest")


class Network(nn.Module):
    """Signals: a stem with pooling, blocks, a view that counts on its layout, and a head of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, 6, 7, 2, padding=3, bias=False), nn.BatchNorm1d(6)
        self.pool = nn.MaxPool1d(3, 2, padding=1)
        self.blocks = nn.ModuleList([Waves(), ProjectedWaves()])
        self.head = Classifier()
        self.head.fc1 = nn.Linear(10 * 5, 13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn(self.conv(x))))
        for block in self.blocks:
            x = block(x)
        return self.head(x.view(x.shape[0], -1))


class Mixed(nn.Module):
    """A Linear along a convolution's signal: no chain has both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(9, 9, 3, padding=1), nn.BatchNorm1d(9)
        self.fc, self.last = nn.Linear(11, 11), nn.BatchNorm1d(9)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        return F.relu(self.last(self.fc(y)) + y)


class Along(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.fc(F.relu(self.bn(self.conv(x))))))


class Across(Mixed):
    """The Linear is no projection of the convolution's, but another tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + self.fc(x))


ROWS, SIGNALS, MIXED = (9, 7), (3, 6, 11), (3, 9, 11)
#: Class -> the shape of its input, launches in eval mode, and in training.
MODULES = {
    Rows: (ROWS, 2, 3), Projected: (ROWS, 3, 4), PreActivation: (ROWS, 2, 3), PreActivationProjected: (ROWS, 3, 4),
    Beside: (ROWS, 2, 3), Classifier: (ROWS, 2, 4), Size: (ROWS, 1, 2),
    Waves: (SIGNALS, 2, 3), ProjectedWaves: (SIGNALS, 3, 4), PreActivationWaves: (SIGNALS, 2, 3), Pyramid: (SIGNALS, 1, 2),
    Network: ((4, 3, 37), 9, 13), Mixed: (MIXED, 1, 2),
    Along: (MIXED, 1, 2), Across: (MIXED, 1, 2),
}  # fmt: skip
#: Of these a gradient in eval mode keeps what is in front of a LeakyReLU or ReLU6 that is not in place, and one more launch
#: makes the output of it: somebody may write over that, as in eager PyTorch.
REWRITABLE = (Projected, Classifier, Network)
EACH = pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)


def some(*kinds: type[nn.Module]) -> list[Any]:
    """These in each run of the tests, the others in the slow ones."""
    return [pytest.param(kind, marks=[] if kind in kinds else pytest.mark.slow, id=kind.__name__) for kind in MODULES]


MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def compare(truth: dict[str, Tensor], actual: dict[str, Tensor], bound: float) -> None:
    assert list(actual) == list(truth)
    for what, expected in truth.items():
        assert actual[what].shape == expected.shape, what
        if expected.abs().max() > 1e-10:  # but a bias in front of a BatchNorm
            assert relative_error(actual[what], expected) < bound, what


@MODES
@EACH
def test_it_computes_what_it_did(kind: type[nn.Module], training: bool) -> None:
    """Values, every gradient, running statistics: float64 through the reference, fp32 through the CPU executor."""
    shape, *expected = MODULES[kind]
    single = randomise(kind()).train(training)
    eager, x = copy.deepcopy(single).double(), torch.randn(shape)
    exact, fused = fuse(copy.deepcopy(eager), backend="reference"), fuse(copy.deepcopy(single), backend="cpu")
    truth = train_step(eager, x.double())
    compare(truth, train_step(exact, x.double()), 1e-10)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), count_launches() as log:
            fused(x)
        more = gradients and not training and kind in REWRITABLE
        assert len(log) == expected[training] + more and {runner for runner, _ in log.launches} == {"cpu"}
    fused.load_state_dict(single.state_dict())
    compare(truth, train_step(fused, x), 1e-4)
    assert list(fused.state_dict()) == list(single.state_dict())
    unfuse(fused).load_state_dict(single.state_dict())
    assert type(fused) is kind
    compare(train_step(single, x), train_step(fused, x), 1e-12)


@MODES
@pytest.mark.parametrize("kind", some(PreActivationProjected, Beside, ProjectedWaves))
def test_triton(kind: type[nn.Module], training: bool) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = randomise(kind()).train(training)
    x = torch.randn(MODULES[kind][0])
    fused = fuse(copy.deepcopy(plain).to(device), backend="triton")
    with count_launches() as log:
        actual = train_step(fused, x.to(device))
    assert {runner for runner, _ in log.launches} == {"triton"}
    compare(train_step(plain.double(), x.double()), actual, 1e-4)


@MODES
@pytest.mark.parametrize("kind", some(PreActivationProjected, Beside, Network, Across))
def test_the_backend_of_torch_compile(kind: type[nn.Module], training: bool) -> None:
    """The same in Dynamo's graph, for any number of images; a pooling behind a chain is left to the compiler."""
    torch._dynamo.reset()
    shape, *expected = MODULES[kind]
    plain = randomise(kind()).double().train(training)
    same = copy.deepcopy(plain)
    compiled = torch.compile(same, backend=backend, options={"inner": "aot_eager"}, fullgraph=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, *shape[1:], dtype=torch.float64)
        truth = train_step(plain, x)
        with count_launches() as log:
            actual = train_step(compiled, x)
        assert len(log) > expected[training] + 1, "forward and backward"
        compare(truth, {key.replace("_orig_mod.", ""): tensor for key, tensor in actual.items()}, 1e-9)
    with torch.no_grad(), count_launches() as log:
        compiled(x)
    assert len(log) == expected[training]


#: A network's chains and what is left alone: place -> what explain says of it.
EXPLAINED = {
    "conv": "conv", "blocks.0": "conv1 + conv2", "blocks.1": "conv1 + conv2 + downsample.0",
    "head.fc1": "fc1", "head.fc2": "fc2",
}  # fmt: skip


def test_explain() -> None:
    rows = explain(fuse(Network().eval()), show=False).rows
    assert {row.name: row.what for row in rows if row.fused} == EXPLAINED and len(rows) == len(EXPLAINED)
    for row in rows:
        takes, most = ("[N, C]", 500) if "head" in row.name else ("[N, C, L]", 40)
        alone = f"unfused on a CPU where autograd records, up to {most} M multiplications"
        assert row.note.endswith(f"takes {takes}, other inputs run unfused; {alone}, unless a backend or a memory is chosen")
    rows = explain(fuse(Network().eval(), backend="cpu"), show=False).rows
    assert all(row.note.endswith("other inputs run unfused") for row in rows)


class Odd(nn.Module):
    """What is in no chain, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.wrong = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm1d(4)
        self.volume, self.deep = nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4)
        self.fc, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.lazy, self.lazy_norm = nn.LazyLinear(4), nn.LazyBatchNorm1d()
        self.alone = nn.BatchNorm1d(2)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        x = self.wrong(self.image(x))
        y = self.deep(self.volume(y)).mean((2, 3, 4))
        z = self.last(F.relu(self.norm(self.fc(z))))
        return self.alone(z + 1) + self.lazy_norm(self.lazy(y)).mean() + x.mean()


REASONS = {
    "image": "stands alone: behind it is BatchNorm1d", "wrong": "no convolution of its dimensions has it to itself",
    "volume": "volume is a Conv3d", "deep": "a BatchNorm3d is no BatchNorm2d or BatchNorm1d",
    "lazy_norm": "a LazyBatchNorm1d is no BatchNorm2d or BatchNorm1d", "alone": "no convolution of its dimensions",
}  # fmt: skip


def test_reasons() -> None:
    model = fuse(Odd())
    rows = {row.name: row for row in explain(model, show=False).rows}
    assert rows.pop("fc").fused and set(rows) == set(REASONS)
    for place, reason in REASONS.items():
        assert reason in rows[place].note, place


class Given(nn.Module):
    """Two tensors are added behind a layer of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.bn(self.fc(x)) + y)


class Unnormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


#: Inputs that are not what the chain takes, but something else to PyTorch: [N, L, C] to Linears, one signal without a batch.
OTHERS = {
    "rows of rows": (lambda: Rows(6, 6), [(3, 6, 6)]),
    "rows of rows, their size asked": (lambda: Size(6, 6), [(6, 6, 6)]),
    "one signal": (Waves, [(6, 6)]),
    "one signal, no BatchNorm": (Unnormed, [(6, 9)]),
    "a sum that broadcasts": (Given, [(5, 6), (1, 6)]),
    "a sum that broadcasts a vector": (Given, [(5, 6), (6,)]),
    "a sum that broadcasts both": (Given, [(6, 6), (6, 6, 1)]),
    "a sum of another type": (Given, [(5, 6), torch.ones(5, 6, dtype=torch.float64)]),
    "no rows": (Rows, [(0, 7)]),
}


@MODES
@pytest.mark.parametrize("case", OTHERS)
def test_other_inputs_run_unfused(case: str, training: bool) -> None:
    make, shapes = OTHERS[case]
    plain = randomise(make()).train(training)
    fused = fuse(copy.deepcopy(plain), backend="cpu")
    given = [shape if isinstance(shape, Tensor) else torch.randn(shape) for shape in shapes]
    with count_launches() as log:
        results = [[x.clone().requires_grad_() for x in given] for _ in range(2)]
        outs = [_result(model, xs) for model, xs in zip((plain, fused), results)]
    if isinstance(outs[0], Exception):
        assert type(outs[1]) is type(outs[0]) and str(outs[1]) == str(outs[0])
        return
    assert len(log) == (case == "no rows" and not training) * 2
    assert relative_error(outs[1], outs[0]) < 1e-6 and outs[1].dtype == outs[0].dtype
    outs[0].square().sum().backward(), outs[1].square().sum().backward()
    for a, b in zip(*results):
        assert relative_error(b.grad, a.grad) < 1e-6
    for (key, a), (_, b) in zip(plain.named_buffers(), fused.named_buffers()):
        assert relative_error(b, a) < 1e-6, key


def _result(model: nn.Module, inputs: list[Tensor]) -> Tensor | Exception:
    try:
        return model(*inputs)
    except (ValueError, RuntimeError) as error:
        return error


def test_errors_are_those_of_eager() -> None:
    for make, shape in ((Rows, (1, 7)), (Rows, (5, 8)), (Rows, (2, 3, 4, 7)), (Waves, (1, 6, 1)), (Waves, (2, 5, 9))):
        plain = make().train()
        expected, actual = (
            _result(model, [torch.randn(shape)]) for model in (plain, fuse(copy.deepcopy(plain), backend="cpu"))
        )
        assert isinstance(expected, Exception) and type(actual) is type(expected), (shape, expected, actual)


def test_lazy_layers_are_fused_when_they_are_none_any_more() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = nn.LazyLinear(5), nn.LazyBatchNorm1d()
            self.first, self.norm = nn.Linear(7, 9), nn.BatchNorm1d(9)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.fc(F.relu(self.norm(self.first(x))))))

    model = fuse(Lazy())
    x = torch.randn(6, 7)
    with count_launches() as log:
        model(x)
    assert len(log) == 0 or {launch.layer for _, launch in log.launches} == {"first"}
    model.eval()
    with torch.no_grad(), count_launches() as log:
        actual = model(x)
    assert len(log) == 2
    assert relative_error(actual, unfuse(model)(x)) < 1e-5


@pytest.mark.parametrize("kind", [Rows, Beside, PreActivationProjected, Waves, Network], ids=lambda kind: kind.__name__)
def test_prepared_chains_follow_their_parameters(kind: type[nn.Module]) -> None:
    """Without gradients, inputs that come again, of two sizes in turn; then other parameters, in place and exchanged."""
    plain = randomise(kind()).eval()
    fused = fuse(copy.deepcopy(plain))
    shape = MODULES[kind][0]
    inputs = [torch.randn(shape), torch.randn(shape[0] + 2, *shape[1:])]

    def agree() -> None:
        for x in inputs * 3:
            given = x.clone()
            assert relative_error(fused(given), plain(x)) < 1e-5 and torch.equal(given, x)

    with torch.no_grad():
        agree()
        for model in (plain, fused):
            for parameter in model.parameters():
                parameter.mul_(1.5)
        agree()
        for model in (plain, fused):
            for module in model.modules():
                if isinstance(module, (nn.Linear, nn.Conv1d)):
                    module.weight = nn.Parameter(module.weight * -0.5)
        agree()
        for model in (plain, fused):
            for parameter in model.parameters():
                parameter.data = parameter.data * 0.75
        agree()
