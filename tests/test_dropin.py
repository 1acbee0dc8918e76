"""What people do to modules besides calling them: transforms, wrappers, odd BatchNorms, slices, nested logs."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from nets import copies, images, randomise, tiny
from tolerances import relative_error
from torch import Tensor, nn
from torch.autograd import forward_ad
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

import fused_resnet
from fused_resnet import count_launches, explain, fuse
from fused_resnet.backends import clock_launches
from fused_resnet.chain import Chain, Layer
from fused_resnet.functional import chain
from fused_resnet.launch import PoolGeometry

CLOSE = 1e-5


def test_forward_mode_and_jvp_see_the_tangent() -> None:
    plain, fused = copies(tiny())
    fuse(fused).requires_grad_(False)
    plain.requires_grad_(False)
    x, tangent = images(), images()
    for run in (lambda model: torch.func.jvp(model, (x,), (tangent,))[1], lambda model: dual(model, x, tangent)):
        assert relative_error(run(fused), run(plain)) < 1e-4


def dual(model: nn.Module, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent


def test_torch_func_grad_and_vmap() -> None:
    plain, fused = copies(tiny())
    fuse(fused)
    x = images()
    first, second = (torch.func.grad(lambda x, model=model: model(x).square().sum())(x) for model in (plain, fused))
    assert relative_error(second, first) < 1e-4
    many = torch.stack([images(), images()])
    assert relative_error(torch.vmap(fused)(many), torch.vmap(plain)(many)) < CLOSE


def test_gradients_after_a_warm_up_in_inference_mode_under_autocast() -> None:
    plain, fused = copies(tiny())
    fuse(fused).requires_grad_(False)
    plain.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            fused(images())
        x = images().requires_grad_()
        fused(x).float().square().sum().backward()
        y = x.detach().clone().requires_grad_()
        plain(y).float().square().sum().backward()
    # Two bf16 programs round a ReLU's input to either side of zero: single elements differ, the direction does not.
    assert torch.cosine_similarity(x.grad.flatten(), y.grad.flatten(), 0) > 0.95


def test_a_batchnorm_with_a_weight_and_no_bias() -> None:
    net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()
    net[1].bias = None
    plain, fused = copies(net)
    with pytest.warns(UserWarning, match="found no"):
        fuse(fused)
    assert relative_error(fused(images()), plain(images())) >= 0
    assert "only one of weight and bias" in explain(fused, show=False).left_alone[0].note


def test_frozen_batchnorm_under_autocast_keeps_eagers_type() -> None:
    net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8), nn.ReLU())).eval()
    plain, fused = copies(net)
    fuse(fused)
    x = images()
    with torch.no_grad():
        assert relative_error(fused(x), plain(x)) < CLOSE
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = plain(x), fused(x)
    assert actual.dtype == expected.dtype == torch.float32
    assert relative_error(actual, expected) < CLOSE


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_batchnorm_that_calls_its_activation_calls_it_once(mode: bool) -> None:
    """timm's; fused, and one by one under a hook."""
    layers = pytest.importorskip("timm.layers")
    norm = layers.BatchNormAct2d(8, act_layer=nn.SiLU)
    plain, fused = copies(randomise(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.MaxPool2d(2))).train(mode))
    fuse(fused)
    x = images()
    assert explain(fused, show=False).rows[0].fused
    assert relative_error(fused(x), plain(x)) < CLOSE
    fused[0].register_forward_hook(lambda *_: None)
    assert relative_error(fused(x), plain(x)) < CLOSE


def test_a_forward_replaced_on_a_convolution_is_called() -> None:
    net = fuse(tiny())
    conv, calls = net.basic.conv1, []
    original = conv.forward
    conv.forward = lambda x: (calls.append(1), original(x))[1]
    net(images())
    assert calls == [1]
    assert "forward was replaced" in next(row.note for row in explain(net, show=False).rows if row.name == "basic")


def test_nested_logs_are_their_own() -> None:
    net = fuse(tiny())
    with torch.no_grad(), count_launches() as outer:
        with count_launches() as inner:
            pass
        net(images())
    assert len(inner) == 0 and len(outer) == 8


def test_nested_clocks_are_their_own() -> None:
    net = fuse(tiny())
    with torch.no_grad(), clock_launches(time.perf_counter) as outer:
        with clock_launches(time.perf_counter) as inner:
            pass
        net(images())
    assert len(inner) == 0 and len(outer) == 8
    assert all(start <= end for _, start, end in outer)


def test_a_slice_of_conv_bn_relu_is_a_sequential() -> None:
    block = fused_resnet.ConvBNReLU(3, 8).eval()
    assert type(block[:2]) is nn.Sequential and block[0] is block[:2][0]


def test_a_slot_read_twice_is_not_written_over() -> None:
    """One weight layer with an identity shortcut: x is the convolution's input and the summand."""
    spec = Chain((Layer("conv1", 4, 4, (3, 3), padding=(1, 1), activation="relu"),), residual=True)
    x = torch.randn(2, 4, 7, 9).contiguous(memory_format=torch.channels_last)
    w = torch.randn(4, 4, 3, 3)
    expected = torch.relu(torch.conv2d(x, w, padding=1) + x)
    with torch.no_grad():
        assert relative_error(chain(x.clone(memory_format=torch.channels_last), [w], spec, donate=True), expected) < CLOSE


def test_filters_shared_by_two_batchnorms_are_folded_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_resnet.backends import cpu

    conv = nn.Conv2d(3, 3, 3, padding=1)
    net = fuse(randomise(nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(), conv, nn.BatchNorm2d(3), nn.ReLU())).eval())
    with torch.no_grad():
        net(images())
        monkeypatch.setattr(cpu.reference, "scale_and_shift", lambda *a: pytest.fail("folded again"))
        net(images())


def test_statistics_of_a_batchnorm_that_is_called_twice() -> None:
    """They move twice, under torch.compile as well: whoever calls it is a chain of its own."""
    norm = nn.BatchNorm2d(4, momentum=0.5)
    row = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), norm, nn.ReLU())
    block = BasicBlock(4, 4)
    block.bn2 = block.bn1
    plain, fused = copies(randomise(nn.Sequential(row, block)).train())
    fuse(fused)
    assert [row.name for row in explain(fused, show=False).rows] == ["0.0", "0.3", "1.conv1", "1.conv2"]
    compiled = copy.deepcopy(fused)
    x = torch.randn(2, 4, 7, 8)
    expected = plain(x)
    assert relative_error(fused(x), expected) < CLOSE
    assert relative_error(torch.compile(compiled, backend="aot_eager")(x), expected) < CLOSE
    for name, value in plain.named_buffers():
        for model in (fused, compiled):
            assert relative_error(model.get_buffer(name).double(), value.double()) < CLOSE, name


def test_pooling_padded_by_more_than_half_its_kernel_is_pytorchs_error() -> None:
    with pytest.raises(RuntimeError, match="at most half"):
        PoolGeometry(1, 8, 8, 3, (2, 2), (2, 2), (2, 2))
    PoolGeometry(1, 8, 8, 3, (3, 3), (2, 2), (1, 1))


def test_complex_convolutions_are_left_to_pytorch() -> None:
    """Its own backward of them is one of real convolutions, which a launch does not know of."""
    net = fuse(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3)))
    assert explain(net, show=False).rows[0].fused
    plain, fused = copies(fused_resnet.unfuse(copy.deepcopy(net)).to(torch.complex64))
    net.to(torch.complex64)
    with pytest.warns(UserWarning, match="found no"):
        fuse(fused)
    assert {row.note for row in explain(net, show=False).left_alone} == {
        "0's weight is torch.complex64, which no executor computes in"
    }
    net.load_state_dict(plain.state_dict())
    x = torch.randn(2, 2, 7, 8, dtype=torch.complex64)
    for model in (plain, fused, net):
        model(x).abs().square().sum().backward()
    for p, a, b in zip(plain.parameters(), fused.parameters(), net.parameters(), strict=True):
        assert torch.equal(p.grad, a.grad) and torch.equal(p.grad, b.grad)


def test_integer_images_under_autocast_are_pytorchs_error() -> None:
    plain, fused = copies(tiny())
    fuse(fused)
    x = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        for model in (plain, fused):
            with pytest.raises(RuntimeError):
                model(x)
