"""What goes wrong in training mode: PyTorch's exception type, what the message names, and a state that is left as it was."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from nets import copies, live, look_at_launches, randomise, state_of
from tolerances import relative_error
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fused_resnet import backends, count_launches, fuse
from fused_resnet.backends.triton_start import Start
from fused_resnet.chain import Chain, Layer
from fused_resnet.launch import Launch
from fused_resnet.plan import forward_plan
from fused_resnet.tuning import Choice

BACKENDS = ("reference", "cpu")


def refused(model: nn.Module, x: Tensor) -> Exception:
    """What the model raises."""
    with pytest.raises(Exception) as caught:
        model(x).sum().backward()
    return caught.value


@pytest.mark.parametrize("stride", [1, 2])
def test_one_value_per_channel_is_pytorchs_error_and_changes_nothing(stride: int) -> None:
    """Also where only a later layer has one value: nothing has run by then. (Eager has counted the batch when it raises.)"""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2, stride), nn.BatchNorm2d(4), nn.ReLU()
    )
    eager, fused = copies(randomise(net).train())
    fuse(fused)
    x = torch.randn(1, 3, 2, 2)
    before = state_of(fused)
    theirs, ours = refused(eager, x), refused(fused, x)
    assert type(ours) is type(theirs) is ValueError
    assert "more than 1 value per channel when training, got input size torch.Size([1, 4, 1, 1])" in str(ours)
    assert "more than 1 value per channel when training, got input size torch.Size([1, 4, 1, 1])" in str(theirs)
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())
    fused.eval()
    assert fused(x).shape == (1, 4, 1, 1)
    assert fused.train()(torch.randn(2, 3, 2, 2)).shape == (2, 4, 1, 1), "two images have two values"


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("length", [1, 3, 5])
def test_running_statistics_of_the_wrong_length(name: str, length: int) -> None:
    eager, fused = copies(randomise(BasicBlock(4, 4)).train())
    fuse(fused)
    for model in (eager, fused):
        setattr(model.bn2, name, torch.ones(length))
    before = state_of(fused)
    x = torch.randn(2, 4, 5, 5)
    theirs, ours = refused(eager, x), refused(fused, x)
    assert type(ours) is type(theirs) is RuntimeError
    assert name in str(ours) and str(length) in str(ours) and "4" in str(ours)
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())


def test_a_shortcut_that_does_not_fit_changes_nothing() -> None:
    net = fuse(randomise(BasicBlock(4, 6)).train())
    before = state_of(net)
    assert isinstance(refused(net, torch.randn(2, 4, 5, 5)), RuntimeError)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changed", ["conv1.weight", "conv2.weight", "bn1.weight", "bn2.weight", "x"])
def test_a_change_between_forward_and_backward_is_pytorchs_error(changed: str, backend: str) -> None:
    eager, fused = copies(randomise(BasicBlock(4, 4)).train())
    fuse(fused, backend=backend)
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    messages = []
    for model in (eager, fused):
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = model(given)
        with torch.no_grad():
            (given if changed == "x" else model.get_parameter(changed)).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
            out.sum().backward()
        messages.append(str(caught.value))
    assert len(messages) == 2


@pytest.mark.parametrize("changed", [None, "0.bn1.weight", "0.bn2.bias", "0.conv2.weight"])
def test_a_change_behind_a_partial_gradient_is_pytorchs_error(changed: str | None) -> None:
    """The second block's gradients alone make the first one's output again; what that was made of may change before its own."""
    eager, fused = copies(nn.Sequential(randomise(BasicBlock(4, 4)), randomise(BasicBlock(4, 4))).double().train())
    fuse(fused, memory="less")
    x, gradients = torch.randn(2, 4, 5, 5, dtype=torch.float64), []
    for model in (eager, fused):
        loss = model(x).square().sum()
        torch.autograd.grad(loss, [*model[1].parameters()], retain_graph=True)
        if changed is not None:
            with torch.no_grad():
                model.get_parameter(changed).mul_(2)
        try:
            gradients.append(torch.autograd.grad(loss, [*model[0].parameters()]))
        except RuntimeError as error:
            gradients.append(error)
    theirs, ours = gradients
    if changed is None:
        for a, b in zip(ours, theirs, strict=True):
            assert relative_error(a, b) < 1e-9
    else:
        assert "modified by an inplace operation" in str(ours)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_forwards_before_their_backwards(backend: str) -> None:
    """The second updates the running statistics; the first's backward does not read them."""
    eager, fused = copies(randomise(Bottleneck(8, 2)).double().train())
    fuse(fused, backend=backend)
    first, second = torch.randn(2, 2, 8, 5, 6, dtype=torch.float64)
    for model in (eager, fused):
        outs = [model(first), model(second)]
        (outs[0].square().sum() + outs[1].sum()).backward()
    for (key, a), b in zip(fused.named_parameters(), eager.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-9, key
    for (key, a), b in zip(fused.named_buffers(), eager.buffers(), strict=True):
        assert relative_error(a, b) < 1e-11, key


def test_second_order_gradients_are_refused() -> None:
    net = fuse(randomise(BasicBlock(4, 4)).train())
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice.*once_differentiable"):
        dx.square().sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_penalty_of_the_gradient_is_refused(backend: str) -> None:
    """As of WGAN-GP, where nothing behind the last chain has parameters: it would add nothing to the gradients, silently."""
    critic = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3))
    x = torch.randn(2, 2, 5, 5, requires_grad=True)
    score = fuse(critic, backend=backend)(x)
    (dx,) = torch.autograd.grad(score, x, torch.ones_like(score), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (score.mean() + dx.square().mean()).backward()


def test_a_hessian_is_refused() -> None:
    """Not all zeros, which is what it is where the graph of a gradient does not come past the inputs."""
    net = fuse(nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU()))
    x = torch.randn(1, 1, 3, 4)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.functional.hessian(lambda x: net(x).square().sum(), x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_batch_of_output_gradients_is_refused() -> None:
    net = fuse(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()))
    with pytest.raises(RuntimeError, match=r"got a batch of them \(is_grads_batched=True"):
        torch.autograd.functional.jacobian(lambda x: net(x).sum((1, 2, 3)), torch.randn(2, 3, 5, 5), vectorize=True)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_with_a_graph_can_be_written_to() -> None:
    """Some training loops always say create_graph, and clip what they got."""
    eager, fused = copies(randomise(BasicBlock(4, 4)).double().train())
    fuse(fused, backend="reference")
    x = torch.randn(2, 4, 5, 5).double()
    for model in (eager, fused):
        torch.autograd.backward(model(x).square().sum(), create_graph=True)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert all(parameter.grad.requires_grad for parameter in model.parameters())
    for a, b in zip(fused.parameters(), eager.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-9


def test_backward_twice_is_refused() -> None:
    out = fuse(randomise(BasicBlock(4, 4)).train())(torch.randn(2, 4, 5, 5)).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_a_launch_that_fails_midway_leaves_the_statistics(
    momentum: float | None, backend: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last launch of a block raises, such as for want of memory, when all its layers have made their statistics: kernels
    have updated the running ones then, the CPU's executor does so behind all launches."""
    net = fuse(randomise(Bottleneck(8, 2)).train(), backend=backend)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    first, x = torch.randn(2, 2, 8, 5, 6)
    net(first)
    before, changed = state_of(net), []

    def failing(launch: Launch, _: object) -> None:
        if launch.kind == "bn_add_relu":
            changed.extend(key for key, value in net.state_dict().items() if not torch.equal(value, before[key]))
            raise error("no memory")

    look_at_launches(monkeypatch, failing)
    with pytest.raises(error, match="no memory"):
        net(x)
    expected = 0 if backend == "cpu" else 9
    assert len(changed) == expected, "means, variances and counts of three layers had been updated when it failed"
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    monkeypatch.undo()
    net(x)
    assert not torch.equal(net.bn1.running_mean, before["bn1.running_mean"])
    assert int(net.bn3.num_batches_tracked) == int(before["bn3.num_batches_tracked"]) + 1


@pytest.mark.parametrize("how", ["fused", "vendor"])
@pytest.mark.parametrize(("dtype", "momentum"), [(torch.float32, 1.0), (torch.bfloat16, None)])
def test_a_kernel_that_cannot_start_leaves_the_statistics(
    dtype: torch.dtype, momentum: float | None, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where nothing is copied in front of a block: what its kernels wrote aside is put back."""
    triton = pytest.importorskip("fused_resnet.backends.triton")
    start = importlib.import_module("fused_resnet.backends.triton_start")
    net = fuse(randomise(Bottleneck(8, 2)).to(dtype).train(), backend="triton")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    net.bn2.running_mean = torch.randn(4, dtype=dtype)[::2]  # not dense
    net(torch.randn(2, 8, 3, 4, dtype=dtype))
    before, changed = state_of(net), []
    begin, choose = start.begin, triton.choose

    def failing(what: Start, tensors: Sequence[Tensor], arguments: Sequence[object], device: torch.device) -> None:
        named = dict(zip(what.kernel.arg_names, arguments, strict=True))
        if what.kernel.__name__ == "bn_add_relu" and named["shortcut"] is not None:
            changed.extend(key for key, value in net.state_dict().items() if not torch.equal(value, before[key]))
            raise RuntimeError("out of resources")
        begin(what, tensors, arguments, device)

    def chosen(launch: Launch, *rest: object, **options: object) -> Choice:
        return replace(choose(launch, *rest, **options), how=how if launch.kind == "conv" else "fused")

    monkeypatch.setattr(start, "begin", failing)
    monkeypatch.setattr(triton, "choose", chosen)
    monkeypatch.setattr(backends, "_copied", lambda *_: [])
    with count_launches() as log, pytest.raises(RuntimeError, match="out of resources"):
        net(torch.randn(2, 8, 3, 4, dtype=dtype))
    assert log.kernels.count("conv_forward" if how == "fused" else "conv_end") == 3
    assert len(changed) == 9, "means, variances and counts of three layers had been updated when it failed"
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_what_no_kernel_writes_aside_is_copied_first() -> None:
    """On a GPU that is what the reference executor updates: fp64, and between the ranks of a SyncBatchNorm."""
    pytest.importorskip("triton")
    spec = Chain((live(Layer("l1", 4, 3, (3, 3), padding=(1, 1), norm=True, affine=False)),))
    elsewhere = {slot: torch.empty(4, device="meta") for slot in spec.buffer_slots}
    here = {slot: torch.empty(4) for slot in spec.buffer_slots}
    for dtype, tensors, copied in (
        (torch.float32, elsewhere, 0),
        (torch.float64, elsewhere, 3),
        (torch.float32, here, 3),
    ):
        assert len(backends._copied(forward_plan(spec, 2, 5, 6, dtype), tensors, "triton")) == copied
    shared = Chain((replace(spec.layers[0], group="0"),))
    plan = forward_plan(shared, 2, 5, 6, torch.float32)
    assert len(backends._copied(plan, elsewhere, "triton")) == 3
