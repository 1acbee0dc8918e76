"""The convolution kernel against float64, loader by loader, epilogue by epilogue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from launches import DEVICE, conv, expected, loaders, operands_of, run_poisoned
from tolerances import assert_close
from torch import Tensor

from fused_resnet.backends import count_launches, triton_arguments
from fused_resnet.backends import triton as executor
from fused_resnet.launch import EPILOGUES, Geometry, Launch
from fused_resnet.tuning import Tile
from fused_resnet.tuning.tile import choose_tile

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

#: One geometry a loader, each with rims in every direction, C past a chunk and K past a tile where the loader allows it.
CLASSES: dict[str, tuple[tuple[str | None, str | None], Callable[..., Launch], Tile]] = {
    "box": (("box", "matrix"), lambda **how: conv(3, 5, 9, 32, 24, 3, 3, padding=(1, 1), **how), Tile(2, 4, 8, 16, 16)),
    "pointwise": (("box", "matrix"), lambda **how: conv(3, 5, 7, 40, 24, 1, 1, **how), Tile(2, 4, 8, 16, 16)),
    "box, chunk past C": (
        ("box", "rows"),
        lambda **how: conv(2, 6, 7, 24, 24, 3, 3, padding=(1, 1), **how),
        Tile(1, 4, 8, 16, 16),
    ),
    "parity": (
        ("parity", "matrix"),
        lambda **how: conv(3, 10, 10, 32, 24, 3, 3, stride=(2, 2), padding=(1, 1), **how),
        Tile(2, 4, 4, 16, 32),
    ),
    "parity 1x1": (
        ("parity", "matrix"),
        lambda **how: conv(2, 14, 10, 32, 24, 1, 1, stride=(2, 2), **how),
        Tile(1, 4, 4, 16, 16),
    ),
    "gather": (
        ("gather", "matrix"),
        lambda **how: conv(3, 9, 10, 32, 24, 3, 3, stride=(2, 2), padding=(1, 1), **how),
        Tile(2, 4, 4, 16, 16),
    ),
    "gather, chunk past C": (
        ("gather", "rows"),
        lambda **how: conv(2, 5, 5, 24, 24, 3, 3, stride=(2, 2), padding=(1, 1), **how),
        Tile(1, 2, 4, 16, 16),
    ),
    "flat": (
        ("flat", "flat"),
        lambda **how: conv(2, 12, 15, 3, 24, 5, 5, stride=(2, 2), padding=(2, 2), **how),
        Tile(1, 4, 8, 16, 16),
    ),
    "grouped, whole": (
        ("box", "matrix"),
        lambda **how: conv(2, 6, 7, 64, 32, 3, 3, padding=(1, 1), groups=2, **how),
        Tile(1, 4, 8, 16, 16),
    ),
    "grouped": (
        ("box", "block_diagonal"),
        lambda **how: conv(2, 6, 7, 48, 72, 3, 3, padding=(1, 1), groups=12, **how),
        Tile(1, 4, 8, 16, 16),
    ),
    "grouped, stride 2": (
        ("parity", "block_diagonal"),
        lambda **how: conv(2, 10, 12, 32, 32, 3, 3, stride=(2, 2), padding=(1, 1), groups=8, **how),
        Tile(1, 4, 8, 16, 16),
    ),
    "grouped, unaligned": (
        ("gather", "block_diagonal"),
        lambda **how: conv(2, 6, 7, 21, 14, 3, 3, padding=(1, 1), groups=7, **how),
        Tile(1, 4, 8, 16, 16),
    ),
    "depthwise": (
        (None, None),
        lambda **how: conv(2, 6, 7, 20, 40, 3, 3, padding=(1, 1), groups=20, **how),
        Tile(1, 4, 8, 16, 16),
    ),
}


def check(launch: Launch, tile: Tile | None = None, parameters: torch.dtype = torch.float32, **how: Any) -> None:
    g = launch.geometry
    assert isinstance(g, Geometry)
    operands = operands_of(launch, parameters)
    actual = run_poisoned(launch, operands, tile, **how)
    assert_close(actual, expected(launch, operands), g.R * g.S * g.C // g.groups, what=str(launch))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        # fp32 and one of the 16-bit types by turns in the default run, the other one in the long run.
        pytest.param(name, dtype, marks=[pytest.mark.slow] if i % 2 == j else [])
        for i, name in enumerate(CLASSES)
        for j, dtype in enumerate((torch.float16, torch.bfloat16, torch.float32))
    ],
    ids=str,
)
def test_every_loader_in_every_type(name: str, dtype: torch.dtype) -> None:
    """Several tiles in each direction, and the loader that the class is about."""
    names, make, tile = CLASSES[name]
    launch = make(dtype=dtype, epilogue="affine_add", activation="relu")
    assert loaders(launch, tile) == names
    check(launch, tile)


@pytest.mark.parametrize("name", CLASSES)
def test_every_loader_with_the_rules_tile(name: str) -> None:
    check(CLASSES[name][1](epilogue="affine"))


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_epilogue_in_every_type(epilogue: str, dtype: torch.dtype, activation: str) -> None:
    check(conv(2, 5, 6, 16, 24, 3, 3, padding=(1, 1), dtype=dtype, epilogue=epilogue, activation=activation))


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_epilogue_behind_every_loader(epilogue: str, dtype: torch.dtype, name: str) -> None:
    _, make, tile = CLASSES[name]
    check(make(dtype=dtype, epilogue=epilogue, activation="relu"), tile)


@pytest.mark.parametrize("name", CLASSES)
def test_a_prologue_behind_every_loader(name: str) -> None:
    """The padding is zero after the normalisation, not before it: shift is not zero here."""
    check(CLASSES[name][1](prologue="bn_relu", epilogue="bias"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prologue_in_every_type(dtype: torch.dtype) -> None:
    check(conv(2, 5, 6, 24, 24, 3, 3, padding=(1, 1), dtype=dtype, prologue="bn_relu"), Tile(1, 4, 8, 16, 16))


@pytest.mark.parametrize("without", [("bias",), ("gamma", "beta"), ("bias", "gamma", "beta")], ids="-".join)
def test_affine_without_some_operands(without: tuple[str, ...]) -> None:
    check(conv(1, 5, 6, 16, 24, 1, 1, epilogue="affine_add", without=without))


@pytest.mark.parametrize("parameters", [torch.float16, torch.bfloat16], ids=str)
def test_vectors_of_the_models_type(parameters: torch.dtype) -> None:
    check(conv(1, 5, 6, 16, 24, 1, 1, epilogue="affine", dtype=parameters), parameters=parameters)


SHAPES = [
    # N, H, W, C, K, R, S
    ((1, 1, 1, 16, 16, 1, 1), {}),
    ((1, 3, 3, 16, 16, 3, 3), {}),
    ((2, 9, 11, 16, 20, 5, 5), {"padding": (2, 2)}),
    ((1, 9, 11, 16, 7, 7, 7), {"padding": (3, 3)}),
    ((1, 9, 11, 16, 16, 1, 7), {"padding": (0, 3)}),
    ((1, 9, 11, 16, 16, 7, 1), {"padding": (3, 0)}),
    ((1, 9, 11, 16, 16, 3, 3), {"padding": (4, 5)}),
    ((2, 9, 11, 16, 16, 3, 3), {"padding": (2, 2), "dilation": (2, 2)}),
    ((1, 9, 13, 16, 16, 3, 3), {"padding": (2, 3), "dilation": (2, 3)}),
    ((1, 10, 12, 16, 16, 3, 3), {"padding": (2, 2), "dilation": (2, 2), "stride": (2, 2)}),
    ((1, 10, 12, 16, 16, 7, 7), {"padding": (3, 3), "stride": (2, 2)}),
    ((1, 10, 12, 16, 16, 3, 3), {"padding": (1, 1), "stride": (1, 2)}),
    ((2, 11, 13, 16, 16, 3, 3), {"padding": (1, 1), "stride": (3, 3)}),
    ((2, 11, 13, 16, 16, 1, 1), {"stride": (3, 2)}),
    ((1, 6, 6, 16, 16, 1, 1), {"padding": (1, 1)}),
    ((1, 8, 8, 16, 16, 2, 2), {"stride": (2, 2)}),
    ((2, 6, 7, 5, 3, 3, 3), {"padding": (1, 1)}),
    ((2, 6, 7, 7, 5, 1, 1), {}),
    ((1, 6, 7, 1, 1, 3, 3), {"padding": (1, 1)}),
    ((1, 20, 18, 3, 20, 7, 7), {"padding": (3, 3), "stride": (2, 2)}),
    ((1, 7, 6, 64, 64, 3, 3), {"padding": (1, 1), "groups": 16}),
    ((1, 8, 6, 32, 32, 3, 3), {"padding": (1, 1), "groups": 4, "stride": (2, 2)}),
    ((1, 7, 6, 36, 24, 3, 3), {"padding": (1, 1), "groups": 12}),
    ((1, 7, 6, 12, 12, 3, 3), {"padding": (1, 1), "groups": 6, "stride": (2, 2)}),
    ((1, 7, 6, 24, 24, 5, 5), {"padding": (2, 2), "groups": 24, "dilation": (1, 2)}),
    ((1, 7, 6, 6, 12, 3, 3), {"padding": (1, 1), "groups": 6}),
    ((1, 7, 6, 64, 128, 1, 1), {"groups": 2}),
]


@pytest.mark.parametrize(("sizes", "how"), SHAPES, ids=str)
def test_shapes(sizes: tuple[int, ...], how: dict[str, Any]) -> None:
    check(conv(*sizes, epilogue="bias", **how))


@pytest.mark.parametrize("name", ["pointwise", "parity", "grouped, whole"])
def test_the_loaders_for_devices_without_descriptors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on sm_80 and gfx942."""
    _, make, tile = CLASSES[name]
    launch = make(epilogue="affine")
    executor.plan_start.cache_clear()
    monkeypatch.setattr(executor, "has_tma", lambda arch: False)
    try:
        assert not {"box", "parity", "matrix"} & set(loaders(launch, tile))
        check(launch, tile)
    finally:
        executor.plan_start.cache_clear()


@pytest.mark.parametrize("name", ["pointwise", "gather", "flat", "grouped", "depthwise"])
def test_wide_offsets(name: str) -> None:
    """The same numbers, and all offsets have 64 bits (what that is for does not fit in memory here)."""
    _, make, tile = CLASSES[name]
    check(make(epilogue="affine_add"), tile, wide=True)


def test_wide_offsets_are_chosen_by_elements() -> None:
    assert not executor.needs_wide_offsets((1, 1 << 10, 1 << 10, (1 << 11) - 1))
    assert executor.needs_wide_offsets((1, 1, 1, 1), (1, 1 << 10, 1 << 10, 1 << 11))
    start = executor.plan_start(conv(1 << 10, 64, 64, 512, 16, 1, 1), "sm_90")
    assert start.constants["WIDE"]
    assert not executor.plan_start(conv(1 << 9, 64, 64, 512, 16, 1, 1), "sm_90").constants["WIDE"]


@pytest.mark.parametrize("group", [1, 2, 3, 64])
def test_the_order_of_programs_covers_every_tile_once(group: int) -> None:
    check(conv(1, 9, 8, 16, 56, 1, 1), Tile(1, 1, 16, 16, 16, group=group))


def test_unaligned_memory() -> None:
    """Tensors that start 4 bytes off, as views into another tensor may."""
    launch = conv(1, 5, 6, 16, 24, 3, 3, padding=(1, 1))
    operands = operands_of(launch)
    for role in ("x", "w"):
        logical = operands[role].permute(0, 2, 3, 1)
        shifted = torch.empty(logical.numel() + 1, device=DEVICE)[1:].view(logical.shape).copy_(logical)
        operands[role] = shifted.permute(0, 3, 1, 2)
        assert operands[role].data_ptr() % 16
    assert_close(run_poisoned(launch, operands), expected(launch, operands), 9 * 16)


def test_no_images() -> None:
    launch = conv(0, 5, 6, 16, 24, 3, 3, padding=(1, 1))
    assert executor.run(launch, operands_of(launch)).shape == (0, 24, 5, 6)


def test_new_output_is_channels_last() -> None:
    launch = conv(2, 5, 6, 16, 24, 3, 3, dtype=torch.float16)
    y = executor.run(launch, operands_of(launch))
    assert y.dtype == torch.float16 and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "bad"),
    [*((name, torch.nan) for name in CLASSES), ("box", torch.inf), ("grouped", torch.inf), ("grouped", -torch.inf)],
)
def test_non_finite_pixels_reach_what_they_reach_in_eager(name: str, bad: float) -> None:
    """One bad pixel in the middle and one in a corner, first and last channel: the same outputs are NaN, the same inf."""
    _, make, tile = CLASSES[name]
    launch = make(activation="relu")
    g = launch.geometry
    operands = operands_of(launch)
    operands["x"][0, 0, g.H // 2, g.W // 2] = bad
    operands["x"][-1, -1, -1, 0] = bad
    actual, truth = run_poisoned(launch, operands, tile).cpu(), expected(launch, operands)
    assert torch.equal(actual.isnan(), truth.isnan())
    assert torch.equal(actual.isinf(), truth.isinf())
    clean = truth.isfinite()
    assert_close(actual[clean], truth[clean], g.R * g.S * g.C)


@pytest.mark.parametrize("name", CLASSES)
def test_non_finite_weights_stay_in_their_filter(name: str) -> None:
    _, make, tile = CLASSES[name]
    launch = make()
    operands = operands_of(launch)
    operands["w"][1] = torch.nan
    actual = run_poisoned(launch, operands, tile).cpu()
    assert actual[:, 1].isnan().all()
    assert actual[:, [k for k in range(launch.geometry.K) if k != 1]].isfinite().all()


@pytest.mark.parametrize("epilogue", ["affine_add", "bias_add"])
def test_non_finite_epilogue_operands(epilogue: str) -> None:
    launch = conv(1, 5, 6, 16, 24, 1, 1, epilogue=epilogue, activation="relu")
    operands = operands_of(launch)
    operands["shortcut"][0, 3, 2, 1] = torch.nan
    operands["shortcut"][0, 4, 2, 1] = -torch.inf
    operands["bias"][7] = torch.nan
    actual, truth = run_poisoned(launch, operands).cpu(), expected(launch, operands)
    assert torch.equal(actual.isnan(), truth.isnan())
    assert actual[0, 4, 2, 1] == 0


@pytest.mark.parametrize("name", CLASSES)
def test_one_kernel_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the kernel itself, not where the executor says so."""
    launch = CLASSES[name][1](epilogue="affine_add", activation="relu")
    starts = []
    kernel = type(executor.conv.conv_forward)
    run = kernel.run
    monkeypatch.setattr(kernel, "run", lambda self, *args, **how: (starts.append(self), run(self, *args, **how))[1])
    with count_launches() as log:
        executor.run(launch, operands_of(launch))
    assert len(starts) == 1
    assert log.kernels == ["conv_forward"]


def test_folded_batchnorm_is_never_stale() -> None:
    launch = conv(1, 5, 6, 16, 24, 1, 1, epilogue="affine")
    operands = operands_of(launch)
    before: Tensor = executor.run(launch, operands)
    operands["var"].mul_(2)
    operands["gamma"].neg_()
    after = executor.run(launch, operands)
    assert not torch.equal(before, after)
    assert_close(after, expected(launch, operands), 16)


def test_supports() -> None:
    launch = conv(1, 5, 6, 16, 24, 1, 1)
    assert executor.supports(launch) is None
    assert "float64" in str(executor.supports(replace(launch, dtype=torch.float64)))
    assert "sync_sums" in str(executor.supports(replace(launch, kind="sync_sums")))
    assert "statistics" in str(executor.supports(replace(launch, epilogue="statistics")))


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter", "sm_999"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rules_tiles_are_legal(arch: str, name: str, dtype: torch.dtype) -> None:
    launch = CLASSES[name][1](dtype=dtype)
    tile = choose_tile(launch, arch)
    for extent in (tile.images, tile.rows, tile.columns, tile.filters, tile.channels):
        assert extent & (extent - 1) == 0
    assert tile.pixels >= 16 and tile.filters >= 16 and tile.channels >= 16
    assert tile.num_stages * tile.stage_bytes(dtype) <= 64 * 1024 or arch not in ("gfx942", "sm_999")


def test_the_rules_boxes() -> None:
    """The boxes named in the rule's docstring."""

    def box(size: int) -> tuple[int, int, int]:
        tile = choose_tile(conv(1024, size, size, 128, 128, 3, 3, padding=(1, 1), dtype=torch.bfloat16), "sm_90")
        return tile.images, tile.rows, tile.columns

    assert box(56) == (2, 8, 8)
    assert box(28) == (8, 4, 4)
    assert box(14) == (32, 2, 2)
    assert box(7) == (128, 1, 1)


@pytest.mark.parametrize(("legacy", "allowed"), [(True, True), (False, False)])
def test_tf32_follows_pytorchs_settings(legacy: bool, allowed: bool) -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = legacy
        assert executor.tf32_allowed(torch.float32, torch.device("cuda")) is (allowed and not torch.version.hip)
        assert not executor.tf32_allowed(torch.float16, torch.device("cuda"))
        assert not executor.tf32_allowed(torch.float32, torch.device("cpu"))
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_tf32_by_the_newer_settings() -> None:
    conv_settings = torch.backends.cudnn.conv
    before = conv_settings.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            conv_settings.fp32_precision = precision
            assert executor.tf32_allowed(torch.float32, torch.device("cuda")) is (precision == "tf32" and not torch.version.hip)
    finally:
        conv_settings.fp32_precision = before


@pytest.mark.parametrize("tf32", [False, True])
def test_factors_are_rounded_to_tf32_as_they_are_loaded(tf32: bool) -> None:
    """By their descriptors, of fp32; not what a BatchNorm on load reads, nor where fp32 is meant."""
    for prologue, as_it_is in (("identity", True), ("bn_relu", False)):
        start = executor.plan_start(conv(2, 16, 16, 64, 64, 3, 3, padding=(1, 1), prologue=prologue), "sm_90", tf32=tf32)
        assert start.x_view is not None and start.w_view is not None
        assert (start.x_view.rounded, start.w_view.rounded) == (tf32 and as_it_is, tf32)
    if not triton_arguments.ROUNDS:
        return
    w = torch.zeros(64, 9 * 64)
    assert start.w_view.of(w).round_f32_to_tf32 is tf32
    assert not start.w_view.of(w.half()).round_f32_to_tf32
