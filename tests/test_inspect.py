"""``fused-resnet inspect``: totals, tables, pictures, files; with a stand-in for the compiler, and once with the compiler."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fused_resnet import counts, network
from fused_resnet.cli import main
from fused_resnet.inspect import cache, compiling, report, show
from fused_resnet.inspect.assembly import Loop, Reading
from fused_resnet.inspect.compiling import Job, Outcome, Planned
from fused_resnet.inspect.facts import Facts
from fused_resnet.models import MODELS
from fused_resnet.tuning import choose
from fused_resnet.tuning.devices import devices, find, typical
from fused_resnet.tuning.model import roofline_seconds

LOOP = Loop(4, 2, 8, 80, {"HGMMA": 4, "UTMALDG": 2})
READING = Reading("HGMMA 64x128x16", "shared-shared", ("TMA",), 4, 8, 0, 999, LOOP)
FACTS = Facts("conv_forward", 98, 0, 1 << 16, 0, 8, 4, (3, 4), READING)


def compiled(jobs: Sequence[Job], cache: Any = None, assembly: bool = False, **_: Any) -> list[Outcome]:
    """In the compiler's place: every kernel is the same."""
    return [
        Outcome(
            Planned(f"{job.arch} {number}", choose(job.launch, job.arch, job.tf32, whole_only=True).tile, 1),
            FACTS,
            assembly="\ts_endpgm\n" if assembly else None,
        )
        for number, job in enumerate(jobs)
    ]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compile_all", compiled)


def document(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What the command writes."""
    path = tmp_path / "report.json"
    assert main(["inspect", *arguments, "--json", str(path)]) == 0
    return report.load(path)


TINY = ("--model", "resnet18", "--batch", "2", "--size", "64")


# ---- what is shown


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name: str, no_compiler: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row a launch in each of the two tables, and the network beside eager PyTorch."""
    found = document(tmp_path, "--model", name, "--batch", "64")
    part = found["architectures"]["sm_90"]
    guess, text = part["totals"]["predicted"], capsys.readouterr().out
    assert 0 < guess["roofline_seconds"] < guess["launches_seconds"] < guess["fused_seconds"] < guess["eager_seconds"]
    assert guess["ratio"] == guess["eager_seconds"] / guess["fused_seconds"]
    # No kernel of either side is faster than the roofline; the launches outside are on both.
    assert guess["roofline_seconds"] < guess["eager_roofline_seconds"] < guess["eager_seconds"]
    assert 1 < guess["roofline_ratio"] < guess["eager_roofline_seconds"] / guess["roofline_seconds"]
    for row in part["launches"].values():
        assert sum(line.startswith(f"  {row['label']}  ") for line in text.splitlines()) == 2, row["label"]
    assert "COMPILED" in text and "PREDICTED" in text and f"predicted ratio {guess['ratio']:.2f}" in text


def test_totals_are_those_of_the_counts(no_compiler: None, tmp_path: Path) -> None:
    """ResNet-50's inference runs whole: 54 launches, their bytes and eager's as ``info`` counts them."""
    found = document(tmp_path, "--arch", "sm_80,gfx942")
    with torch.device("meta"):
        x = torch.empty(256, 3, 224, 224, dtype=torch.bfloat16)
    fused = counts.kernels(network.network("resnet50").to(torch.bfloat16).eval(), x)
    for arch in ("sm_80", "gfx942"):
        totals = found["architectures"][arch]["totals"]
        assert totals["counted"]["launches"] == 54
        assert totals["counted"]["bytes"] == sum(kernel.bytes for kernel in fused if kernel.fused)
        assert totals["counted"]["bytes"] == pytest.approx(14.5e9, rel=0.02)
        assert totals["counted"]["flops"] == pytest.approx(2 * 4.09e9 * 256, rel=0.01)  # torchvision: 4.09 G multiply-adds
        assert totals["counted"]["eager_kernels"] == 174 and totals["counted"]["outside_kernels"] == 2
        assert totals["counted"]["eager_bytes"] == pytest.approx(41.4e9, rel=0.02)
        assert totals["compiled"] == {"distinct": 25, "failed": 0, "spilling": 0, "registers": 98, "shared": 1 << 16}


def test_training_is_shown_as_it_runs(no_compiler: None, tmp_path: Path) -> None:
    """Pieces have rows of their own, on the architectures where the choice takes a launch apart."""
    found = document(tmp_path, "--model", "resnet18", "--mode", "train")
    rows = found["architectures"]["sm_90"]["launches"]
    assert {"output_gradient", "wgrad", "dgrad", "max_pool_backward"} <= {row["kind"] for row in rows.values()}
    named = network.launches(network.network("resnet18"), 256, 224, torch.bfloat16, "train")
    assert sum(len(row["layers"]) for row in rows.values()) > len(named)


def test_predictions_of_a_row(no_compiler: None, tmp_path: Path) -> None:
    found = document(tmp_path, *TINY, "--device", "H100")
    h100 = find("H100")
    part = found["architectures"]["sm_90"]
    assert part["device"] == "H100"
    for row in part["launches"].values():
        floor = roofline_seconds(row["counted"]["flops"], row["counted"]["bytes"], h100, torch.bfloat16)
        assert row["predicted"]["seconds"] >= 0.999 * floor
        assert row["predicted"]["bound"]
    occupancy = {row["compiled"]["occupancy"]["programs"] for row in part["launches"].values()}
    assert occupancy == {2}  # 98 registers of 8 warps: 256 threads of 104 each are 26,624 of 65,536


def test_layers_by_pattern(no_compiler: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part of a name or a shell's pattern; the network's totals are left out."""
    found = document(tmp_path, *TINY, "--layer", "layer1.?.conv1")
    rows = found["architectures"]["sm_90"]["launches"]
    assert [row["layers"] for row in rows.values()] == [["layer1.0.conv1", "layer1.1.conv1"]]
    assert "ratio" not in found["architectures"]["sm_90"]["totals"]["predicted"] and "eager" not in capsys.readouterr().out
    assert len(document(tmp_path, *TINY, "--layer", "layer1")["architectures"]["sm_90"]["launches"]) == 2


def test_a_kernel_that_does_not_compile_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, its row says why, its time is predicted all the same."""

    def one_fails(jobs: Sequence[Job], *_: Any, **__: Any) -> list[Outcome]:
        first, *others = compiled(jobs)
        return [Outcome(first.planned, error="OutOfResources: shared memory"), *others]

    monkeypatch.setattr(compiling, "compile_all", one_fails)
    assert main(["inspect", *TINY, "--json", str(tmp_path / "a.json")]) == 1
    assert "no kernel: OutOfResources: shared memory" in capsys.readouterr().out
    part = report.load(tmp_path / "a.json")["architectures"]["sm_90"]
    assert part["totals"]["compiled"]["failed"] == 1
    assert all(row["predicted"]["seconds"] > 0 for row in part["launches"].values())


def test_tensor_memory_limits_what_is_resident(no_compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of its 512 columns two programs of 256 take all."""
    small = Facts("conv_forward", 32, 0, 1 << 10, 256, 4, 2, (2, 2), READING)
    monkeypatch.setattr("test_inspect.FACTS", small)
    rows = document(tmp_path, *TINY, "--arch", "sm_100", "--layer", "layer1")["architectures"]["sm_100"]["launches"]
    assert {row["compiled"]["occupancy"]["limited_by"] for row in rows.values()} == {"tensor memory"}
    assert {row["compiled"]["occupancy"]["programs"] for row in rows.values()} == {2}


# ---- files


def test_picture(no_compiler: None, tmp_path: Path) -> None:
    """SVG: a circle a launch with FLOPs beside the legend's, all on the paper; it calls itself predicted."""
    path = tmp_path / "roofline.svg"
    found = document(tmp_path, *TINY, "--mode", "train", "--arch", "sm_90,gfx942", "--picture", str(path))
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    names = "{http://www.w3.org/2000/svg}"
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    points = [group.find(f"{names}circle") for group in root.iter(f"{names}g") if group.find(f"{names}title") is not None]
    drawn = sum(row["counted"]["flops"] > 0 for part in found["architectures"].values() for row in part["launches"].values())
    assert len(points) == drawn > 20
    for point in points:
        assert point is not None and 0 < float(point.attrib["cx"]) < width and 0 < float(point.attrib["cy"]) < height
    assert "Predicted, not measured" in "".join(root.itertext())


def test_assembly_is_written_a_file_a_kernel(no_compiler: None, tmp_path: Path) -> None:
    assert main(["inspect", *TINY, "--layer", "layer1", "--asm", str(tmp_path / "new" / "asm")]) == 0
    names = sorted(path.name for path in (tmp_path / "new" / "asm").iterdir())
    assert names == ["sm_90_conv_3x3_64_64_16x16_affine_add_relu.asm", "sm_90_conv_3x3_64_64_16x16_affine_relu.asm"]


def test_compare(
    no_compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing where nothing changed; else what did, of which launch, and the sum."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    request = ["inspect", *TINY, "--layer", "layer1"]
    assert main([*request, "--json", str(old)]) == 0
    assert main(["inspect", "--compare", str(old), str(old)]) == 0
    assert "nothing changed" in capsys.readouterr().out
    spilling = Facts("conv_forward", 255, 8, 1 << 16, 0, 8, 4, (3, 4), READING)
    monkeypatch.setattr("test_inspect.FACTS", spilling)
    assert main([*request, "--json", str(new)]) == 0
    capsys.readouterr()
    assert main(["inspect", "--compare", str(old), str(new)]) == 0
    lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    label = "conv 3x3 64>64 16x16 affine+relu"
    assert [label, "registers", "98", "255"] in lines and [label, "spills", "0", "8"] in lines
    assert not [line for line in lines if line[0] == label and line[1] in ("tile", "loop", "warps", "matrix")]


# ---- wrong input: one line, exit code 2, nothing written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "pentium"], "unknown architecture 'pentium': expected one of"),
        (["--arch", "sm_90,"], "unknown architecture ''"),
        (["--model", "resnet17"], "resnet17"),
        (["--layer", "layer9"], "no layer matches 'layer9': resnet18 has conv1"),
        (["--device", "A100"], "--device A100 is of sm_80, which is not in --arch sm_90"),
        (["--device", "Voodoo2"], "unknown device 'Voodoo2'"),
        (["--dtype", "fp64"], "fp32, fp16 and bf16"),
        (["--batch", "0"], "at least 1"),
        (["--mode", "sleep"], "invalid choice"),
        (["--size", "8", "--mode", "train", "--batch", "1"], ""),
        (["--json", "nowhere/at/all.json"], "cannot write to the folder nowhere/at"),
        (["--picture", "."], "is a folder"),
        (["--picture", "file/roofline.svg"], "cannot write to the folder file"),
        (["--asm", "file/asm"], "cannot make the folder file/asm"),
        (["--layer", "pool", "--picture", "pool.svg"], "nothing to draw"),
    ],
)
def test_wrong_input(
    arguments: list[str],
    message: str,
    no_compiler: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert main(["inspect", *TINY, "--json", "report.json", "--asm", "asm", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line
    written = {path.name for path in tmp_path.rglob("*")} - {"asm"}
    assert written == {"file"} and not any((tmp_path / "asm").glob("*"))


#: What is taken out of a report ("*": the first) -> what the message says.
DAMAGED = {
    ("architectures",): "damaged.json: not whole: 'architectures' is missing",
    ("request", "batch"): "request: not whole: 'batch' is missing",
    ("versions", "torch"): "versions: not whole: 'torch' is missing",
    ("architectures", "sm_90", "totals"): "sm_90: not whole: 'totals' is missing",
    ("architectures", "sm_90", "launches", "*", "label"): "not whole: 'label' is missing",
    ("architectures", "sm_90", "launches", "*", "compiled", "spills"): "not whole: 'spills' is missing",
    ("architectures", "sm_90", "launches", "*", "compiled", "reading", "loop", "load"): "not whole: 'load' is missing",
}


def test_reports_that_cannot_be_compared(no_compiler: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = document(tmp_path, *TINY, "--layer", "layer1")
    path = tmp_path / "report.json"

    def refused(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        capsys.readouterr()
        assert main(["inspect", "--compare", str(path), str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    other = {**good, "request": {**good["request"], "batch": 7}}
    assert "different requests" in refused("batch.json", json.dumps(other))
    assert "batch 2 and 7" in refused("batch.json", json.dumps(other))
    assert "has schema 99, expected 1" in refused("schema.json", json.dumps({**good, "schema": 99}))
    assert "was not written by inspect --json" in refused("list.json", "[]")
    assert "is not JSON" in refused("cut.json", json.dumps(good)[:100])
    assert "is damaged" in refused("deep.json", "[" * 100_000)
    bare = {"what": report.WHAT, "schema": report.SCHEMA}
    assert "bare.json: not whole: 'request' is missing" in refused("bare.json", json.dumps(bare))
    for path_to, says in DAMAGED.items():
        other = copy.deepcopy(good)
        inner = other
        for step in path_to[:-1]:
            inner = inner[step if step != "*" else next(iter(inner))]
        del inner[path_to[-1]]
        assert says in refused("damaged.json", json.dumps(other))
    assert main(["inspect", "--compare", str(path), str(tmp_path / "none.json")]) == 2
    assert "cannot read" in capsys.readouterr().err


# ---- what is kept


def test_facts_survive_being_stored(tmp_path: Path) -> None:
    kept = cache.Cache(tmp_path)
    assert kept.facts("sm_90 a") is None and kept.assembly("sm_90 a") is None
    kept.keep("sm_90 a", FACTS, "LDG ;\n")
    assert cache.Cache(tmp_path).facts("sm_90 a") == FACTS and kept.assembly("sm_90 a") == "LDG ;\n"
    assert kept.facts("sm_90 b") is None and kept.broken is None
    plain = Facts("pool", 10, 0, 0, 0, 4, 1, (1, 1), Reading("", "", (), 0, 0, 0, 9, None))
    assert Facts.from_json(json.loads(json.dumps(plain.as_json()))) == plain


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"registers": 3}', '{"reading": {"loads": [], "loop": {"matrix": 1}}}'])
def test_what_is_corrupt_is_compiled_again(text: str, tmp_path: Path) -> None:
    kept = cache.Cache(tmp_path)
    kept.keep("key", FACTS, "LDG ;\n")
    for path in tmp_path.rglob("*.*"):
        if path.is_file():
            path.write_text(text)
    assert kept.facts("key") is None and kept.assembly("key") is None
    kept.keep("key", FACTS)
    assert kept.facts("key") == FACTS


def test_a_cache_that_cannot_be_written_forgets(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    kept = cache.Cache(tmp_path / "file")
    kept.keep("key", FACTS)
    assert kept.facts("key") is None and "file" in (kept.broken or "")


def test_the_compiler_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One small launch for two architectures in processes of its own; the second time from the cache alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    request = ["--model", "resnet18", "--batch", "2", "--size", "64", "--layer", "layer1.0.conv1", "--arch", "sm_90,gfx942"]
    found = document(tmp_path, *request, "--asm", str(tmp_path / "asm"))
    for arch, instruction, form in (("sm_90", "HGMMA", "shared-shared"), ("gfx942", "MFMA", "registers")):
        ((row,),) = (found["architectures"][arch]["launches"].values(),)
        made = row["compiled"]
        assert made["kernel"] == "conv_forward" and made["spills"] == 0 and 32 <= made["registers"] <= 255
        assert made["reading"]["matrix"].startswith(instruction) and made["reading"]["operands"] == form
        assert made["reading"]["loop"]["matrix"] > 0 and made["occupancy"]["programs"] > 0
        assert row["tile"]["filters"] == 64 and made["stages"][0] >= (2 if arch == "sm_90" else 1)
    assert sorted(path.name.partition("_conv")[0] for path in (tmp_path / "asm").iterdir()) == ["gfx942", "sm_90"]
    monkeypatch.setattr(compiling, "compile_some", None)  # nothing is left to compile
    again = document(tmp_path, *request)
    assert again["architectures"] == found["architectures"]
    assert capsys.readouterr().err.count("kernels compiled") >= 1


def test_every_device_has_its_architecture() -> None:
    for name, device in devices().items():
        standing = typical(device.arch)
        assert standing is not None and standing.arch == device.arch, name
    assert set(report.architectures()) == {device.arch for device in devices().values()}
    assert show.stages({"stages": (3, 4)}) == "3-4" and show.stages({"stages": (2, 2)}) == "2"
