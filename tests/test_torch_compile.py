"""torch.compile, torch.export and torch.library's own checks: the chain is one opaque operator with shapes known ahead."""

from __future__ import annotations

import contextvars
import threading
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from nets import (
    CHAINS,
    TINY_LAUNCHES,
    TINY_TRAINING_LAUNCHES,
    TRAINING_CHAINS,
    TinyNet,
    chain_inputs,
    copies,
    images,
    plain_chain,
    tiny,
)
from tolerances import relative_error
from torch import nn
from torchvision.models.resnet import Bottleneck

from fused_resnet import backend, backends, count_launches, fuse
from fused_resnet.functional import chain
from fused_resnet.plan import kept_slots, saved_slots

CLOSE = 1e-5


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def compiled(net: nn.Module, **options: object) -> nn.Module:
    return torch.compile(net, fullgraph=True, backend="aot_eager", **options)


def test_inference() -> None:
    plain, fused = copies(tiny())
    run = compiled(fuse(fused))
    x = images()
    with torch.no_grad():
        expected = plain(x)
        assert relative_error(run(x), expected) < CLOSE
        with count_launches() as log:
            run(x)
    assert len(log) == TINY_LAUNCHES, "the fused launches run inside the compiled model"


def test_gradients() -> None:
    plain, fused = copies(tiny())
    run = compiled(fuse(fused))
    x = images().requires_grad_()
    (plain(x).square().sum()).backward()
    dx, x.grad = x.grad, None
    run(x).square().sum().backward()
    assert relative_error(x.grad, dx) < 1e-4
    for (key, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-4, key


def test_partly_frozen() -> None:
    plain, fused = copies(tiny())
    run = compiled(fuse(fused))
    for model in (plain, fused):
        model.stem.requires_grad_(False)
        model.basic.bn1.requires_grad_(False)
    x = images()
    plain(x).sum().backward(), run(x).sum().backward()
    for (key, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        assert a.grad is None or relative_error(a.grad, b.grad) < 1e-4, key


def test_changed_weights_are_seen() -> None:
    plain, fused = copies(tiny())
    run = compiled(fuse(fused))
    x = images()
    with torch.no_grad():
        run(x)
        for model in (plain, fused):
            model.basic.conv1.weight.mul_(1.5)
            model.bottleneck.bn1.running_var.add_(1)
        assert relative_error(run(x), plain(x)) < CLOSE


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_dynamic_batch(grad: bool) -> None:
    """One graph for all batch sizes."""
    plain, fused = copies(tiny())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(fuse(fused), fullgraph=True, backend=counter, dynamic=None)
    with torch.set_grad_enabled(grad):
        for n in (2, 3, 4, 7):
            x = images(n)
            torch._dynamo.mark_dynamic(x, 0)
            assert relative_error(run(x), plain(x)) < CLOSE, n
    assert counter.frame_count == 1


def test_dynamic_sizes() -> None:
    plain, fused = copies(tiny())
    run = compiled(fuse(fused), dynamic=True)
    with torch.no_grad():
        for h, w in ((33, 35), (40, 31), (64, 64)):
            x = images(2, h, w)
            assert relative_error(run(x), plain(x)) < CLOSE, (h, w)


def test_train_and_eval_are_told_apart() -> None:
    plain, fused = copies(tiny())
    run = compiled(fuse(fused))
    x = images(4)
    for mode in (False, True, False):
        plain.train(mode), fused.train(mode)
        with torch.no_grad(), count_launches() as log:
            assert relative_error(run(x), plain(x)) < CLOSE
        assert len(log) == (TINY_TRAINING_LAUNCHES if mode else TINY_LAUNCHES)
    for (key, a), b in zip(fused.named_buffers(), plain.buffers(), strict=True):
        assert relative_error(a, b) < CLOSE, key


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_with_a_dynamic_batch(momentum: float | None) -> None:
    """One graph for all batch sizes; running statistics too."""
    plain, fused = copies(tiny().double().train())
    for model in (plain, fused):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(fuse(fused), fullgraph=True, backend=counter)
    for n in (3, 5, 4):
        x = images(n).double()
        torch._dynamo.mark_dynamic(x, 0)
        for model in (run, plain):
            model.zero_grad()
            model(x).square().sum().backward()
        for (key, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
            assert relative_error(a.grad, b.grad) < CLOSE, key
        for (key, a), b in zip(fused.named_buffers(), plain.buffers(), strict=True):
            assert relative_error(a, b) < CLOSE, key
    assert counter.frame_count == 1


def test_under_autocast() -> None:
    plain, fused = copies(tiny())
    run = compiled(fuse(fused))
    x = images()
    with torch.no_grad():
        truth = plain(x)
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = plain(x), run(x)
    assert actual.dtype == expected.dtype
    assert relative_error(actual, truth) <= 2 * relative_error(expected, truth)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export(dynamic: bool) -> None:
    plain, fused = copies(tiny())
    x = images()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},) if dynamic else None
    with torch.no_grad():
        program = torch.export.export(fuse(fused), (x,), dynamic_shapes=shapes)
        for given in (x, images(5)) if dynamic else (x,):
            assert relative_error(program.module()(given), plain(given)) < CLOSE


#: Chains in eval mode, and in training, where the operator hands on running statistics.
OPERATORS = {
    **{name: CHAINS[name] for name in ("basic_projection", "stem", "bottleneck_groups", "bias_add", "entry")},
    **{
        f"{name}, train": TRAINING_CHAINS[name]
        for name in ("basic_projection", "stem", "basic, second frozen", "entry_and_projection")
    },
    "low, train": (replace(TRAINING_CHAINS["basic_projection"][0], memory="low"), 9, 7),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_of_the_forward_operator(name: str) -> None:
    """Schema, fake kernel, autograd registration and dynamic shapes, by PyTorch's own tester."""
    spec, h, w = OPERATORS[name]
    x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    flags = [t.requires_grad for t in (x, *parameters)]
    for chosen in ("cpu", "reference", ""):
        torch.library.opcheck(torch.ops.fused_resnet.chain.default, (x, parameters, spec.token, chosen, flags))
    torch.library.opcheck(
        torch.ops.fused_resnet.chain.default,
        (x.detach(), [p.detach() for p in parameters], spec.token, "cpu", [False] * len(flags)),
    )


@pytest.mark.parametrize("which", ["all", "x", "parameters"])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_of_the_backward_operator(name: str, which: str) -> None:
    spec, h, w = OPERATORS[name]
    x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
    flags = [t.requires_grad and which in ("all", "x" if t is x else "parameters") for t in (x, *parameters)]
    tensors = dict(zip(("x", *spec.parameter_slots), (t.detach() for t in (x, *parameters)), strict=True))
    needs = frozenset(slot for slot, flag in zip(tensors, flags, strict=True) if flag)
    outputs = torch.ops.fused_resnet.chain(tensors["x"], list(tensors.values())[1:], spec.token, "cpu", flags)
    tensors.update(zip(("out", *kept_slots(spec, needs)), outputs, strict=False))  # running statistics come behind
    saved = [tensors[slot] for slot in saved_slots(spec, needs)]
    dout = torch.randn_like(outputs[0])
    torch.library.opcheck(torch.ops.fused_resnet.chain_backward.default, (dout, saved, [2, h, w], spec.token, "cpu", flags))


def test_a_chain_function_compiles_by_itself() -> None:
    spec, h, w = CHAINS["basic"]
    x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
    run = torch.compile(lambda x, *p: chain(x, p, spec), fullgraph=True, backend="aot_eager")
    assert relative_error(run(x, *parameters), plain_chain(spec, x, parameters)) < CLOSE


def test_the_backward_runs_where_the_forward_did() -> None:
    """Also where nobody has traced the backward: it is the forward's context that counts."""
    run = torch.compile(fuse(tiny()).train(), fullgraph=True, backend="eager")
    run(images())
    with count_launches() as log:
        with backend("reference"):
            out = run(images())
        out.sum().backward()
    assert len(log) > TINY_TRAINING_LAUNCHES and {name for name, _ in log.launches} == {"reference"}


def test_autograds_own_thread_is_handed_the_context() -> None:
    """As PyTorch does before a backward on a GPU, where it runs in another thread."""
    found = []
    with backend("reference"):
        context = contextvars.copy_context()

    def work() -> None:
        found.append(backends.context_of_backward())
        torch._C._stash_obj_in_tls("context", context)
        found.append(backends.context_of_backward())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None, "reference"]


def test_a_compiled_backward_runs_in_the_context_of_its_call() -> None:
    run = compiled(fuse(tiny()).train())
    run(images()).sum().backward()
    with backend("reference"), count_launches() as log:
        run(images()).sum().backward()
    with count_launches() as behind:
        run(images()).sum().backward()
    assert {name for name, _ in log.launches} == {"reference"}
    assert {name for name, _ in behind.launches} == {"cpu"}


def test_bad_input_is_still_refused() -> None:
    run = compiled(fuse(TinyNet().eval()))
    with pytest.raises(Exception, match="channels"):
        run(torch.randn(1, 4, 16, 16))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_gradients_of_filters_are_laid_out_as_they_are(layout: torch.memory_format) -> None:
    """To the strides of 1x1 filters, which have one layout in memory and two ways to say so: DDP warns where they differ."""
    net = fuse(nn.Sequential(Bottleneck(64, 16), Bottleneck(64, 16)).train().to(memory_format=layout))
    x = torch.randn(2, 64, 7, 7).contiguous(memory_format=layout)
    seen = {}
    for key, parameter in net.named_parameters():
        parameter.register_hook(lambda gradient, key=key: seen.update({key: gradient.stride()}))
    torch.compile(net, backend="aot_eager")(x).sin().sum().backward()
    assert seen == {key: parameter.stride() for key, parameter in net.named_parameters()}
