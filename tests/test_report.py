"""``fused-resnet report``: pages and pictures say how each number is known, and nothing unmeasured looks measured."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet.cli import main
from fused_resnet.gpu import draw, networks, pages, predicted, report, results, scope
from fused_resnet.gpu.results import ResultsError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check_docs  # noqa: E402


def time_of(milliseconds: float) -> dict[str, Any]:
    seconds = milliseconds / 1e3
    return {"median": seconds, "low": 0.98 * seconds, "high": 1.02 * seconds, "rounds": 20}


def measured(gpu: str = "NVIDIA H200") -> dict[str, Any]:
    """Results as a run would write them, with times nobody measured: for tests alone."""
    data = results.empty(True, "2026-11-30T10:00:00+00:00")
    data["machine"] = {
        "gpu": gpu,
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"},
        "date": "2026-11-30",
        "as_found": {"driver_version": "580.1", "clocks.sm": "1980 MHz"},
    }
    data["ceilings"] = [
        {"key": key, "status": "ok", "unit": unit, "rate": rate, "measured": True, "times": {key: time_of(1)}}
        for key, unit, rate in (("copy", "B/s", 4.3e12), ("bf16 product", "FLOP/s", 7.9e14))
    ]
    data["checks"] = [{"key": "a", "status": "ok", "bitwise_twice": True, "relative_error": 1e-3, "allowed": 1e-2}]
    data["tests"] = [
        {"key": "tests/test_gpu.py", "kind": "file", "status": "ok", "passed": 5, "failed": 0, "skipped": 1, "late": 0}
    ]
    for use in networks.uses(scope.TOY, 2, 16, torch.bfloat16, "train"):
        times: dict[str, Any] = {"fused": time_of(0.5)}
        if use.launch.flops:
            times["convolution of PyTorch"] = time_of(0.8)
        facts = {"signature": use.launch.signature, "kind": use.launch.kind, "layer": use.layers[0], "uses": use.times}
        sizes = {"flops": use.launch.flops, "bytes": use.launch.bytes, "roofline": 2.5e-4}
        data["launches"].append(
            {
                "key": use.launch.signature,
                "status": "ok",
                "where": "toy train",
                **facts,
                **sizes,
                "measured": True,
                "times": times,
            }
        )
    both = {
        "eager contiguous": time_of(40),
        "eager channels_last": time_of(30),
        "fused": time_of(20),
        "fused, low memory": time_of(22),
    }
    for cell in (scope.Cell("resnet50", "train", 256), scope.Cell("resnet50", "infer", 1, graph=True)):
        sizes = {"eager channels_last": 10**10, "fused": 8 * 10**9, "fused, low memory": 5 * 10**9}
        data["models"].append(
            {"key": cell.key, "status": "ok", "mode": cell.mode, "measured": True, "times": dict(both), "step_bytes": sizes}
        )
    data["tuning"] = [
        {
            "key": "t", "status": "ok", "signature": data["launches"][0]["signature"],
            "chosen": {"how": "vendor", "tile": None},
            "times": {"as chosen": time_of(2), "fused": time_of(1.5), "vendor": time_of(1)}, "measured": True,
        }
    ]  # fmt: skip
    data["profile"] = [
        {
            "key": "fused", "cell": "resnet50 train b256", "status": "ok", "measured": True, "times": {}, "span": 0.03,
            "idle": 0.001, "busy": 0.029, "launches": 200, "host": 0.01, "whole": 0.031, "cpu_bound": False, "longest_gaps": [],
            "lines": [{"kind": "conv", "launches": 53, "seconds": 0.015, "part": 0.5}],
        }
    ]  # fmt: skip
    return data


@pytest.fixture(autouse=True)
def few_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The predictions of one small network on two devices: seconds instead of most of a minute."""
    two = {name: device for name, device in predicted.devices().items() if name in ("A100", "H200")}
    for module in (predicted, report.predicted_pages):
        monkeypatch.setattr(module, "devices", lambda: two)
    monkeypatch.setattr(predicted, "NETWORKS", ("resnet18",))
    monkeypatch.setattr(predicted, "SHOWN", "resnet18")
    monkeypatch.setattr(predicted, "BATCH", 8)
    monkeypatch.setattr(predicted, "SIZE", 64)


def written(folder: Path, data: dict[str, Any], name: str = "results.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(data))
    return path


# ---- without results


def test_without_results_there_are_predictions_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "-o", str(tmp_path / "out")]) == 0
    assert "nothing was measured" in capsys.readouterr().out
    files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert set(files) == {
        "index.md", "predicted.md", "predicted-launches.md", "predicted-speedup.svg", "predicted-roofline.svg", "memory.svg",
    }  # fmt: skip
    assert "No time has been measured on a GPU yet" in files["index.md"]
    for name in ("predicted.md", "predicted-launches.md"):
        assert "**predicted: nothing on this page was measured.**" in files[name]
    for name in ("predicted-speedup.svg", "predicted-roofline.svg"):
        texts = [element.text or "" for element in ET.fromstring(files[name]).iter() if element.tag.endswith("text")]
        assert sum("predicted, not measured" in text for text in texts) == 1
    assert files["predicted-speedup.svg"].count('stroke-dasharray="4 3"') == 4  # predicted bars look unlike measured ones
    assert not any(
        re.search(r"(?<!not )(?<!was )(?<!been )measured[:,]", text) for name, text in files.items() if "predicted" in name
    )


def test_a_prediction_is_the_sum_of_its_launches() -> None:
    device = predicted.devices()["H200"]
    total = predicted.total("resnet18", "infer", device)
    launches = sum(use.times * predicted.expected(use.launch, device).seconds for use in predicted.uses("resnet18", "infer"))
    assert launches < total.fused < launches + 1e-4 and total.ratio == total.eager / total.fused
    assert predicted.total("resnet18", "train", device).fused > 2 * total.fused


# ---- with results


def test_a_page_says_how_its_numbers_are_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(written(tmp_path, measured())), "-o", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    said = "measured: NVIDIA H200, PyTorch 2.11.0, Triton 3.6.0, CUDA 13.0, driver 580.1, 2026-11-30"
    page = (out / "nvidia-h200-2026-11-30.md").read_text()
    assert f"**{said}.**" in page and said in (out / "index.md").read_text()
    assert "No time has been measured" not in (out / "index.md").read_text()
    for which in ("speedup", "memory", "roofline"):
        picture = out / f"nvidia-h200-2026-11-30-{which}.svg"
        assert said in picture.read_text() and f"({picture.name})" in page
        ET.parse(picture)
    row = next(line for line in page.splitlines() if line.startswith("| resnet50 train b256"))
    assert "30 ± 2.0%" in row and "20 ± 2.0%" in row and "1.50x" in row
    assert "| 50% | 800 |" in page  # of the roofline; the vendor's convolution
    assert "vendor |" in page and "conv | 53 | 15.000 | 50.0%" in page


def test_links_of_the_pages_lead_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = report.files([written(tmp_path, measured())])
    folder = tmp_path / "docs" / "benchmarks"
    folder.mkdir(parents=True)
    report.write_all(made, folder)
    for name in ("docs/gpu.md", "README.md", "fused_resnet/tuning/model.py", "fused_resnet/tuning/devices.json"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / name).read_text())
    monkeypatch.setattr(check_docs, "ROOT", tmp_path)
    for path in folder.glob("*.md"):
        for _, line in enumerate(check_docs.split(path.read_text())[0]):
            for target in check_docs.LINK.findall(line[1]):
                assert check_docs.check_link(path, target) is None, (path.name, target)


def test_what_was_not_measured_is_not_printed_as_a_time() -> None:
    data = measured()
    data["models"][0]["times"]["eager channels_last"] = None
    data["launches"][0]["times"]["fused"] = None
    data["launches"][0]["times"]["convolution of PyTorch"] = None
    data["profile"][0]["measured"] = False
    data["ceilings"][0]["rate"] = None
    page = pages.measured_page(data, {})
    row = next(line for line in page.splitlines() if line.startswith("| resnet50 train b256"))
    assert row.split(" | ")[2] == "not measured" and "2.00x" in row  # against the one that was
    first = next(line for line in page.splitlines() if line.startswith(f"| toy train: {data['launches'][0]['layer']}"))
    assert first.endswith("| not measured | not measured | not measured | not measured |")
    assert "fused: not measured." in page and "| copy | not measured |" in page
    assert pages.roofs(data) is None
    kinds = [point.hint.split(":")[0] for point in pages.roofline_points(data)]
    assert f"toy train {data['launches'][0]['layer']}" not in kinds[:1]


def test_failures_come_first() -> None:
    data = measured()
    data["launches"][2].update(status="crashed", error="an illegal memory access")
    page = pages.measured_page(data, {})
    assert page.index("## 1 failures") < page.index("## Networks")
    assert "crashed: an illegal memory access" in page


def test_a_stage_that_was_killed_is_no_failure() -> None:
    """It has noted something, and has no status yet."""
    data = {**measured(), "stages": {"models": {"notes": ["out of memory at 256"]}}}
    assert results.failures(results.check(data, "r.json")) == []


def test_the_same_results_give_the_same_files(tmp_path: Path) -> None:
    path = written(tmp_path, measured())
    assert report.files([path]) == report.files([path])


# ---- wrong input


def forged() -> dict[str, Any]:
    return {**measured(), "measured": False}


def dry() -> dict[str, Any]:
    return results.empty(False, "2026-11-30")


def without(*path: Any) -> str:
    """Results that lack what is at ``path``."""
    data = measured()
    inner: Any = data
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({**measured(), "schema": 2}), "results of schema 2, this version reads 1"),
        (json.dumps(forged()), "but nothing was measured"),
        (json.dumps(dry()), "of a dry run: nothing in it was measured"),
        ("{", "not JSON"),
        (json.dumps({"datetime": "x", "benchmarks": []}), "no results of fused-resnet gpu"),
        (json.dumps({**measured(), "launches": 3}), "not whole: 'launches'"),
        *((without(key), f"not whole: '{key}' is missing") for key in ("begun", "grade", "seconds", "stages", "running")),
        (without("machine"), "not whole: 'machine' is missing"),
        (json.dumps({**measured(), "begun": 3}), "not whole: 'begun': expected text, got a number"),
        (json.dumps({**measured(), "machine": {"versions": []}}), "'versions': expected an object, got a list"),
        (json.dumps({**measured(), "stages": {"models": 1}}), "stage 'models': not whole: expected an object, got a number"),
        (json.dumps({**measured(), "running": {}}), "running: not whole: 'stage' is missing"),
        (without("launches", 0, "layer"), "not whole: 'layer' is missing"),
        (without("launches", 0, "times", "fused", "low"), "'fused': not whole: 'low' is missing"),
        (without("tests", 0, "passed"), "not whole: 'passed' is missing"),
        (without("tuning", 0, "signature"), "not whole: 'signature' is missing"),
        (without("profile", 0, "span"), "not whole: 'span' is missing"),
        (without("profile", 0, "lines", 0, "kind"), "lines: not whole: 'kind' is missing"),
        ('{"schema": ' + "[" * 100_000, "damaged: no results are nested so deep"),
        ('{"schema": ' + "9" * 5000 + "}", "damaged"),
    ],
    ids=lambda value: "" if len(value) > 100 else None,
)
def test_wrong_results(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    good = written(tmp_path, measured(), "good.json")
    assert main(["report", str(good), str(path), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "bad.json" in error and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists(), "something half-written"


def test_two_of_one_gpu_and_day_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, measured())
    with pytest.raises(ResultsError, match="same GPU and day"):
        report.files([path, path])


def test_an_unwritable_folder_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("results are read and drawn")

    monkeypatch.setattr(report, "files", work)
    (tmp_path / "file").write_text("")
    assert main(["report", "-o", str(tmp_path / "file")]) == 2
    assert main(["report", "-o", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


# ---- names and pictures


@pytest.mark.parametrize(
    ("signature", "label"),
    [
        (
            "conv bf16 N256 56x56 C64 K128 3x3 s2x2 p1x1 d1x1 g1 bn_relu/identity/stats/identity x,w -> y,mean",
            "conv 3x3 stride 2, 64 to 128, 56x56, N256: bn_relu, stats",
        ),
        (
            "dgrad bf16 N8 7x7 C64 K64 3x3 s1x1 p1x1 d1x1 g32 identity/identity/store/identity dz,w -> dx",
            "dgrad 3x3 32 groups, 64 to 64, 7x7, N8",
        ),
        (
            "max_pool bf16 N1 112x112 C64 k3x3 s2x2 p1x1 d1x1 identity/identity/store/identity x -> y",
            "max_pool 3x3 stride 2, 64, 112x112, N1",
        ),
    ],
)
def test_a_launch_for_people(signature: str, label: str) -> None:
    assert pages.label(signature) == label


def test_every_launch_has_a_label() -> None:
    for mode in ("infer", "train"):
        labels = [pages.label(use.launch.signature) for use in networks.uses("resnet50", 2, 64, torch.bfloat16, mode)]
        assert all(labels)


def test_bars_are_as_long_as_their_values() -> None:
    text = draw.bars(
        "T & T",
        "s",
        "c",
        [draw.Group("a", {"eager": (1.0, "1"), "fused": (2.0, "2 <")}), draw.Group("b", {"fused": (4.0, "4")})],
    )
    rectangles = [e for e in ET.fromstring(text).iter() if e.tag.endswith("rect") and e.get("height") == "14"]
    widths = [float(e.get("width", 0)) for e in rectangles]
    assert widths[1] == pytest.approx(2 * widths[0], rel=1e-3) and widths[2] == pytest.approx(4 * widths[0], rel=1e-3)
    assert widths[2] < draw.WIDTH and rectangles[0].get("fill") != rectangles[1].get("fill")


def test_points_lie_under_the_roof_they_are_under() -> None:
    """A launch at half the bandwidth lies below the slope; one that does 10 times the FLOPs lies higher."""
    points = [draw.Point("conv", 10, 2e13, 0.5, "slow"), draw.Point("wgrad", 1000, 4e14, 0.5, "fast")]
    tree = ET.fromstring(draw.roofline("t", "s", "c", points, 4e12, 8e14))
    slow, fast = ([float(e.get(name, 0)) for name in ("cx", "cy")] for e in tree.iter() if e.tag.endswith("circle"))
    (line,) = [e for e in tree.iter() if e.tag.endswith("polyline")]
    corners = [tuple(float(number) for number in corner.split(",")) for corner in line.get("points", "").split()]
    (x0, y0), (x1, y1), _ = corners
    on_roof = y0 + (slow[0] - x0) / (x1 - x0) * (y1 - y0)
    assert slow[1] > on_roof + 5 and fast[1] < slow[1] and fast[0] > slow[0]
    assert fast[1] > y1
