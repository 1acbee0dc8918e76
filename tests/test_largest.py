"""The largest of torchvision's with a BatchNorm, 645 M parameters: a gradient is compared when it is made, and let go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nets import randomise
from torch import Tensor, nn
from zoo_check import OUTPUT, fill

from fused_resnet import count_launches, fuse, unfuse
from fused_resnet.agreement import FLOOR, STATE, TIMES, far, step
from fused_resnet.counts import fused_share

pytestmark = pytest.mark.slow
torchvision = pytest.importorskip("torchvision")

#: GiB, 13.5 measured: at its highest the test holds the float64 model, a layer's gradients, and the model itself.
MEMORY = 14


def _available() -> float:
    """GiB that processes may take, where the system tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":") for line in file)
    except OSError:
        return float(MEMORY)
    return float(sizes["MemAvailable"].split()[0]) / 2**20


@pytest.fixture(scope="module")
def largest() -> tuple[nn.Module, Tensor]:
    if _available() < MEMORY:
        pytest.skip(f"{_available():.0f} GiB of memory are free, {MEMORY} are needed")
    torch.manual_seed(0)
    plain = randomise(torchvision.models.regnet_y_128gf(weights=None, num_classes=7))
    x = torch.randn(4, 3, 64, 64)
    fill(plain, x)
    return plain, x


def passed(model: nn.Module, x: Tensor, take: Callable[[str, Tensor], None]) -> list[Tensor]:
    """Outputs of a forward and backward, whose gradients are handed to ``take`` and kept nowhere."""
    for name, parameter in model.named_parameters():

        def taken(parameter: Tensor, name: str = name) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            take(name, gradient)

        parameter.register_post_accumulate_grad_hook(taken)
    made, left = step(model, x)
    take("x", left.pop("x"))
    assert not left
    return [out.detach() for out in made]  # whose graph would keep the parameters


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_largest_computes_what_it_did(training: bool, largest: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    plain, x = largest
    plain.train(training)
    norms: dict[str, float] = {}

    def keep(name: str, gradient: Tensor) -> None:
        norms[name] = float(gradient.norm())
        torch.save(gradient, tmp_path / name)

    exact = copy.deepcopy(plain).double()
    truth = passed(exact, x.double(), keep)
    moved = {key: value.clone() for key, value in exact.named_buffers()}
    del exact
    scale = max(norms.values())

    def compared(model: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, float]]:
        errors: dict[str, float] = {}

        def take(name: str, gradient: Tensor) -> None:
            errors[name] = float((gradient.double() - torch.load(tmp_path / name)).norm())

        made = passed(model, x, take)
        assert errors.keys() == norms.keys()
        return made, errors

    def root_mean_square(errors: dict[str, float]) -> float:
        found = [(errors[key] / norm) ** 2 for key, norm in norms.items() if norm > 1e-6 * scale]
        return float((sum(found) / len(found)) ** 0.5)

    wide = fuse(copy.deepcopy(plain).double().to(memory_format=torch.channels_last))  # the layout that else is a copy
    with count_launches() as log:
        made, errors = compared(wide, x.double())
    assert len(log) > 100
    for a, t in zip(made, truth, strict=True):
        assert a.shape == t.shape and far(a, t) < 1e-9, far(a, t)
    for key, error in errors.items():
        assert error <= 1e-7 * norms[key] + 1e-10 * scale, key
    for key, t in moved.items():
        assert far(wide.get_buffer(key), t) < 1e-9, key
    del wide
    own = copy.deepcopy(plain)
    results, eager = compared(own, x)
    theirs = {key: far(own.get_buffer(key), t) for key, t in moved.items()}
    own = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    other = compared(own, x.contiguous(memory_format=torch.channels_last))[1]
    del own
    fused = fuse(copy.deepcopy(plain))
    found, gradients = compared(fused, x)
    for a, e, t in zip(found, results, truth, strict=True):
        assert far(a, t) <= max(TIMES * far(e, t), FLOOR) and far(a, e) <= OUTPUT[training], f"{far(a, t):.1e}, {far(e, t):.1e}"
    own_distance = max(root_mean_square(eager), root_mean_square(other))
    distance = root_mean_square(gradients)
    assert distance <= max(TIMES * own_distance, FLOOR), f"gradients: {distance:.1e}, eager's own {own_distance:.1e}"
    for key, t in moved.items():
        assert far(fused.get_buffer(key), t) <= max(TIMES * theirs[key], STATE), key
    assert list(fused.state_dict()) == list(plain.state_dict())
    for key, value in fused.named_parameters():
        assert torch.equal(value, plain.get_parameter(key)), key
    unfuse(fused)
    assert [type(module) for module in fused.modules()] == [type(module) for module in plain.modules()]


def test_the_largests_fused_share(largest: tuple[nn.Module, Tensor]) -> None:
    plain, x = largest
    with torch.no_grad():
        assert fused_share(fuse(copy.deepcopy(plain).eval()), x) >= 0.9
