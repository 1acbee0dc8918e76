"""Chains whose shortcut starts from a second input: what a feature pyramid hands down, an average pooling, any tensor.

Outputs, gradients of both inputs and of all parameters, and running statistics, against float64 eager PyTorch.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nets import chain_inputs, in_training, plain_chain, twin, with_activation
from tolerances import assert_no_worse, relative_error
from torch import Tensor

from fused_resnet import count_launches
from fused_resnet.chain import Chain, Layer
from fused_resnet.functional import chain
from fused_resnet.plan import backward_plan, forward_plan, nominal_size, saved_slots, trainable_slots

_NORM = {"norm": True, "affine": True, "eps": 1e-5}


def _layer(name: str, channels: int, filters: int, kernel: int = 3, **options: object) -> Layer:
    return Layer(name, filters, channels, (kernel, kernel), padding=(kernel // 2, kernel // 2), **options)  # type: ignore[arg-type]


_BASIC = (_layer("a", 4, 6, stride=(2, 2), activation="relu", **_NORM), _layer("b", 6, 6, activation="relu", **_NORM))
_ENDS = replace(_BASIC[1], activation="identity")
_SIDE = _layer("d", 5, 6, 1, **_NORM)

#: Name -> (chain, rows and columns of x, shape of the second input without its images).
CHAINS: dict[str, tuple[Chain, tuple[int, int], tuple[int, int, int]]] = {
    "pyramid": (Chain((_layer("a", 5, 4, 1, bias=True),), True, skip=True), (7, 9), (4, 7, 9)),
    "pre-activation": (Chain((_BASIC[0], _layer("b", 6, 6)), True, skip=True), (9, 7), (6, 5, 4)),
    "basic": (Chain(_BASIC, True, skip=True), (9, 7), (6, 5, 4)),
    "no activation": (Chain((_BASIC[0], _ENDS), True, skip=True), (9, 7), (6, 5, 4)),
    "average-pool": (Chain(_BASIC, True, _SIDE, skip=True), (9, 7), (5, 5, 4)),
    "projection without norm": (Chain(_BASIC, True, _layer("d", 5, 6, 1), skip=True), (9, 7), (5, 5, 4)),
    # The rows and columns that the stride leaves over are not in the sizes of the sum.
    "strided projection": (Chain(_BASIC, True, replace(_SIDE, stride=(2, 2)), skip=True), (9, 7), (5, 10, 8)),
}
MODES = {
    **CHAINS,
    **{f"{name}, silu": (with_activation(spec, "silu"), *sizes) for name, (spec, *sizes) in CHAINS.items() if "basic" in name},
}
MODES |= {
    **{f"{name}, train": (in_training(spec), *sizes) for name, (spec, *sizes) in MODES.items() if spec.layers[0].norm},
    "average-pool, low": (in_training(CHAINS["average-pool"][0], memory="low"), *CHAINS["average-pool"][1:]),
    "average-pool, second frozen": (in_training(CHAINS["average-pool"][0], 2), *CHAINS["average-pool"][1:]),
}  # fmt: skip


def inputs(name: str, n: int, dtype: torch.dtype) -> tuple[Chain, list[Tensor]]:
    """A chain with its inputs and parameters: x, skip and the others."""
    spec, (h, w), shape = MODES[name]
    x, parameters = chain_inputs(spec, n, h, w, dtype)
    return spec, [x, torch.randn(n, *shape, dtype=dtype, requires_grad=True), *parameters]


def run(spec: Chain, tensors: list[Tensor], dout: Tensor | None, backend: str | None) -> dict[str, Tensor]:
    """Forward and backward on copies, in eager PyTorch where ``backend`` is None: all that comes out, by name."""
    x, skip, *parameters = twin(tensors)
    if backend is None:
        out = plain_chain(spec, x, parameters, skip=skip)
    else:
        out = chain(x, parameters, spec, backend, skip=skip)
    made = {"out": out.detach()}
    named = dict(zip(("x", *spec.operand_slots), (x, skip, *parameters), strict=True))
    wanted = [slot for slot, tensor in named.items() if tensor.requires_grad]
    if dout is not None and wanted:
        gradients = torch.autograd.grad(out, [named[slot] for slot in wanted], dout.to(out.dtype))
        made |= {f"gradient of {slot}": gradient for slot, gradient in zip(wanted, gradients, strict=True)}
    return made | {slot: named[slot] for slot in spec.buffer_slots}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", MODES)
def test_float64_is_exact(name: str, backend: str) -> None:
    spec, tensors = inputs(name, 3, torch.float64)
    out = run(spec, tensors, None, None)["out"]
    dout = torch.randn_like(out)
    truth, actual = (run(spec, tensors, dout, which) for which in (None, backend))
    assert list(actual) == list(truth) and "gradient of skip" in truth
    for what, expected in truth.items():
        assert relative_error(actual[what], expected) < 1e-11, what


#: What is interpreted: each end that reads the second input.
INTERPRETED = ("pyramid", "basic, silu", "average-pool", "average-pool, train", "strided projection, train")


@pytest.mark.parametrize(("name", "backend"), [*((name, "cpu") for name in MODES), *((name, "triton") for name in INTERPRETED)])
def test_fp32_is_no_worse_than_twice_eager(name: str, backend: str) -> None:
    spec, tensors = inputs(name, 2, torch.float32)
    dout = torch.randn_like(run(spec, tensors, None, None)["out"])
    truth = run(spec, twin(tensors, torch.float64), dout, None)
    with count_launches() as log:
        actual = run(spec, tensors, dout, backend)
    assert backend == "cpu" or {runner for runner, _ in log.launches} == {"triton"}
    eager = run(spec, tensors, dout, None)
    for what, expected in truth.items():
        assert_no_worse(relative_error(actual[what], expected), relative_error(eager[what], expected), what, 1e-5)


@pytest.mark.parametrize("name", ["pyramid", "basic", "average-pool", "strided projection, train", "basic, silu, train"])
def test_each_gradient_alone_equals_its_share_of_all(name: str) -> None:
    spec, tensors = inputs(name, 2, torch.float64)
    dout = torch.randn_like(run(spec, tensors, None, None)["out"])
    every = run(spec, tensors, dout, "reference")
    for slot, index in zip(("x", *spec.operand_slots), range(len(tensors))):
        if tensors[index].requires_grad:
            alone = [tensor.detach().requires_grad_(i == index) for i, tensor in enumerate(tensors)]
            actual = run(spec, alone, dout, "reference")
            assert [what for what in actual if what.startswith("gradient")] == [f"gradient of {slot}"]
            assert relative_error(actual[f"gradient of {slot}"], every[f"gradient of {slot}"]) < 1e-12, slot


def test_what_is_kept_and_launched() -> None:
    """The second input is kept only for a filter's gradient; its own costs a launch only behind a projection."""
    for name, kept, backward in (("pyramid", {"x"}, 3), ("basic", {"x", "out", "a1"}, 5), ("average-pool", {"skip"}, 7)):
        spec = CHAINS[name][0]
        needs = trainable_slots(spec)
        assert "skip" in needs
        saved = {slot for slot in saved_slots(spec, needs) if "." not in slot}
        assert kept <= saved and ("skip" in saved) is (spec.projection is not None)
        assert len(backward_plan(spec, *nominal_size(spec), torch.float32, needs).launches) == backward
    assert [launch.epilogue for launch in forward_plan(CHAINS["pyramid"][0], 1, 4, 4, torch.float32).launches] == ["bias_add"]


@pytest.mark.parametrize("name", MODES)
def test_a_chain_is_its_text(name: str) -> None:
    assert Chain.parse(MODES[name][0].token) == MODES[name][0]


@pytest.mark.parametrize("name", ["pyramid", "average-pool, train", "strided projection"])
def test_opcheck_of_the_operators(name: str) -> None:
    """Schema, fake kernel, autograd registration and dynamic shapes, by PyTorch's own tester."""
    spec, tensors = inputs(name, 2, torch.float32)
    x, *operands = [t.detach().contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.detach() for t in tensors]
    x, *operands = [t.requires_grad_(given.requires_grad) for t, given in zip((x, *operands), tensors)]
    flags = [t.requires_grad for t in tensors]
    for backend in ("cpu", "reference"):
        torch.library.opcheck(torch.ops.fused_resnet.chain.default, (x, operands, spec.token, backend, flags))


def test_under_the_compiler() -> None:
    spec, tensors = inputs("strided projection", 2, torch.float64)
    compiled = torch.compile(
        lambda x, skip, *parameters: chain(x, parameters, spec, skip=skip), fullgraph=True, backend="aot_eager"
    )
    out, expected = compiled(*tensors), run(spec, tensors, torch.ones(2, 6, 5, 4), None)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    for gradient, (what, truth) in zip(torch.autograd.grad(out.sum(), wanted), list(expected.items())[1:]):
        assert relative_error(gradient, truth) < 1e-12, what


def test_a_gradient_that_is_handed_through_is_nobody_elses() -> None:
    """Without an activation the second input's gradient is the output's; summing up into it must not change that one."""
    spec, (x, skip, *parameters) = inputs("pyramid", 1, torch.float64)
    out = chain(x, parameters, spec, "reference", skip=skip)
    dout = torch.randn_like(out)
    before = dout.clone()
    (out * 1).backward(dout)
    skip.grad.mul_(2)
    assert torch.equal(dout, before) and torch.equal(skip.grad, 2 * before)


def test_errors() -> None:
    spec, (x, skip, *parameters) = inputs("pyramid", 2, torch.float32)
    with pytest.raises(TypeError, match="skip must be a Tensor"):
        chain(x, parameters, spec)
    with pytest.raises(TypeError, match="skip must be None"):
        chain(x, parameters, replace(spec, skip=False, residual=False), skip=skip)
    with pytest.raises(RuntimeError, match=r"skip of shape \[2, 4, 7, 8\] .* expected \[2, 4, 7, 9\]"):
        chain(x, parameters, spec, skip=skip[..., :-1])
    with pytest.raises(RuntimeError, match=r"skip is torch\.float64"):
        chain(x, parameters, spec, skip=skip.double())
    spec, (x, skip, *parameters) = inputs("strided projection", 2, torch.float32)
    with pytest.raises(RuntimeError, match=r"expected what d makes \[2, 6, 5, 4\] of"):
        chain(x, parameters, spec, skip=skip[:, :, :8])
