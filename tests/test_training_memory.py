"""What autograd keeps between forward and backward, in bytes, against eager PyTorch: the numbers of docs/training.md."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torchvision
from nets import CHAINS, chain_inputs, in_training, randomise, saved_bytes
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

import fused_resnet
from fused_resnet import fuse
from fused_resnet.functional import chain
from fused_resnet.plan import kept_slots, trainable_slots

BACKENDS = ("reference", "cpu")


def frozen(model: nn.Module) -> nn.Module:
    """All BatchNorms in eval mode; the weights train."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "memory", "statistics", "most"),
    [
        ("resnet18", "default", "live", 0.68),
        ("resnet50", "default", "live", 0.80),
        ("resnet50", "low", "live", 0.50),
        ("resnet50", "default", "frozen", 0.55),
    ],
)
def test_saved_bytes_of_networks(name: str, memory: str, statistics: str, most: float, backend: str) -> None:
    """One image of 96x96, fp32; each storage once, parameters and buffers left out."""
    eager = getattr(torchvision.models, name)().train()
    if statistics == "frozen":
        frozen(eager)
    x = torch.randn(1, 3, 96, 96)
    fused = fuse(copy.deepcopy(eager), backend=backend, memory=memory)
    ratio = saved_bytes(fused, x) / saved_bytes(eager, x)
    print(f"saved for backward, {name} {memory} {statistics} {backend}: {ratio:.3f}")  # shown by pytest -rP
    assert 0.3 < ratio <= most


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["default", "low"])
def test_a_bottleneck_keeps_what_the_design_says(memory: str, backend: str) -> None:
    """Width w: x (the shortcut too), y_1, y_2, y_3 and out are 14 w, and out is the next block's x. Low: all but y_3."""
    width, n, h, w = 8, 2, 9, 7
    block = fuse(randomise(Bottleneck(4 * width, width)).train(), backend=backend, memory=memory)
    x = torch.randn(n, 4 * width, h, w).contiguous(memory_format=torch.channels_last).requires_grad_()
    activations = (14 if memory == "default" else 10) * width * n * h * w * 4
    statistics = 2 * (width + width + 4 * width) * 4
    assert activations < saved_bytes(block, x) <= activations + 2 * statistics


def test_frozen_batch_norm_keeps_no_convolution_output() -> None:
    """x, a_1 and out of a BasicBlock, and no byte more; torchvision's FrozenBatchNorm2d too."""
    for norm in (nn.BatchNorm2d, FrozenBatchNorm2d):
        block = fuse(randomise(BasicBlock(8, 8, norm_layer=norm)).eval())
        x = torch.randn(2, 8, 7, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
        assert saved_bytes(block, x) == 3 * x.numel() * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_stem_keeps_bytes_for_places(backend: str) -> None:
    """x, the convolution's output, an arg-max in a byte and the result, which is the next block's x: no ReLU's, no int64."""
    stem = fused_resnet.Stem(3, 8).train()
    stem.fused_backend = backend
    x = torch.randn(2, 3, 33, 35).contiguous(memory_format=torch.channels_last)
    y, pooled = 2 * 8 * 17 * 18, 2 * 8 * 9 * 9
    kept = saved_bytes(stem, x)
    tensors = x.numel() * 4 + y * 4 + pooled + pooled * 4
    assert tensors < kept <= tensors + 4 * 8 * 4


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nothing_is_kept_without_gradients(training: bool) -> None:
    net = fuse(randomise(Bottleneck(8, 2)).train(training))
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        assert saved_bytes(net, x) == 0 and net(x).grad_fn is None
    net.requires_grad_(False)
    assert saved_bytes(net, x) == 0


def kept(trained: set[str], memory: str = "default", name: str = "bottleneck_dilated") -> set[str]:
    spec = in_training(CHAINS[name][0], memory=memory)
    return {slot for slot in kept_slots(spec, frozenset(trained)) if not slot.endswith((".batch_mean", ".invstd"))}


def test_only_what_the_wanted_gradients_read_is_kept() -> None:
    """Of the activations made inside: filters to train keep their input, and BatchNorms the output of their convolution."""
    spec = CHAINS["bottleneck_dilated"][0]
    assert kept(set(trainable_slots(in_training(spec)))) == {"y1", "y2", "y3", "yd"}
    assert kept(set(trainable_slots(in_training(spec))), "low") == {"y1", "y2"}
    assert kept({"c.beta"}) == kept({"d.w"}) == {"y3", "yd"}
    assert kept({"c.w"}) == kept({"b.beta"}) == {"y2", "y3", "yd"}
    assert kept({"b.beta"}, "low") == {"y2"}
    spec = CHAINS["stem"][0]
    assert kept(set(trainable_slots(in_training(spec))), name="stem") == {"y1", "indices"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_frees_what_was_kept(backend: str) -> None:
    """Nothing stays in a cache behind the step (the CPU executor shares temporaries between the launches of one plan)."""
    spec, h, w = in_training(CHAINS["bottleneck_dilated"][0]), 17, 13
    x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
    chain(x, parameters, spec, backend).sum().backward()
    x.grad = None
    gc.collect()
    alive = [o for o in gc.get_objects() if isinstance(o, Tensor) and o.dim() == 4 and tuple(o.shape[2:]) == (h, w)]
    assert [tensor is x for tensor in alive] == [True]
