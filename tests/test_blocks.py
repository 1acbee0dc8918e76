"""The drop-in modules: their launches when they run, values and gradients in eval mode, training mode, state_dicts, options."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nets import projection, randomise
from tolerances import relative_error
from torch import nn
from torchvision.models import resnet as torchvision_resnet

import fused_resnet
from fused_resnet import BasicBlock, Bottleneck, ConvBNReLU, Stem, count_launches, explain

#: Name -> (block, its plain twin, arguments, launches in eval mode); training is one launch more, each way as in issue 4.
BLOCKS = {
    "BasicBlock": (BasicBlock, torchvision_resnet.BasicBlock, {"inplanes": 8, "planes": 8}, 2),
    "BasicBlock with projection": (
        BasicBlock, torchvision_resnet.BasicBlock, {"inplanes": 8, "planes": 12, "stride": 2, "downsample": (8, 12, 2)}, 3,
    ),
    "Bottleneck": (Bottleneck, torchvision_resnet.Bottleneck, {"inplanes": 16, "planes": 4}, 3),
    "Bottleneck with projection": (
        Bottleneck, torchvision_resnet.Bottleneck, {"inplanes": 8, "planes": 4, "stride": 2, "downsample": (8, 16, 2)}, 4,
    ),
    "Bottleneck with groups": (
        Bottleneck, torchvision_resnet.Bottleneck, {"inplanes": 16, "planes": 4, "groups": 4, "base_width": 32}, 3,
    ),
    "Bottleneck dilated": (Bottleneck, torchvision_resnet.Bottleneck, {"inplanes": 16, "planes": 4, "dilation": 2}, 3),
}  # fmt: skip


def make(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A fused block, torchvision's with the same state, and an input; in eval mode."""
    kind, plain, arguments, _ = BLOCKS[name]
    arguments = dict(arguments)
    side = arguments.pop("downsample", None)
    fused = kind(**arguments, downsample=projection(*side) if side else None)
    other = plain(**arguments, downsample=projection(*side) if side else None)
    randomise(fused)
    other.load_state_dict(fused.state_dict())
    return fused.eval(), other.eval(), torch.randn(2, arguments["inplanes"], 9, 11)


@pytest.mark.parametrize("name", BLOCKS)
def test_launches_when_run(name: str) -> None:
    block, _, x = make(name)
    with torch.no_grad(), count_launches() as log:
        block(x)
    assert len(log) == BLOCKS[name][3] == explain(block, show=False).launches


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", BLOCKS)
def test_eval_mode_values_and_gradients(name: str, backend: str) -> None:
    """Fine-tuning with frozen statistics: every gradient is eager's."""
    block, other, x = make(name)
    x.requires_grad_()
    with fused_resnet.backend(backend):
        out = block(x)
    expected = other(x)
    assert relative_error(out, expected) < 1e-5
    dout = torch.randn_like(expected)
    (dx,) = torch.autograd.grad(out, x, dout, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, x, dout, retain_graph=True)
    assert relative_error(dx, wanted) < 1e-5
    out.backward(dout)
    expected.backward(dout)
    for (key, a), b in zip(block.named_parameters(), other.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 2e-5, key


@pytest.mark.parametrize("name", BLOCKS)
def test_training_mode_is_eagers(name: str) -> None:
    """Values, gradients and running statistics, in the launches of the design's tables."""
    block, other, x = make(name)
    block.double().train(), other.double().train()
    x = x.double().requires_grad_()
    with count_launches() as log:
        out, expected = block(x), other(x)
    forward = BLOCKS[name][3] + 1
    assert len(log) == forward == explain(block, show=False).launches
    assert relative_error(out, expected) < 1e-12
    dout = torch.randn_like(expected)
    with count_launches() as log:
        out.backward(dout)
    assert len(log) == 2 * forward - 1, "a dgrad and a wgrad for each convolution, and bn_add_relu_backward"
    dx, x.grad = x.grad, None
    expected.backward(dout)
    assert relative_error(dx, x.grad) < 1e-12
    for (key, a), b in zip(block.named_parameters(), other.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-11, key
    for (key, a), (_, b) in zip(block.named_buffers(), other.named_buffers(), strict=True):
        assert relative_error(a, b) < 1e-12, key
    assert "stats" in explain(block, show=False).rows[0].note


@pytest.mark.parametrize("name", BLOCKS)
def test_state_dict_is_torchvisions(name: str) -> None:
    block, other, _ = make(name)
    assert list(block.state_dict()) == list(other.state_dict())


@pytest.mark.parametrize("name", BLOCKS)
def test_copies_and_pickles_run_fused(name: str) -> None:
    block, _, x = make(name)
    expected = block(x)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(twin) is type(block)
        with count_launches() as log:
            assert torch.equal(twin(x), expected)
        assert len(log) == BLOCKS[name][3]


def test_stem_is_two_launches_and_eager() -> None:
    stem = randomise(Stem(3, 8)).eval()
    plain = nn.Sequential(stem.conv1, stem.bn1, nn.ReLU(), stem.maxpool)
    for shape in ((2, 3, 33, 35), (1, 3, 8, 8), (1, 3, 1, 1)):
        x = torch.randn(shape)
        with torch.no_grad(), count_launches() as log:
            out = stem(x)
        assert [launch.kind for _, launch in log.launches] == ["conv", "max_pool"]
        assert relative_error(out, plain(x)) < 1e-5
    assert explain(stem, show=False).launches == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"relu": False}, {"bias": True}, {"stride": 2}, {"kernel_size": 1}, {"kernel_size": (1, 7)},
        {"kernel_size": 5, "groups": 2},
        {"dilation": 2}, {"dilation": (2, 3)}, {"padding": 0}, {"padding": (0, 2)}, {"kernel_size": 4, "stride": (2, 1)},
        {"groups": 4}, {"backend": "reference"},
    ],
    ids=str,
)  # fmt: skip
def test_conv_bn_relu_is_a_sequential_in_one_launch(arguments: dict) -> None:
    module = randomise(ConvBNReLU(4, 8, **arguments)).eval()
    x = torch.randn(2, 4, 13, 12)
    expected = x
    for child in module.children():
        expected = child(expected)
    with torch.no_grad(), count_launches() as log:
        out = module(x)
    assert len(log) == 1
    assert log.launches[0][0] == arguments.get("backend", "cpu")
    assert relative_error(out, expected) < 1e-5
    assert next(iter(module.state_dict())) == "0.weight"
    if not {"padding", "stride"} & set(arguments) and arguments.get("kernel_size") != 4:
        assert out.shape[2:] == x.shape[2:], "the default padding keeps the size"


def test_conv_bn_relu_pickles_and_copies() -> None:
    module = randomise(ConvBNReLU(3, 4, backend="cpu")).eval()
    x = torch.randn(1, 3, 8, 8)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is ConvBNReLU and twin.fused_backend == "cpu"
        assert torch.equal(twin(x), module(x))


def test_unknown_backend_is_refused_when_the_block_is_built() -> None:
    with pytest.raises(ValueError, match="backend must be one of 'triton', 'cpu', 'reference', got 'tpu'"):
        ConvBNReLU(3, 4, backend="tpu")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"groups": 2}, ValueError), ({"base_width": 128}, ValueError), ({"dilation": 2}, NotImplementedError)],
    ids=str,
)
def test_basic_block_refuses_what_torchvisions_refuses(arguments: dict, error: type[Exception]) -> None:
    for kind in (BasicBlock, torchvision_resnet.BasicBlock):
        with pytest.raises(error):
            kind(8, 8, **arguments)


@pytest.mark.parametrize(
    "norm", [nn.SyncBatchNorm, lambda c: nn.BatchNorm2d(c, affine=False), lambda c: nn.BatchNorm2d(c, eps=0.1)]
)
def test_other_batch_norms_are_fused(norm: object) -> None:
    block = randomise(BasicBlock(4, 4, norm_layer=norm)).eval()
    x = torch.randn(2, 4, 7, 7)
    expected = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))) + x)
    with count_launches() as log:
        assert relative_error(block(x), expected) < 1e-5
    assert len(log) == 2


def test_without_running_statistics_the_batchs_are_used_in_eval_mode_too() -> None:
    block = randomise(BasicBlock(4, 4, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False))).eval()
    x = torch.randn(2, 4, 7, 7)
    expected = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))) + x)
    with count_launches() as log:
        assert relative_error(block(x), expected) < 1e-5
    assert len(log) == 3


@pytest.mark.parametrize("norm", [nn.Identity, nn.InstanceNorm2d])
def test_what_is_no_batch_norm_runs_in_pytorch(norm: object) -> None:
    """And gives eager's result all the same."""
    block = BasicBlock(4, 4, norm_layer=norm).eval()
    x = torch.randn(2, 4, 7, 7)
    expected = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))) + x)
    with count_launches() as log:
        assert relative_error(block(x), expected) < 1e-6
    assert len(log) == 0
    assert explain(block, show=False).rows[0].backend == "pytorch"


@pytest.mark.parametrize("live", [1, 2])
def test_one_batch_norm_in_training_mode(live: int) -> None:
    """The other keeps its statistics; where the last one is frozen, no launch is needed behind the convolutions."""
    block = randomise(BasicBlock(4, 4)).eval()
    getattr(block, f"bn{live}").train()
    other = copy.deepcopy(block)
    x = torch.randn(2, 4, 7, 7)
    with count_launches() as log:
        out = block(x)
    assert len(log) == (2 if live == 1 else 3)
    expected = torch.relu(other.bn2(other.conv2(torch.relu(other.bn1(other.conv1(x))))) + x)
    assert relative_error(out, expected) < 1e-5
    for (key, a), (_, b) in zip(block.named_buffers(), other.named_buffers(), strict=True):
        assert torch.allclose(a, b), key
    assert getattr(block, f"bn{live}").num_batches_tracked == 1 and getattr(block, f"bn{3 - live}").num_batches_tracked == 0
