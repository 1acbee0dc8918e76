"""The CPU executor, launch by launch, against the reference in float64; what it hands on, what it reuses."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from nets import CHAINS, TRAINING_CHAINS, chain_inputs, copies, images, plain_chain, randomise, tiny
from test_reference import GEOMETRIES, ONE_RESULT, make, statistics, tensors, truth
from tolerances import assert_close, assert_no_worse, distance, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_resnet import backends, count_launches, fuse
from fused_resnet.backends import cpu, cpu_inference, cpu_norm, reference
from fused_resnet.functional import chain
from fused_resnet.launch import ACTIVATIONS, EPILOGUES, Geometry, Launch


def run(
    g: Geometry, epilogue: str, activation: str, dtype: torch.dtype, donate: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The executor's result and the truth in float64."""
    roles = ["x", "w", *EPILOGUES[epilogue]]
    given = {role: tensor for role, tensor in tensors(g, dtype).items() if role in roles}
    expected = truth(g, epilogue, activation, given, 1e-3)
    given = {r: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for r, t in given.items()}
    launch = make("conv", g, roles, ["y"], dtype, epilogue=epilogue, activation=activation, eps=1e-3)
    donated = frozenset({"shortcut"}) if donate else frozenset()
    if g is GEOMETRIES["one channel, one column"] and cpu.supports(launch) is not None:  # oneDNN is wrong there
        return reference.run(launch, given).contiguous(memory_format=torch.channels_last), expected
    assert cpu.supports(launch) is None
    before = {role: tensor.clone() for role, tensor in given.items()}
    y = cpu.run(launch, given, donated, {})
    for role, tensor in given.items():
        assert role in donated or torch.equal(tensor, before[role]), f"{role} was written to"
    return y, expected


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("epilogue", ONE_RESULT)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_epilogue_activation_and_geometry(name: str, epilogue: str, activation: str) -> None:
    g = GEOMETRIES[name]
    y, expected = run(g, epilogue, activation, torch.float32)
    assert_close(y, expected, g.C // g.groups * g.R * g.S)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("epilogue", ["add", "bias_add", "affine_add"])
def test_a_shortcut_nobody_reads_again_is_summed_in_its_memory(epilogue: str) -> None:
    g = GEOMETRIES["3x3"]
    y, expected = run(g, epilogue, "relu", torch.float32, donate=True)
    assert_close(y, expected, g.C * g.R * g.S)


def test_bfloat16_runs_here_or_says_why_not() -> None:
    """Nothing in between: a type oneDNN has no convolution for goes to the reference, with a reason."""
    g = GEOMETRIES["3x3"]
    for dtype in (torch.bfloat16, torch.float16):
        launch = make("conv", g, ["x", "w"], ["y"], dtype)
        reason = cpu.supports(launch)
        if reason is None:
            y, expected = run(g, "affine_add", "relu", dtype)
            assert_close(y, expected, g.C * g.R * g.S, 2)  # the folded filters are rounded once more
        else:
            assert str(dtype) in reason
    assert "torch.float64" in str(cpu.supports(make("conv", g, ["x", "w"], ["y"], torch.float64)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_given_statistics_behind_the_batchs_are_folded_in_fp32(dtype: torch.dtype) -> None:
    """A frozen layer behind a live one, in 16 bits: scale and shift of a mean far from zero are not rounded to them."""
    g = GEOMETRIES["1x1"]
    given = tensors(g, dtype)
    given |= {"mean": torch.full((g.K,), 40.0) + torch.rand(g.K), "bias": torch.full((g.K,), 40.0, dtype=dtype)}
    given |= statistics(given["x"].float(), 1e-3, "x_")
    given = {r: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for r, t in given.items()}
    launch = make("conv", g, [*given], ["y"], dtype, prologue="bn_relu", epilogue="affine_add", eps=1e-3)
    exact = replace(launch, dtype=torch.float64)
    expected = reference.run(exact, {role: tensor.double() for role, tensor in given.items()})
    ours, theirs = (run(launch, given, frozenset(), {}) for run in (cpu.run, lambda *a: reference.run(*a[:2])))
    assert relative_error(ours, expected) < 3 * max(relative_error(theirs, expected), torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("name", ["basic", "basic_projection", "stem", "bottleneck_groups", "entry", "entry_and_projection"])
def test_a_training_step_runs_here(name: str) -> None:
    """No launch of a step in fp32 goes to the reference, with the batch's statistics or with given ones."""
    for spec, h, w in (CHAINS[name], TRAINING_CHAINS[name]):
        x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
        with count_launches() as log:
            chain(x, parameters, spec, "cpu").sum().backward()
        elsewhere = [str(launch) for runner, launch in log.launches if runner != "cpu"]
        assert elsewhere == (["pool: max_pool_backward"] if name == "stem" and not spec.batch else [])


@pytest.mark.parametrize("name", [name for name, (spec, _, _) in TRAINING_CHAINS.items() if spec.batch])
@pytest.mark.parametrize("filters", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_a_layers_gradients_are_one_call(name: str, filters: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its filters and of its input, where both are wanted; with the same values as one by one, and as many launches.

    Who clocks launches sees them one by one.
    """
    spec, h, w = TRAINING_CHAINS[name]
    x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
    parameters = [t.contiguous(memory_format=filters) if t.dim() == 4 else t for t in parameters]
    calls: list[str] = []
    gradients = cpu._gradients
    monkeypatch.setattr(cpu, "_gradients", lambda first, second, *rest: calls.append("") or gradients(first, second, *rest))
    backends._program.cache_clear()

    def step() -> tuple[list[torch.Tensor], list[Launch]]:
        own = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.requires_grad) for t in (x, *parameters)]
        with count_launches() as log:
            out = chain(own[0], own[1:], spec, "cpu")
            out.backward(torch.sin(torch.arange(out.numel(), dtype=torch.float32)).view_as(out))
        return [t.grad for t in own if t.grad is not None], [launch for _, launch in log.launches]

    together, launches = step()
    both = [one for one, after in pairwise(launches) if (one.kind, after.kind) == ("wgrad", "dgrad")]
    assert len(calls) == sum(one.gradient == "bn_backward" for one in both)
    joined = len(calls)
    with backends.clock_launches(lambda: 0) as seen:
        apart, one_by_one = step()
    assert len(calls) == joined and one_by_one == launches and len(seen) == len(launches)
    for actual, expected in zip(together, apart, strict=True):
        assert_close(actual, expected.double(), 9 * h * w)
    backends._program.cache_clear()


def test_only_gradients_that_are_both_wanted_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """With frozen filters there is no wgrad to join, without a gradient of the input no dgrad."""
    joins: list[tuple[str, str]] = []
    join = cpu.join
    monkeypatch.setattr(cpu, "join", lambda *pair: joins.append(tuple(one.kind for one in pair)) or join(*pair))
    backends._program.cache_clear()
    spec, h, w = TRAINING_CHAINS["basic"]
    for frozen in ("x", spec.layers[0].slot("w")):
        x, parameters = chain_inputs(spec, 2, h, w, torch.float32)
        for slot, tensor in zip(("x", *spec.parameter_slots), (x, *parameters), strict=True):
            tensor.requires_grad_(tensor.requires_grad and slot != frozen)
        with count_launches() as log:
            chain(x, parameters, spec, "cpu").sum().backward()
        kinds = [launch.kind for _, launch in log.launches]
        assert kinds.count("dgrad") + kinds.count("wgrad") == 3, frozen
    backends._program.cache_clear()
    assert ("wgrad", "dgrad") in joins


def test_filters_are_laid_out_for_the_size_that_comes_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """First for the first; for another when it came three times in a row. Heads of detectors see five sizes in turn."""
    conv, norm = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
    plain = nn.Sequential(conv, norm, nn.ReLU()).eval()
    with torch.no_grad():
        for vector in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            vector.uniform_(0.5, 2)
    fused = fuse(copy.deepcopy(plain), backend="cpu")
    laid_out: list[tuple[int, int]] = []
    own = cpu_inference.laid_out
    monkeypatch.setattr(cpu_inference, "laid_out", lambda weight, g: laid_out.append((g.H, g.W)) or own(weight, g))
    sizes = [(9, 7), (5, 4), (9, 7), (5, 4), (3, 3), (5, 4), (5, 4), (5, 4), (5, 4), (9, 7)]
    for size in sizes:
        x = torch.randn(2, 8, *size)
        with torch.no_grad():
            assert relative_error(fused(x), copy.deepcopy(plain).double()(x.double())) < 1e-6
        if size == (3, 3):
            assert laid_out == [(9, 7)]
    assert laid_out == [(9, 7), (5, 4)]


def test_filters_of_large_linears_are_laid_out_for_the_rows_that_come_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of convolutions; for a single row apart, and small ones not at all."""
    side = 512
    assert side**2 == cpu_inference.MOST_ROWS
    first = [nn.Linear(side, side, bias=False), nn.BatchNorm1d(side), nn.ReLU()]
    plain = randomise(nn.Sequential(*first, nn.Linear(side, side - 1), nn.BatchNorm1d(side - 1))).eval()
    fused = fuse(copy.deepcopy(plain), backend="cpu")
    laid_out: list[int] = []
    own = cpu_inference.laid_out
    monkeypatch.setattr(cpu_inference, "laid_out", lambda weight, g: laid_out.append(g.N) or own(weight, g))
    truth = copy.deepcopy(plain).double()
    for rows in (9, 5, 9, 4, 5, 5, 5, 1, 9, 0):
        x = torch.randn(2 * rows, side)[::2]
        if rows > 5:
            x[3, 7], x[4, 8] = torch.nan, torch.inf
        with torch.no_grad():
            y, expected = fused(x), truth(x.double())
        finite = expected.isfinite()
        assert torch.equal(y.isfinite(), finite) and y.shape == expected.shape
        assert not rows or relative_error(y[finite], expected[finite]) < 1e-6
    assert laid_out == [9, 5, 1]


@pytest.mark.parametrize(
    ("shape", "kernel", "groups", "small"),
    [
        ((1, 8, 9, 7), 3, 1, True),
        ((1, 320, 8, 8), 1, 1, True),  # as many elements as are small
        ((1, 324, 8, 8), 1, 1, False),
        ((2, 8, 9, 7), 3, 1, False),
        ((1, 8, 9, 7), 3, 2, False),
        ((1, 8, 9, 9), 5, 1, False),
        ((1, 8, 9, 9), (5, 3), 1, True),
    ],
)
def test_small_convolutions_are_pytorchs_own(
    shape: tuple[int, ...], kernel: Any, groups: int, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PyTorch would not take oneDNN either. (With one thread it takes less of it, for 1x1 filters.)"""
    net = nn.Sequential(nn.Conv2d(shape[1], 12, kernel, 1, 1, groups=groups), nn.BatchNorm2d(12), nn.Hardswish())
    net = randomise(net).eval()
    fused = fuse(copy.deepcopy(net), backend="cpu")
    laid_out: list[Any] = []
    own = cpu_inference.laid_out
    monkeypatch.setattr(cpu_inference, "laid_out", lambda weight, g: laid_out.append(g) or own(weight, g))
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = fused(x)
        assert relative_error(y, net.double()(x.double())) < 1e-6 and laid_out == ([] if small else laid_out[:1])
        assert y.is_contiguous(memory_format=torch.channels_last) and (small or laid_out)
    conv = net[0].float()
    where = ((1, 1), (1, 1), (1, 1), False, (0, 0), groups)
    taken = torch._C._select_conv_backend(x, conv.weight, conv.bias, *where)
    assert ("Mkldnn" not in str(taken)) is small or torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("shape", "filters", "product"),
    [
        ((1, 30, 9, 7), 12, True),
        ((3, 30, 9, 7), 12, True),
        ((1, 256, 3, 5), 256, True),  # as many filters as are few
        ((1, 256, 3, 5), 257, False),
        ((1, 64, 26, 32), 64, True),  # as many multiplications as are few
        ((1, 64, 27, 32), 64, False),
    ],
    ids=str,
)
def test_small_convolutions_of_one_tap_are_products(
    shape: tuple[int, ...], filters: int, product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pixels by filters, in any layout and among others' channels; what is not finite stays in its pixel."""
    net = nn.Sequential(
        nn.Conv2d(shape[1], filters, 1), nn.BatchNorm2d(filters), nn.Hardswish(), nn.Conv2d(filters, 5, 1, bias=False)
    )
    net = randomise(nn.Sequential(*net, nn.BatchNorm2d(5))).eval()
    fused, truth = fuse(copy.deepcopy(net), backend="cpu"), copy.deepcopy(net).double()
    multiplied: list[int] = []
    own = cpu_inference._multiplied
    monkeypatch.setattr(cpu_inference, "_multiplied", lambda g, *rest: multiplied.append(g.K) or own(g, *rest))
    wide = torch.randn(shape[0], shape[1] + 3, *shape[2:])
    wide[0, 5, 1, 2], wide[-1, 6, 2, 3] = torch.inf, torch.nan
    with torch.no_grad():
        for _ in range(3):  # the second time it is prepared
            for x in (wide, wide.contiguous(memory_format=torch.channels_last)):
                x = x[:, 2:-1]
                y, expected = fused(x), truth(x.double())
                finite = expected.isfinite()
                assert torch.equal(y.isfinite(), finite) and not finite.all()
                assert relative_error(y[finite], expected[finite]) < 1e-6
                assert y.is_contiguous(memory_format=torch.channels_last)
            net[0].weight.mul_(2)
            fused[0].weight.mul_(2)
            truth[0].weight.mul_(2)
    assert (filters in multiplied) is product


@pytest.mark.parametrize("deviations", [0, 1, 30, 100, 1000])
@pytest.mark.parametrize("shape", [(8, 512, 14, 28), (2, 64, 56, 56), (4, 6, 40, 30)], ids=str)
def test_statistics_are_no_worse_than_eagers(shape: tuple[int, ...], deviations: int) -> None:
    """Of channels with large means, too, all of them or one; eager's are of the same layout."""
    y = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    for means in (torch.randn(shape[1]).sign(), torch.eye(shape[1])[3]):
        shifted = y + deviations * means.view(1, -1, 1, 1)
        exact = shifted.double()
        truth = exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)
        _, eagers, invstd = torch.native_batch_norm(shifted, None, None, None, None, True, 0.1, 0.0)
        theirs = eagers, invstd.double() ** -2
        for what, ours, eager, expected in zip(("mean", "variance"), cpu_norm.moments(shifted), theirs, truth, strict=True):
            assert_no_worse(relative_error(ours, expected), relative_error(eager, expected), what)


@pytest.mark.parametrize("shape", [(8, 256, 28, 28), (2, 64, 56, 56), (8, 1024, 7, 7), (1, 64, 251, 251)], ids=str)
def test_statistics_are_as_exact_as_if_added_up_in_fp64(shape: tuple[int, ...]) -> None:
    """Which is what eager does with contiguous tensors, though not with channels_last ones."""
    y = torch.randn(shape)
    truth = y.double().var((0, 2, 3), correction=0)
    _, _, invstd = torch.native_batch_norm(y, None, None, None, None, True, 0.1, 0.0)
    _, var = cpu_norm.moments(y.contiguous(memory_format=torch.channels_last))
    assert_no_worse(distance([(var, truth)]), distance([(invstd.double() ** -2, truth)]), "variance", floor=2e-7)


def test_one_channel_with_a_large_mean_harms_no_other() -> None:
    y = 1e-3 * torch.randn(8, 64, 40, 40).contiguous(memory_format=torch.channels_last)
    y[:, 3] += 10
    y[:, 5] = 3
    exact = y.double().var((0, 2, 3), correction=0)
    _, var = cpu_norm.moments(y)
    assert float(var[5]) < 1e-12
    others = torch.arange(64) != 5
    assert relative_error((var / exact)[others], torch.ones(63)) < 1e-6


def test_filters_are_folded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a warm-up a forward folds and prepacks nothing; one changed vector folds one layer again."""
    net = fuse(tiny())
    x = images()
    net(x)
    folds = []
    original = cpu.reference.scale_and_shift
    monkeypatch.setattr(cpu.reference, "scale_and_shift", lambda *a: (folds.append(1), original(*a))[1])
    with torch.no_grad():
        net(x), net(images(2, 20, 21))
        assert not folds
        net.basic.bn2.bias.add_(1)
        net(x)
        assert len(folds) == 1


def test_identity_shortcut_input_survives() -> None:
    """x is the shortcut and belongs to the caller: the sum must not be made in its memory."""
    spec, h, w = CHAINS["basic"]
    x, parameters = chain_inputs(spec, 1, h, w, torch.float32)
    x = x.detach().contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.inference_mode():
        first, second = (chain(x, parameters, spec, "cpu") for _ in range(2))
    assert torch.equal(x, before)
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)


def test_a_projection_kept_in_memory_does_not_leak_into_the_next_call() -> None:
    spec, h, w = CHAINS["basic_projection"]
    x, parameters = chain_inputs(spec, 1, h, w, torch.float32)
    with torch.no_grad():
        first = chain(x, parameters, spec, "cpu")
        kept = first.clone()
        chain(x * 2, parameters, spec, "cpu")
    assert torch.equal(first, kept)
    assert relative_error(first, plain_chain(spec, x, parameters)) < 1e-5


def test_empty_batches_keep_their_type() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        plain, fused = copies(tiny().to(dtype))
        fuse(fused)
        x = torch.zeros(0, 3, 33, 35, dtype=dtype)
        assert fused(x).shape == plain(x).shape == (0, 5) and fused(x).dtype == dtype


def test_without_onednn_everything_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch builds for some processors have no oneDNN."""
    from fused_resnet import backends

    monkeypatch.setattr(cpu, "_onednn_dtypes", lambda: frozenset())
    for cache in (backends.assign, backends._program):
        cache.cache_clear()
    try:
        plain, fused = copies(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval())
        fuse(fused)
        x = torch.randn(1, 3, 8, 8)
        with count_launches() as log:
            assert relative_error(fused(x), plain(x)) < 1e-5
        assert log.launches[0][0] == "reference"
    finally:
        for cache in (backends.assign, backends._program):
            cache.cache_clear()


def test_dilated_one_by_one_kernel() -> None:
    """Found by test_properties: oneDNN crashed the process on prepacked 1x1 filters with a dilation."""
    g = Geometry(1, 4, 1, 1, 3, 1, 1, (2, 2), (1, 1), (1, 3))
    y, expected = run(g, "bias", "identity", torch.float32)
    assert_close(y, expected, 1)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(8, 6), nn.BatchNorm1d(6), (5, 8)),
        (nn.Linear(512, 520), nn.BatchNorm1d(520), (5, 512)),
        (nn.Conv1d(8, 6, 1), nn.BatchNorm1d(6), (5, 8, 7)),
        (nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), (5, 8, 7, 3)),
        (nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), (5, 8, 1, 1)),
        (nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), (5, 8, 7, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [False, True])
def test_results_may_be_written_to(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...], training: bool) -> None:
    """As an activation in place does that is no part of the chain; in eval mode too, where autograd records."""
    plain = randomise(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm)).train(training))
    fused = fuse(copy.deepcopy(plain), backend="cpu")
    found = []
    for net in (fused, plain.double()):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(next(net.parameters()).dtype).requires_grad_()
        y = net(x)
        y.tanh_()
        (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
        found.append([y, x.grad, *(p.grad for p in net.parameters())])
    for actual, expected in zip(*found, strict=True):
        assert relative_error(actual, expected) < 1e-5 or expected.norm() < 1e-9


@pytest.mark.parametrize("size", [(7, 3), (1, 1)])
def test_results_without_gradients_may_be_written_to_with_them(size: tuple[int, int]) -> None:
    """What a frozen backbone gave, scaled by a parameter; and behind reentrant checkpointing."""
    plain = randomise(nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6))).eval()
    fused = fuse(copy.deepcopy(plain), backend="cpu")
    truth, x, factor = plain.double(), torch.randn(5, 8, *size), nn.Parameter(torch.full((1,), 2.0))
    expected = truth(x.double())
    for times in range(1, 4):
        with torch.no_grad():
            y = fused(x)
        y.mul_(factor).sum().backward()
        assert relative_error(y, 2 * expected) < 1e-6
        assert factor.grad is not None and relative_error(factor.grad, times * expected.sum()[None]) < 1e-5
    given = [x.clone().requires_grad_(), x.double().requires_grad_()]
    results = [checkpoint(net, image, use_reentrant=True).relu_() for net, image in zip((fused, truth), given, strict=True)]
    for result in results:
        result.square().sum().backward()
    assert relative_error(*results) < 1e-6 and relative_error(*(image.grad for image in given)) < 1e-5
