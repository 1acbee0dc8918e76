"""What every model of :mod:`zoo` has to pass: the same outputs, gradients, running statistics and state_dict as before."""

from __future__ import annotations

import copy
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fused_resnet import count_launches, fuse, unfuse

#: How far an output in fp32 may be from float64, over its norm, by mode.
OUTPUT = {False: 1e-4, True: 1e-3}
#: How far running statistics in fp32 may be from float64 in any case; else three times as far as eager's, in deep networks.
STATE = 1e-4
#: How many times eager's own distance from float64 gradients may have, and what is allowed in any case. Eager's own is the
#: larger of two memory formats: fused blocks run in channels_last, where PyTorch's CPU BatchNorm adds up pixel after pixel.
GRADIENTS, FLOOR = 3.0, 1e-5


def outputs(made: Any) -> list[Tensor]:
    """The floating-point tensors of any result."""
    values = made.values() if isinstance(made, dict) else made
    leaves = tree_leaves(dict(values=list(values)) if isinstance(made, dict) else made)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _far(actual: Tensor, truth: Tensor) -> float:
    difference, scale = (actual.detach().double() - truth.detach().double()).norm(), truth.detach().double().norm()
    return float(difference / scale) if scale > 0 else float(difference)


@torch.no_grad()
def fill(model: nn.Module, x: Tensor) -> None:
    """Running statistics near the true ones, of which deep random networks in eval mode keep their numbers in range."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 0.7
    model(x)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def _step(model: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients by name, of one forward and backward; the same random numbers in each."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(11)
    out = outputs(model(x))
    generator = torch.Generator().manual_seed(3)
    total = sum(
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)).sum() for y in out if y.requires_grad
    )
    total.backward()  # type: ignore[union-attr]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out, {"x": x.grad, **gradients}


def _gradients_far(gradients: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Root mean square over the parameters of their relative errors, without those whose gradients cancel to nothing."""
    scale = max(float(gradient.norm()) for gradient in truth.values())
    found = [_far(gradients[key], t) ** 2 for key, t in truth.items() if float(t.norm()) > 1e-6 * scale]
    return float(torch.tensor(found, dtype=torch.float64).mean().sqrt())


def _apart(plain: nn.Module, x: Tensor) -> float:
    """How many times eager's distance from float64 gradients ours have on one input; 1 where both are within the rounding."""
    wanted = _step(copy.deepcopy(plain).double(), x.double())[1]
    layouts = (torch.contiguous_format, torch.channels_last)
    eager = [
        _gradients_far(_step(copy.deepcopy(plain).to(memory_format=layout), x.contiguous(memory_format=layout))[1], wanted)
        for layout in layouts
    ]
    ours = _gradients_far(_step(fuse(copy.deepcopy(plain)), x)[1], wanted)
    return 1.0 if ours <= FLOOR else ours / max(eager)


def check_exactly(plain: nn.Module, x: Tensor, truth: list[Tensor], wanted: dict[str, Tensor], exact: nn.Module) -> None:
    """Compare in float64, where all must agree to the rounding.

    In fp32 a ReLU whose input rounds to the other side of zero moves gradients of deep random networks by percents, eager's
    among them.
    """
    wide = fuse(copy.deepcopy(plain).double())
    with count_launches() as log:
        results, gradients = _step(wide, x.double())
    assert len(log) > 0 and gradients.keys() == wanted.keys() and len(results) == len(truth)
    scale = max(float(gradient.norm()) for gradient in wanted.values())
    for a, t in zip(results, truth, strict=True):
        assert a.shape == t.shape and _far(a, t) < 1e-9, _far(a, t)
    for key, t in wanted.items():
        assert float((gradients[key] - t).norm()) <= 1e-7 * float(t.norm()) + 1e-10 * scale, key
    for key, t in exact.state_dict().items():
        assert _far(wide.state_dict()[key], t) < 1e-9, key


def check(name: str, training: bool) -> None:
    """Compare a model of the zoo before and after ``fuse``, and after ``unfuse``: in float64, then in fp32."""
    plain, x = zoo.build(name)
    fill(plain, x)
    plain.train(training)
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    exact = copy.deepcopy(plain).double()
    truth, wanted = _step(exact, x.double())
    if name not in zoo.LEAN:
        check_exactly(plain, x, truth, wanted, exact)
    moved = {key: value.clone() for key, value in exact.named_buffers()}
    del exact
    fused = copy.deepcopy(plain)
    kinds = [type(module) for module in fused.modules()]
    fuse(fused)
    same = copy.deepcopy(plain)
    results, eager = _step(plain, x)
    with count_launches() as log:
        found, gradients = _step(fused, x)
    assert len(log) > 0 and len(found) == len(results) == len(truth) and gradients.keys() == eager.keys() == wanted.keys()
    for a, e, t in zip(found, results, truth, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        assert _far(a, t) <= max(3 * _far(e, t), FLOOR), f"output: {_far(a, t):.1e}, eager's own {_far(e, t):.1e}"
        assert _far(a, e) <= OUTPUT[training], f"output: {_far(a, e):.1e}"
    if _gradients_far(gradients, wanted) > max(GRADIENTS * _gradients_far(eager, wanted), FLOOR):
        # A ReLU that falls to the other side decides by chance over one input: the median of five.
        times = sorted(_apart(same, part) for part in (x, *(torch.randn_like(x) for _ in range(4))))
        assert times[2] <= GRADIENTS, f"gradients: {times} times eager's own error"
    assert list(fused.state_dict()) == list(plain.state_dict()) == list(state)
    for key, value in fused.state_dict().items():
        t = moved.get(key, state[key])
        assert _far(value, t) <= max(3 * _far(plain.state_dict()[key], t), STATE), f"{key}: {_far(value, t):.1e}"
        if not training:
            assert torch.equal(value, state[key]), key
    unfuse(fused)
    assert [type(module) for module in fused.modules()] == kinds
    assert not any(key.startswith("fused_") for module in fused.modules() for key in module.__dict__)
