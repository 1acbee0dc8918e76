"""Every activation at every end of every kernel, forward and backward, against the reference executor in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from gradient_launches import dgrad, wgrad
from launches import DEVICE, conv, end_of_block, max_pool, max_pool_backward
from nets import CHAINS, chain_inputs, in_training, plain_chain, twin, with_activation
from tolerances import relative_error

from fused_resnet import count_launches
from fused_resnet.activations import ACTIVATIONS, from_output
from fused_resnet.functional import chain
from fused_resnet.gpu import operands as device
from fused_resnet.kernels import activations as kernels
from fused_resnet.launch import Launch

CASES = [("relu", 0.0), ("relu6", 0.0), ("leaky_relu", 0.2), ("leaky_relu", -0.3), ("silu", 0.0), ("gelu", 0.0)]
CASES += [("gelu_tanh", 0.0), ("hardswish", 0.0)]

_NORM = ("mean", "invstd", "gamma", "beta")
_ENDS = ("y", *_NORM, "shortcut", *(f"shortcut_{role}" for role in _NORM))
_POOL = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
_3X3 = (1, 5, 7, 16, 24, 3, 3)


def launches(name: str, slope: float, dtype: torch.dtype) -> dict[str, Launch]:
    """A launch for each place of an activation; several tiles, padding, odd sizes."""
    told = from_output(name, slope)
    seen, given = ("out",) if told else (), "z_previous" if told else "a_previous"
    how = {"dtype": dtype}
    behind = {**how, "activation": name}
    made = {
        "epilogue": conv(*_3X3, padding=(1, 1), epilogue="affine_add", **behind),
        "prologue": conv(*_3X3, padding=(1, 1), prologue=f"bn_{name}", epilogue="stats", **how),
        "prologue alone": conv(*_3X3, padding=(1, 1), prologue=name, epilogue="bias", **how),
        "depthwise": conv(1, 4, 5, 8, 8, 3, 3, padding=(1, 1), groups=8, prologue=f"bn_{name}", **behind),
        "mask": dgrad(*_3X3, padding=(1, 1), gradient="scale", epilogue="mask", without=("dshortcut", given), **behind),
        "bn_mask": dgrad(*_3X3, stride=(2, 2), padding=(1, 1), gradient="bn_backward", epilogue="bn_mask", **behind),
        "wgrad": wgrad(*_3X3, padding=(1, 1), gradient="bn_backward", prologue=f"bn_{name}", **how),
        "wgrad alone": wgrad(*_3X3, padding=(1, 1), gradient="scale", prologue=name, outputs=("dw", "dgamma"), **how),
        "end": end_of_block(2, 5, 7, 40, operands=_ENDS, **behind),
        "end backward": end_of_block(
            2, 5, 7, 40, operands=("dout", *seen, *_ENDS), outputs=("dz", "sum", "dot", "shortcut_dot"), **behind
        ),
        "end backward, frozen": end_of_block(
            2, 5, 7, 40, operands=("dout", *(seen or ("y",))), outputs=("dz", "sum"), **behind
        ),
        "pool": max_pool(2, 7, 8, 20, prologue=f"bn_{name}", outputs=("y", "indices"), **how, **_POOL),
        "pool backward": max_pool_backward(
            2, 7, 8, 20, operands=("dy", "x", "indices", *(f"x_{role}" for role in _NORM)), outputs=("dx", "sum", "dot"),
            **behind, **_POOL
        ),
        "pool backward, frozen": max_pool_backward(
            2, 7, 8, 20, operands=("dy", "x", "indices"), outputs=("dx", "sum"), **behind, **_POOL
        ),
    }  # fmt: skip
    return {place: replace(launch, slope=slope, x_slope=slope) for place, launch in made.items()}


def check(place: str, launch: Launch) -> None:
    given = device.random_operands(launch, DEVICE, 5)
    for role in ("x", "y", "z_previous"):
        if role in given and not launch.kind.startswith("max_pool"):  # where far below zero many values are one
            given[role] = given[role] * 3  # past the bends at -3, 3 and 6
    verdict = device.compare(launch, given, device.run(launch, given, how="fused"), device.truth(launch, given))
    # A value next to a bend may fall on its other side in fp32.
    assert not verdict.wrong, f"{place}: {verdict.wrong}, allowed {verdict.allowed:.1e}"


def others_slow(name: str) -> list[object]:
    return [case if case[0] == name else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", others_slow("silu"), ids=str)
def test_every_place(case: tuple[str, float]) -> None:
    for place, launch in launches(*case, torch.float32).items():
        check(place, launch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_16_bits(case: tuple[str, float], dtype: torch.dtype) -> None:
    for place, launch in launches(*case, dtype).items():
        check(place, launch)


@pytest.mark.parametrize(
    ("name", "slope", "mode"),
    [
        ("leaky_relu", -0.3, "first frozen"),
        *(
            pytest.param(*case, mode, marks=pytest.mark.slow)
            for case in CASES
            for mode in ("training", "frozen", "first frozen")
        ),
    ],
)
def test_a_block_and_a_stem(name: str, slope: float, mode: str) -> None:
    """From the chain to its gradients, all of it through Triton, against float64 eager PyTorch."""
    for place in ("basic_projection", "stem") if mode != "first frozen" else ("bottleneck_groups",):
        spec, h, w = CHAINS[place]
        spec = with_activation(spec, name, slope)
        spec = spec if mode == "frozen" else in_training(spec, *((2, 1) if mode == "first frozen" else ()))
        x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
        exact = twin([x, *parameters], torch.float64)
        expected = plain_chain(spec, exact[0], exact[1:])
        x, parameters = x.to(DEVICE), [tensor.to(DEVICE) for tensor in parameters]
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in (x, *parameters)]
        with count_launches() as log:
            out = chain(inputs[0], inputs[1:], spec, "triton")
            dout = torch.randn_like(expected)
            out.backward(dout.float().to(DEVICE))
        assert {runner for runner, _ in log.launches} == {"triton"}
        assert relative_error(out, expected) < 1e-5
        expected.backward(dout)
        for slot, actual, wanted in zip(("x", *spec.parameter_slots), inputs, exact, strict=True):
            if wanted.grad is not None and wanted.grad.abs().max() > 1e-10:
                assert relative_error(actual.grad, wanted.grad) < 3e-5, f"{place}: {slot}"


@triton.jit
def _both(z, gradient, slope, a, dz, ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(a + at, ACTIVATION(tl.load(z + at), slope))
    tl.store(dz + at, BACKWARD(tl.load(gradient + at), tl.load(z + at), slope))


@pytest.mark.parametrize(("name", "slope"), CASES)
def test_the_functions_themselves(name: str, slope: float) -> None:
    """On both sides of every bend and far out, where exponentials overflow; NaN and infinities as on the CPU."""
    z = torch.cat([torch.linspace(-110, 110, 1000), torch.linspace(-9, 9, 1044), torch.tensor([0.0, torch.nan, torch.inf])])
    z = torch.cat([z, -z[-1:]]).to(DEVICE)
    gradient = torch.randn_like(z)
    a, dz = torch.full_like(z, torch.nan), torch.full_like(z, torch.nan)
    functions = kernels.ACTIVATIONS[name]
    _both[(1,)](z, gradient, slope, a, dz, *functions, z.numel())
    row = ACTIVATIONS[name]
    exact = (row.function(z.double(), slope), row.backward(gradient.double(), z.double(), slope, None))
    for actual, expected in zip((a, dz), exact, strict=True):
        there = z.isfinite()
        assert relative_error(actual[there], expected[there]) < 1e-6
        difference = (actual - expected).abs()[there] / gradient.abs().clamp(min=1)[there]
        assert difference.max() < 2e-5
    assert torch.equal(a.isfinite(), exact[0].float().isfinite())
    if name != "relu6":  # whose gradient at a NaN is as the vector unit falls
        assert torch.equal(dz.isfinite(), exact[1].float().isfinite())
    if from_output(name, slope):
        again = torch.full_like(z, torch.nan)
        _both[(1,)](a, gradient, slope, torch.empty_like(a), again, *functions, z.numel())
        assert torch.equal(again.nan_to_num(), dz.nan_to_num())


def test_the_tables_agree() -> None:
    assert list(kernels.ACTIVATIONS) == list(ACTIVATIONS)
