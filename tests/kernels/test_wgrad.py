"""Gradients of a convolution's parameters against autograd in float64: loaders, shares, what is recomputed on load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_launches import expected, last_program_first, operands_of, run_poisoned, two_layers, wgrad
from launches import DEVICE
from tolerances import assert_close

from fused_resnet.backends import triton, triton_gradients
from fused_resnet.backends.triton_start import arch_of
from fused_resnet.launch import Geometry, Launch
from fused_resnet.tuning import Tile
from fused_resnet.tuning.tile import choose_gradient_tile

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

#: A geometry a row, with rims in every direction: loaders of dz and x, launch, and a tile that is smaller than everything.
CLASSES: dict[str, tuple[tuple[str | None, str | None], Callable[..., Launch], Tile]] = {
    "box": (
        ("box", "box"),
        lambda **how: wgrad(3, 5, 9, 32, 24, 2, 2, padding=(1, 1), **how),
        Tile(2, 4, 4, 16, 16, splits=3),
    ),
    "pointwise": (("box", "box"), lambda **how: wgrad(3, 5, 7, 40, 24, 1, 1, **how), Tile(2, 4, 4, 16, 16, splits=2)),
    "chunk past C": (
        ("box", "box"),
        lambda **how: wgrad(2, 6, 7, 24, 24, 2, 3, padding=(1, 1), **how),
        Tile(1, 4, 8, 16, 16, splits=2),
    ),
    "parity": (
        ("box", "parity"),
        lambda **how: wgrad(3, 10, 10, 32, 24, 3, 3, stride=(2, 2), padding=(1, 1), **how),
        Tile(2, 4, 4, 16, 32, splits=2),
    ),
    "parity 1x1": (
        ("box", "parity"),
        lambda **how: wgrad(2, 14, 10, 32, 24, 1, 1, stride=(2, 2), **how),
        Tile(1, 4, 4, 16, 16, splits=2),
    ),
    "gather": (
        ("box", "gather"),
        lambda **how: wgrad(3, 9, 10, 32, 24, 3, 2, stride=(2, 2), padding=(1, 1), **how),
        Tile(2, 4, 4, 16, 16, splits=2),
    ),
    "stem": (
        ("box", "flat"),
        lambda **how: wgrad(2, 12, 15, 3, 24, 7, 7, stride=(2, 2), padding=(3, 3), **how),
        Tile(1, 4, 8, 16, 64, splits=2),
    ),
    "unaligned": (
        ("gather", "flat"),
        lambda **how: wgrad(2, 6, 7, 7, 21, 3, 2, padding=(1, 1), **how),
        Tile(1, 4, 4, 16, 32, splits=3),
    ),
    "grouped, whole": (
        ("box", "box"),
        lambda **how: wgrad(2, 6, 7, 64, 32, 3, 3, padding=(1, 1), groups=2, **how),
        Tile(1, 4, 8, 16, 32, splits=2),
    ),
    "grouped": (
        ("box", "box"),
        lambda **how: wgrad(2, 6, 7, 32, 48, 2, 2, padding=(1, 1), groups=8, **how),
        Tile(1, 4, 8, 16, 16, splits=2),
    ),
    "grouped, stride 2": (
        ("box", "parity"),
        lambda **how: wgrad(2, 10, 12, 32, 32, 3, 3, stride=(2, 2), padding=(1, 1), groups=8, **how),
        Tile(1, 4, 8, 16, 16, splits=2),
    ),
    "grouped, unaligned": (
        ("gather", "gather"),
        lambda **how: wgrad(2, 6, 7, 21, 14, 3, 3, padding=(1, 1), groups=7, **how),
        Tile(1, 4, 8, 16, 16, splits=2),
    ),
    "depthwise": (
        (None, None),
        lambda **how: wgrad(2, 6, 7, 20, 40, 3, 3, padding=(1, 1), groups=20, **how),
        Tile(1, 4, 8, 16, 16, splits=2),
    ),
}

#: Both sides recomputed on load, as training with the batch's statistics does; and everything that given statistics give.
TRAINING: dict[str, Any] = {"gradient": "bn_backward", "prologue": "bn_relu", "outputs": ("dw", "dbias")}
GIVEN: dict[str, Any] = {"gradient": "scale", "outputs": ("dw", "dbias", "dgamma", "dbeta")}


def check(launch: Launch, tile: Tile | None = None, parameters: torch.dtype = torch.float32, **how: Any) -> None:
    g = launch.geometry
    assert isinstance(g, Geometry)
    operands = operands_of(launch, parameters)
    actual, truth = run_poisoned(launch, operands, tile, **how), expected(launch, operands)
    for role, tensor in actual.items():
        assert tensor.dtype == (launch.dtype if role == "dw" else torch.float32)
        length = g.N * g.P * g.Q * (g.R * g.S * g.C // g.groups if role == "dgamma" else 1)
        assert_close(tensor.cpu(), truth[role], length, what=f"{role} of {launch}")


def loaders(launch: Launch, tile: Tile | None = None) -> tuple[str | None, str | None]:
    """Names of the loaders a launch takes where the tests run."""
    constants = triton_gradients.plan_start(launch, arch_of(DEVICE), tile).constants
    names = {id(function): name for name, function in triton_gradients.gradients.LOADS.items()}
    pixels = {id(function): name for name, function in triton_gradients.boxes.PIXELS.items()}
    return names.get(id(constants["LOAD"])), pixels.get(id(constants["PIXELS"]))


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
    """Several tiles in each direction, shares of the pixels that are not equal, and the loaders that the class is about."""
    names, make, tile = CLASSES[name]
    launch = make(dtype=dtype, **TRAINING)
    assert loaders(launch, tile) == names
    check(launch, tile)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_with_the_rules_tile(name: str) -> None:
    check(CLASSES[name][1](prologue="bn"))


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_with_given_statistics(name: str) -> None:
    """dgamma is a sum over all tiles of a filter, each of which several programs share."""
    _, make, tile = CLASSES[name]
    check(make(**GIVEN), tile)


@pytest.mark.parametrize("prologue", ["identity", "bn", "bn_relu"])
@pytest.mark.parametrize(
    ("gradient", "outputs"),
    [("identity", ("dw", "dbias")), ("scale", ("dw", "dbias", "dgamma", "dbeta")), ("bn_backward", ("dw", "dbias"))],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_gradient_and_prologue(dtype: torch.dtype, gradient: str, outputs: tuple[str, ...], prologue: str) -> None:
    """With every operand there is, also the count of all ranks."""
    check(
        wgrad(
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
            prologue=prologue,
            outputs=outputs,
            without=(),
        )
    )


@pytest.mark.parametrize("splits", [1, 2, 7, 8, 9, 19])
def test_shares(splits: int) -> None:
    """Up to one for each of the 18 tiles of pixels, and one that has none; from 9 on the sum has two levels."""
    check(wgrad(2, 5, 9, 16, 24, 1, 1, padding=(1, 1), **GIVEN), Tile(1, 4, 4, 16, 16, splits=splits))


@pytest.mark.parametrize("outputs", [("dgamma",), ("dbias", "dbeta"), ("dw", "dbeta"), ("dw",)], ids="-".join)
def test_some_outputs(outputs: tuple[str, ...]) -> None:
    check(wgrad(2, 5, 6, 16, 24, 3, 3, padding=(1, 1), gradient="scale", outputs=outputs), Tile(1, 4, 4, 16, 16, splits=2))


@pytest.mark.parametrize("without", [("bias",), ("gamma",), ("bias", "gamma")], ids="-".join)
def test_given_statistics_without_some_operands(without: tuple[str, ...]) -> None:
    check(wgrad(2, 5, 6, 16, 24, 1, 1, without=without, **GIVEN))


def test_without_affine_parameters() -> None:
    check(wgrad(2, 5, 6, 16, 24, 1, 1, without=("gamma", "x_gamma", "x_beta", "count"), **TRAINING))


@pytest.mark.parametrize("ends", [TRAINING, GIVEN], ids=["training", "given"])
def test_parameters_of_the_models_type(ends: dict[str, Any]) -> None:
    check(wgrad(2, 5, 6, 16, 24, 1, 1, dtype=torch.bfloat16, **ends), parameters=torch.bfloat16)


@pytest.mark.parametrize("gradient", ["identity", "scale", "bn_backward"])
def test_frozen_filters(gradient: str) -> None:
    """Nothing to multiply: x is not given, and only the vectors are made."""
    outputs = {"identity": ("dbias",), "scale": ("dbias", "dbeta"), "bn_backward": ("dbias",)}[gradient]
    check(wgrad(2, 5, 6, 16, 300, 1, 1, gradient=gradient, outputs=outputs, without=("x", "w", "y")))


SHAPES = [
    # N, H, W, C, K, R, S
    ((1, 1, 1, 16, 16, 1, 1), {}),
    ((1, 3, 3, 16, 16, 3, 3), {}),
    ((1, 9, 11, 16, 16, 1, 7), {"padding": (0, 3)}),
    ((1, 9, 11, 16, 16, 7, 1), {"padding": (3, 0), "stride": (2, 1)}),
    ((1, 9, 11, 16, 16, 3, 3), {"padding": (4, 5)}),
    ((1, 9, 13, 16, 16, 3, 3), {"padding": (2, 3), "dilation": (2, 3)}),
    ((1, 10, 11, 16, 16, 3, 3), {"padding": (2, 2), "dilation": (2, 2), "stride": (2, 2)}),
    ((2, 11, 13, 16, 16, 3, 3), {"padding": (1, 1), "stride": (3, 3)}),
    ((1, 6, 7, 16, 16, 1, 1), {"padding": (1, 1), "stride": (2, 2)}),
    ((1, 8, 8, 16, 16, 2, 2), {"stride": (2, 2)}),
    ((2, 6, 7, 5, 3, 3, 3), {"padding": (1, 1)}),
    ((1, 6, 7, 1, 1, 3, 3), {"padding": (1, 1)}),
    ((1, 7, 6, 64, 64, 3, 3), {"padding": (1, 1), "groups": 16}),
    ((1, 7, 6, 36, 24, 3, 3), {"padding": (1, 1), "groups": 12, "stride": (2, 2)}),
    ((1, 7, 6, 24, 24, 5, 5), {"padding": (2, 2), "groups": 24, "dilation": (1, 2)}),
    ((1, 7, 6, 64, 128, 1, 1), {"groups": 2}),
]


@pytest.mark.parametrize(("sizes", "how"), SHAPES, ids=str)
def test_shapes(sizes: tuple[int, ...], how: dict[str, Any]) -> None:
    check(wgrad(*sizes, **TRAINING, **how))


@pytest.mark.parametrize("name", ["pointwise", "parity", "grouped, whole", "grouped"])
def test_the_loaders_for_devices_without_descriptors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on sm_80 and gfx942."""
    _, make, tile = CLASSES[name]
    launch = make(**TRAINING)
    triton_gradients.plan_start.cache_clear()
    monkeypatch.setattr(triton_gradients, "has_tma", lambda arch: False)
    try:
        assert loaders(launch, tile) == ("gather", "gather")
        check(launch, tile)
    finally:
        triton_gradients.plan_start.cache_clear()


@pytest.mark.parametrize("name", ["pointwise", "gather", "stem", "grouped", "depthwise"])
def test_wide_offsets(name: str) -> None:
    """The same numbers, and all offsets have 64 bits (what that is for does not fit in memory here)."""
    _, make, tile = CLASSES[name]
    check(make(**TRAINING), tile, wide=True)


def test_the_result_does_not_depend_on_which_program_is_last() -> None:
    launch = wgrad(2, 5, 17, 40, 24, 1, 1, **GIVEN)
    tile = Tile(1, 1, 16, 16, 16, splits=10)
    operands = operands_of(launch)
    first = run_poisoned(launch, operands, tile)
    again = run_poisoned(launch, operands, tile)
    with last_program_first():
        reversed_ = run_poisoned(launch, operands, tile)
    for role, tensor in first.items():
        assert torch.equal(tensor, again[role]) and torch.equal(tensor, reversed_[role]), role


@pytest.mark.parametrize(("kernel", "padding"), [((3, 3), (1, 1)), ((1, 1), (0, 0))])
def test_between_two_layers(kernel: tuple[int, int], padding: tuple[int, int]) -> None:
    """dw of the convolution between two BatchNorms, against autograd of the plain composition."""
    sizes = (2, 9, 8, 16, 24, *kernel)
    layers = two_layers(Geometry(*sizes, padding=padding))
    launch = wgrad(*sizes, padding=padding, **TRAINING)
    actual = run_poisoned(
        launch, {role: layers.operands[role] for role in launch.roles - {"bias"}}, Tile(1, 4, 8, 16, 16, splits=3)
    )
    # The statistics and sums given here are rounded to fp32, and each term of dy carries that: three roundings for one.
    assert_close(actual["dw"].cpu(), layers.gradients["w"], 2 * 9 * 8, layers=3)


@pytest.mark.parametrize(
    ("name", "role", "bad"),
    [
        *((name, role, torch.nan) for name in CLASSES for role in ("dz", "x")),
        ("box", "dz", torch.inf),
        ("grouped", "x", -torch.inf),
    ],
)
def test_non_finite_values_reach_what_they_reach_in_eager(name: str, role: str, bad: float) -> None:
    """One bad pixel in the middle and one in a corner, first and last channel: the same weights are NaN, the same inf."""
    _, make, tile = CLASSES[name]
    launch = make()
    operands = operands_of(launch)
    tensor = operands[role]
    tensor[0, 0, tensor.shape[2] // 2, tensor.shape[3] // 2] = bad
    tensor[-1, -1, -1, 0] = bad
    actual, truth = run_poisoned(launch, operands, tile)["dw"].cpu(), expected(launch, operands)["dw"]
    assert torch.equal(actual.isnan(), truth.isnan())
    assert torch.equal(actual.isinf(), truth.isinf())
    clean = truth.isfinite()
    g = launch.geometry
    if clean.any():
        assert_close(actual[clean], truth[clean], g.N * g.P * g.Q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prologue", ["identity", "relu", "bn_relu"])
@pytest.mark.parametrize("stride", [1, 2])
def test_pixels_past_the_last_output_are_not_read(stride: int, prologue: str, dtype: torch.dtype) -> None:
    """A box over the output's border sees pixels that belong to no output of its tap; one of them may be NaN or infinite."""
    launch = wgrad(2, 8, 8, 16, 16, 3, 3, stride=(stride, stride), prologue=prologue, dtype=dtype)
    operands = operands_of(launch)
    operands["x"][:, 3, -1, 5] = torch.nan
    operands["x"][:, 4, 2, -1] = torch.inf
    tile = Tile(1, 4, 4, 16, 16)
    assert loaders(launch, tile) == ("box", "parity" if stride == 2 else "box")
    actual, truth = run_poisoned(launch, operands, tile)["dw"].cpu(), expected(launch, operands)["dw"]
    assert torch.equal(actual.isfinite(), truth.isfinite())
    assert truth.isfinite().all() == (stride == 2), "with stride 2 nobody reads the last row and column"
    assert_close(actual[truth.isfinite()], truth[truth.isfinite()], 2 * 36)


def test_unaligned_memory() -> None:
    """Tensors that start 4 bytes off, as views into another tensor may."""
    launch = wgrad(1, 5, 6, 16, 24, 3, 3, padding=(1, 1), **TRAINING)
    operands = operands_of(launch)
    for role in ("dz", "y", "x"):
        logical = operands[role].permute(0, 2, 3, 1)
        shifted = torch.empty(logical.numel() + 1, device=DEVICE)[1:].view(logical.shape).copy_(logical)
        operands[role] = shifted.permute(0, 3, 1, 2)
        assert operands[role].data_ptr() % 16
    assert_close(run_poisoned(launch, operands)["dw"].cpu(), expected(launch, operands)["dw"], 30)


def test_no_images_and_new_outputs() -> None:
    launch = wgrad(0, 5, 6, 16, 24, 3, 3, padding=(1, 1), **TRAINING)
    dw, dbias = triton.run(launch, operands_of(launch))
    assert not dw.any() and not dbias.any() and dw.shape == (24, 16, 3, 3) and dbias.shape == (24,)
    launch = wgrad(2, 5, 6, 16, 24, 3, 3, dtype=torch.float16)
    dw = triton.run(launch, operands_of(launch))
    assert dw.dtype == torch.float16 and dw.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter", "sm_999"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rules_tiles_are_legal(arch: str, dtype: torch.dtype) -> None:
    for _, make, _ in CLASSES.values():
        launch = make(dtype=dtype, **TRAINING)
        tile = choose_gradient_tile(launch, arch)
        for extent in (tile.images, tile.rows, tile.columns, tile.filters, tile.channels):
            assert extent & (extent - 1) == 0
        assert tile.pixels >= 16 and tile.filters >= 16 and tile.channels >= 16
        assert tile.splits >= 1


def test_the_rule_fills_the_device_once() -> None:
    """ResNet-50's first stage: 9 tiles of dw and 3136 tiles of pixels, so many programs share each."""
    launch = wgrad(64, 56, 56, 64, 64, 3, 3, padding=(1, 1), dtype=torch.bfloat16, **TRAINING)
    assert choose_gradient_tile(launch, "sm_90").splits == 132 // 9
    launch = wgrad(64, 7, 7, 512, 2048, 1, 1, dtype=torch.bfloat16, **TRAINING)
    assert choose_gradient_tile(launch, "sm_90").splits == 132 // (16 * 4)


def test_supports() -> None:
    launch = wgrad(1, 5, 6, 16, 24, 1, 1)
    assert triton.supports(launch) is None
    assert "float64" in str(triton.supports(wgrad(1, 5, 6, 16, 24, 1, 1, dtype=torch.float64)))
