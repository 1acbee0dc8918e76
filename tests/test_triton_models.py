"""Whole networks through the Triton kernels (the interpreter's where there is no GPU), against float64 eager PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from nets import projection, randomise, train_step
from tolerances import NETWORK_FP32, relative_error
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fused_resnet import count_launches, fuse

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def small_bottleneck_net() -> nn.Module:
    """Torchvision's ResNet with few Bottlenecks and everything in them: projection, identity, stride 2, dilation, groups."""
    return torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck,
        [2, 1, 1, 1],
        num_classes=10,
        groups=2,
        width_per_group=32,
        replace_stride_with_dilation=[False, True, False],
    )


NETS = {"resnet18": (torchvision.models.resnet18, 64, 21), "bottlenecks": (small_bottleneck_net, 47, 21)}


@pytest.fixture(params=NETS, scope="module")
def net(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor, int]:
    build, size, launches = NETS[request.param]
    torch.manual_seed(0)
    model = build().eval().to(DEVICE)
    randomise(model)
    return model, torch.randn(2, 3, size, size, device=DEVICE), launches


@torch.no_grad()
def test_fp32_logits_equal_eager_and_every_launch_is_one_kernel(net: tuple[nn.Module, torch.Tensor, int]) -> None:
    model, x, launches = net
    fused = fuse(copy.deepcopy(model), backend="triton")
    with count_launches() as log, torch.backends.cudnn.flags(allow_tf32=False):
        actual = fused(x)
        expected = model(x)
    assert relative_error(actual, expected) <= NETWORK_FP32
    assert relative_error(actual, copy.deepcopy(model).double()(x.double())) <= NETWORK_FP32
    assert len(log) == len(log.kernels) == launches
    assert {backend for backend, _ in log.launches} == {"triton"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision_is_no_worse_than_twice_eager(net: tuple[nn.Module, torch.Tensor, int], dtype: torch.dtype) -> None:
    model, x, _ = net
    low, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    truth = copy.deepcopy(low).double()(x.double())
    eager = relative_error(low(x), truth)
    actual = relative_error(fuse(copy.deepcopy(low), backend="triton")(x), truth)
    assert actual <= 2 * eager, f"fused {actual:.1e}, eager {eager:.1e} from float64"


@torch.no_grad()
def test_half_model_with_fp32_batchnorm() -> None:
    """The usual mixed model: filters and activations in bf16, BatchNorm's vectors in fp32."""
    torch.manual_seed(1)
    model = small_bottleneck_net().eval().to(DEVICE)
    randomise(model)
    low = copy.deepcopy(model).to(torch.bfloat16)
    for name, module in low.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float().load_state_dict(model.get_submodule(name).state_dict())
    x = torch.randn(1, 3, 40, 40, device=DEVICE).to(torch.bfloat16)
    truth = copy.deepcopy(low).double()(x.double())
    actual = fuse(copy.deepcopy(low), backend="triton")(x)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, truth) <= 2 * relative_error(low(x), truth)


def residual_net(last: int = 64) -> nn.Module:
    """A stem, both kinds of blocks with and without a projection, stride 2 and groups, small enough to train interpreted."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        BasicBlock(16, 16),
        BasicBlock(16, 32, 2, projection(16, 32, 2)),
        Bottleneck(32, 8),
        Bottleneck(32, last // 4, 2, projection(32, last, 2), groups=4),
    )


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients and running statistics of one training step."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        return train_step(model, x)


def errors(made: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of each, the counters of batches left out (equal)."""
    return {key: relative_error(made[key], truth[key]) for key in truth if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("build", "size"),
    [
        pytest.param(residual_net, 45, id="both blocks"),
        pytest.param(lambda: torchvision.models.resnet18(num_classes=10), 67, id="resnet18", marks=pytest.mark.slow),
    ],
)
def test_a_training_step_is_eagers_and_every_launch_is_one_kernel(build: Callable[[], nn.Module], size: int) -> None:
    torch.manual_seed(0)
    eager = randomise(build()).to(DEVICE).train()
    x = torch.randn(3, 3, size, size - 2, device=DEVICE)
    fused, double = fuse(copy.deepcopy(eager), backend="triton"), copy.deepcopy(eager).double()
    with count_launches() as log:
        made = step(fused, x)
    assert {backend for backend, _ in log.launches} == {"triton"}
    assert len(log.kernels) == len(log)
    truth = step(double, x.double())
    own, allowed = errors(made, truth), errors(step(eager, x), truth)
    worst = {key: (own[key], allowed[key]) for key in own if own[key] > max(2 * allowed[key], 1e-5)}
    assert not worst
    assert max(own.values()) <= 2 * max(allowed.values())


def test_a_training_step_gives_the_same_bits_twice() -> None:
    torch.manual_seed(0)
    model = fuse(randomise(residual_net(16)).to(DEVICE).train(), backend="triton")
    x = torch.randn(2, 3, 29, 31, device=DEVICE)
    first, second = (step(copy.deepcopy(model), x) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
