"""A chain as a function: values and gradients against float64 autograd of plain PyTorch, and what is kept for the backward."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from nets import CHAINS, chain_inputs, plain_chain
from tolerances import assert_close, bound, relative_error
from torch import Tensor

from fused_resnet import count_launches
from fused_resnet.chain import Chain
from fused_resnet.functional import chain

BACKENDS = ("reference", "cpu")


def gradients(out: Tensor, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, [t for t in inputs if t.requires_grad], dout))


def longest_sum(spec: Chain) -> int:
    return max(layer.channels // layer.groups * layer.kernel[0] * layer.kernel[1] for layer in spec.weight_layers)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHAINS)
def test_forward_and_all_gradients_against_float64_autograd(name: str, backend: str) -> None:
    """The reference in float64 to its last digits; the CPU executor in fp32 against the same float64 truth."""
    spec, h, w = CHAINS[name]
    dtype = torch.float64 if backend == "reference" else torch.float32
    x, parameters = chain_inputs(spec, 2, h, w, dtype)
    truth = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, *parameters)]
    expected = plain_chain(spec, truth[0], truth[1:])
    out = chain(x, parameters, spec, backend)
    assert out.dtype == dtype
    assert_close(out, expected, longest_sum(spec), 2 * len(spec.layers), "out")
    dout = torch.randn_like(expected)
    labels = [slot for slot, t in zip(("x", *spec.parameter_slots), truth, strict=True) if t.requires_grad]
    pairs = zip(labels, gradients(out, [x, *parameters], dout.to(dtype)), gradients(expected, truth, dout), strict=True)
    pixels = 2 * h * w
    for label, actual, wanted in pairs:
        assert_close(actual, wanted, longest_sum(spec) * pixels, 2 * len(spec.layers), f"gradient of {label}")


@pytest.mark.parametrize(
    "name", ["basic_projection", "bottleneck_groups", "stem", "affine_with_bias", "bias_add", "entry_and_projection"]
)
def test_gradcheck(name: str) -> None:
    """Against finite differences: nobody's derivative formulas."""
    spec, h, w = CHAINS[name]
    x, parameters = chain_inputs(spec, 1, h, w)
    assert torch.autograd.gradcheck(lambda *t: chain(t[0], t[1:], spec, "reference"), (x, *parameters), fast_mode=True)


@pytest.mark.parametrize(
    "name",
    [
        "basic_projection", "bottleneck_dilated", "stem", "bias_add", "affine_with_bias", "plain_projection",
        "entry_and_shortcut", "entry_and_projection",
    ],
)  # fmt: skip
def test_each_gradient_alone_equals_its_share_of_all(name: str) -> None:
    """With one tensor to train, its gradient is the same and nothing else comes out."""
    spec, h, w = CHAINS[name]
    x, parameters = chain_inputs(spec, 2, h, w)
    tensors = [x, *parameters]
    out = chain(x, parameters, spec, "reference")
    dout = torch.randn_like(out)
    every = dict(zip([i for i, t in enumerate(tensors) if t.requires_grad], gradients(out, tensors, dout), strict=True))
    for index, expected in every.items():
        alone = [t.detach().requires_grad_(i == index) for i, t in enumerate(tensors)]
        (actual,) = gradients(chain(alone[0], alone[1:], spec, "reference"), alone, dout)
        assert relative_error(actual, expected) < 1e-12, ("x", *spec.parameter_slots)[index]


def backward_kinds(spec: Chain, h: int, w: int, trained: set[str]) -> Counter[str]:
    """Kinds of the launches that the backward runs when ``trained`` slots need gradients."""
    x, parameters = chain_inputs(spec, 1, h, w)
    for slot, tensor in zip(("x", *spec.parameter_slots), (x, *parameters), strict=True):
        tensor.requires_grad_(slot in trained)
    out = chain(x, parameters, spec, "reference")
    with count_launches() as log:
        out.sum().backward()
    return Counter(launch.kind for _, launch in log.launches)


def test_only_needed_gradients_are_computed() -> None:
    """Frozen parameters cost no launch: dgrad stops at the first layer that trains, wgrad runs where something is wanted."""
    spec, h, w = CHAINS["bottleneck_dilated"]  # three layers a, b, c and a projection d
    everything = {"x"} | {s for s in spec.parameter_slots if not s.endswith((".mean", ".var"))}
    assert backward_kinds(spec, h, w, everything) == {"bn_add_relu_backward": 1, "dgrad": 4, "wgrad": 4}
    assert backward_kinds(spec, h, w, everything - {"x"}) == {"bn_add_relu_backward": 1, "dgrad": 2, "wgrad": 4}
    assert backward_kinds(spec, h, w, {"x"}) == {"bn_add_relu_backward": 1, "dgrad": 4}
    assert backward_kinds(spec, h, w, {"c.w"}) == {"bn_add_relu_backward": 1, "wgrad": 1}
    assert backward_kinds(spec, h, w, {"b.gamma", "c.beta"}) == {"bn_add_relu_backward": 1, "dgrad": 1, "wgrad": 2}
    assert backward_kinds(spec, h, w, {"d.w"}) == {"bn_add_relu_backward": 1, "wgrad": 1}
    assert backward_kinds(spec, h, w, {"a.beta"}) == {"bn_add_relu_backward": 1, "dgrad": 2, "wgrad": 1}


def saved_names(spec: Chain, h: int, w: int, trained: set[str]) -> set[str]:
    """What autograd is asked to keep, by slot; an activation inside the chain, which we never see, is ``inner``."""
    x, parameters = chain_inputs(spec, 1, h, w)
    x = x.to(memory_format=torch.channels_last).detach()
    known = dict(zip(("x", *spec.parameter_slots), (x, *parameters), strict=True))
    for slot, tensor in known.items():
        tensor.requires_grad_(slot in trained)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = chain(x, parameters, spec, "reference")
    places = {t.data_ptr(): slot for slot, t in (*known.items(), ("out", out))}
    names = [places.get(t.data_ptr(), f"inner{tuple(t.shape)}") for t in kept]
    assert len(names) == len(set(names)), "a tensor is kept twice"
    return set(names)


def test_saves_what_the_backward_reads_and_no_more() -> None:
    spec, h, w = CHAINS["basic"]
    inner = f"inner{(1, 6, h, w)}"
    activations = {"x", inner, "out"}
    assert saved_names(spec, h, w, {"b.beta"}) & activations == {"out"}
    assert saved_names(spec, h, w, {"b.w"}) & activations == {inner, "out"}
    assert saved_names(spec, h, w, {"a.w"}) & activations == {"x", inner, "out"}
    for_x = saved_names(spec, h, w, {"x"})
    assert for_x & activations == {inner, "out"}, "dgrad reads no input, only the masks"
    assert not {"a.mean", "b.mean", "a.beta", "b.beta"} & for_x
    spec, h, w = CHAINS["affine"]
    assert "out" not in saved_names(spec, h, w, {"a.w"}), "no activation, no mask"


def test_nothing_is_saved_without_gradients() -> None:
    spec, h, w = CHAINS["basic"]
    assert saved_names(spec, h, w, set()) == set()
    x, parameters = chain_inputs(spec, 1, h, w)
    with torch.no_grad():
        assert chain(x, parameters, spec, "reference").grad_fn is None


def test_the_graph_is_freed_after_backward() -> None:
    """``out`` is among the saved tensors: a reference cycle would keep every activation until the garbage collector runs."""
    import gc
    import weakref

    spec, h, w = CHAINS["basic"]
    x, parameters = chain_inputs(spec, 1, h, w)
    gc.disable()
    try:
        out = chain(x, parameters, spec, "cpu")
        alive = weakref.ref(out)
        out.sum().backward()
        del out
        assert alive() is None
    finally:
        gc.enable()


def test_second_derivative_is_refused() -> None:
    spec, h, w = CHAINS["basic"]
    x, parameters = chain_inputs(spec, 1, h, w)
    (dx,) = torch.autograd.grad(chain(x, parameters, spec, "reference").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_backward_twice_is_refused() -> None:
    spec, h, w = CHAINS["basic"]
    out = chain(*chain_inputs(spec, 1, h, w), spec, "reference").sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


@pytest.mark.parametrize("changed", ["a.w", "b.w", "b.var", "x", "out"])
def test_a_write_between_forward_and_backward_is_noticed(changed: str) -> None:
    """PyTorch's own error, from the version counters of the saved tensors."""
    spec, h, w = CHAINS["basic"]
    x, parameters = chain_inputs(spec, 1, h, w)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    out = chain(x, parameters, spec, "cpu")
    tensors = dict(zip(spec.parameter_slots, parameters, strict=True), x=x, out=out)
    with torch.no_grad():
        tensors[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_accumulate_and_own_their_memory() -> None:
    """dbeta of a block and of its projection are the same numbers: accumulating into one must not change the other."""
    spec, h, w = CHAINS["basic_projection"]
    x, parameters = chain_inputs(spec, 1, h, w)
    for _ in range(3):
        chain(x, parameters, spec, "reference").sum().backward()
    once = torch.autograd.grad(chain(x, parameters, spec, "reference").sum(), [p for p in parameters if p.requires_grad])
    for slot, parameter in zip(spec.parameter_slots, parameters, strict=True):
        if parameter.requires_grad:
            expected = once[[s for s, p in zip(spec.parameter_slots, parameters, strict=True) if p.requires_grad].index(slot)]
            assert relative_error(parameter.grad, 3 * expected) < 1e-12, slot


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_is_no_worse_than_twice_eager(dtype: torch.dtype, backend: str) -> None:
    """fp16 and bf16: error against float64 at most twice that of eager PyTorch in the same type."""
    spec, h, w = CHAINS["bottleneck_dilated"]
    x, parameters = chain_inputs(spec, 4, h, w, dtype)
    truth = plain_chain(spec, x.detach().double(), [p.detach().double() for p in parameters])
    eager = plain_chain(spec, x.detach(), [p.detach() for p in parameters])
    out = chain(x, parameters, spec, backend)
    assert out.dtype == dtype
    assert relative_error(out, truth) <= 2 * relative_error(eager, truth)
    grads = gradients(out, [x, *parameters], torch.ones_like(out))
    assert all(g.dtype == dtype and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_filters_with_fp32_batch_norm(backend: str) -> None:
    """What ``.to(bfloat16)`` with BatchNorms kept in fp32, or autocast, hands over."""
    spec, h, w = CHAINS["basic_projection"]
    x, parameters = chain_inputs(spec, 2, h, w, torch.bfloat16)
    parameters = [
        p if slot.endswith(".w") else p.detach().float().requires_grad_(p.requires_grad)
        for slot, p in zip(spec.parameter_slots, parameters, strict=True)
    ]
    truth = plain_chain(spec, x.detach().double(), [p.detach().double() for p in parameters])
    out = chain(x, parameters, spec, backend)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, truth) < 4 * bound(torch.bfloat16, 36)
    out.float().sum().backward()
    for slot, p in zip(spec.parameter_slots, parameters, strict=True):
        assert p.grad is None or p.grad.dtype == p.dtype, slot


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["basic_projection", "bottleneck_groups", "stem", "bias_add", "depthwise", "store"])
def test_nan_and_inf_travel_as_in_eager(name: str, backend: str) -> None:
    spec, h, w = CHAINS[name]
    x, parameters = chain_inputs(spec, 3, h, w, torch.float32)
    x, parameters = x.detach(), [p.detach() for p in parameters]
    x[0, 1, 2, 3], x[1, 0, 0, 0], x[1, 2, h - 1, w - 1] = float("nan"), float("inf"), -float("inf")
    expected = plain_chain(spec, x, parameters)
    out = chain(x, parameters, spec, backend)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(out), kind(expected)), kind.__name__
    fine = expected.isfinite()
    assert fine[2].all()
    assert relative_error(out[fine], expected[fine]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slot", ["a.w", "a.gamma", "b.beta", "b.mean", "a.var"])
def test_nan_in_a_parameter_is_not_swallowed(slot: str, backend: str) -> None:
    spec, h, w = CHAINS["basic"]
    x, parameters = chain_inputs(spec, 1, h, w, torch.float32)
    parameters = [p.detach() for p in parameters]
    parameters[spec.parameter_slots.index(slot)].view(-1)[0] = float("nan")
    expected = plain_chain(spec, x.detach(), parameters)
    assert expected.isnan().any()
    assert torch.equal(chain(x.detach(), parameters, spec, backend).isnan(), expected.isnan())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_in_the_gradient_travel_as_in_eager(backend: str) -> None:
    """Which gradients are finite is the same. (inf or NaN may differ for gamma: its sum is taken in another order.)"""
    spec, h, w = CHAINS["basic"]
    x, parameters = chain_inputs(spec, 2, h, w)
    expected = plain_chain(spec, x, parameters)
    place = (expected[0] > 0).nonzero()[0].tolist()
    for poison in (float("nan"), float("inf")):
        dout = torch.randn_like(expected)
        dout[(0, *place)] = poison
        wanted = gradients(plain_chain(spec, x, parameters), [x, *parameters], dout)
        actual = gradients(chain(x, parameters, spec, backend), [x, *parameters], dout)
        assert not all(g.isfinite().all() for g in wanted)
        for a, e in zip(actual, wanted, strict=True):
            assert torch.equal(a.isfinite(), e.isfinite())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_activation_lets_the_gradient_pass(backend: str) -> None:
    """threshold_backward compares with <=, which a NaN is not: the gradient goes through."""
    spec, h, w = CHAINS["store_relu"]
    x, parameters = chain_inputs(spec, 1, h, w)
    with torch.no_grad():
        x[0, 0, 3, 3] = float("nan")
    dout = torch.randn_like(plain_chain(spec, x, parameters))
    wanted = gradients(plain_chain(spec, x, parameters), [x, *parameters], dout)
    actual = gradients(chain(x, parameters, spec, backend), [x, *parameters], dout)
    for a, e in zip(actual, wanted, strict=True):
        assert torch.equal(a.isnan(), e.isnan())
        assert relative_error(a.nan_to_num(), e.nan_to_num()) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(CHAINS))
def test_no_images_give_an_empty_result_and_zero_gradients(name: str, backend: str) -> None:
    spec, h, w = CHAINS[name]
    x, parameters = chain_inputs(spec, 0, h, w, torch.float32)
    out = chain(x, parameters, spec, backend)
    expected = plain_chain(spec, x, parameters)
    assert out.shape == expected.shape and out.dtype == expected.dtype
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    for p in parameters:
        assert not p.requires_grad or torch.equal(p.grad, torch.zeros_like(p))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_are_accepted(backend: str) -> None:
    """NCHW, channels_last, sliced, transposed, expanded: the same values, and gradients of the layout asked for."""
    spec, h, w = CHAINS["basic"]
    x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
    x, parameters = x.detach(), [p.detach() for p in parameters]
    wide = torch.zeros(2, 6, h, 2 * w)
    wide[..., ::2] = x
    layouts = {
        "NCHW": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": wide[..., ::2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch inside": x.transpose(0, 1).contiguous().transpose(0, 1),
    }
    expected = plain_chain(spec, x, parameters)
    for label, given in layouts.items():
        before = given.clone()
        out = chain(given, parameters, spec, backend)
        assert relative_error(out, expected) < 1e-5, label
        assert out.is_contiguous(memory_format=torch.channels_last), label
        assert torch.equal(given, before), f"{label}: the input was written to"
    one = x[:1].expand(3, -1, -1, -1)
    assert relative_error(chain(one, parameters, spec, backend), plain_chain(spec, one, parameters)) < 1e-5
    still = torch.zeros(1, 1, 1, 1).expand(2, 6, h, w)
    assert relative_error(chain(still, parameters, spec, backend), plain_chain(spec, still, parameters)) < 1e-5
    x.requires_grad_()
    out = chain(x, parameters, spec, backend)
    out.sum().backward()  # an expanded gradient: strides of zero
    wanted = torch.autograd.grad(plain_chain(spec, x, parameters).sum(), x)[0]
    assert relative_error(x.grad, wanted) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_filters_with_any_strides(backend: str) -> None:
    """1x1 filters that are transposed, a slice, or expanded: gradients by element, not by memory."""
    spec, h, w = CHAINS["bottleneck_groups"]
    x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
    expected = torch.autograd.grad(plain_chain(spec, x, parameters).square().sum(), parameters[0])[0]
    filters = parameters[0].detach()
    wide = torch.zeros(4, 16, 1, 1)
    wide[:, ::2] = filters
    layouts = {
        "contiguous": filters,
        "channels_last": filters.contiguous(memory_format=torch.channels_last),
        "transposed": filters.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": wide[:, ::2],
    }
    for label, given in layouts.items():
        assert given.shape == filters.shape and torch.equal(given, filters)
        given = given.detach().requires_grad_()
        (actual,) = torch.autograd.grad(chain(x, [given, *parameters[1:]], spec, backend).square().sum(), given)
        assert relative_error(actual, expected) < 1e-4, label
    one = filters[:1].expand(4, -1, -1, -1).detach().requires_grad_()
    (actual,) = torch.autograd.grad(chain(x, [one, *parameters[1:]], spec, backend).square().sum(), one)
    (wanted,) = torch.autograd.grad(plain_chain(spec, x, [one, *parameters[1:]]).square().sum(), one)
    assert relative_error(actual, wanted) < 1e-4, "expanded"


@pytest.mark.parametrize("name", ["basic", "bottleneck_groups", "stem"])
@pytest.mark.parametrize("side", [(1, 1), (1, 5), (4, 1)])
def test_tiny_images_through_the_cpu_executor(name: str, side: tuple[int, int]) -> None:
    """One-pixel extents make strides ambiguous: channels_last and contiguous look the same."""
    spec, _, _ = CHAINS[name]
    x, parameters = chain_inputs(spec, 2, *side, torch.float32)
    assert relative_error(chain(x, parameters, spec, "cpu"), plain_chain(spec, x, parameters)) < 1e-5


def test_one_chain_for_changing_sizes() -> None:
    """Filters are prepacked for the first size seen; other sizes use them too."""
    spec, _, _ = CHAINS["bottleneck_groups"]
    _, parameters = chain_inputs(spec, 1, 5, 5, torch.float32)
    for n, h, w in ((1, 5, 5), (3, 16, 9), (2, 1, 1), (1, 40, 41)):
        x = torch.randn(n, 8, h, w)
        assert relative_error(chain(x, parameters, spec, "cpu"), plain_chain(spec, x, parameters)) < 1e-5, (n, h, w)
