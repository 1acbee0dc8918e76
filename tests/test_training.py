"""Chains with the batch's statistics: outputs, every gradient and the running statistics, against float64 eager PyTorch.

Each chain of ``nets.py`` runs with all of its BatchNorms in training mode, and with half of them frozen, one way and the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from nets import CHAINS, TRAINING_CHAINS, chain_inputs, in_training, plain_chain, twin
from tolerances import assert_no_worse, distance, relative_error
from torch import Tensor

from fused_resnet import count_launches
from fused_resnet.chain import Chain, Pool
from fused_resnet.functional import chain
from fused_resnet.plan import trainable_slots

BACKENDS = ("reference", "cpu")
HALVES = (torch.float16, torch.bfloat16)
CONTIGUOUS = torch.contiguous_format

#: Name -> (chain, rows, columns); ``low`` computes the last convolution and the projection again.
MODES = {
    **TRAINING_CHAINS,
    **{f"{name}, low": (in_training(CHAINS[name][0], memory="low"), *CHAINS[name][1:])
       for name in ("basic", "basic_projection", "bottleneck_groups", "bottleneck_dilated", "affine_with_bias", "stem")},
}  # fmt: skip


def step(
    spec: Chain, tensors: Sequence[Tensor], dout: Tensor, backend: str | None, layout: torch.memory_format = CONTIGUOUS
) -> dict[str, Tensor]:
    """Forward and backward on copies, through a backend or (None) in eager PyTorch: all that comes out, by name."""
    x, *parameters = twin(tensors)
    out = plain_chain(spec, x, parameters, layout) if backend is None else chain(x, parameters, spec, backend)
    named = dict(zip(("x", *spec.parameter_slots), (x, *parameters), strict=True))
    wanted = [slot for slot, tensor in named.items() if tensor.requires_grad]
    gradients = torch.autograd.grad(out, [named[slot] for slot in wanted], dout.to(out.dtype))
    result = {"out": out.detach(), **{f"gradient of {slot}": g for slot, g in zip(wanted, gradients, strict=True)}}
    return result | {slot: named[slot] for slot in spec.buffer_slots}


def problem(spec: Chain, n: int, h: int, w: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """Random inputs and output gradient in ``dtype``, and what should come out of them, in float64."""
    x, parameters = chain_inputs(spec, n, h, w, dtype)
    exact = twin([x, *parameters], torch.float64)
    dout = torch.randn_like(plain_chain(spec, exact[0], twin(exact[1:]))).to(dtype)
    return [x, *parameters], dout, step(spec, exact, dout.double(), None)


def has_biases(spec: Chain) -> bool:
    """Whether there is a bias whose gradient is not zero."""
    return any(layer.bias and not layer.batch for layer in spec.weight_layers)


def biases_in_front_of_batch_norm(spec: Chain) -> set[str]:
    """Their gradient is zero, and what eager PyTorch gives is rounding noise."""
    return {f"gradient of {layer.slot('bias')}" for layer in spec.weight_layers if layer.batch and layer.bias}


def single_taps_in_front_of_batch_norm(spec: Chain) -> set[str]:
    """BatchNorm divides by the size of a filter that is one number: its gradient is what eps leaves, and rounding noise."""
    layers = [layer for layer in spec.weight_layers if layer.batch]
    return {f"gradient of {layer.slot('w')}" for layer in layers if layer.kernel == (1, 1) and layer.channels == layer.groups}


def eager_in_both_layouts(spec: Chain, tensors: Sequence[Tensor], dout: Tensor) -> list[dict[str, Tensor]]:
    """Eager PyTorch sums in another order for channels_last; its own error is the larger of the two."""
    return [step(spec, tensors, dout, None, layout) for layout in (CONTIGUOUS, torch.channels_last)]


def errors_by_kind(spec: Chain, actual: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of the output, and of the gradients of all filters together, all gammas, ..., all running means, ..."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for what, expected in truth.items():
        if what not in biases_in_front_of_batch_norm(spec) | single_taps_in_front_of_batch_norm(spec):
            pairs.setdefault(what.rpartition(".")[2], []).append((actual[what], expected))
    return {kind: distance(several) for kind, several in pairs.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODES)
def test_float64_is_exact(name: str, backend: str) -> None:
    """To the last digits. (The CPU executor hands float64 to the reference.)"""
    spec, h, w = MODES[name]
    tensors, dout, truth = problem(spec, 3, h, w, torch.float64)
    actual = step(spec, tensors, dout, backend)
    assert list(actual) == list(truth)
    for what, expected in truth.items():
        assert actual[what].dtype == expected.dtype
        if what in biases_in_front_of_batch_norm(spec):
            assert actual[what].abs().max() < 1e-12 > expected.abs().max()
        else:
            assert relative_error(actual[what], expected) < 1e-11, what


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODES)
def test_fp32_is_no_worse_than_twice_eager(name: str, backend: str) -> None:
    spec, h, w = MODES[name]
    tensors, dout, truth = problem(spec, 6, h, w, torch.float32)
    actual = step(spec, tensors, dout, backend)
    assert all(not actual[what].any() for what in biases_in_front_of_batch_norm(spec))
    eagers = [errors_by_kind(spec, eager, truth) for eager in eager_in_both_layouts(spec, tensors, dout)]
    for kind, error in errors_by_kind(spec, actual, truth).items():
        assert_no_worse(error, max(eager[kind] for eager in eagers), kind)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_no_worse_than_twice_eager(backend: str, dtype: torch.dtype) -> None:
    """Outputs and running statistics chain by chain; gradients over all chains together.

    In fp16 and bf16 some values fall on the other side of a ReLU, or a maximum on another place: in eager PyTorch as here, but
    not the same. Only over many does the error mean something. A few chains alone have a bias whose gradient counts, where one
    value would decide: these are larger, and drawn several times.
    """
    total: dict[str, list[float]] = {}
    drawn = [(name, size) for name, (spec, _, _) in MODES.items() for size in ([4] * 4 if has_biases(spec) else [1])]
    for name, size in drawn:
        spec, h, w = MODES[name]
        tensors, dout, truth = problem(spec, 8, size * h, size * w, dtype)
        eagers = eager_in_both_layouts(spec, tensors, dout)
        actual = step(spec, tensors, dout, backend)
        assert {what: t.dtype for what, t in actual.items()} == {what: t.dtype for what, t in eagers[0].items()}
        ours, theirs = errors_by_kind(spec, actual, truth), [errors_by_kind(spec, eager, truth) for eager in eagers]
        for kind, error in ours.items():
            own = max(eager[kind] for eager in theirs)
            if kind == "out" or kind.startswith("running"):
                assert_no_worse(error, own, f"{kind} of {name}")
            else:
                sums = total.setdefault(kind, [0.0, 0.0])
                total[kind] = [sums[0] + error**2, sums[1] + own**2]
    for kind, (ours_squared, own_squared) in total.items():
        assert_no_worse(ours_squared**0.5, own_squared**0.5, kind)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_filters_with_fp32_batch_norm(backend: str) -> None:
    """What ``.to(bfloat16)`` with BatchNorms kept in fp32, or autocast, hands over: gradients in each parameter's own type."""
    spec, h, w = TRAINING_CHAINS["basic_projection"]
    x, parameters = chain_inputs(spec, 8, 4 * h, 4 * w, torch.bfloat16)
    mixed = [
        p.detach().float().requires_grad_(p.requires_grad) if p.is_floating_point() and not slot.endswith(".w") else p
        for slot, p in zip(spec.parameter_slots, parameters, strict=True)
    ]
    exact = twin([x, *mixed], torch.float64)
    dout = torch.ones_like(plain_chain(spec, exact[0], twin(exact[1:])))
    truth, eager, actual = (step(spec, t, dout, b) for t, b in ((exact, None), ([x, *mixed], None), ([x, *mixed], backend)))
    assert {what: t.dtype for what, t in actual.items()} == {what: t.dtype for what, t in eager.items()}
    own = errors_by_kind(spec, eager, truth)
    for kind, error in errors_by_kind(spec, actual, truth).items():
        assert_no_worse(error, own[kind], kind)


@pytest.mark.parametrize(
    "name",
    ["basic_projection", "bottleneck_groups", "stem", "affine_with_bias", "rectangles", "norm_without_affine",
     "basic_projection, first frozen", "bottleneck_dilated, second frozen", "two_layers_and_pool", "bottleneck_groups, low"],
)  # fmt: skip
def test_gradcheck(name: str) -> None:
    """Against finite differences: nobody's derivative formulas."""
    spec, h, w = MODES[name]
    x, parameters = chain_inputs(spec, 2, h, w)
    assert torch.autograd.gradcheck(
        lambda *t: chain(t[0], t[1:], spec, "reference"), (x, *parameters), fast_mode=True, nondet_tol=1e-12
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    ["basic_projection", "bottleneck_dilated", "stem", "affine_with_bias", "basic_projection, first frozen", "basic, low"],
)
def test_each_gradient_alone_equals_its_share_of_all(name: str, backend: str) -> None:
    """With one tensor to train, its gradient is the same and nothing else comes out."""
    spec, h, w = MODES[name]
    dtype = torch.float64 if backend == "reference" else torch.float32
    x, parameters = chain_inputs(spec, 2, h, w, dtype)
    named = dict(zip(("x", *spec.parameter_slots), (x, *parameters), strict=True))
    dout = torch.randn_like(plain_chain(spec, x, twin(parameters)))
    every = step(spec, [x, *parameters], dout, backend)
    for slot in trainable_slots(spec):
        alone = [tensor.detach().requires_grad_(name == slot) for name, tensor in named.items()]
        actual = step(spec, alone, dout, backend)
        assert [what for what in actual if what.startswith("gradient")] == [f"gradient of {slot}"]
        scale = every[f"gradient of {slot}"]
        assert relative_error(actual[f"gradient of {slot}"], scale) < 100 * torch.finfo(dtype).eps, slot


# ------------------------------------------------------------------------------------------------- launches


def kinds(spec: Chain, h: int, w: int, trained: set[str], backend: str = "reference") -> tuple[Counter[str], Counter[str]]:
    """Kinds of the launches that ran, forward and backward, when ``trained`` slots need gradients."""
    x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
    for slot, tensor in zip(("x", *spec.parameter_slots), (x, *parameters), strict=True):
        if tensor.is_floating_point():
            tensor.requires_grad_(slot in trained)
    with count_launches() as log:
        out = chain(x, parameters, spec, backend)
        forward = len(log)
        if out.requires_grad:
            out.sum().backward()
    launches = [launch.kind for _, launch in log.launches]
    return Counter(launches[:forward]), Counter(launches[forward:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("basic", {"conv": 2, "bn_add_relu": 1}, {"bn_add_relu_backward": 1, "dgrad": 2, "wgrad": 2}),
        ("basic_projection", {"conv": 3, "bn_add_relu": 1}, {"bn_add_relu_backward": 1, "dgrad": 3, "wgrad": 3}),
        ("bottleneck_groups", {"conv": 3, "bn_add_relu": 1}, {"bn_add_relu_backward": 1, "dgrad": 3, "wgrad": 3}),
        ("bottleneck_dilated", {"conv": 4, "bn_add_relu": 1}, {"bn_add_relu_backward": 1, "dgrad": 4, "wgrad": 4}),
        ("stem", {"conv": 1, "max_pool": 1}, {"max_pool_backward": 1, "dgrad": 1, "wgrad": 1}),
        ("affine_relu", {"conv": 1, "bn_add_relu": 1}, {"bn_add_relu_backward": 1, "dgrad": 1, "wgrad": 1}),
        # The last BatchNorm frozen: its affine is in the convolution, no launch behind it.
        ("basic, second frozen", {"conv": 2}, {"bn_add_relu_backward": 1, "dgrad": 2, "wgrad": 2}),
        ("basic, low", {"conv": 2, "bn_add_relu": 1}, {"conv": 1, "bn_add_relu_backward": 1, "dgrad": 2, "wgrad": 2}),
        ("bottleneck_dilated, low", {"conv": 4, "bn_add_relu": 1},
         {"conv": 2, "bn_add_relu_backward": 1, "dgrad": 4, "wgrad": 4}),
    ],
)  # fmt: skip
def test_launches_that_ran(name: str, forward: dict[str, int], backward: dict[str, int], backend: str) -> None:
    """The tables of docs/training.md, counted when they run."""
    spec, h, w = MODES[name]
    assert kinds(spec, h, w, set(trainable_slots(spec)), backend) == (forward, backward)


def test_only_needed_gradients_are_computed() -> None:
    """Frozen filters launch no wgrad, an input that needs no gradient no dgrad of the first layer; sums come for nothing."""
    spec, h, w = TRAINING_CHAINS["bottleneck_dilated"]  # three layers a, b, c and a projection d
    everything = set(trainable_slots(spec))
    filters = {slot for slot in everything if slot.endswith(".w")}

    def backward(trained: set[str]) -> Counter[str]:
        return kinds(spec, h, w, trained)[1] - Counter({"bn_add_relu_backward": 1})

    assert backward(everything - {"x"}) == {"dgrad": 2, "wgrad": 4}
    assert backward(everything - filters) == {"dgrad": 4}
    assert backward(everything - filters - {"x"}) == {"dgrad": 2}
    assert backward({"x"}) == {"dgrad": 4}
    assert backward({"c.w"}) == {"wgrad": 1}
    assert backward({"d.w"}) == {"wgrad": 1}
    assert backward({"c.beta"}) == backward({"c.gamma"}) == backward({"d.beta"}) == backward({"d.gamma"}) == {}
    assert backward({"b.gamma", "c.beta"}) == {"dgrad": 1}
    assert backward({"a.beta"}) == {"dgrad": 2}
    assert kinds(spec, h, w, set())[1] == {}


def test_a_launch_reads_no_more_than_it_needs() -> None:
    """With one beta of the last layer to train, nothing of the convolution's input is kept or read."""
    spec, h, w = TRAINING_CHAINS["basic"]
    x, parameters = chain_inputs(spec, 2, h, w)
    for slot, tensor in zip(("x", *spec.parameter_slots), (x, *parameters), strict=True):
        if tensor.is_floating_point():
            tensor.requires_grad_(slot == "b.beta")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = chain(x, parameters, spec, "reference")
    activations = [tuple(t.shape) for t in kept if t.dim() == 4]
    assert len(activations) <= 2 and not any(t.data_ptr() == x.data_ptr() for t in kept)
    out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["basic_projection", "bottleneck_dilated", "pre_add_identity", "stem", "basic_projection, low"]
)
def test_every_gradient_owns_its_memory(name: str, backend: str) -> None:
    """dbeta of a block and of its projection are the same numbers; writing to one must change nothing else."""
    spec, h, w = MODES[name]
    x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
    out = chain(x, parameters, spec, backend)
    dout = torch.randn_like(out)
    wanted = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
    made = torch.autograd.grad(out, wanted, dout)
    places = [tensor.untyped_storage().data_ptr() for tensor in (*made, dout, out, x, *parameters)]
    assert len(places) == len(set(places))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_inputs_give_the_same_bits(backend: str) -> None:
    spec, h, w = TRAINING_CHAINS["bottleneck_dilated"]
    tensors, dout, _ = problem(spec, 3, h, w, torch.float32)
    first, second = (step(spec, tensors, dout, backend) for _ in range(2))
    assert all(torch.equal(first[what], second[what]) for what in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_are_accepted(backend: str) -> None:
    """NCHW, channels_last, sliced, transposed inputs and gradients: the same values, and nobody's memory is written to."""
    spec, h, w = TRAINING_CHAINS["basic_projection"]
    (x, *parameters), dout, truth = problem(spec, 2, h, w, torch.float32)
    x = x.detach()
    wide = torch.zeros(2, x.shape[1], h, 2 * w)
    wide[..., ::2] = x
    layouts = {
        "NCHW": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": wide[..., ::2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch inside": x.transpose(0, 1).contiguous().transpose(0, 1),
    }
    for label, given in layouts.items():
        given = given.detach().requires_grad_()
        before, douts = given.detach().clone(), dout.transpose(2, 3).contiguous().transpose(2, 3)
        own = twin(parameters)
        out = chain(given, own, spec, backend)
        out.backward(douts)
        assert relative_error(out, truth["out"]) < 1e-5, label
        assert relative_error(given.grad, truth["gradient of x"]) < 1e-4, label
        assert torch.equal(given.detach(), before) and torch.equal(douts, dout), f"{label}: an operand was written to"
    out = chain(x.requires_grad_(), twin(parameters), spec, backend)
    out.sum().backward()  # an expanded gradient: strides of zero


def test_the_graph_is_freed_after_backward() -> None:
    """``out`` is among the saved tensors: a reference cycle would keep every activation until the garbage collector runs."""
    import gc
    import weakref

    spec, h, w = TRAINING_CHAINS["basic"]
    x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
    gc.disable()
    try:
        out = chain(x, parameters, spec, "cpu")
        alive = weakref.ref(out)
        out.sum().backward()
        del out
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pooling_with_more_places_than_a_byte_counts(backend: str, frozen: bool) -> None:
    """272 places a window. Behind given statistics and a SiLU, too, whose pooling tells where the maximum was."""
    layer = CHAINS["stem"][0].layers[0]
    spec = Chain((replace(layer, stride=(1, 1), activation="silu"),), pool=Pool((17, 16), (1, 2), (3, 0)))
    spec = spec if frozen else in_training(spec)
    tensors, dout, truth = problem(spec, 2, 19, 22, torch.float64 if backend == "reference" else torch.float32)
    actual = step(spec, tensors, dout, backend)
    for what, expected in truth.items():
        assert distance([(actual[what], expected)]) < (1e-10 if backend == "reference" else 1e-4), what
