"""What only a GPU can show: graph capture, no allocation but outputs, no host synchronisation."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from nets import randomise
from tolerances import relative_error

from fused_resnet import fuse
from fused_resnet.specimens import eager_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """fp32 is fp32, and no tf32, PyTorch's default for convolutions."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def half_resnet() -> torch.nn.Module:
    model = eager_model("resnet18").cuda()
    randomise(model)
    return model.half().to(memory_format=torch.channels_last)


def batch() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, device="cuda", dtype=torch.half).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_graph_capture_replays_with_new_inputs_and_new_parameters() -> None:
    eager = half_resnet()
    fused = fuse(copy.deepcopy(eager))
    x = batch()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        fused(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused(x)
    for _ in range(2):
        x.copy_(batch())
        for model in (eager, fused):
            model.bn1.running_mean.add_(0.25)
            model.layer1[0].conv1.weight.mul_(1.25)
        graph.replay()
        truth = copy.deepcopy(eager).double()(x.double())
        assert relative_error(out, truth) <= 2 * relative_error(eager(x), truth)


@torch.no_grad()
def test_forward_neither_synchronises_nor_allocates_beyond_activations() -> None:
    fused = fuse(half_resnet())
    x = batch()
    fused(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = fused(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rounded = -(-out.numel() * out.element_size() // 512) * 512
    assert torch.cuda.memory_allocated() - before <= rounded


@torch.no_grad()
def test_tf32_is_used_exactly_when_pytorch_allows_it_for_convolutions() -> None:
    eager = eager_model("resnet18").cuda()
    randomise(eager)
    fused = fuse(copy.deepcopy(eager))
    x = batch().float()
    truth = copy.deepcopy(eager).double()(x.double())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = relative_error(fused(x), truth)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        rounded = relative_error(fused(x), truth)
    assert exact <= 1e-5
    assert rounded > 10 * exact


def test_a_training_step_is_captured_and_replayed() -> None:
    torch.manual_seed(0)
    eager = eager_model("resnet18").cuda().to(memory_format=torch.channels_last).train()
    randomise(eager)
    fused = fuse(copy.deepcopy(eager))
    x = torch.randn(4, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    before = copy.deepcopy(fused.state_dict())
    with torch.cuda.stream(side):
        for _ in range(2):
            fused(x).square().mean().backward()
    torch.cuda.current_stream().wait_stream(side)
    fused.load_state_dict(before)
    fused.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused(x).square().mean().backward()
    fused.load_state_dict(before)
    graph.replay()
    double = copy.deepcopy(eager).double()
    double(x.double()).square().mean().backward()
    eager(x).square().mean().backward()
    for mine, theirs, truth in zip(fused.parameters(), eager.parameters(), double.parameters(), strict=True):
        assert relative_error(mine.grad, truth.grad) <= max(2 * relative_error(theirs.grad, truth.grad), 1e-6)
    for mine, truth in zip(fused.buffers(), double.buffers(), strict=True):
        assert relative_error(mine, truth) <= 1e-3


def test_a_training_step_does_not_synchronise_and_is_reproducible() -> None:
    model = fuse(eager_model("resnet18").cuda().to(memory_format=torch.channels_last).train())
    x = torch.randn(4, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    model(x).square().mean().backward()
    gradients = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)
