"""What a training step is said to move and to keep: by hand for a few layers, against the plan for blocks, and as ratios."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import count_launches, counts, measure, plain
from fused_resnet.counts import Work

F32 = 4


def named(kernels: tuple[counts.Kernel, ...]) -> list[tuple[str, int]]:
    return [(kernel.name, kernel.bytes) for kernel in kernels]


def test_eager_step_by_the_rule() -> None:
    """conv (with bias), BatchNorm, ReLU on x[2, 3, 5, 5] with 8 filters; x needs a gradient. v is a vector of 8."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).train()
    x, w, y, v = F32 * 2 * 3 * 25, F32 * 8 * 3 * 9, F32 * 2 * 8 * 25, F32 * 8
    step = counts.step(model, torch.randn(2, 3, 5, 5, requires_grad=True))
    assert named(step.forward) == [
        ("convolution", x + w + v + y),
        ("add_", 2 * 8),  # num_batches_tracked
        ("native_batch_norm", 2 * y + 4 * v + 2 * v),  # gamma, beta, the running ones; mean and invstd
        ("relu", 2 * y),
    ]
    assert named(step.backward) == [
        ("threshold_backward", 3 * y),
        ("native_batch_norm_backward", 3 * y + 5 * v + 2 * v),  # gamma, the running ones, mean, invstd; dgamma, dbeta
        ("convolution_backward: dgrad", x + w + y),
        ("convolution_backward: wgrad", x + w + y),
        ("convolution_backward: bgrad", y + v),
    ]
    flops = 2 * 2 * 25 * 8 * 27
    assert [kernel.flops for kernel in step.kernels if kernel.flops] == [flops] * 3
    assert Work.of(counts.in_passes(step.kernels)) == Work.of(step.kernels) + Work(2, 0, y + 2 * y)
    assert (
        step.saved == x + y + 2 * v + y
    )  # of the convolution, BatchNorm (mean and invstd too), ReLU; parameters are there anyway


def test_frozen_statistics_need_one_pass() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    step = counts.step(model, torch.randn(2, 3, 5, 5))
    assert counts.in_passes(step.kernels) == list(step.kernels)


def test_groups_and_transposed_convolutions_backward() -> None:
    """dgrad and wgrad take the forward's operations; without a gradient of x there is no dgrad."""
    for layer in (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False)):
        step = counts.step(layer, torch.randn(2, 4, 5, 7))
        assert [kernel.name for kernel in step.backward] == ["convolution_backward: wgrad"]
        assert step.backward[0].flops == step.forward[0].flops > 0


def test_max_pool_writes_and_reads_its_indices() -> None:
    """In a training step; a forward alone does without them."""
    model, x = nn.MaxPool2d(2), torch.randn(1, 2, 4, 4, requires_grad=True)
    image, pooled, indices = F32 * 32, F32 * 8, 8 * 8
    step = counts.step(model, x)
    assert named(step.forward) == [("max_pool2d_with_indices", image + pooled + indices)]
    assert named(step.backward) == [("max_pool2d_with_indices_backward", pooled + image + indices + image)]
    assert [kernel.bytes for kernel in counts.kernels(model, x)] == [image + pooled]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("memory", ["default", "low"])
def test_fused_step_is_the_launches_that_ran(device: str, memory: str) -> None:
    """In both directions; the operators inside an executor do not count beside its launches, what is outside the plans does."""
    with torch.device(device):
        eager = plain.ResNet(plain.BasicBlock, [1, 1, 1, 1]).train()
        x = torch.zeros(2, 3, 33, 32)
    fused = fused_resnet.fuse(copy.deepcopy(eager), memory=memory)
    with count_launches() as log:
        step = counts.step(fused, x)
    ran = [launch for _, launch in log.launches]
    assert [kernel.name for kernel in step.kernels if kernel.fused] == [str(launch) for launch in ran]
    assert sum(kernel.bytes for kernel in step.kernels if kernel.fused) == sum(launch.bytes for launch in ran)
    left = [kernel.name for kernel in step.kernels if not kernel.fused]
    layout = ["new_zeros", "copy_"] if device == "cpu" else []  # what flatten makes of channels_last
    assert left == ["mean", "addmm", "mm", "mm", "sum", *layout, "div"]
    theirs = counts.step(eager, x)
    again = 1 + 4 + 3 if memory == "low" else 0  # the stem's convolution, the last one of each block, the projections
    assert len(ran) == 2 + 3 + 4 * 3 + 2 + 5 + 7 * 3 + again
    if memory == "default":
        assert Work.of(step.kernels).flops == Work.of(theirs.kernels).flops
    assert not any(module._forward_hooks or "step" in vars(module) for module in fused.modules())


def test_a_step_leaves_no_gradients() -> None:
    model = fused_resnet.fuse(plain.BasicBlock(4, 4).train())
    counts.step(model, torch.randn(2, 4, 5, 5))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_frozen_model_has_no_backward() -> None:
    model = plain.BasicBlock(4, 4).requires_grad_(False)
    step = counts.step(model, torch.randn(2, 4, 5, 5))
    assert len(step.forward) == 9 and step.backward == () and step.saved == 0  # 7 and two num_batches_tracked


@pytest.mark.parametrize(
    ("name", "moved", "passes", "saved", "low"),
    [("resnet18", 0.637, 0.554, 0.656, 0.276), ("resnet50", 0.688, 0.596, 0.793, 0.322)],
)
def test_ratios_of_networks(name: str, moved: float, passes: float, saved: float, low: float) -> None:
    """Of eager: bytes moved, the same with BatchNorm in its two passes, bytes kept by default and with memory="low"."""
    vision = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        eager = getattr(vision, name)().train()
        x = torch.empty(8, 3, 224, 224)
    own, fused = counts.step(eager, x), counts.step(fused_resnet.fuse(copy.deepcopy(eager)), x)
    low_memory = fused_resnet.fuse(copy.deepcopy(eager), memory="low")
    frugal = counts.step(low_memory, x)
    with fused_resnet.backend("reference"):
        kept = measure.saved_bytes(lambda: low_memory(x), (*low_memory.parameters(), *low_memory.buffers()))
    assert frugal.saved == kept, "counting changes what is counted"
    rules = [Work.of(kernels).bytes for kernels in (own.kernels, counts.in_passes(own.kernels))]
    found = [Work.of(fused.kernels).bytes / eagers for eagers in rules]
    found += [step.saved / own.saved for step in (fused, frugal)]
    assert found == pytest.approx([moved, passes, saved, low], abs=0.002)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_saved_bytes_counts_each_storage_once(device: str) -> None:
    """Views and tensors saved twice once, what is skipped not at all, and nothing without gradients."""
    w = torch.ones(6, device=device, requires_grad=True)
    x = torch.ones(6, device=device)
    assert measure.saved_bytes(lambda: (w * x).sum()) == 6 * F32  # x; w is not wanted by anyone
    assert measure.saved_bytes(lambda: (w * x + w.view(2, 3).mul(x.view(2, 3)).view(6)).sum()) == 6 * F32
    assert measure.saved_bytes(lambda: w * w) == 6 * F32
    assert measure.saved_bytes(lambda: w * w, [w]) == 0
    assert measure.saved_bytes(lambda: w.exp().exp()) == 2 * 6 * F32
    assert measure.saved_bytes(lambda: w[:2] * x[:2]) == 6 * F32  # a view keeps the whole
    with torch.no_grad():
        assert measure.saved_bytes(lambda: w * x) == 0
