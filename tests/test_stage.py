"""A stage's blocks may write over what they hand to each other, and over nothing else."""

from __future__ import annotations

import pytest
import torch
from nets import copies, projection, randomise
from tolerances import relative_error
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from fused_resnet import blocks, fuse, unfuse

CLOSE = 1e-5


def stage() -> nn.Sequential:
    blocks = nn.Sequential(Bottleneck(16, 8, 1, projection(16, 32)), Bottleneck(32, 8), Bottleneck(32, 8), Bottleneck(32, 8))
    return randomise(blocks).eval()  # type: ignore[return-value]


def images() -> Tensor:
    return torch.randn(2, 16, 9, 11).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@torch.no_grad()
def test_values_are_eagers_and_the_input_survives(backend: str) -> None:
    plain, fused = copies(stage())
    fuse(fused, backend=backend)
    assert isinstance(fused, blocks.FusedStage)
    x = images()
    before = x.clone()
    assert relative_error(fused(x), plain(x)) < CLOSE
    assert torch.equal(x, before)


@torch.no_grad()
def test_inner_results_share_memory() -> None:
    """The point of it: from the second block on, the sum is made in the memory of the block's input."""
    fused = fuse(stage())
    seen: list[tuple[int, int]] = []
    step = blocks.FusedResidual.step

    def watched(self: blocks.FusedResidual, x: Tensor, donate: bool, drop: bool) -> tuple[Tensor, bool]:
        address = x.data_ptr()
        out, ours = step(self, x, donate, drop)
        seen.append((address, out.data_ptr()))
        return out, ours

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks.FusedResidual, "step", watched)
        fused(images())
    assert [into == out for into, out in seen] == [False, True, True, True]


@torch.no_grad()
def test_what_a_hook_inside_an_unfused_block_has_kept_is_not_written_over() -> None:
    """Feature extraction: the hooked block runs unfused, and its last ReLU's output is its result."""
    fused = fuse(stage())
    kept: list[Tensor] = []
    fused[0].relu.register_forward_hook(lambda module, args, output: kept.append(output))
    fused(images())
    first = kept[-1]
    again: list[Tensor] = []
    fused[1].register_forward_pre_hook(lambda module, args: again.append(args[0].clone()))
    x = images()
    fused(x)
    second, copy = kept[-1], again[-1]
    assert torch.equal(second, copy) and first.shape == second.shape


@torch.no_grad()
def test_a_block_whose_forward_was_replaced_is_called() -> None:
    fused = fuse(stage())
    calls: list[int] = []
    for index in (1, 2):
        original = fused[index].forward

        def wrapped(x: Tensor, original: object = original, index: int = index) -> Tensor:
            calls.append(index)
            return original(x)  # type: ignore[operator]

        fused[index].forward = wrapped  # type: ignore[method-assign]
    fused(images())
    assert calls == [1, 2]


@pytest.mark.parametrize("kind", ["forward", "pre", "everywhere"])
@torch.no_grad()
def test_what_a_hook_has_seen_is_not_written_over(kind: str) -> None:
    plain, fused = copies(stage())
    fuse(fused)
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(*arguments: object) -> None:
        tensor = arguments[-1]
        tensor = tensor[0] if isinstance(tensor, tuple) else tensor
        assert isinstance(tensor, Tensor)
        kept.append((tensor, tensor.clone()))

    if kind == "everywhere":
        handle = nn.modules.module.register_module_forward_hook(keep)
    else:
        handle = fused[1].register_forward_hook(keep) if kind == "forward" else fused[2].register_forward_pre_hook(keep)
    x = images()
    try:
        assert relative_error(fused(x), plain(x)) < CLOSE
    finally:
        handle.remove()
    blocks_outputs = [pair for pair in kept if pair[0].shape[1] == 32 or kind != "everywhere"]
    assert blocks_outputs
    if kind != "everywhere":  # eager's own in-place ReLU writes over what global hooks saw
        assert all(torch.equal(tensor, copy) for tensor, copy in kept)


def test_gradients_flow_through_a_stage() -> None:
    plain, fused = copies(stage())
    fuse(fused)
    x, y = images().requires_grad_(), None
    fused(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    plain(y).square().sum().backward()
    assert relative_error(x.grad, y.grad) < 1e-4
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-4


def test_unfused_stage_is_the_sequential_it_was() -> None:
    fused = fuse(stage())
    assert type(unfuse(fused)) is nn.Sequential and type(fused[1]) is Bottleneck


@torch.no_grad()
def test_a_stage_with_other_modules_between_its_blocks() -> None:
    plain, fused = copies(nn.Sequential(*stage()[:3], nn.Identity(), *stage()[1:3], nn.Dropout(0.5), *stage()[1:2]).eval())
    fuse(fused)
    x = images()
    assert relative_error(fused(x), plain(x)) < CLOSE
