"""Chains with every activation: values, gradients, running statistics against float64 eager PyTorch, and what is recognised."""

from __future__ import annotations

import copy
import math
from statistics import median

import pytest
import torch
from nets import (
    CHAINS,
    PLAIN_ACTIVATIONS,
    chain_inputs,
    in_training,
    plain_chain,
    projection,
    randomise,
    train_step,
    twin,
    with_activation,
)
from tolerances import assert_close, assert_no_worse, relative_error
from torch import Tensor, nn

import fused_resnet
from fused_resnet import count_launches, plain_paper
from fused_resnet.activations import ACTIVATIONS, from_output
from fused_resnet.chain import Chain
from fused_resnet.functional import chain
from fused_resnet.plan import saved_slots, trainable_slots

BACKENDS = ("reference", "cpu")

#: What stands in the place of ReLU: name, slope. A negative slope cannot be told from the output.
CASES = [("relu6", 0.0), ("leaky_relu", 0.2), ("leaky_relu", -0.3), ("silu", 0.0), ("gelu", 0.0), ("gelu_tanh", 0.0)]
CASES += [("hardswish", 0.0)]

#: Chains in which an activation stands at every place there is.
PLACES = (
    "bias_relu", "add", "bias_add", "affine_relu", "basic", "basic_projection", "plain_projection", "bottleneck_groups",
    "norm_then_bias_add", "stem", "two_layers_and_pool", "rectangles",
)  # fmt: skip

#: Which BatchNorms are in training mode, and what is kept.
MODES = {
    "frozen": lambda spec: spec,
    "frozen, low": lambda spec: in_training(spec, 1, 1, memory="low"),
    "training": in_training,
    "training, low": lambda spec: in_training(spec, memory="low"),
    "second frozen": lambda spec: in_training(spec, 2, 0),
    "first frozen": lambda spec: in_training(spec, 2, 1),
    "first frozen, low": lambda spec: in_training(spec, 2, 1, memory="low"),
}


def case(place: str, mode: str, activation: tuple[str, float]) -> tuple[Chain, int, int]:
    spec, h, w = CHAINS[place]
    return MODES[mode](with_activation(spec, *activation)), h, w


def wide(tensors: list[Tensor]) -> list[Tensor]:
    """Inputs large enough that pre-activations fall on all sides of -3, 0, 3 and 6."""
    with torch.no_grad():
        tensors[0].mul_(4)
    return tensors


def step(spec: Chain, tensors: list[Tensor], dout: Tensor, backend: str | None) -> dict[str, Tensor]:
    """Forward and backward on copies, through a backend or (None) eager: all that comes out, by name."""
    x, *parameters = twin(tensors)
    out = plain_chain(spec, x, parameters) if backend is None else chain(x, parameters, spec, backend)
    named = dict(zip(("x", *spec.parameter_slots), (x, *parameters), strict=True))
    wanted = [slot for slot, tensor in named.items() if tensor.requires_grad]
    gradients = torch.autograd.grad(out, [named[slot] for slot in wanted], dout.to(out.dtype))
    made = {"out": out.detach(), **{f"gradient of {slot}": g for slot, g in zip(wanted, gradients, strict=True)}}
    return made | {slot: named[slot] for slot in spec.buffer_slots}


@pytest.mark.parametrize("activation", CASES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_float64_is_exact(mode: str, activation: tuple[str, float]) -> None:
    for place in PLACES:
        spec, h, w = case(place, mode, activation)
        x, parameters = chain_inputs(spec, 2, h, w)
        tensors = wide([x, *parameters])
        dout = torch.randn_like(plain_chain(spec, tensors[0], twin(tensors[1:])))
        truth = step(spec, tensors, dout, None)
        actual = step(spec, tensors, dout, "reference")
        assert list(actual) == list(truth)
        for what, expected in truth.items():
            if expected.abs().max() > 1e-10:  # but a bias in front of BatchNorm, whose gradient is rounding noise
                assert relative_error(actual[what], expected) < 1e-10, f"{place}: {what}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", CASES, ids=str)
@pytest.mark.parametrize("mode", ["frozen", "training", "first frozen, low"])
def test_the_cpu_executor_is_no_worse_than_twice_eager(mode: str, activation: tuple[str, float], dtype: torch.dtype) -> None:
    """The median over all chains and gradients: in 16 bits a sum that cancels may decide over one."""
    total: dict[str, list[tuple[float, float]]] = {}
    for place in PLACES:
        spec, h, w = case(place, mode, activation)
        x, parameters = chain_inputs(spec, 4, h, w, dtype)
        tensors = wide([x, *parameters])
        exact = twin(tensors, torch.float64)
        dout = torch.randn_like(plain_chain(spec, exact[0], twin(exact[1:]))).to(dtype)
        truth, eager, actual = (step(spec, t, dout, b) for t, b in ((exact, None), (tensors, None), (tensors, "cpu")))
        for what, expected in truth.items():
            layer = next((layer for layer in spec.weight_layers if what == f"gradient of {layer.slot('bias')}"), None)
            single = next((layer for layer in spec.weight_layers if what == f"gradient of {layer.slot('w')}"), None)
            noise = (layer is not None and layer.batch) or (single is not None and single.groups > 1)
            assert actual[what].dtype == eager[what].dtype
            if noise:
                continue
            scale = expected.double().square().sum().item() ** 0.5
            kind = "gradient" if what.startswith("gradient") else what.rpartition(".")[2]
            ours, own = ((made[what].double() - expected.double()).square().sum().item() ** 0.5 for made in (actual, eager))
            total.setdefault(kind, []).append((ours / scale, own / scale))
    for kind, errors in total.items():
        assert_no_worse(median(ours for ours, _ in errors), median(own for _, own in errors), kind)


@pytest.mark.parametrize("activation", [case for case in CASES if not from_output(*case)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_each_gradient_alone_equals_its_share_of_all(mode: str, activation: tuple[str, float]) -> None:
    """What is kept depends on what trains: a forward that keeps no pre-activation writes the activation."""
    for place in ("basic_projection", "stem", "bias_add"):
        spec, h, w = case(place, mode, activation)
        x, parameters = chain_inputs(spec, 2, h, w)
        named = dict(zip(("x", *spec.parameter_slots), (x, *parameters), strict=True))
        dout = torch.randn_like(plain_chain(spec, x, twin(parameters)))
        every = step(spec, [x, *parameters], dout, "reference")
        for slot in trainable_slots(spec):
            alone = [tensor.detach().requires_grad_(name == slot) for name, tensor in named.items()]
            actual = step(spec, alone, dout, "reference")
            assert relative_error(actual["out"], every["out"]) < 1e-12
            assert relative_error(actual[f"gradient of {slot}"], every[f"gradient of {slot}"]) < 1e-11, (place, slot)


def activations_kept(place: str, mode: str, activation: tuple[str, float], needs: set[str] | None = None) -> set[str]:
    spec, _, _ = case(place, mode, activation)
    kept = saved_slots(spec, frozenset(needs) if needs else trainable_slots(spec))
    return {slot for slot in kept if "." not in slot}


def test_what_is_kept() -> None:
    """As many tensors as for ReLU: a pre-activation in the place of an activation, and y in the place of out."""
    silu, relu6 = ("silu", 0.0), ("relu6", 0.0)
    assert activations_kept("basic", "training", ("relu", 0.0)) == {"x", "y1", "y2", "out"}
    assert activations_kept("basic", "training", relu6) == {"x", "y1", "y2", "out"}
    assert activations_kept("basic", "training", silu) == {"x", "y1", "y2"}
    assert activations_kept("basic", "training, low", silu) == {"x", "y1"}
    assert activations_kept("basic_projection", "training", silu) == {"x", "y1", "y2", "yd"}
    assert activations_kept("basic", "frozen", ("relu", 0.0)) == {"x", "a1", "out"}
    assert activations_kept("basic", "frozen", silu) == {"x", "z1", "z2"}
    assert activations_kept("basic", "frozen, low", silu) == {"x", "z1"}
    assert activations_kept("basic", "frozen", silu, {"b.beta"}) == {"z2"}
    assert activations_kept("stem", "frozen", silu) == {"x", "z1", "indices"}
    assert activations_kept("stem", "frozen, low", silu) == {"x", "indices"}
    assert activations_kept("stem", "training", silu) == {"x", "y1", "indices"}


@pytest.mark.parametrize(("place", "mode", "expected"), [
    ("basic", "frozen", {"conv": 2, "bn_add_relu": 1}), ("basic", "frozen, low", {"conv": 2}),
    ("stem", "frozen", {"conv": 1, "max_pool": 1}), ("basic", "training", {"conv": 2, "bn_add_relu": 1}),
])  # fmt: skip
def test_launches_of_the_forward(place: str, mode: str, expected: dict[str, int]) -> None:
    spec, h, w = case(place, mode, ("silu", 0.0))
    x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
    for wanted in (True, False):
        with count_launches() as log, torch.set_grad_enabled(wanted):
            chain(x, parameters, spec, "cpu")
        kinds = [launch.kind for _, launch in log.launches]
        without = expected if mode == "training" else {kind: n for kind, n in expected.items() if kind != "bn_add_relu"}
        assert {kind: kinds.count(kind) for kind in kinds} == (expected if wanted else without)
        assert {runner for runner, _ in log.launches} == {"cpu"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["frozen", "training"])
@pytest.mark.parametrize("activation", CASES, ids=str)
def test_nan_and_inf_travel_as_in_eager(activation: tuple[str, float], mode: str, backend: str) -> None:
    """Through values and gradients. (Eager's own gradient of a ReLU6 at a NaN is 0 or passes, as the vector unit falls.)"""
    spec, h, w = case("basic_projection", mode, activation)
    x, parameters = chain_inputs(spec, 3, h, w, torch.float32)
    with torch.no_grad():
        x[0, 1, 2, 3], x[1, 0, 0, 0], x[1, 2, h - 1, w - 1] = math.nan, math.inf, -math.inf
    dout = torch.randn_like(plain_chain(spec, x, twin(parameters)))
    expected, actual = (step(spec, [x, *parameters], dout, b) for b in (None, backend))
    for what in expected if activation[0] != "relu6" else ["out", *spec.buffer_slots]:
        assert torch.equal(actual[what].isfinite(), expected[what].isfinite()), what


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_table_against_autograd(name: str) -> None:
    """Each row: function, in-place form and gradient, into a new tensor and over the gradient itself."""
    slope = 0.1 if name == "leaky_relu" else 0.0
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)[1:-1].clone().requires_grad_()
    expected = PLAIN_ACTIVATIONS[name](z, slope)
    gradient = torch.randn_like(z)
    (wanted,) = torch.autograd.grad(expected, z, gradient)
    row, z = ACTIVATIONS[name], z.detach()
    assert torch.equal(row.function(z, slope), expected.detach())
    assert torch.equal(row.in_place(z.clone(), slope), expected.detach())
    for seen in (z, expected.detach()) if from_output(name, slope) else (z,):
        assert torch.equal(row.backward(gradient, seen, slope, None), wanted)
        copy = gradient.clone()
        assert row.backward(copy, seen, slope, copy) is copy
        assert torch.equal(copy, wanted)


MODULES = [
    nn.ReLU(), nn.ReLU6(inplace=True), nn.LeakyReLU(0.2), nn.LeakyReLU(-0.1), nn.SiLU(inplace=True), nn.GELU(), nn.GELU("tanh"),
    nn.Hardswish(), nn.Identity(),
]  # fmt: skip


def network(activation: nn.Module) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        activation,
        nn.Conv2d(8, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        activation,
    )
    randomise(net)
    return net


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", MODULES, ids=str)
def test_a_sequential_is_one_chain(activation: nn.Module, training: bool) -> None:
    """Recognised, swapped, the same values and gradients; with the class and arguments of PyTorch's modules."""
    net = network(activation).train(training)
    exact = network(activation).double().train(training)
    exact.load_state_dict(net.state_dict())
    x = 3 * torch.randn(4, 3, 9, 8)
    net = fused_resnet.fuse(net)
    with count_launches() as log:
        out = net(x)
        dout = torch.randn_like(out)
        out.backward(dout)
    assert {runner for runner, _ in log.launches} == {"cpu"}
    expected = exact(x.double())
    expected.backward(dout.double())
    assert_close(out, expected, 72, 4)
    for (name, actual), wanted in zip(net.named_parameters(), exact.parameters(), strict=True):
        if wanted.grad.abs().max() > 1e-10:  # but what is in front of a BatchNorm that subtracts it
            assert relative_error(actual.grad, wanted.grad) < 2e-5, name
    for (name, actual), wanted in zip(net.named_buffers(), exact.buffers(), strict=True):
        assert relative_error(actual, wanted) < 1e-5, name


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.LeakyReLU(0.2), nn.LeakyReLU(-0.3)], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_a_highway_block(activation: nn.Module, memory: str, training: bool) -> None:
    """The gate mixes in what is behind the activation; from z or its output, kept or computed again."""
    eager = randomise(plain_paper.HighwayBlock(4, 6, 2, projection(4, 6, 2))).double().train(training)
    eager.relu = activation
    nn.init.uniform_(eager.gate.bias, -1, 1)
    fused = fused_resnet.fuse(copy.deepcopy(eager), backend="reference", memory=memory)
    x = torch.randn(3, 4, 9, 7).double()
    truth, actual = train_step(eager, x), train_step(fused, x)
    for what, expected in truth.items():
        assert relative_error(actual[what], expected) < 1e-10, what
    with torch.no_grad():
        assert relative_error(fused.eval()(x), eager.eval()(x)) < 1e-12


def test_an_unknown_activation_is_left_alone_with_the_reason() -> None:
    block = fused_resnet.BasicBlock(8, 8)
    block.relu = nn.Tanh()
    told = str(fused_resnet.explain(nn.Sequential(block)))
    assert "the activation behind conv1 is a Tanh, none of Identity, ReLU" in told


def test_a_subclass_of_an_activation_is_not_taken_for_it() -> None:
    class Twice(nn.SiLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Twice()).eval()
    x = torch.randn(2, 3, 5, 5)
    expected = net(x)
    assert relative_error(fused_resnet.fuse(net)(x), expected) < 1e-5


@pytest.mark.parametrize("training", [False, True])
def test_torch_compile(training: bool) -> None:
    """The chain's description travels as text, slope included."""
    net = network(nn.LeakyReLU(0.3)).train(training)
    plain = network(nn.LeakyReLU(0.3)).train(training)
    plain.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 9, 8)
    compiled = torch.compile(fused_resnet.fuse(net), backend="aot_eager", fullgraph=True)
    out, expected = compiled(x), plain(x)
    assert relative_error(out, expected) < 1e-5
    out.sum().backward()
    expected.sum().backward()
    assert relative_error(net[3].weight.grad, plain[3].weight.grad) < 1e-4
