"""Some steps of training, as people do it: the loss follows eager's, and the result moves on into torchvision's classes."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import copies, images, tiny
from tolerances import relative_error
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fused_resnet
from fused_resnet import fuse


def small_resnet() -> ResNet:
    """ResNet with one block a stage, BasicBlocks, narrow."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)


def data() -> tuple[Tensor, Tensor]:
    """48 images in four classes that a network can tell apart: noise with a pattern of the class."""
    generator = torch.Generator().manual_seed(7)
    patterns = torch.randn(4, 3, 24, 24, generator=generator)
    y = torch.arange(48) % 4
    return 0.7 * torch.randn(48, 3, 24, 24, generator=generator) + 0.6 * patterns[y], y


def losses(
    model: nn.Module, steps: int, shuffle: int | None = None, layout: torch.memory_format = torch.contiguous_format
) -> list[float]:
    """Loss of each SGD step on batches of 16; ``shuffle`` orders the images within each batch differently."""
    x, y = data()
    x = x.contiguous(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    curve = []
    for step in range(steps):
        index = torch.arange(16) + 16 * (step % 3)
        if shuffle is not None:
            index = index[torch.randperm(16, generator=torch.Generator().manual_seed(100 * shuffle + step))]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[index]), y[index])
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def accuracy(model: nn.Module) -> float:
    x, y = data()
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).float().mean().item()


@pytest.mark.parametrize("steps", [16, pytest.param(50, marks=pytest.mark.slow)])
def test_a_training_run_follows_eagers(steps: int, tmp_path) -> None:
    """SGD with momentum: the loss stays as near to eager's curves as those are to each other.

    Rounding errors grow from step to step, in eager too; its curves differ by the order of the images in a batch and by the
    memory format. The checkpoint goes into torchvision's class and knows as much.
    """
    start = small_resnet()
    eager = copy.deepcopy(start)
    curves = [losses(eager, steps)]
    for shuffle in (1, 2):
        for layout in (torch.contiguous_format, torch.channels_last):
            curves.append(losses(copy.deepcopy(start), steps, shuffle, layout))
    assert all(curve[-1] < 0.3 * curve[0] for curve in curves), "it learns"
    for backend in ("reference", "cpu"):
        fused = fuse(copy.deepcopy(start), backend=backend)
        ours, spread = losses(fused, steps), 1e-5 * curves[0][0]
        for step in range(steps):
            eagers = [curve[step] for curve in curves]
            spread = max(spread, max(eagers) - min(eagers))
            assert min(eagers) - spread <= ours[step] <= max(eagers) + spread, f"step {step} on {backend}"
        torch.save(fused.state_dict(), tmp_path / f"{backend}.pt")
        plain = small_resnet()
        plain.load_state_dict(torch.load(tmp_path / f"{backend}.pt", weights_only=True))
        assert accuracy(plain) == accuracy(fused) >= 0.9
        assert abs(accuracy(eager) - accuracy(fused)) <= 0.05


def test_blocks_of_our_own_train_with_any_optimizer() -> None:
    """Adam on a model built of our classes, against the same on torchvision's."""
    torch.manual_seed(3)
    ours = nn.Sequential(fused_resnet.Stem(3, 8), fused_resnet.BasicBlock(8, 8), fused_resnet.Bottleneck(8, 2), nn.Flatten())
    theirs = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        BasicBlock(8, 8), Bottleneck(8, 2), nn.Flatten(),
    )  # fmt: skip
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    optimizers = [torch.optim.Adam(model.double().train().parameters(), lr=1e-3) for model in (ours, theirs)]
    for _ in range(3):
        x = torch.randn(3, 3, 17, 19, dtype=torch.float64)
        outs = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            outs.append(model(x))
            outs[-1].square().mean().backward()
            optimizer.step()
        assert relative_error(outs[0], outs[1]) < 1e-6


def test_train_mode_of_a_model_that_was_tiny_in_eval_mode() -> None:
    """Filters folded for inference are not used in training, and are made again afterwards."""
    eager, fused = copies(tiny())
    fuse(fused)
    x = images(4)
    for model in (eager, fused):
        model.eval()(x)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
        nn.functional.cross_entropy(model(x), torch.tensor([0, 3, 1, 4])).backward()
        optimizer.step()
        model.eval()
    assert relative_error(fused(x), eager(x)) < 1e-3
