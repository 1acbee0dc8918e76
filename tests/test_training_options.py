"""Everything a BatchNorm2d can be told in training mode, non-finite values, ``memory``; each time against eager PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from nets import copies, projection, randomise, train_step
from tolerances import assert_no_worse, distance, relative_error
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import fused_resnet
from fused_resnet import count_launches, explain, fuse, unfuse

BACKENDS = ("reference", "cpu")

#: Constructors of BatchNorms.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "default": nn.BatchNorm2d,
    "momentum 1": lambda c: nn.BatchNorm2d(c, momentum=1.0),
    "momentum 0.3": lambda c: nn.BatchNorm2d(c, momentum=0.3),
    "momentum 0": lambda c: nn.BatchNorm2d(c, momentum=0.0),
    "cumulative average": lambda c: nn.BatchNorm2d(c, momentum=None),
    "large eps": lambda c: nn.BatchNorm2d(c, eps=0.5),
    "without affine": lambda c: nn.BatchNorm2d(c, affine=False, momentum=0.3),
    "without running statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "without anything": lambda c: nn.BatchNorm2d(c, affine=False, track_running_stats=False, momentum=None),
    "SyncBatchNorm without a process group": lambda c: nn.SyncBatchNorm(c, momentum=0.3),
}

BLOCKS: dict[str, Callable[[Callable[[int], nn.Module]], nn.Module]] = {
    "BasicBlock": lambda norm: BasicBlock(4, 4, norm_layer=norm),
    "Bottleneck with projection": lambda norm: Bottleneck(
        4, 2, 2, nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), norm(8)), norm_layer=norm
    ),
    "Sequential": lambda norm: nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), norm(6), nn.ReLU(), nn.Conv2d(6, 5, 3, 2), norm(5), nn.ReLU(True), nn.MaxPool2d(2)
    ),
}


def equal(actual: dict[str, Tensor], expected: dict[str, Tensor], allowed: float) -> None:
    """The same entries with the same types and values; what is zero but for rounding is left to itself."""
    assert list(actual) == list(expected)
    for what, truth in expected.items():
        assert actual[what].dtype == truth.dtype and actual[what].shape == truth.shape, what
        if truth.numel() and truth.abs().max() < 100 * torch.finfo(torch.float64).eps:
            assert actual[what].abs().max() < 1e-10, what
        else:
            assert relative_error(actual[what], truth) < allowed, what


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("norm", NORMS)
def test_options_of_batch_norm(norm: str, block: str, backend: str) -> None:
    """Two steps, one in eval mode, one more: values, gradients and buffers in float64.

    SyncBatchNorm's eager twin has BatchNorm2d in its place, since PyTorch's refuses the CPU.
    """
    eager, fused = copies(randomise(BLOCKS[block](NORMS[norm])).double())
    if norm.startswith("Sync"):
        eager = randomise(BLOCKS[block](NORMS["momentum 0.3"])).double()
        eager.load_state_dict(fused.state_dict())
    fuse(fused, backend=backend)
    for training in (True, True, False, True):
        x = torch.randn(3, 4, 9, 7, dtype=torch.float64)
        eager.train(training), fused.train(training)
        with count_launches() as log:
            actual = train_step(fused, x)
        assert len(log)
        equal(actual, train_step(eager, x), 1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_options_of_batch_norm_in_fp32_on_the_cpu(norm: str) -> None:
    eager, fused = copies(randomise(BLOCKS["Bottleneck with projection"](NORMS[norm])))
    if norm.startswith("Sync"):
        eager = randomise(BLOCKS["Bottleneck with projection"](NORMS["momentum 0.3"]))
        eager.load_state_dict(fused.state_dict())
    fuse(fused, backend="cpu")
    for training in (True, False, True):
        x = torch.randn(3, 4, 9, 7)
        eager.train(training), fused.train(training)
        actual, expected = train_step(fused, x), train_step(eager, x)
        for what, truth in expected.items():
            assert distance([(actual[what], truth)]) < 1e-4, what


def test_the_number_of_batches_is_counted() -> None:
    net = fuse(BasicBlock(4, 4)).train()
    counts = net.bn1.num_batches_tracked, net.bn2.num_batches_tracked
    for n in range(1, 4):
        net(torch.randn(2, 4, 5, 5))
        assert counts[0] == counts[1] == n
        assert counts[0] is net.bn1.num_batches_tracked, "in place"
    net.eval()
    net(torch.randn(2, 4, 5, 5))
    assert counts[0] == 3


def test_tracking_switched_off_on_a_module_that_has_statistics() -> None:
    """``track_running_stats = False`` on an existing module: the batch's statistics in training, the running ones in eval."""
    eager, fused = copies(randomise(BasicBlock(4, 4)).double().train())
    fuse(fused)
    for model in (eager, fused):
        model.bn1.track_running_stats = False
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    for training in (True, False):
        eager.train(training), fused.train(training)
        equal(train_step(fused, x), train_step(eager, x), 1e-10)


def test_a_module_without_a_counter() -> None:
    """``num_batches_tracked`` None (old checkpoints): the momentum holds, nothing is counted."""
    eager, fused = copies(randomise(BasicBlock(4, 4, norm_layer=lambda c: nn.BatchNorm2d(c, momentum=0.2))).double())
    fuse(fused)
    for model in (eager, fused):
        model.bn1.num_batches_tracked = None
        model.train()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    for _ in range(2):
        equal(train_step(fused, x), train_step(eager, x), 1e-10)


def test_frozen_parts_get_no_gradients() -> None:
    """requires_grad switched off here and there, and one BatchNorm in eval mode."""
    eager, fused = copies(randomise(Bottleneck(4, 2, 2, projection(4, 8, 2))).double())
    fuse(fused)
    for model in (eager, fused):
        model.train()
        model.conv1.requires_grad_(False)
        model.bn2.requires_grad_(False)
        model.bn3.weight.requires_grad_(False)
        model.downsample[1].eval()
    x = torch.randn(3, 4, 7, 9, dtype=torch.float64)
    equal(train_step(fused, x), train_step(eager, x), 1e-10)
    assert fused.conv1.weight.grad is None and fused.bn2.bias.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_convolutions_bias_in_front_of_batch_norm(backend: str) -> None:
    """BatchNorm subtracts it: its gradient is zero (eager's is rounding noise), the running mean has it."""
    net = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4, momentum=1.0), nn.ReLU())).train()
    eager, fused = copies(net)
    fuse(fused, backend=backend)
    x = torch.randn(3, 3, 6, 7)
    actual, expected = train_step(fused, x), train_step(eager, x)
    assert torch.equal(actual["gradient of 0.bias"], torch.zeros(4))
    assert expected["gradient of 0.bias"].abs().max() < 1e-4
    assert relative_error(actual["1.running_mean"], expected["1.running_mean"]) < 1e-6
    assert relative_error(actual["out"], expected["out"]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [True, False], ids=["last layer", "first layer"])
def test_a_mean_of_1000_standard_deviations(last: bool, backend: str) -> None:
    """What is subtracted is large: errors against float64 at most twice eager's (E[x^2] - E[x]^2 would leave nothing)."""
    net = randomise(BasicBlock(4, 4)).train()
    conv = net.conv2 if last else net.conv1
    conv.bias = nn.Parameter(torch.tensor([1000.0, -700.0, 0.0, 300.0]))
    eager, fused = copies(net)
    fuse(fused, backend=backend)
    errors: dict[str, list[list[float]]] = {}
    for _ in range(5):
        x = torch.randn(4, 4, 13, 11)
        truth = train_step(copy.deepcopy(net).double(), x.double())
        layouts = (x, x.contiguous(memory_format=torch.channels_last))
        theirs = [train_step(copy.deepcopy(eager), given) for given in layouts]
        ours = train_step(copy.deepcopy(fused), x)
        for what, expected in truth.items():
            if "conv" not in what or "bias" not in what:
                own = max(distance([(t[what], expected)]) for t in theirs)
                errors.setdefault(what, []).append([distance([(ours[what], expected)]), own])
    for what, pairs in errors.items():
        actual, own = (sorted(pair[i] for pair in pairs)[len(pairs) // 2] for i in (0, 1))
        assert_no_worse(actual, own, what)


# ------------------------------------------------------------------------------------------------ non-finite values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["x", "gradient", "conv1.weight", "bn1.weight", "bn2.bias", "bn1.running_mean"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_travel_as_in_eager(value: float, where: str, backend: str) -> None:
    """NaN and inf stand in the same places: GradScaler skips the same steps, and a diverged network looks diverged."""
    net = randomise(BasicBlock(4, 4)).train()
    net.conv1 = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)  # one channel's trouble stays in that channel for a while
    x, dout = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    if where == "x":
        x[1, 2, 3, 4] = value
    elif where == "gradient":
        with torch.no_grad():
            place = (copy.deepcopy(net)(x)[0] > 0).nonzero()[0].tolist()
        dout[(0, *place)] = value
    else:
        net.state_dict()[where].view(-1)[1] = value
    eager, fused = copies(net)
    fuse(fused, backend=backend)
    expected, actual = train_step(eager, x, dout), train_step(fused, x, dout)
    assert (where, value) == ("bn2.bias", -float("inf")) or any(not t.isfinite().all() for t in expected.values())
    for what, truth in expected.items():
        assert torch.equal(actual[what].isfinite(), truth.isfinite()), what
        fine = truth.isfinite()
        if fine.any():
            assert relative_error(actual[what][fine], truth[fine]) < 1e-3, what
    assert torch.equal(actual["out"].isnan(), expected["out"].isnan())
    for key in ("bn1.running_mean", "bn1.running_var", "bn2.running_mean", "bn2.running_var"):
        assert torch.equal(actual[key].isnan(), expected[key].isnan()), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nonfinite_gradient_behind_a_dead_relu_is_masked_as_in_eager(backend: str) -> None:
    net = randomise(BasicBlock(4, 4)).train()
    x, dout = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    place = (copy.deepcopy(net)(x)[0] <= 0).nonzero()[0].tolist()
    dout[(0, *place)] = float("nan")
    eager, fused = copies(net)
    expected, actual = train_step(eager, x, dout), train_step(fuse(fused, backend=backend), x, dout)
    for what, truth in expected.items():
        assert torch.equal(actual[what].isfinite(), truth.isfinite()) and truth.isfinite().all(), what


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend: str) -> None:
    """An empty batch: eager's shapes, and its running statistics, whatever they become."""
    eager, fused = copies(randomise(BasicBlock(4, 4)).train())
    fuse(fused, backend=backend)
    x = torch.zeros(0, 4, 6, 5)
    expected, actual = train_step(eager, x), train_step(fused, x)
    for what, truth in expected.items():
        assert actual[what].shape == truth.shape and actual[what].dtype == truth.dtype, what
        assert torch.equal(actual[what].isnan(), truth.isnan()), what
        assert torch.equal(actual[what].nan_to_num(), truth.nan_to_num()), what


# ------------------------------------------------------------------------------------------------ memory


def test_memory_is_checked() -> None:
    with pytest.raises(ValueError, match=r"memory must be one of 'default', 'less', 'low', got 'lo'"):
        fuse(BasicBlock(4, 4), memory="lo")
    net = fuse(BasicBlock(4, 4))
    net.fused_memory = "lo"
    with pytest.raises(ValueError, match=r"memory must be one of 'default', 'less', 'low', got 'lo'"):
        net.train()(torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_memory_gives_the_same_gradients(backend: str) -> None:
    """A convolution computed again is the same convolution: to the bit."""
    net = randomise(nn.Sequential(BasicBlock(4, 4), Bottleneck(4, 2, 2, projection(4, 8, 2)), Bottleneck(8, 2))).train()
    default, low = copies(net)
    fuse(default, backend=backend), fuse(low, backend=backend, memory="low")
    x = torch.randn(3, 4, 9, 7)
    first, second = train_step(default, x), train_step(low, x)
    assert all(torch.equal(first[what], second[what]) for what in first)


def test_each_block_can_choose_its_memory() -> None:
    net = fuse(nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4)).train(), backend="reference")
    net[1].fused_memory = "low"
    launched = []
    for block in net:
        with count_launches() as log:
            block(torch.randn(2, 4, 5, 5)).sum().backward()
        launched.append([launch.kind for _, launch in log.launches].count("conv"))
    assert launched == [2, 3]
    told = explain(net, show=False)
    assert [sum(count for _, count in row.backward) for row in told.rows] == [5, 6]
    unfuse(net)
    assert "fused_memory" not in net[1].__dict__
    assert fused_resnet.BasicBlock(4, 4).fused_memory == "default"


@pytest.mark.parametrize("memory", ["default", "less", "low"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_backward_inside_autocast_runs_in_the_forwards_types(backend: str, memory: str) -> None:
    """What is computed again, too: it was of bf16, or an error."""
    layers = (nn.Conv2d(8, 12, 3), nn.SiLU(), nn.Conv2d(12, 8, 1), nn.SiLU())
    net = randomise(nn.Sequential(Bottleneck(8, 2), BasicBlock(8, 8), nn.Sequential(*layers))).train()
    fused = fuse(copy.deepcopy(net), backend=backend, memory=memory)
    x = torch.randn(2, 8, 9, 7)
    grads = []
    for model in (fused, copy.deepcopy(net).double()):
        out = model(x.to(next(model.parameters()).dtype)).sin().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=model is fused):
            out.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for actual, expected in zip(*grads, strict=True):
        assert relative_error(actual, expected) < 1e-4
