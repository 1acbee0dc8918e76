"""The gradient of a convolution's input against autograd in float64: loaders, classes of pixels, what is done at both ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_launches import dgrad, expected, last_program_first, operands_of, run_poisoned, two_layers, wgrad
from launches import DEVICE
from tolerances import assert_close
from torch import Tensor

from fused_resnet.backends import triton, triton_gradients
from fused_resnet.backends.triton_start import arch_of
from fused_resnet.launch import DGRAD_EPILOGUES, GRADIENTS, Geometry, Launch
from fused_resnet.tuning import Tile
from fused_resnet.tuning.tile import choose_gradient_tile

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

#: A geometry a row, with rims in every direction: loaders, launch, and a tile that is smaller than everything.
CLASSES: dict[str, tuple[tuple[str | None, str | None], Callable[..., Launch], Tile]] = {
    "box": (("box", "matrix"), lambda **how: dgrad(3, 5, 6, 32, 24, 3, 2, padding=(1, 1), **how), Tile(2, 4, 4, 16, 16)),
    "pointwise": (("box", "matrix"), lambda **how: dgrad(3, 5, 7, 24, 40, 1, 1, **how), Tile(2, 4, 4, 16, 16)),
    "tile past C": (
        ("box", "rows"),
        lambda **how: dgrad(2, 5, 6, 24, 24, 2, 3, padding=(1, 1), **how),
        Tile(1, 4, 8, 16, 16),
    ),
    "stride 2, even": (
        ("box", "matrix"),
        lambda **how: dgrad(2, 10, 8, 32, 24, 3, 3, stride=(2, 2), padding=(1, 1), **how),
        Tile(2, 4, 4, 16, 16),
    ),
    "stride 2, odd": (
        ("box", "matrix"),
        lambda **how: dgrad(3, 7, 9, 16, 24, 3, 3, stride=(2, 2), padding=(1, 1), **how),
        Tile(2, 4, 4, 16, 16),
    ),
    "stride 2, 1x1": (
        ("box", "matrix"),
        lambda **how: dgrad(2, 7, 10, 32, 24, 1, 1, stride=(2, 2), **how),
        Tile(1, 4, 4, 16, 16),
    ),
    "stem": (
        ("box", "rows"),
        lambda **how: dgrad(1, 9, 8, 3, 16, 7, 7, stride=(2, 2), padding=(3, 3), **how),
        Tile(1, 4, 4, 16, 16),
    ),
    "unaligned": (
        ("gather", "rows"),
        lambda **how: dgrad(2, 6, 7, 7, 21, 3, 3, stride=(2, 1), padding=(1, 1), **how),
        Tile(1, 4, 4, 16, 16),
    ),
    "grouped, whole": (
        ("box", "matrix"),
        lambda **how: dgrad(2, 6, 7, 64, 32, 3, 3, padding=(1, 1), groups=2, **how),
        Tile(1, 4, 8, 16, 16),
    ),
    "grouped": (
        ("box", "block_diagonal"),
        lambda **how: dgrad(1, 6, 7, 72, 48, 3, 2, padding=(1, 1), groups=12, **how),
        Tile(1, 4, 8, 16, 16),
    ),
    "grouped, stride 2": (
        ("box", "block_diagonal"),
        lambda **how: dgrad(2, 9, 8, 32, 32, 3, 3, stride=(2, 2), padding=(1, 1), groups=8, **how),
        Tile(1, 4, 4, 16, 16),
    ),
    "grouped, unaligned": (
        ("gather", "block_diagonal"),
        lambda **how: dgrad(2, 6, 7, 14, 21, 3, 3, padding=(1, 1), groups=7, **how),
        Tile(1, 4, 8, 16, 16),
    ),
    "depthwise": (
        (None, None),
        lambda **how: dgrad(2, 7, 6, 20, 40, 3, 3, stride=(2, 2), padding=(1, 1), groups=20, **how),
        Tile(1, 4, 4, 16, 16),
    ),
}

#: The two ends together that training with the batch's statistics has.
TRAINING: dict[str, Any] = {"gradient": "bn_backward", "epilogue": "bn_mask", "activation": "relu"}


def check_all(launch: Launch, operands: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
    """dx against autograd; the sums against float64 sums of the dx that was stored."""
    g = launch.geometry
    assert isinstance(g, Geometry)
    assert_close(actual["dx"].cpu(), expected(launch, operands)["dx"], g.R * g.S * g.K // g.groups, what=str(launch))
    dx = actual["dx"].double().cpu()
    sums = {"sum_previous": dx.sum((0, 2, 3))}
    if launch.epilogue == "bn_mask":
        mean, invstd = (operands[role].double().cpu().view(1, -1, 1, 1) for role in ("x_mean", "x_invstd"))
        sums["dot_previous"] = (dx * (operands["x"].double().cpu() - mean) * invstd).sum((0, 2, 3))
    for role in actual.keys() - {"dx"}:
        assert actual[role].dtype == torch.float32
        assert_close(actual[role].cpu(), sums[role], g.N * g.H * g.W, what=f"{role} of {launch}")


def check(launch: Launch, tile: Tile | None = None, parameters: torch.dtype = torch.float32, **how: Any) -> None:
    operands = operands_of(launch, parameters)
    check_all(launch, operands, run_poisoned(launch, operands, tile, **how))


def loaders(launch: Launch, tile: Tile | None = None) -> tuple[str | None, str | None]:
    """Names of the loaders a launch takes where the tests run."""
    constants = triton_gradients.plan_start(launch, arch_of(DEVICE), tile).constants
    names = {id(function): name for name, function in triton_gradients.gradients.LOADS.items()}
    filters = {id(function): name for name, function in triton_gradients.boxes.FILTERS.items()}
    return names.get(id(constants["LOAD"])), filters.get(id(constants["FILTERS"]))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        # fp32 in the default run, and the 16-bit types by turns; the others in the long run.
        pytest.param(name, dtype, marks=[pytest.mark.slow] if (i + j) % 3 == 1 and dtype != torch.float32 else [])
        for i, name in enumerate(CLASSES)
        for j, dtype in enumerate(DTYPES)
    ],
    ids=str,
)
def test_every_class_in_every_type(name: str, dtype: torch.dtype) -> None:
    """Several tiles in each direction, and the loaders that the class is about."""
    names, make, tile = CLASSES[name]
    launch = make(dtype=dtype, **TRAINING)
    assert loaders(launch, tile) == names
    check(launch, tile)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_as_it_is_and_with_the_rules_tile(name: str) -> None:
    """Nothing on load: the product is the other way round. Nothing masked: pixels past the border would show in the sums."""
    check(CLASSES[name][1](epilogue="bn_mask"))


@pytest.mark.parametrize("epilogue", DGRAD_EPILOGUES)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_gradient_and_epilogue(dtype: torch.dtype, gradient: str, epilogue: str) -> None:
    """With every operand there is: the shortcut's gradient, the count of all ranks."""
    launch = dgrad(
        2,
        5,
        6,
        16,
        24,
        3,
        3,
        padding=(1, 1),
        dtype=dtype,
        gradient=gradient,
        epilogue=epilogue,
        activation="relu",
        without=("z_previous",),
    )
    check(launch)


@pytest.mark.parametrize("epilogue", ["mask", "bn_mask"])
def test_without_an_activation_nothing_is_masked(epilogue: str) -> None:
    check(dgrad(2, 5, 6, 16, 24, 1, 1, epilogue=epilogue))


def test_without_affine_parameters() -> None:
    check(dgrad(2, 5, 6, 16, 24, 1, 1, without=("gamma", "x_gamma", "x_beta", "count"), **TRAINING))


def test_parameters_of_the_models_type() -> None:
    check(dgrad(2, 5, 6, 16, 24, 1, 1, dtype=torch.bfloat16, **TRAINING), parameters=torch.bfloat16)


SHAPES = [
    # N, H, W, C, K, R, S
    ((1, 1, 1, 16, 16, 1, 1), {}),
    ((1, 3, 3, 16, 16, 3, 3), {}),
    ((1, 9, 11, 16, 16, 1, 7), {"padding": (0, 3)}),
    ((1, 9, 11, 16, 16, 7, 1), {"padding": (3, 0), "stride": (2, 1)}),
    ((1, 9, 11, 16, 16, 3, 3), {"padding": (4, 5)}),
    ((1, 9, 13, 16, 16, 3, 3), {"padding": (2, 3), "dilation": (2, 3)}),
    ((1, 10, 11, 16, 16, 3, 3), {"padding": (2, 2), "dilation": (2, 2), "stride": (2, 2)}),
    ((1, 10, 11, 16, 16, 3, 3), {"padding": (1, 1), "dilation": (2, 2), "stride": (2, 4)}),
    ((1, 10, 12, 16, 16, 3, 3), {"padding": (1, 1), "stride": (1, 2)}),
    ((2, 11, 13, 16, 16, 3, 3), {"padding": (1, 1), "stride": (3, 3)}),
    ((2, 11, 13, 16, 16, 2, 2), {"stride": (3, 2)}),
    ((1, 6, 7, 16, 16, 1, 1), {"padding": (1, 1), "stride": (2, 2)}),
    ((1, 3, 2, 16, 16, 1, 1), {"stride": (4, 5)}),
    ((1, 8, 8, 16, 16, 2, 2), {"stride": (2, 2)}),
    ((2, 6, 7, 5, 3, 3, 3), {"padding": (1, 1)}),
    ((1, 6, 7, 1, 1, 3, 3), {"padding": (1, 1)}),
    ((1, 7, 6, 64, 64, 3, 3), {"padding": (1, 1), "groups": 16}),
    ((1, 7, 6, 12, 18, 3, 3), {"padding": (1, 1), "groups": 6, "stride": (2, 2)}),
    ((1, 7, 6, 24, 24, 5, 5), {"padding": (2, 2), "groups": 24, "dilation": (1, 2)}),
    ((1, 7, 6, 64, 128, 1, 1), {"groups": 2}),
]


@pytest.mark.parametrize(("sizes", "how"), SHAPES, ids=str)
def test_shapes(sizes: tuple[int, ...], how: dict[str, Any]) -> None:
    """bn_backward does not map 0 to 0: what is read past dy's border must be zero behind it."""
    check(dgrad(*sizes, gradient="bn_backward", epilogue="mask", activation="relu", **how))


@pytest.mark.parametrize("name", ["box", "pointwise", "stride 2, odd", "grouped, whole", "grouped"])
def test_the_loaders_for_devices_without_descriptors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on sm_80 and gfx942."""
    _, make, tile = CLASSES[name]
    launch = make(**TRAINING)
    triton_gradients.plan_start.cache_clear()
    monkeypatch.setattr(triton_gradients, "has_tma", lambda arch: False)
    try:
        assert not {"box", "matrix"} & set(loaders(launch, tile))
        check(launch, tile)
    finally:
        triton_gradients.plan_start.cache_clear()


@pytest.mark.parametrize("name", ["pointwise", "stride 2, odd", "grouped", "depthwise"])
def test_wide_offsets(name: str) -> None:
    """The same numbers, and all offsets have 64 bits (what that is for does not fit in memory here)."""
    _, make, tile = CLASSES[name]
    check(make(**TRAINING), tile, wide=True)


@pytest.mark.parametrize("group", [1, 3, 64])
def test_the_order_of_programs_covers_every_tile_once(group: int) -> None:
    launch = dgrad(1, 5, 7, 56, 16, 3, 3, stride=(2, 2), padding=(1, 1), epilogue="mask", activation="relu")
    check(launch, Tile(1, 1, 4, 16, 16, group=group))


def test_sums_do_not_depend_on_which_program_is_last() -> None:
    """More tiles than the first level of the sums merges, so that there are two."""
    launch = dgrad(2, 5, 17, 16, 16, 1, 1, **TRAINING)
    tile = Tile(1, 1, 16, 16, 16)
    operands = operands_of(launch)
    first = run_poisoned(launch, operands, tile)
    again = run_poisoned(launch, operands, tile)
    with last_program_first():
        reversed_ = run_poisoned(launch, operands, tile)
    check_all(launch, operands, first)
    for role, tensor in first.items():
        assert torch.equal(tensor, again[role]) and torch.equal(tensor, reversed_[role]), role


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1)), ((1, 1), (2, 2), (0, 0))]
)
def test_between_two_layers(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> None:
    """The whole backward between two BatchNorms, against autograd; the sums are the other's dbeta and dgamma."""
    sizes = (2, 9, 8, 16, 24, *kernel)
    layers = two_layers(Geometry(*sizes, stride=stride, padding=padding))
    launch = dgrad(*sizes, stride=stride, padding=padding, **TRAINING)
    actual = run_poisoned(launch, {role: layers.operands[role] for role in launch.roles})
    # The statistics and sums given here are rounded to fp32, and each term of dy carries that: three roundings for one.
    for role, name in (("dx", "z_previous"), ("sum_previous", "x_beta"), ("dot_previous", "x_gamma")):
        assert_close(actual[role].cpu(), layers.gradients[name], 9 * 24 if role == "dx" else 2 * 9 * 8, layers=3, what=role)


@pytest.mark.parametrize(
    ("name", "bad"),
    [*((name, torch.nan) for name in CLASSES), ("box", torch.inf), ("grouped", torch.inf), ("grouped", -torch.inf)],
)
def test_non_finite_gradients_reach_what_they_reach_in_eager(name: str, bad: float) -> None:
    """One bad pixel in the middle and one in a corner, first and last filter: the same pixels are NaN, the same inf."""
    _, make, tile = CLASSES[name]
    launch = make()
    g = launch.geometry
    operands = operands_of(launch)
    operands["dz"][0, 0, g.P // 2, g.Q // 2] = bad
    operands["dz"][-1, -1, -1, 0] = bad
    actual, truth = run_poisoned(launch, operands, tile)["dx"].cpu(), expected(launch, operands)["dx"]
    assert torch.equal(actual.isnan(), truth.isnan())
    assert torch.equal(actual.isinf(), truth.isinf())
    clean = truth.isfinite()
    assert_close(actual[clean], truth[clean], g.R * g.S * g.K)


@pytest.mark.parametrize("name", ["box", "stride 2, odd", "grouped", "depthwise"])
def test_non_finite_weights_stay_in_their_channel(name: str) -> None:
    _, make, tile = CLASSES[name]
    launch = make()
    operands = operands_of(launch)
    operands["w"][0, 0] = torch.nan  # filter 0 is of the first group, so this is channel 0
    actual = run_poisoned(launch, operands, tile)["dx"].cpu()
    assert actual[:, 0].isnan().any()
    assert actual[:, 1:].isfinite().all()


@pytest.mark.parametrize("epilogue", ["mask", "bn_mask"])
def test_a_nan_lets_the_gradient_pass(epilogue: str) -> None:
    """As in PyTorch, whose ReLU masks where its output is not above zero."""
    launch = dgrad(1, 5, 6, 16, 24, 1, 1, epilogue=epilogue, activation="relu")
    operands = operands_of(launch)
    operands["a_previous" if epilogue == "mask" else "x"][0, 3, 2, 1] = torch.nan
    actual, truth = run_poisoned(launch, operands), expected(launch, operands)
    assert actual["dx"][0, 3, 2, 1] != 0
    assert_close(actual["dx"].cpu(), truth["dx"], 24)
    for role in actual.keys() - {"dx"}:
        assert torch.equal(actual[role].cpu().isnan(), truth[role].isnan())


def test_unaligned_memory() -> None:
    """Tensors that start 4 bytes off, as views into another tensor may."""
    launch = dgrad(1, 5, 6, 16, 24, 3, 3, padding=(1, 1), **TRAINING)
    operands = operands_of(launch)
    for role in ("dz", "y", "w"):
        logical = operands[role].permute(0, 2, 3, 1)
        shifted = torch.empty(logical.numel() + 1, device=DEVICE)[1:].view(logical.shape).copy_(logical)
        operands[role] = shifted.permute(0, 3, 1, 2)
        assert operands[role].data_ptr() % 16
    check_all(launch, operands, run_poisoned(launch, operands))


def test_no_images_and_new_outputs() -> None:
    launch = dgrad(0, 5, 6, 16, 24, 3, 3, padding=(1, 1), **TRAINING)
    dx, total, product = triton.run(launch, operands_of(launch))
    assert dx.shape == (0, 16, 5, 6)
    assert torch.equal(total, torch.zeros(16, device=DEVICE)) and torch.equal(product, total)
    dx = triton.run(
        dgrad(2, 5, 6, 16, 24, 3, 3, dtype=torch.float16), operands_of(dgrad(2, 5, 6, 16, 24, 3, 3, dtype=torch.float16))
    )
    assert isinstance(dx, Tensor) and dx.dtype == torch.float16 and dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter", "sm_999"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rules_tiles_are_legal(arch: str, dtype: torch.dtype) -> None:
    for _, make, _ in CLASSES.values():
        tile = choose_gradient_tile(make(dtype=dtype, **TRAINING), arch)
        for extent in (tile.images, tile.rows, tile.columns, tile.filters, tile.channels):
            assert extent & (extent - 1) == 0
        assert tile.pixels >= 16 and tile.filters >= 16 and tile.channels >= 16


@pytest.mark.parametrize("kind", [dgrad, wgrad])
@pytest.mark.parametrize("gradient", ["identity", "bn_backward"])
def test_gradients_are_rounded_to_tf32_as_they_are_loaded(gradient: str, kind: Callable[..., Launch]) -> None:
    """What is multiplied as it is; not what a BatchNorm's backward on load reads."""
    launch = kind(2, 16, 16, 64, 64, 3, 3, padding=(1, 1), gradient=gradient)
    views = triton_gradients.plan_start(launch, "sm_90", tf32=True).views
    assert views["dz"].rounded is (gradient == "identity") and not views["y"].rounded
    assert views["w" if kind is dgrad else "x"].rounded
    assert not any(view.rounded for view in triton_gradients.plan_start(launch, "sm_90").views.values())
