"""What every model of :mod:`zoo` has to pass: the same outputs, gradients, running statistics and state_dict as before."""

from __future__ import annotations

import copy

import torch
import zoo
from torch import Tensor, nn

from fused_resnet import count_launches, fuse, unfuse, whole
from fused_resnet.agreement import FLOOR, STATE, TIMES, far, gradients_far, median_times, outputs, step
from fused_resnet.watch import ATTRIBUTE

#: How far an output in fp32 may be from float64, over its norm, by mode.
OUTPUT = {False: 1e-4, True: 1e-3}


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


def check_exactly(plain: nn.Module, x: Tensor, truth: list[Tensor], wanted: dict[str, Tensor], exact: nn.Module) -> None:
    """Compare in float64, where all must agree to the rounding.

    In fp32 a ReLU whose input rounds to the other side of zero moves gradients of deep random networks by percents, eager's
    among them.
    """
    wide = fuse(copy.deepcopy(plain).double())
    with count_launches() as log:
        results, gradients = step(wide, x.double())
    assert len(log) > 0 and gradients.keys() == wanted.keys() and len(results) == len(truth)
    scale = max(float(gradient.norm()) for gradient in wanted.values())
    for a, t in zip(results, truth, strict=True):
        assert a.shape == t.shape and far(a, t) < 1e-9, far(a, t)
    for key, t in wanted.items():
        assert float((gradients[key] - t).norm()) <= 1e-7 * float(t.norm()) + 1e-10 * scale, key
    for key, t in exact.state_dict().items():
        assert far(wide.state_dict()[key], t) < 1e-9, key


def check(name: str, training: bool) -> None:
    """Compare a model of the zoo before and after ``fuse``, and after ``unfuse``: in float64, then in fp32."""
    plain, x = zoo.build(name)
    fill(plain, x)
    plain.train(training)
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    exact = copy.deepcopy(plain).double()
    truth, wanted = step(exact, x.double())
    check_exactly(plain, x, truth, wanted, exact)
    moved = {key: value.clone() for key, value in exact.named_buffers()}
    del exact
    fused = copy.deepcopy(plain)
    kinds = [type(module) for module in fused.modules()]
    fuse(fused)
    same = copy.deepcopy(plain)
    results, eager = step(plain, x)
    with count_launches() as log:
        found, gradients = step(fused, x)
    assert len(log) > 0 and len(found) == len(results) == len(truth) and gradients.keys() == eager.keys() == wanted.keys()
    for a, e, t in zip(found, results, truth, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        assert far(a, t) <= max(TIMES * far(e, t), FLOOR), f"output: {far(a, t):.1e}, eager's own {far(e, t):.1e}"
        assert far(a, e) <= OUTPUT[training], f"output: {far(a, e):.1e}"
    if gradients_far(gradients, wanted) > max(TIMES * gradients_far(eager, wanted), FLOOR):
        times = median_times(same, fuse(copy.deepcopy(same)), x)
        assert times <= TIMES, f"gradients: {times:.1f} times eager's own error"
    assert list(fused.state_dict()) == list(plain.state_dict()) == list(state)
    for key, value in fused.state_dict().items():
        t = moved.get(key, state[key])
        assert far(value, t) <= max(TIMES * far(plain.state_dict()[key], t), STATE), f"{key}: {far(value, t):.1e}"
        if not training:
            assert torch.equal(value, state[key]), key
    unfuse(fused)
    assert [type(module) for module in fused.modules()] == kinds
    assert not any(key.startswith("fused_") for module in fused.modules() for key in module.__dict__)


@torch.no_grad()
def check_again(name: str) -> bool:
    """Call a model of the zoo again and again, in parts, then as a whole; whether it was looked at so."""
    plain, x = zoo.build(name)
    fill(plain, x)
    fused = fuse(copy.deepcopy(plain.eval()))
    results = outputs(plain(x))
    first: list[Tensor] = []
    for _ in range(2 * whole.FIRST):
        found = outputs(fused(x))
        first = first or found
        for a, e, f in zip(found, results, first, strict=True):
            assert a.shape == e.shape and a.dtype == e.dtype
            assert far(a, e) <= OUTPUT[False] and far(a, f) <= OUTPUT[False] / 10, f"{far(a, e):.1e}, {far(a, f):.1e}"
    return any(whole.LOOK in vars(module)[ATTRIBUTE].entries for module in (fused,) if ATTRIBUTE in vars(module))
