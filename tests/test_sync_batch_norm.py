"""SyncBatchNorm in two processes (gloo): unequal shares of a batch, together equal to one big batch in float64.

PyTorch's own SyncBatchNorm refuses CPU tensors, so the truth is nn.BatchNorm2d on all images in one process.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from nets import TinyNet, look_at_launches, projection, randomise, state_of, train_step
from tolerances import relative_error
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import fused_resnet
from fused_resnet import count_launches, fuse
from fused_resnet.launch import Launch

Result = dict[str, Tensor]


def stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=True), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1))


class PreActivation(nn.Module):
    """A block with BatchNorm and ReLU in front of its convolutions, and a projection behind the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(6)
        self.conv1, self.conv2 = nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.Conv2d(6, 6, 3, 1, 1, bias=False)
        self.downsample = nn.Conv2d(4, 6, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.bn1(x))
        return self.conv2(torch.relu(self.bn2(self.conv1(a)))) + self.downsample(a)


def dense_layer() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 1, 1, bias=False))


#: Name -> (model, shape of an image, images on each rank, options of fuse).
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, int], dict[str, Any]]] = {
    "BasicBlock": (lambda: BasicBlock(4, 4), (4, 5, 6), (3, 1), {}),
    "BasicBlock with projection": (lambda: BasicBlock(4, 6, 2, projection(4, 6, 2)), (4, 7, 5), (1, 4), {}),
    "Bottleneck with projection, low memory": (
        lambda: Bottleneck(4, 2, 2, projection(4, 8, 2)), (4, 7, 6), (2, 3), {"memory": "low"}
    ),
    "stem with a bias": (stem, (3, 11, 9), (2, 1), {}),
    "cumulative average": (lambda: BasicBlock(4, 4, norm_layer=partial(nn.BatchNorm2d, momentum=None)), (4, 5, 6), (2, 3), {}),
    "without affine": (lambda: BasicBlock(4, 4, norm_layer=lambda c: nn.BatchNorm2d(c, affine=False)), (4, 5, 6), (2, 3), {}),
    "without running statistics": (
        lambda: BasicBlock(4, 4, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)), (4, 5, 6), (2, 3), {}
    ),
    "one value a channel on one rank": (lambda: BasicBlock(4, 4), (4, 1, 1), (1, 2), {}),
    "one value a channel on each rank": (lambda: BasicBlock(4, 4), (4, 1, 1), (1, 1), {}),
    "no images on one rank": (lambda: BasicBlock(4, 4), (4, 5, 6), (0, 3), {}),
    "in front of the convolutions": (PreActivation, (4, 7, 6), (3, 1), {}),
    "in front of a convolution, no images on one rank": (dense_layer, (4, 5, 6), (0, 3), {}),
    "a network": (TinyNet, (3, 33, 35), (1, 3), {}),
}  # fmt: skip

BACKENDS = ("reference", "cpu")


def problem(name: str) -> tuple[nn.Module, Tensor, tuple[int, int], dict[str, Any]]:
    """Model with BatchNorm2d, the images of all ranks, how many each has, options; the same in every process."""
    torch.manual_seed(len(name))
    build, shape, shares, options = CASES[name]
    model = randomise(build()).double().train()
    return model, torch.randn(sum(shares), *shape, dtype=torch.float64), shares, options


def share(name: str, rank: int, backend: str) -> Result:
    """Two steps of one rank."""
    model, x, shares, options = problem(name)
    x = x.split(shares)[rank]
    model = fuse(nn.SyncBatchNorm.convert_sync_batchnorm(model), backend=backend, **options)
    train_step(model, x * 0.5, torch.ones(()).expand_as(model(x * 0.5)))
    torch.manual_seed(rank)
    dout = output_gradients(name).split(shares)[rank]
    result = train_step(model, x, dout)
    result["eval"] = model.eval()(x).detach()
    return result


#: Chains in fp32, which the CPU executor runs itself, and where one rank has no images.
EMPTY: dict[str, Callable[[], nn.Module]] = {
    "block": lambda: BasicBlock(4, 4),
    "in front of a convolution": dense_layer,
    "stem": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
    "stem of another activation": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.SiLU(), nn.MaxPool2d(2)
    ),
}


def empty_problem(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(len(name))
    return randomise(EMPTY[name]()).train(), torch.randn(3, 4, 9, 8)


def empty_share(name: str, rank: int) -> Result:
    """A step of three images on one rank and none on the other."""
    model, x = empty_problem(name)
    x = x[: 3 * rank]
    model = fuse(nn.SyncBatchNorm.convert_sync_batchnorm(model), backend="cpu")
    return train_step(model, x)


def output_gradients(name: str) -> Tensor:
    """For the outputs of all ranks."""
    model, x, _, _ = problem(name)
    return torch.randn(copy.deepcopy(model)(x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def work(rank: int) -> dict[str, Any]:
    """All that one rank does; the tests look at the results."""
    results: dict[str, Any] = {}
    for name in CASES:
        for backend in BACKENDS:
            results[f"{name} on {backend}"] = share(name, rank, backend)
    for name in EMPTY:
        results[f"no images, {name}"] = empty_share(name, rank)
    results["launches"] = launches_of_a_block()
    results["groups"] = group_of_one()
    results["frozen"] = partly_frozen(rank)
    results["error"] = wrong_shortcut()
    results["midway"] = failing_midway()
    return results


def launches_of_a_block() -> tuple[Counter[str], Counter[str]]:
    net = fuse(nn.SyncBatchNorm.convert_sync_batchnorm(Bottleneck(8, 2)).train())
    with count_launches() as log:
        out = net(torch.randn(2, 8, 5, 5, requires_grad=True))
        forward = len(log)
        out.sum().backward()
    kinds = [launch.kind for _, launch in log.launches]
    return Counter(kinds[:forward]), Counter(kinds[forward:])


def group_of_one() -> int:
    """A process group with this rank alone: an ordinary BatchNorm, without an exchange."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    net = BasicBlock(4, 4, norm_layer=lambda c: nn.SyncBatchNorm(c, process_group=groups[dist.get_rank()]))
    with count_launches() as log:
        fuse(net.train())(torch.randn(2, 4, 5, 5))
    return len(log)


def partly_frozen(rank: int) -> Result:
    """Only the first layer trains; the exchange goes on where it is needed."""
    model, x, shares, _ = problem("BasicBlock")
    model.requires_grad_(False)
    model.conv1.requires_grad_(True)
    model.bn1.requires_grad_(True)
    model = fuse(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    return train_step(model, x.split(shares)[rank], output_gradients("BasicBlock").split(shares)[rank])


def wrong_shortcut() -> str:
    """An error before anything has been sent: nobody waits for the other."""
    net = fuse(nn.SyncBatchNorm.convert_sync_batchnorm(BasicBlock(4, 6)).train())
    try:
        net(torch.randn(2, 4, 5, 5))
    except RuntimeError as error:
        return str(error)
    return ""


def failing_midway() -> list[str]:
    """What has changed in the state of a block whose last launch fails on all ranks, when its layers have been through."""
    net = fuse(randomise(nn.SyncBatchNorm.convert_sync_batchnorm(Bottleneck(8, 2))).train(), backend="reference")
    before, reached = state_of(net), []

    def failing(launch: Launch, _: object) -> None:
        if launch.kind == "bn_add_relu":
            reached.extend(key for key, value in net.state_dict().items() if not torch.equal(value, before[key]))
            raise RuntimeError("no memory")

    with pytest.MonkeyPatch.context() as patch:
        look_at_launches(patch, failing)
        with pytest.raises(RuntimeError, match="no memory"):
            net(torch.randn(2, 8, 5, 5))
    assert len(reached) == 9
    return [key for key, value in net.state_dict().items() if not torch.equal(value, before[key])]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return ranks.run("test_sync_batch_norm", "work", folder)


def compare(name: str, shares: list[Result], expected: Result) -> None:
    for what, truth in expected.items():
        if what in ("out", "gradient of x", "eval"):
            actual = torch.cat([result[what] for result in shares])
        elif what.startswith("gradient"):
            actual = sum(result[what] for result in shares)
        else:
            actual = shares[0][what]
            assert torch.equal(actual, shares[1][what]), f"{what} differs between the ranks"
        if truth.abs().max() < 1e-12:
            assert actual.abs().max() < 1e-10, what
        else:
            assert relative_error(actual, truth) < 1e-8, f"{name}: {what}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_equal_to_one_big_batch(name: str, backend: str, results: list[dict[str, Any]]) -> None:
    """Outputs, gradients (those of parameters summed over the ranks), running statistics after two steps, then eval mode."""
    model, x, _, _ = problem(name)
    train_step(model, x * 0.5, torch.ones(()).expand_as(copy.deepcopy(model)(x * 0.5)))
    model(x * 0.5)  # each rank has run this forward twice: once for the shape
    expected = train_step(model, x, output_gradients(name))
    expected["eval"] = model.eval()(x).detach()
    if name == "without running statistics":  # in eval mode SyncBatchNorm is each rank's own, as in PyTorch
        expected["eval"] = torch.cat([model(part) for part in x.split(CASES[name][2])]).detach()
    compare(name, [result[f"{name} on {backend}"] for result in results], expected)


@pytest.mark.parametrize("name", EMPTY)
def test_a_rank_without_images_in_fp32(name: str, results: list[dict[str, Any]]) -> None:
    model, x = empty_problem(name)
    expected = train_step(model.double(), x.double())
    shares = [result[f"no images, {name}"] for result in results]
    for what, value in expected.items():
        empty, full = (part[what] for part in shares)
        if what in ("out", "gradient of x"):
            assert empty.shape == (0, *value.shape[1:])
        actual = empty + full if what.startswith("gradient of") and what != "gradient of x" else full
        assert relative_error(actual, value) < 1e-5, what


def test_an_exchange_stands_between_the_launches(results: list[dict[str, Any]]) -> None:
    """A sync for each BatchNorm each way, and else the launches of one process."""
    forward = {"conv": 3, "sync_statistics": 3, "bn_add_relu": 1}
    backward = {"bn_add_relu_backward": 1, "sync_sums": 3, "dgrad": 3, "wgrad": 3}
    assert all(result["launches"] == (forward, backward) for result in results)


def test_a_group_of_one_shares_nothing(results: list[dict[str, Any]]) -> None:
    assert all(result["groups"] == 3 for result in results)


def test_partly_frozen_is_one_big_batch_too(results: list[dict[str, Any]]) -> None:
    model, x, _, _ = problem("BasicBlock")
    model.requires_grad_(False)
    model.conv1.requires_grad_(True)
    model.bn1.requires_grad_(True)
    compare("frozen", [result["frozen"] for result in results], train_step(model, x, output_gradients("BasicBlock")))


def test_an_error_on_all_ranks_leaves_nobody_waiting(results: list[dict[str, Any]]) -> None:
    assert all("shortcut" in result["error"] for result in results)


def test_a_launch_that_fails_midway_leaves_the_statistics_of_all_ranks(results: list[dict[str, Any]]) -> None:
    assert [result["midway"] for result in results] == [[], []]


def test_without_a_process_group_it_is_an_ordinary_batch_norm() -> None:
    """In PyTorch too, whose own then runs on the CPU."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(randomise(BasicBlock(4, 4)).double().train())
    eager, fused = net, fuse(copy.deepcopy(net))
    for norm in ("bn1", "bn2"):  # what PyTorch's computes once it knows that nobody else is there
        plain = nn.BatchNorm2d(4).double()
        plain.load_state_dict(getattr(eager, norm).state_dict())
        setattr(eager, norm, plain)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    actual, expected = train_step(fused, x), train_step(eager, x)
    assert all(relative_error(actual[what], truth) < 1e-10 for what, truth in expected.items())
    assert fused_resnet.explain(fused, show=False).rows[0].launches == 3
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused(x[:1, :, :1, :1])
