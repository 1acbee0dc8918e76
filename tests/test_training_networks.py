"""Training steps of whole networks and of random chains in fp32: no further from float64 than twice eager PyTorch's own error.

A value next to zero may fall on the other side of a ReLU when sums are taken in another order. One such value among a million
changes the gradients of a network more than all rounding does, between eager PyTorch's own two memory formats as well. So
networks are judged by the median over several batches, eager's own error is the larger of its two formats', and gradients in
which values have crossed over in eager PyTorch are judged together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from statistics import median

import pytest
import torch
import torchvision
from nets import live, randomise
from test_training import biases_in_front_of_batch_norm, eager_in_both_layouts, errors_by_kind, problem, step
from tolerances import assert_no_worse, distance, relative_error
from torch import Tensor, nn

from fused_resnet import count_launches, fuse
from fused_resnet.chain import Chain, Layer, Pool
from fused_resnet.plan import forward_plan

BACKENDS = ("reference", "cpu")

#: An error in fp32 above this is not rounding: values have crossed to the other side of a ReLU.
CROSSED = 1e-4


def network(name: str) -> nn.Module:
    """A torchvision model in training mode with random state and a momentum that shows."""
    model = randomise(getattr(torchvision.models, name)(num_classes=7)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3
    return model


def train_once(model: nn.Module, x: Tensor, y: Tensor, backend: str | None) -> dict[str, Tensor]:
    """Logits, gradients and running statistics of one step on a copy of the model."""
    model = copy.deepcopy(model)
    if backend is not None:
        fuse(model, backend=backend)
    x = x.detach().to(next(model.parameters()).dtype).requires_grad_()
    with count_launches() as log:
        out = model(x)
        nn.functional.cross_entropy(out, y).backward()
    assert bool(len(log)) == (backend is not None)
    made = {"logits": out.detach(), "gradient of x": x.grad}
    made |= {f"gradient of {key}": parameter.grad for key, parameter in model.named_parameters()}
    return made | dict(model.named_buffers())


def check_every_gradient_and_running_statistic(name: str, backends: Sequence[str]) -> None:
    model = network(name)
    exact = copy.deepcopy(model).double()
    errors: dict[str, dict[str, list[float]]] = {}
    for _ in range(5 if name == "resnet18" else 3):
        x, y = torch.randn(4, 3, 39, 33), torch.randint(7, (4,))
        truth = train_once(exact, x, y, None)
        eagers = [train_once(model, t, y, None) for t in (x, x.contiguous(memory_format=torch.channels_last))]
        for backend in backends:
            actual = train_once(model, x, y, backend)
            assert list(actual) == list(truth)
            for what, expected in truth.items():
                if what.endswith("num_batches_tracked"):
                    assert torch.equal(actual[what], expected)
                    continue
                entry = errors.setdefault(what, {})
                entry.setdefault(backend, []).append(distance([(actual[what], expected)]))
                if backend == backends[0]:
                    entry.setdefault("eager", []).append(max(distance([(eager[what], expected)]) for eager in eagers))
    assert len(errors) == 2 + len(list(model.parameters())) + 2 * sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    for backend in backends:
        crossed: list[tuple[float, float]] = []
        for what, entry in errors.items():
            ours, eagers = median(entry[backend]), median(entry["eager"])
            if eagers < CROSSED:
                assert_no_worse(ours, eagers, f"{what} on {backend}")
            else:
                crossed.append((ours, eagers))
        ours, eagers = (sum(pair[i] ** 2 for pair in crossed) ** 0.5 for i in (0, 1))
        assert_no_worse(ours, eagers, f"{len(crossed)} tensors on {backend}")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_every_gradient_and_running_statistic(name: str) -> None:
    check_every_gradient_and_running_statistic(name, BACKENDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_every_gradient_and_running_statistic_through_the_kernels(name: str) -> None:
    pytest.importorskip("triton")
    check_every_gradient_and_running_statistic(name, ["triton"])


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_in_float64_a_whole_network_is_exact(name: str) -> None:
    """No rounding to hide behind: outputs, every gradient, running statistics."""
    model = network(name).double()
    x, y = torch.randn(3, 3, 45, 37), torch.randint(7, (3,))
    truth, actual = (train_once(model, x, y, backend) for backend in (None, "reference"))
    for what, expected in truth.items():
        assert relative_error(actual[what], expected) < 1e-9, what


# ------------------------------------------------------------------------------------------------- random chains


def pick(choices: list) -> object:
    return choices[int(torch.randint(len(choices), ()))]


def random_layer(name: str, channels: int, filters: int | None = None, **fixed: object) -> Layer:
    """A convolution of any kind, with or without bias and BatchNorm; the BatchNorm live or frozen, affine or not."""
    groups = pick([g for g in (1, 1, 2, 3, channels) if channels % g == 0 and (filters is None or filters % g == 0)])
    kernel, dilation = pick([(1, 1), (3, 3), (3, 3), (5, 5), (1, 7), (2, 2), (3, 1)]), pick([(1, 1), (1, 1), (2, 2), (1, 3)])
    norm = bool(pick([True, True, True, False]))
    options = {
        "stride": pick([(1, 1), (1, 1), (2, 2), (1, 2), (3, 3)]),
        "padding": tuple(pick([0, d * (k - 1) // 2, k // 2]) for k, d in zip(kernel, dilation, strict=True)),
        "dilation": dilation,
        "groups": groups,
        "bias": pick([True, False]),
        "norm": norm,
        "affine": norm and pick([True, True, False]),
        "eps": pick([1e-5, 1e-2]) if norm else 0.0,
        "activation": pick(["relu", "relu", "identity"]),
        **fixed,
    }
    layer = Layer(name, filters or groups * pick([1, 2, 3]), channels, kernel, **options)
    how = {"momentum": pick([0.1, 0.3, 1.0, None]), "tracked": True, "counted": True}
    return live(layer, **how) if pick([True, True, False]) else layer


def output_sides(layers: list[Layer], h: int, w: int) -> tuple[int, int]:
    for layer in layers:
        geometry = layer.geometry(1, h, w)
        h, w = geometry.P, geometry.Q
    return h, w


def random_chain() -> tuple[Chain, int, int]:
    """One to three layers; then nothing, a pooling, or a shortcut, with a projection if it must fit."""
    h, w, channels = (int(pick(list(range(low, high)))) for low, high in ((4, 14), (4, 14), (1, 7)))
    end = pick(["nothing", "pooling", "identity", "projection"])
    count = pick([1, 2, 3])
    layers: list[Layer] = []
    for index in range(count):
        last = index == count - 1
        same = {"kernel": None} if end == "identity" else {}
        fixed: dict[str, object] = {}
        if same:  # the block keeps its size
            fixed = {"stride": (1, 1), "groups": 1, "filters": channels if last else None}
        made = random_layer(f"l{index}", layers[-1].filters if layers else channels, **fixed)
        if same:
            kernel = tuple(side | 1 for side in made.kernel)
            spread = tuple(d * (k - 1) // 2 for k, d in zip(kernel, made.dilation, strict=True))
            made = Layer(**{**made.__dict__, "kernel": kernel, "padding": spread})
        layers.append(made)
    projection = None
    if end == "projection":
        rows, columns = output_sides(layers, h, w)
        stride = (-(-h // rows), -(-w // columns))
        projection = random_layer(
            "side", channels, layers[-1].filters, stride=stride, padding=(0, 0), dilation=(1, 1), activation="identity"
        )
        projection = Layer(**{**projection.__dict__, "kernel": (1, 1)})
    pool = Pool(pick([(2, 2), (3, 3), (3, 2)]), pick([(1, 1), (2, 2)]), (1, 1)) if end == "pooling" else None
    return Chain(tuple(layers), end in ("identity", "projection"), projection, pool, pick(["default", "low"])), h, w


def runnable_chain() -> tuple[Chain, int, int]:
    """One that fits its image and has live BatchNorms with more than one value a channel."""
    while True:
        try:
            spec, h, w = random_chain()
            forward_plan(spec, 4, h, w, torch.float64)
        except (RuntimeError, ZeroDivisionError):
            continue
        pixels = [launch.geometry.P * launch.geometry.Q for launch in forward_plan(spec, 4, h, w, torch.float64).launches]
        if spec.batch and min(pixels) >= 3:
            return spec, h, w


#: ``(kind of tensor, backend or "eager")`` -> its error for each input.
Errors = dict[tuple[str, str], list[float]]


def add_errors(errors: Errors, spec: Chain, h: int, w: int, backends: Sequence[str]) -> None:
    """Of one step in fp32 on new random tensors; eager's own is the larger of its two formats'."""
    tensors, dout, truth = problem(spec, 4, h, w, torch.float32)
    eagers = [errors_by_kind(spec, eager, truth) for eager in eager_in_both_layouts(spec, tensors, dout)]
    for kind in eagers[0]:
        errors.setdefault((kind, "eager"), []).append(max(eager[kind] for eager in eagers))
    for backend in backends:
        for kind, error in errors_by_kind(spec, step(spec, tensors, dout, backend), truth).items():
            errors.setdefault((kind, backend), []).append(error)


def worse(errors: Errors) -> list[str]:
    """What is worse than twice eager, by the median of the inputs."""
    found = []
    for (kind, who), several in errors.items():
        ours, eagers = median(several), median(errors[kind, "eager"])
        if who != "eager" and ours > max(2 * eagers, 1e-6):
            found.append(f"{kind} on {who}: error {ours:.2e}, eager's own {eagers:.2e}, median of {len(several)}")
    return found


def inputs_needed(spec: Chain) -> int:
    """Five, or 25 where a layer has one filter or two.

    The gradient of its bias is one number, or two, that may cancel to almost nothing. The median of five such relative errors
    differs by a factor of two once in 25 times where the two sides are equally exact.
    """
    return 25 if any(layer.filters <= 2 for layer in spec.weight_layers) else 5


def check_no_worse(spec: Chain, h: int, w: int, backends: Sequence[str]) -> None:
    """In fp32 no worse than twice eager, by the median of :func:`inputs_needed` inputs."""
    errors: Errors = {}
    for _ in range(inputs_needed(spec)):
        add_errors(errors, spec, h, w, backends)
    found = worse(errors)
    assert not found, f"{spec} on {h}x{w}: {'; '.join(found)}"


def check_random_chains(count: int) -> None:
    """Exact in float64; in fp32 no worse than twice eager by the median of several inputs."""
    for _ in range(count):
        spec, h, w = runnable_chain()
        told = f"{spec} on {h}x{w}"
        tensors, dout, truth = problem(spec, 4, h, w, torch.float64)
        actual = step(spec, tensors, dout, "reference")
        zero = biases_in_front_of_batch_norm(spec)
        for what, expected in truth.items():
            near = actual[what].abs().max() < 1e-10 if what in zero else relative_error(actual[what], expected) < 1e-8
            assert near or expected.abs().max() < 1e-9 > actual[what].abs().max(), f"{what} of {told}"
        check_no_worse(spec, h, w, BACKENDS)


def check_random_chains_through_the_kernels(count: int) -> None:
    """In fp32 no worse than twice eager by the same rule, each launch by a Triton kernel."""
    pytest.importorskip("triton")
    for _ in range(count):
        spec, h, w = runnable_chain()
        with count_launches() as log:
            check_no_worse(spec, h, w, ["triton"])
        assert {backend for backend, _ in log.launches} == {"triton"} and len(log.kernels) >= len(log.launches) > 0


@pytest.mark.parametrize("seed", range(3))
def test_random_chains(seed: int) -> None:
    check_random_chains(8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_many_random_chains(seed: int) -> None:
    check_random_chains(10)


@pytest.mark.parametrize("seed", range(2))
def test_random_chains_through_the_kernels(seed: int) -> None:
    check_random_chains_through_the_kernels(2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_many_random_chains_through_the_kernels(seed: int) -> None:
    check_random_chains_through_the_kernels(10)
