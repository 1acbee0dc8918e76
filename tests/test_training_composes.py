"""A fused model in training with the rest of PyTorch: autocast, GradScaler, checkpointing, hooks, torch.compile, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from nets import TINY_TRAINING_LAUNCHES, TinyNet, copies, images, launches, randomise, saved_bytes, state_of, train_step
from tolerances import assert_no_worse, distance, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

import fused_resnet
from fused_resnet import count_launches, explain, fuse

CLOSE = 1e-4
LABELS = torch.tensor([0, 3, 1, 4, 2, 2])


def learner(dtype: torch.dtype = torch.float32) -> TinyNet:
    """A TinyNet with random state and a momentum that shows, in training mode."""
    net = TinyNet()
    randomise(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3
    return net.to(dtype).train()


def loss_of(model: nn.Module, x: Tensor, y: Tensor = LABELS) -> Tensor:
    return nn.functional.cross_entropy(model(x).float(), y[: len(x)])


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {key: parameter.grad for key, parameter in model.named_parameters()}


def same(actual: nn.Module, expected: nn.Module, allowed: float = CLOSE) -> None:
    """Equal gradients, parameters and buffers."""
    for (key, a), (_, b) in zip(gradients(actual).items(), gradients(expected).items(), strict=True):
        assert (a is None) == (b is None), key
        assert a is None or (a.dtype == b.dtype and distance([(a, b)]) < allowed), f"gradient of {key}"
    for (key, a), (_, b) in zip(actual.state_dict().items(), expected.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and distance([(a, b)]) < allowed, key


# ------------------------------------------------------------------------------------------------ types


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast(backend: str, dtype: torch.dtype, channels_last: bool) -> None:
    """Outputs, gradients and running statistics of eager's types, and no further from float64 than twice eager: the gradients
    together, since which values change their side of a ReLU in half precision is chance for each alone."""
    errors: dict[str, list[list[float]]] = {}
    for _ in range(5):
        net = learner()
        eager, fused = copies(net)
        fuse(fused, backend=backend)
        x = images(6)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        truth = train_step(copy.deepcopy(net).double(), x.double())
        with torch.autocast("cpu", dtype):
            with count_launches() as log:
                actual = train_step(fused, x)
            expected = train_step(eager, x)
        assert {launch.dtype for _, launch in log.launches} == {dtype}
        assert {what: t.dtype for what, t in actual.items()} == {what: t.dtype for what, t in expected.items()}
        for what, exact in truth.items():
            kind = "gradients" if what.startswith("gradient") else what
            errors.setdefault(kind, []).append([distance([(t[what], exact)]) for t in (actual, expected)])
    for what, pairs in errors.items():
        ours, eagers = (sum(pair[i] ** 2 for pair in pairs) ** 0.5 for i in (0, 1))
        assert_no_worse(ours, eagers, what)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_model_with_fp32_batch_norm(dtype: torch.dtype) -> None:
    net = learner(dtype)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    eager, fused = copies(net)
    fuse(fused)
    x = images(6).to(dtype)
    truth = train_step(copy.deepcopy(net).double(), x.double())
    actual, expected = train_step(fused, x), train_step(eager, x)
    assert {what: t.dtype for what, t in actual.items()} == {what: t.dtype for what, t in expected.items()}
    for kind in ("out", "gradient", "running"):
        found = [what for what in truth if kind in what]
        ours, eagers = (sum(distance([(t[what], truth[what])]) ** 2 for what in found) ** 0.5 for t in (actual, expected))
        assert_no_worse(ours, eagers, kind)


def test_grad_scaler_skips_the_same_steps() -> None:
    """A scale that overflows fp16, then images with an infinity: the scale and the weights follow eager's."""
    eager, fused = copies(learner())
    fuse(fused)
    told = {}
    batches = [images(6) for _ in range(7)]
    batches[3][2, 1, 4, 5] = float("inf")
    for name, model in (("eager", eager), ("fused", fused)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2)
        scales, moved = [], []
        for x in batches:
            before = model.fc.weight.detach().clone()
            buffers = {key: b.clone() for key, b in model.named_buffers()}
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, x)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            moved.append(not torch.equal(before, model.fc.weight))
            if not x.isfinite().all():
                model.load_state_dict(buffers, strict=False)  # the running statistics have become NaN
        told[name] = (scales, moved)
    assert told["fused"] == told["eager"]
    scales, moved = told["fused"]
    assert not moved[0] and not moved[3] and moved.count(True) >= 2


# ------------------------------------------------------------------------------------------------ autograd


class Checkpointed(nn.Module):
    """Each part computed again in the backward."""

    def __init__(self, net: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.net.stem, self.net.basic, self.net.bottleneck):
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return self.net.fc(x.mean((2, 3)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    """Gradients and running statistics (updated twice, as in eager); and it does save memory."""
    eager, fused = copies(learner(torch.float64))
    fuse(fused)
    x = images(4).double()
    whole = saved_bytes(copy.deepcopy(fused), x)
    for model in (eager, fused):
        loss_of(Checkpointed(model, reentrant), x.clone().requires_grad_()).backward()
    same(fused, eager, 1e-5)
    assert fused.basic.bn1.num_batches_tracked == 2
    if not reentrant:
        assert saved_bytes(Checkpointed(copy.deepcopy(fused), False), x) < whole


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_forward_without_gradients(mode: type) -> None:
    """The statistics are updated, nothing is kept."""
    eager, fused = copies(learner())
    fuse(fused)
    x = images(4)
    with mode():
        assert relative_error(fused(x), eager(x)) < CLOSE
        assert launches(fused, x) == TINY_TRAINING_LAUNCHES
        eager(x)
    same(fused, eager)
    assert fused.bottleneck.bn3.num_batches_tracked == 2
    loss_of(fused, x).backward()
    assert fused.stem[0].weight.grad is not None


def test_statistics_can_be_calibrated_after_inference_mode() -> None:
    """Running statistics made in inference mode by a copy: training goes on with them."""
    fused = fuse(learner())
    with torch.inference_mode():
        twin = copy.deepcopy(fused)
        twin(images(4))
    assert not torch.equal(twin.basic.bn1.running_mean, fused.basic.bn1.running_mean)


def test_gradient_accumulation() -> None:
    eager, fused = copies(learner(torch.float64))
    fuse(fused)
    for _ in range(3):
        x = images(4).double()
        for model in (eager, fused):
            loss_of(model, x).backward()
    same(fused, eager, 1e-5)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_gradients_of_contiguous_tensors_can_be_viewed(mode: bool) -> None:
    """Attacks call ``gradient.view(n, -1)``, optimizers and penalties ``view(-1)``: a gradient has its tensor's strides."""
    model = fuse(learner()).train(mode)
    x = images(4).requires_grad_()
    wanted = [x, *model.parameters()]
    found = torch.autograd.grad(loss_of(model, x), wanted)
    assert [gradient.stride() for gradient in found] == [tensor.stride() for tensor in wanted]
    model.to(memory_format=torch.channels_last)
    x = images(4).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in torch.autograd.grad(loss_of(model, x), x))


def test_retain_graph_is_honoured() -> None:
    eager, fused = copies(learner(torch.float64))
    fuse(fused)
    x = images(4).double()
    for model in (eager, fused):
        loss = loss_of(model, x)
        loss.backward(retain_graph=True)
        loss.backward()
    same(fused, eager, 1e-5)


def test_hooks_may_give_saved_tensors_another_layout() -> None:
    """``save_on_cpu(pin_memory=True)`` does: all comes back contiguous, which kernels must not take for channels_last.

    The first block's output is made again, the second block's is kept.
    """
    eager = randomise(nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))).train()
    fused = fuse(copy.deepcopy(eager), backend="triton", memory="less")
    x = torch.randn(2, 4, 3, 4)
    truth = train_step(copy.deepcopy(eager).double(), x.double())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: torch.empty(t.shape, dtype=t.dtype).copy_(t), lambda t: t):
        actual = train_step(fused, x)
    for what, exact in truth.items():
        assert distance([(actual[what], exact)]) < CLOSE, what


def test_a_hook_on_a_module_keeps_its_block_unfused() -> None:
    eager, fused = copies(learner(torch.float64))
    fuse(fused)
    seen: dict[str, list[Tensor]] = {"eager": [], "fused": []}
    handles = []
    for name, model in (("eager", eager), ("fused", fused)):
        found = seen[name]
        handles.append(model.basic.bn1.register_forward_hook(lambda m, x, out, to=found: to.append(out.detach().clone())))
        handles.append(model.basic.conv2.register_full_backward_hook(lambda m, dx, dy, to=found: to.append(dy[0].clone())))
    x = images(4).double()
    with count_launches() as log:
        loss_of(fused, x).backward()
    loss_of(eager, x).backward()
    assert len(seen["fused"]) == 2
    for a, b in zip(seen["fused"], seen["eager"], strict=True):
        assert relative_error(a, b) < 1e-5
    same(fused, eager, 1e-5)
    assert [row.name for row in explain(fused, show=False).left_alone] == ["basic"]
    for handle in handles:
        handle.remove()
    assert not explain(fused, show=False).left_alone
    assert len(log) and launches(fused, x) == TINY_TRAINING_LAUNCHES


def test_hooks_on_a_block_tensors_and_parameters() -> None:
    """They see what eager's see, and may change it."""
    eager, fused = copies(learner(torch.float64))
    fuse(fused)
    x, seen = images(4).double(), {}
    for name, model in (("eager", eager), ("fused", fused)):
        seen[name] = found = []
        model.bottleneck.register_forward_hook(lambda m, args, out: out * 1.5)
        model.bottleneck.register_full_backward_hook(lambda m, given, made, found=found: found.append(given[0].clone()))
        model.basic.conv1.weight.register_hook(lambda g, found=found: (found.append(g.clone()), g * 2)[1])
        model.basic.bn1.weight.register_post_accumulate_grad_hook(lambda p, found=found: found.append(p.grad.clone()))
        given = x.clone().requires_grad_()
        middle = model.basic(model.stem(given))
        middle.retain_grad()
        middle.register_hook(lambda g, found=found: found.append(g.clone()))
        model.fc(model.bottleneck(middle).mean((2, 3))).square().sum().backward()
        found += [middle.grad, given.grad]
    assert len(seen["fused"]) == len(seen["eager"]) == 6
    for a, b in zip(sorted(seen["fused"], key=torch.numel), sorted(seen["eager"], key=torch.numel), strict=True):
        assert a.shape == b.shape and relative_error(a, b) < 1e-5
    same(fused, eager, 1e-5)


def test_torch_func_transforms_do_as_in_eager() -> None:
    """They look into operators, so nothing is fused under them; running statistics inside a transform are eager's business."""
    from torch.func import functional_call, grad

    eager, fused = copies(learner(torch.float64))
    fuse(fused)
    x, told = images(4).double(), []
    for model in (eager, fused):
        parameters = {key: p.detach() for key, p in model.named_parameters()}
        buffers = {key: b.detach().clone() for key, b in model.named_buffers()}

        def loss(parameters: dict[str, Tensor], model: nn.Module = model, buffers: dict[str, Tensor] = buffers) -> Tensor:
            return functional_call(model, {**parameters, **buffers}, (x,)).square().sum()

        try:
            told.append(grad(loss)(parameters))
        except RuntimeError as error:
            told.append(str(error)[:60])
    assert type(told[0]) is type(told[1])
    if isinstance(told[0], dict):
        assert all(distance([(told[1][key], told[0][key])]) < 1e-5 for key in told[0])


# ------------------------------------------------------------------------------------------------ copies and checkpoints


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_in_the_middle_of_training_go_on_alike(how: str) -> None:
    fused = fuse(learner(), memory="low")
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.05, momentum=0.9)
    loss_of(fused, images(6)).backward()
    optimizer.step()
    if how == "deepcopy":
        twin = copy.deepcopy(fused)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    else:
        twin = fuse(learner(), memory="low")
        twin.load_state_dict(state_of(fused))
    assert twin.basic.fused_memory == "low"
    x = images(6)
    for model in (fused, twin):
        model.zero_grad()
        loss_of(model, x).backward()
    for (key, a), (_, b) in zip(twin.named_parameters(), fused.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), key
    assert all(torch.equal(a, b) for a, b in zip(twin.buffers(), fused.buffers(), strict=True))
    assert not {b.data_ptr() for b in twin.buffers()} & {b.data_ptr() for b in fused.buffers()}


# ------------------------------------------------------------------------------------------------ torch.compile


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("memory", ["default", "low"])
def test_compiled_training(memory: str) -> None:
    """One graph: gradients, running statistics and their counters over three steps; the launches run inside."""
    eager, fused = copies(learner(torch.float64))
    fuse(fused, memory=memory)
    run = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = images(4).double()
        with count_launches() as log:
            loss_of(run, x).backward()
        loss_of(eager, x).backward()
        same(fused, eager, 1e-5)
    forward = [launch for _, launch in log.launches if launch.kind in ("conv", "bn_add_relu", "max_pool")]
    assert len(forward) == TINY_TRAINING_LAUNCHES + (memory == "low") * 4
    assert fused.basic.bn1.num_batches_tracked == 3


@pytest.mark.usefixtures("fresh_compiler")
def test_the_whole_step_compiled() -> None:
    """Forward, loss, backward and SGD as one compiled function; then train and eval told apart."""
    eager, fused = copies(learner(torch.float64))
    fuse(fused)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9) for model in (eager, fused)]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    compiled = torch.compile(step, backend="aot_eager")
    for _ in range(3):
        x, y = images(4).double(), LABELS[:4]
        ours, theirs = compiled(fused, optimizers[1], x, y), step(eager, optimizers[0], x, y)
        assert relative_error(ours, theirs) < 1e-6
        same(fused, eager, 1e-5)
    fused.eval(), eager.eval()
    run = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(run(x), eager(x)) < 1e-5


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_frozen_and_live_batch_norms_under_autocast() -> None:
    net = learner()
    net.basic.bn1.eval()
    net.bottleneck.bn3.eval()
    eager, fused = copies(net)
    plain = fuse(copy.deepcopy(net))
    fuse(fused)
    run = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = images(6)
    with torch.autocast("cpu", torch.bfloat16):
        for model in (run, plain, eager):
            loss_of(model, x).backward()
    same(fused, plain, 1e-5)
    assert {key: g.dtype for key, g in gradients(fused).items()} == {key: g.dtype for key, g in gradients(eager).items()}


def test_export_of_a_model_that_has_been_trained() -> None:
    fused = fuse(learner())
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.02)
    for _ in range(2):
        loss_of(fused, images(6)).backward()
        optimizer.step()
    fused.eval()
    x = images(3)
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    plain = fused_resnet.unfuse(copy.deepcopy(fused))
    with torch.no_grad():
        for given in (x, images(5)):
            assert relative_error(program.module()(given), plain(given)) < 1e-5
