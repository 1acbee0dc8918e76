"""Random chains and sizes (hypothesis): what no list of cases thought of."""

from __future__ import annotations

import pytest
import torch
from nets import chain_inputs, plain_chain, randomise
from tolerances import assert_close, relative_error
from torch import nn

from fused_resnet import fuse
from fused_resnet.chain import Chain, Layer, Pool
from fused_resnet.functional import chain
from fused_resnet.plan import backward_plan, forward_plan, nominal_size

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow
SETTINGS = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def layers(draw: st.DrawFn, name: str, channels: int) -> Layer:
    groups = draw(st.sampled_from([g for g in (1, 2, 3, channels) if channels % g == 0]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 7), (2, 2), (3, 1)]))
    norm = draw(st.booleans())
    return Layer(
        name,
        groups * draw(st.integers(1, 3)),
        channels,
        kernel,
        draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 3)])),
        draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        draw(st.sampled_from([(1, 1), (2, 2), (1, 3)])),
        groups,
        draw(st.booleans()),
        norm,
        norm and draw(st.booleans()),
        draw(st.sampled_from([1e-5, 1e-2])) if norm else 0.0,
        draw(st.sampled_from(["relu", "identity"])),
    )


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    channels = draw(st.integers(1, 6))
    made: list[Layer] = []
    for index in range(draw(st.integers(1, 3))):
        made.append(draw(layers(f"l{index}", made[-1].filters if made else channels)))
    pool = draw(
        st.none()
        | st.builds(Pool, st.sampled_from([(2, 2), (3, 3), (3, 2)]), st.sampled_from([(1, 1), (2, 2)]), st.just((1, 1)))
    )
    return Chain(tuple(made), pool=pool)


def fits(spec: Chain, h: int, w: int) -> bool:
    try:
        forward_plan(spec, 1, h, w, torch.float64)
    except RuntimeError:
        return False
    return True


@SETTINGS
@given(chains(), st.integers(0, 3), st.integers(1, 17), st.integers(1, 17), st.data())
def test_any_chain_and_any_subset_of_gradients(spec: Chain, n: int, h: int, w: int, data: st.DataObject) -> None:
    """Reference executor in float64 against autograd: values, and the gradients of a random subset of the tensors."""
    assume(fits(spec, h, w))
    x, parameters = chain_inputs(spec, n, h, w)
    for tensor in (x, *parameters):
        tensor.requires_grad_(tensor.requires_grad and data.draw(st.booleans()))
    expected = plain_chain(spec, x, parameters)
    out = chain(x, parameters, spec, "reference")
    assert relative_error(out, expected) < 1e-12
    wanted = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
    assert out.requires_grad == bool(wanted)
    if wanted:
        dout = torch.randn_like(expected)
        pairs = zip(torch.autograd.grad(out, wanted, dout), torch.autograd.grad(expected, wanted, dout), strict=True)
        for actual, truth in pairs:
            scale = truth.abs().max().item() if truth.numel() else 0.0
            assert scale < 1e-12 or relative_error(actual, truth) < 1e-10


@SETTINGS
@given(chains(), st.integers(0, 3), st.integers(1, 17), st.integers(1, 17))
def test_any_chain_through_the_cpu_executor(spec: Chain, n: int, h: int, w: int) -> None:
    assume(fits(spec, h, w))
    x, parameters = chain_inputs(spec, n, h, w, torch.float32)
    truth = plain_chain(spec, x.detach().double(), [p.detach().double() for p in parameters])
    with torch.no_grad():
        assert_close(chain(x, parameters, spec, "cpu"), truth, 225, 4 * len(spec.layers))


@SETTINGS
@given(chains())
def test_any_chain_has_a_nominal_size_and_a_token(spec: Chain) -> None:
    n, h, w = nominal_size(spec)
    assert fits(spec, h, w)
    assert Chain.parse(spec.token) == spec
    needs = frozenset({"x", *(s for s in spec.parameter_slots if s.endswith((".w", ".bias", ".gamma", ".beta")))})
    assert set(backward_plan(spec, n, h, w, torch.float32, needs).results) == {f"d.{slot}" for slot in needs}


@st.composite
def sequentials(draw: st.DrawFn) -> nn.Sequential:
    modules: list[nn.Module] = []
    channels = 3
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(["conv", "conv", "bn", "relu", "pool", "dropout", "tanh", "identity"]))
        if kind == "conv":
            filters = draw(st.integers(1, 6))
            modules.append(nn.Conv2d(channels, filters, draw(st.sampled_from([1, 3])), padding=1, bias=draw(st.booleans())))
            channels = filters
        else:
            modules.append(
                {
                    "bn": nn.BatchNorm2d(channels),
                    "relu": nn.ReLU(inplace=draw(st.booleans())),
                    "pool": nn.MaxPool2d(3, 2, 1),
                    "dropout": nn.Dropout(),
                    "tanh": nn.Tanh(),
                    "identity": nn.Identity(),
                }[kind]
            )
    return nn.Sequential(*modules)


@pytest.mark.filterwarnings("ignore:fuse found no")
@SETTINGS
@given(sequentials(), st.integers(0, 2))
def test_any_sequential(net: nn.Sequential, n: int) -> None:
    """Whatever the order of the modules, fused or not, the result is eager's."""
    randomise(net).eval()
    x = torch.randn(n, 3, 9, 8)
    with torch.no_grad():
        expected = net(x.clone())
        assert relative_error(fuse(net)(x.clone()), expected) < 1e-5
