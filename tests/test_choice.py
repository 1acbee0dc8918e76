"""What decides how a launch runs: measured choices, the model, the rule; and the files that measurements come from."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_resnet import explain, models, network
from fused_resnet.backends import triton
from fused_resnet.launch import Geometry, Launch
from fused_resnet.tuning import Tile, choice, choose, measured, model
from fused_resnet.tuning.classes import registers_of
from fused_resnet.tuning.devices import devices, find, limits, typical
from fused_resnet.tuning.pieces import pieces
from fused_resnet.tuning.tile import shaped

H200 = find("H200")


def launches(mode: str, batch: int = 256) -> list[Launch]:
    return [use.launch for use in network.uses("resnet50", batch, 224, torch.bfloat16, mode)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache folder, empty; what was read before is forgotten."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice.forget()
    yield tmp_path
    choice.forget()


def test_names_and_counts_of_a_network() -> None:
    """54 launches of inference, each with its layer; forward and backward of a layer have one name."""
    infer = network.uses("resnet50", 8, 64, torch.bfloat16, "infer")
    assert sum(use.times for use in infer) == 54
    assert "layer3.4.conv2" in {layer for use in infer for layer in use.layers}
    train = network.uses("resnet50", 8, 64, torch.bfloat16, "train")
    names = {kind: {layer for use in train if use.launch.kind == kind for layer in use.layers} for kind in ("conv", "wgrad")}
    assert names["conv"] == names["wgrad"]


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_products_of_a_warpgroup_have_its_rows(arch: str) -> None:
    """With fewer than 64 rows Triton takes the older instructions: HMMA instead of HGMMA for a wgrad of 64 to 128."""
    wgrad = next(
        use.launch
        for use in network.uses("resnet18", 256, 224, torch.bfloat16, "train")
        if use.launch.kind == "wgrad" and isinstance(g := use.launch.geometry, Geometry) and (g.C, g.K, g.R) == (64, 128, 1)
    )
    assert shaped(wgrad, 32, 64, 4, arch) is None and shaped(wgrad, 64, 64, 4, arch) is not None
    assert shaped(wgrad, 32, 64, 4, "sm_80") is not None
    plain = next(launch for launch in launches("infer") if launch.epilogue == "affine_add")
    assert shaped(plain, 32, 64, 4, arch) is not None  # the filters' 64 come first there
    tile = choose(wgrad, arch, whole_only=True).tile
    assert isinstance(tile, Tile) and tile.filters >= 64


@pytest.mark.parametrize("mode", network.MODES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_chosen_tiles_fit(arch: str, mode: str) -> None:
    """Two stages fit into shared memory, a program of them onto a multiprocessor; the choice is the best candidate."""
    for launch in launches(mode):
        chosen = choose(launch, arch, whole_only=True)
        assert chosen.how == "fused" and chosen.reason
        if isinstance(chosen.tile, Tile):
            assert chosen.tile.num_stages >= 2
            assert model.staged_bytes(launch, chosen.tile) * 2 <= limits(arch).shared_per_program * 1024
            device = typical(arch)
            assert device is not None
            order = choice.ranked(launch, device)
            assert chosen.tile == order[0][1] and order[0][0] <= 1.011 * min(seconds for seconds, _ in order)


def test_a_reason_says_what_both_ways_take() -> None:
    """A launch whose work on load is dear, taken apart, and one that is not."""
    told = [choose(launch, "sm_90") for launch in launches("train") if pieces(launch, "apart") is not None]
    assert {chosen.how for chosen in told} == {"fused", "apart"}
    form = r"by the model of H200: (fused|apart) [0-9.]+ us( \([a-z0-9]+\))?, (fused|apart) [0-9.]+ us( \([a-z0-9]+\))?"
    for chosen in told:
        assert re.fullmatch(form, chosen.reason), chosen.reason


def test_the_model_knows_its_limits() -> None:
    """Never faster than memory and the matrix units allow, whatever the tile; a wave more costs more."""
    for launch in launches("infer"):
        for tile in choice.candidates(launch, "sm_90")[:4]:
            told = model.predict(launch, tile, H200)
            assert told.seconds >= launch.bytes / H200.bandwidth
            assert told.seconds >= launch.flops / H200.rate(launch.dtype)
            assert told.flops >= launch.flops and told.rim >= 0
            larger = replace(launch, geometry=replace(launch.geometry, N=2 * launch.geometry.N))
            assert model.predict(larger, tile, H200).seconds > told.seconds * 0.99


def test_resident_programs_by_hand() -> None:
    """65536 registers: 8 warps of 128 take half. 228 KiB of shared memory: three of 75 and their reserved KiB."""
    assert model.resident(limits("sm_90"), 128, 0, 8) == (2, "registers")
    assert model.resident(limits("sm_90"), 32, 75 * 1024, 4) == (3, "shared memory")
    assert model.resident(limits("sm_80"), 16, 0, 4) == (16, "warps")


def seven_by_seven() -> Launch:
    """The 3x3 of the last blocks, at batch 1."""
    convolutions = (launch for launch in launches("infer", 1) if isinstance(launch.geometry, Geometry))
    return next(launch for launch in convolutions if (launch.geometry.C, launch.geometry.R, launch.geometry.H) == (512, 3, 7))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_few_tiles_are_shared_and_many_are_not(arch: str) -> None:
    """Batch 1: the 7x7 layers have 16 tiles. What fills the machine is left whole, and so is what has no steps to share."""
    device = typical(arch)
    assert device is not None
    shared = 0
    for launch in [*launches("infer", 1), *launches("train", 1), *launches("infer")]:
        if launch.kind not in ("conv", "dgrad"):
            continue
        tile = choose(launch, arch, whole_only=True).tile
        assert isinstance(tile, Tile)
        tiles = model.tiles_of(launch, tile)
        shared += tile.splits > 1
        if tiles >= device.multiprocessors:
            assert tile.splits == 1
        else:
            whole = model.predict(launch, replace(tile, splits=1), device).seconds
            told = model.predict(launch, tile, device)
            assert told.seconds <= 1.011 * whole and told.programs == tiles * tile.splits
            assert 2 * tile.splits <= max(2, model.steps_of(launch, tile))
    assert shared > 10
    assert "programs share a tile" in choose(seven_by_seven(), arch).reason


def test_shares_cost_memory_and_waiting_by_hand() -> None:
    """7x7, 512 channels, batch 1: 2 by 8 tiles of 32 by 64, 8 shares of 9 steps, parts of 8 KiB written and read once."""
    launch = seven_by_seven()
    tile = Tile(1, 4, 8, 64, 64, num_stages=4, splits=8)
    whole, told = (model.predict(launch, replace(tile, splits=splits), H200) for splits in (1, 8))
    assert (whole.programs, told.programs) == (16, 128)
    assert told.memory_bytes - whole.memory_bytes == 2 * 16 * 8 * 32 * 64 * 4
    assert told.seconds < whole.seconds / 2


def test_what_the_l2_cannot_hold_is_read_again_by_hand() -> None:
    """8192 by 8192 by 8192 in bf16: 128 MiB an operand. Tiles of 128 by 128: 64 by 64 of them, 132 at once.

    In bands of 64 tiles a wave has all pixels and two columns of filters: 32 waves read the pixels, one each the filters. In
    bands of 1 tile, two waves' rows together read all filters: 32 waves again. Bands of 8: the pixels of a band (16 MiB) stay,
    the filters come once a band.
    """
    g = Geometry(1, 1, 8192, 8192, 8192, 1, 1)
    operands = (("x", "x"), ("w", "w"))
    sizes = tuple((role, 8192 * 8192 * 2) for role in ("x", "w", "y"))
    launch = Launch("conv", "layer", g, torch.bfloat16, operands, (("y", "y"),), sizes=sizes)
    tile = Tile(1, 1, 128, 128, 64, num_warps=8)
    again = {group: model.refetched(launch, replace(tile, group=group), H200, 1) / 2**27 for group in (1, 8, 64)}
    assert again == {1: 31, 8: 7, 64: 31}
    assert choice.order_of_programs(launch, tile, H200, 1) not in (1, 64)
    for small in launches("infer"):
        if small.kind == "conv":
            chosen = choose(small, "sm_90").tile
            assert isinstance(chosen, Tile) and model.refetched(small, chosen, H200, 1) == 0


def test_no_tile_that_spills_is_known() -> None:
    for launch in launches("train"):
        assert all(registers <= 240 for registers in registers_of(launch, "sm_90").values())


def test_measured_choices_come_first(cache: Path) -> None:
    launch = launches("infer")[3]
    tile = Tile(1, 8, 8, 64, 64, num_stages=2)
    entry = measured.Entry("vendor", None, 1e-5, {"fused": 2e-5})
    table = measured.Table("Some GPU", "2.11.0", "3.6.0", "2026-11-25", {launch.signature: entry})
    measured.write(measured.user_path("Some GPU"), table)
    assert measured.read(measured.user_path("Some GPU")) == table
    chosen = choose(launch, "sm_90", gpu="Some GPU")
    assert (chosen.how, chosen.tile, chosen.seconds) == ("vendor", None, 1e-5) and "measured on Some GPU" in chosen.reason
    assert choose(launch, "sm_90", gpu="Another GPU").how == "fused"
    near = replace(launch, geometry=replace(launch.geometry, N=128))
    far = replace(launch, geometry=replace(launch.geometry, N=64))
    assert choose(near, "sm_90", gpu="Some GPU").how == "vendor" and choose(far, "sm_90", gpu="Some GPU").how == "fused"
    measured.write(
        measured.user_path("Some GPU"), replace(table, entries={launch.signature: measured.Entry("fused", tile, 1e-5)})
    )
    choice.forget()
    assert choose(launch, "sm_90", gpu="Some GPU").tile == tile


def test_a_smaller_device_of_an_architecture_is_not_the_typical_one() -> None:
    """An H100 with PCIe has 114 multiprocessors, a part of a GPU fewer; without a device it is the typical one's."""
    there = [launch for launch in launches("train", 4) if launch.kind in ("conv", "dgrad", "wgrad")]
    device = typical("sm_90")
    assert device is not None
    differ = 0
    for launch in there:
        assumed = choose(launch, "sm_90", whole_only=True)
        same = choose(launch, "sm_90", whole_only=True, multiprocessors=device.multiprocessors)
        small = choose(launch, "sm_90", whole_only=True, multiprocessors=16)
        assert assumed == same
        assert small.tile == choice.ranked(launch, replace(device, multiprocessors=16))[0][1]
        assert small.tile in choice.candidates(launch, "sm_90", multiprocessors=16)
        differ += small.tile != assumed.tile
    assert differ > len(there) // 4


def test_what_was_measured_as_tf32_is_not_chosen_for_exact_fp32(cache: Path) -> None:
    """Files of schema 1 said fp32 of both; what they measured was PyTorch's default, tf32 but for AMD's GPUs."""
    launch = next(launch for launch in launches("infer") if launch.kind == "conv")
    launch = replace(launch, dtype=torch.float32)
    path = measured.user_path("Some GPU")
    entry = {"how": "vendor", "tile": None, "seconds": 1e-5}

    def both(schema: int, key: str, version: str = "2.11.0") -> tuple[bool, bool]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"schema": schema, "gpu": "", "torch": version, "triton": "", "date": "", "entries": {key: entry}})
        )
        choice.forget()
        how = [choose(launch, "sm_90", tf32, "Some GPU").how for tf32 in (False, True)]
        return how[0] == "vendor", how[1] == "vendor"

    exact, tf32 = measured.key_of(launch), measured.key_of(launch, True)
    assert exact == launch.signature and tf32.startswith("conv tf32 N")
    assert both(2, exact) == (True, False) and both(2, tf32) == (False, True)
    assert both(1, exact) == (False, True) and both(1, exact, "2.11.0+rocm6.4") == (True, False)
    table = measured.read(path)
    assert table is not None
    measured.write(path, table)
    assert measured.read(path) == table
    assert measured.key_of(replace(launch, dtype=torch.bfloat16), True).startswith("conv bf16 ")


@pytest.mark.parametrize("how", ["fused", "apart"])
def test_a_measured_choice_that_does_not_run_is_left_and_told(cache: Path, how: str) -> None:
    """Of another version: a launch that has nothing to take apart, a kernel without its tile."""
    launch = next(launch for launch in launches("infer") if launch.kind == "conv")
    assert pieces(launch, "apart") is None
    entries = {launch.signature: measured.Entry(how, None, 1e-5)}
    measured.write(measured.user_path("Some GPU"), measured.Table("Some GPU", "2.11.0", "3.6.0", "2026-11-25", entries))
    chosen, plain = choose(launch, "sm_90", gpu="Some GPU"), choose(launch, "sm_90")
    assert (chosen.how, chosen.tile, chosen.seconds) == (plain.how, plain.tile, plain.seconds)
    assert f"measured on Some GPU, {how}, does not run" in chosen.reason


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 7}', '{"schema": 1, "gpu": "x"}'])
def test_a_corrupt_file_is_ignored_with_one_warning(cache: Path, text: str) -> None:
    path = measured.user_path("Some GPU")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    launch = launches("infer")[3]
    with pytest.warns(UserWarning, match="some-gpu.json is ignored") as caught:
        assert choose(launch, "sm_90", gpu="Some GPU").how == "fused"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(launches("infer")[4], "sm_90", gpu="Some GPU")


def test_eager_by_the_same_rules() -> None:
    """Eager's convolutions are not predicted at less than their roofline, and not dearer than ours without fusion."""
    from fused_resnet import counts

    with torch.device("meta"):
        eager = models.resnet50().eval().to(torch.bfloat16)
        x = torch.empty(256, 3, 224, 224, dtype=torch.bfloat16)
    from fused_resnet.swap import unfuse

    for kernel in counts.kernels(unfuse(eager), x):
        told = choice.eager_seconds(kernel, H200, torch.bfloat16)
        assert told >= model.roofline_seconds(kernel.flops, kernel.bytes, H200, torch.bfloat16) * 0.999
        assert (kernel.convolution is not None) == (kernel.name == "convolution")


def test_pieces_read_and_write_what_the_launch_does() -> None:
    for launch in launches("train"):
        for how in ("apart", "vendor"):
            parts = pieces(launch, how)
            if parts is None:
                continue
            outputs = (parts.last or parts.core).outputs
            assert [role for role, _ in outputs] == [role for role, _ in launch.outputs]
            assert parts.core.prologue == parts.core.gradient == "identity"
            assert isinstance(parts.core.geometry, Geometry)


def test_unknown_devices() -> None:
    with pytest.raises(ValueError, match="unknown device"):
        find("GTX 480")
    assert find("rtx 4090") is devices()["RTX 4090"]
    assert choose(launches("infer")[3], "sm_75").reason.startswith("by rule")


def test_explain_tells_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "gpu_of", lambda device: "Some GPU")
    monkeypatch.setattr(triton, "arch_of", lambda device: "sm_90")
    rows = explain(models.resnet18(backend="triton").eval(), show=False).rows
    assert any("by the model of H200" in row.note for row in rows if row.fused)
