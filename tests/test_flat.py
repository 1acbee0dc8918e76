"""Linear + BatchNorm1d and Conv1d + BatchNorm1d: the same chains, on rows [N, C] and sequences [N, C, L]."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from nets import randomise, train_step
from tolerances import relative_error
from torch import Tensor, nn

import fused_resnet
from fused_resnet import backends, count_launches
from fused_resnet.fused import Fused
from fused_resnet.plain_rows import ResidualMLP


def mlp() -> nn.Sequential:
    first = (nn.Linear(12, 20), nn.BatchNorm1d(20), nn.SiLU())
    return nn.Sequential(*first, nn.Linear(20, 17, bias=False), nn.BatchNorm1d(17), nn.ReLU(), nn.Linear(17, 5))


def sequences() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(6, 16, 7, stride=2, padding=3), nn.BatchNorm1d(16), nn.GELU(), nn.MaxPool1d(3, 2, 1),
        nn.Conv1d(16, 16, 3, padding="same", dilation=2, groups=4), nn.BatchNorm1d(16), nn.LeakyReLU(0.2),
        nn.Conv1d(16, 10, 1), nn.BatchNorm1d(10, affine=False),
    )  # fmt: skip


def residual() -> nn.Sequential:
    return nn.Sequential(ResidualMLP(12, 20, 24), ResidualMLP(20, 20, activation=nn.GELU()))


NETWORKS = {"mlp": (mlp, (9, 12)), "sequences": (sequences, (4, 6, 33)), "residual": (residual, (9, 12))}


def pair(name: str, training: bool) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network in float64, the same in fp32, and its input."""
    make, shape = NETWORKS[name]
    net = randomise(make()).train(training)
    return copy.deepcopy(net).double(), net, torch.randn(shape)


def compare(truth: dict[str, Tensor], actual: dict[str, Tensor], bound: float) -> None:
    assert list(actual) == list(truth)
    for what, expected in truth.items():
        assert actual[what].shape == expected.shape
        if expected.abs().max() > 1e-10:  # but a bias in front of a BatchNorm
            assert relative_error(actual[what], expected) < bound, what


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step(name: str, training: bool, memory: str) -> None:
    """Values, every gradient, running statistics: float64 through the reference, fp32 through the CPU executor."""
    eager, single, x = pair(name, training)
    truth = train_step(eager, x.double())
    exact = fused_resnet.fuse(copy.deepcopy(eager), backend="reference", memory=memory)
    fused = fused_resnet.fuse(single, backend="cpu", memory=memory)
    exact.load_state_dict(single.state_dict())  # as it was in front of the step
    assert list(fused.state_dict()) == list(eager.state_dict())
    compare(truth, train_step(exact, x.double()), 1e-10)
    with count_launches() as log:
        actual = train_step(fused, x)
    assert {runner for runner, _ in log.launches} == {"cpu"} and len(log) > 6
    compare(truth, actual, 1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_inference(name: str) -> None:
    eager, net, x = pair(name, False)
    expected = eager(x.double())
    fused = fused_resnet.fuse(net)
    with torch.no_grad(), count_launches() as log:
        out = fused(x)
        assert relative_error(out, expected) < 1e-5
        assert torch.equal(fused(x), out)
        with torch.no_grad():
            for parameter in net.parameters():  # folded filters follow
                parameter.mul_(1.5)
            eager.load_state_dict(net.state_dict())
        assert relative_error(fused(x), eager(x.double())) < 1e-5
    assert len(log) == {"mlp": 3, "sequences": 4, "residual": 5}[name] * 3  # calls
    assert out.shape == expected.shape and out.reshape(-1).shape == (out.numel(),)


@pytest.mark.parametrize("training", [False, True])
def test_triton(training: bool) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("mlp", "sequences") if training else ("residual",):
        eager, net, x = pair(name, training)
        fused = fused_resnet.fuse(net.to(device), backend="triton")
        with count_launches() as log:
            actual = train_step(fused, x.to(device))
        assert {runner for runner, _ in log.launches} == {"triton"}
        compare(train_step(eager, x.double()), actual, 1e-4)


def test_the_residual_block_is_the_plain_one() -> None:
    plain = ResidualMLP(6, 8)
    ours = fused_resnet.ResidualMLP(6, 8)
    ours.load_state_dict(plain.state_dict())
    fused = fused_resnet.fuse(plain, inplace=False)
    assert isinstance(fused, fused_resnet.ResidualMLP) and type(fused_resnet.unfuse(fused)) is ResidualMLP
    x = torch.randn(5, 6)
    assert relative_error(ours(x), plain(x)) < 1e-5


def test_filters_seen_as_images_die_with_the_parameter() -> None:
    net = fused_resnet.fuse(mlp().eval())
    with torch.no_grad():
        net(torch.randn(3, 12))
    alive = weakref.ref(net[0].weight)
    del net
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", ["mlp", "sequences"])
def test_one_value_a_channel_is_an_error_in_training(name: str) -> None:
    """PyTorch's type and words."""
    net = {"mlp": mlp(), "sequences": nn.Sequential(nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4))}[name].train()
    x = torch.randn(1, 12) if name == "mlp" else torch.randn(1, 6, 3)
    for model in (copy.deepcopy(net), fused_resnet.fuse(net)):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            model(x)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),  # nothing to normalise: PyTorch's own
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm2d(4), nn.ReLU()),
    ],
)
def test_what_is_no_chain(net: nn.Sequential) -> None:
    with pytest.warns(UserWarning, match="fuse found no"):
        assert not any(isinstance(module, Fused) for module in fused_resnet.fuse(net).modules())


@pytest.mark.parametrize("training", [False, True])
def test_other_ranks_do_what_pytorch_does(training: bool) -> None:
    """Behind a Linear on [N, L, C] a BatchNorm1d normalises L: not our chain. One sequence without a batch, a wrong rank."""
    net = randomise(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())).train(training)
    fused = fused_resnet.fuse(copy.deepcopy(net))
    x = torch.randn(3, 5, 6)
    assert torch.equal(fused(x), net(x))
    flat = nn.Sequential(nn.Conv1d(6, 5, 3), nn.BatchNorm1d(5)).train(training)
    for shape in ((6, 9), (2, 6, 9, 9)):
        with pytest.raises((ValueError, RuntimeError)) as expected:
            flat(torch.randn(shape))
        with pytest.raises(expected.type):
            fused_resnet.fuse(copy.deepcopy(flat))(torch.randn(shape))
    with pytest.raises(RuntimeError):
        fused(torch.randn(3, 7))


@pytest.mark.parametrize("training", [False, True])
def test_autocast_and_empty_batches(training: bool) -> None:
    net = randomise(mlp()).train(training)
    fused = fused_resnet.fuse(copy.deepcopy(net))
    x = torch.randn(16, 12)
    with torch.autocast("cpu", torch.bfloat16):
        expected, out = net(x), fused(x)
    assert out.dtype == expected.dtype
    assert relative_error(out.float(), expected.float()) < 0.05
    if not training:
        assert fused(torch.randn(0, 12)).shape == (0, 5)


def test_torch_compile() -> None:
    eager, net, x = pair("mlp", True)
    compiled = torch.compile(fused_resnet.fuse(net), backend="aot_eager", fullgraph=True)
    out, expected = compiled(x), eager(x.double())
    assert relative_error(out, expected) < 1e-5
    out.sum().backward()
    expected.sum().backward()
    assert relative_error(net[6].weight.grad, eager[6].weight.grad) < 1e-4


def steps(net: nn.Module, x: torch.Tensor) -> int:
    """Launches of a forward that autograd records."""
    with count_launches() as log:
        net(x)
    return len(log)


@pytest.mark.parametrize("name", NETWORKS)
def test_little_work_is_trained_unfused_unless_a_backend_is_chosen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, net, x = pair(name, True)
    plain, x = copy.deepcopy(net), x.float()
    fused, chosen = fused_resnet.fuse(copy.deepcopy(net)), fused_resnet.fuse(copy.deepcopy(net), backend="cpu")
    launches = steps(chosen, x)
    assert launches > 2
    for _ in range(2):  # it is the modules' own: the same bits, step after step
        expected, actual = train_step(plain, x), train_step(fused, x)
        assert all(torch.equal(actual[what], expected[what]) for what in expected)
    assert steps(fused, x) == 0
    with torch.no_grad():
        assert steps(fused, x) == launches
    with fused_resnet.backend("cpu"):
        assert steps(fused, x) == launches
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "cpu")
    assert steps(fused, x) == launches
    monkeypatch.delenv("FUSED_RESNET_BACKEND")
    monkeypatch.setattr(backends, "_ALONE", {2: 0, 3: 0})
    assert steps(fused, x) == launches


def test_little_work_is_known_once_nothing_stands_in_the_way() -> None:
    """Hooks, and a mode in which there is no chain, say nothing about the calls to come."""
    net, x = fused_resnet.fuse(mlp()), torch.randn(9, 12)
    handle = net[0].register_forward_hook(lambda _m, _x, y: y)
    assert steps(net, x) == 0
    handle.remove()
    assert steps(net, x) == 0
    net.eval()
    assert steps(net, x) == 0
    with nn.modules.module.register_module_forward_hook(lambda _m, _x, y: y):
        net.train()
        assert steps(net, x) == 0
    assert steps(net, x) == 0


def test_what_little_work_is() -> None:
    """Its multiplications count, of both layers of a block; images have none too few."""
    block = fused_resnet.fuse(ResidualMLP(500, 500))
    most = backends._ALONE[2] // (2 * 500 * 500)
    assert steps(block, torch.randn(most, 500)) == 0
    assert steps(block, torch.randn(most + 1, 500)) > 0
    layer = fused_resnet.fuse(nn.Sequential(nn.Conv1d(64, 128, 3, padding=1), nn.BatchNorm1d(128), nn.ReLU()))
    most = backends._ALONE[3] // (64 * 128 * 3)
    assert steps(layer, torch.randn(4, 64, most // 4)) == 0
    assert steps(layer, torch.randn(4, 64, most // 4 + 1)) > 0
    image = fused_resnet.fuse(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    assert steps(image, torch.randn(2, 2, 3, 3)) > 0


class Decoder(nn.Module):
    """Rows go in, the chain has images."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4 * 36)
        self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(self.fc(x).view(-1, 4, 6, 6))))


class Words(nn.Module):
    """So do numbers of words, and the chain has signals."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.conv, self.bn = nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(self.words(x).transpose(1, 2))))


def test_the_chains_dimensions_decide_and_a_chosen_memory_counts() -> None:
    decoder = nn.Sequential(nn.Linear(8, 4 * 36), nn.Unflatten(1, (4, 6, 6)), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    for model in (Decoder(), decoder):
        assert steps(fused_resnet.fuse(model), torch.randn(5, 8)) > 0
        assert not any("autograd records" in row.note for row in fused_resnet.explain(model, show=False).rows)
    assert steps(fused_resnet.fuse(Words()), torch.randint(10, (3, 12))) > 0
    assert steps(fused_resnet.fuse(ResidualMLP(12, 12), memory="low"), torch.randn(5, 12)) > 0


def test_batches_that_ranks_share_are_never_left_alone() -> None:
    """Torch's SyncBatchNorm refuses a CPU, ours does not; and ranks must decide alike, with batches of their own."""
    net = nn.Sequential(nn.Linear(8, 16), nn.SyncBatchNorm(16), nn.ReLU(), nn.Linear(16, 4), nn.SyncBatchNorm(4))
    fused = fused_resnet.fuse(net.train())
    assert steps(fused, torch.randn(6, 8)) > 0
    assert not any("autograd records" in row.note for row in fused_resnet.explain(fused, show=False).rows)


def test_work_is_counted_again_where_layers_are_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    net = fused_resnet.fuse(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()))
    x = torch.randn(64, 8)
    monkeypatch.setattr(backends, "_ALONE", {2: 64 * 8 * 8})
    assert steps(net, x) == 0
    net[0], net[1] = nn.Linear(8, 9), nn.BatchNorm1d(9)
    assert steps(net, x) > 0
