"""The machinery of the benchmarks: counts, turns, random state, and that bench/ fills its rows. No times are judged."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import backend, counts, measure, plain, specimens

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def test_eager_kernels_by_the_rule() -> None:
    """conv reads x and w and writes y; BatchNorm reads y and four vectors and writes y; ReLU reads and writes."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)).eval()
    found = counts.kernels(model, torch.randn(2, 3, 5, 5))
    x, w, y = 4 * 2 * 3 * 25, 4 * 8 * 3 * 9, 4 * 2 * 8 * 25
    assert [kernel.place for kernel in found] == ["0", "1", "2"]
    assert [kernel.bytes for kernel in found] == [x + w + y, 2 * y + 4 * 4 * 8, 2 * y]
    assert [kernel.flops for kernel in found] == [2 * 2 * 25 * 8 * 27, 0, 0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fused_kernels_are_the_launches_that_ran(device: str) -> None:
    """Counted on the meta device as on the CPU; the operators inside an executor do not count beside its launches."""
    with torch.device(device):
        eager = plain.ResNet(plain.BasicBlock, [1, 1, 1, 1]).eval()
        x = torch.zeros(2, 3, 32, 32)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    rows = counts.compare(eager, fused, x)
    assert [row.place for row in rows] == ["stem", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "avgpool", "fc"]
    assert [row.fused.kernels for row in rows] == [2, 2, 3, 3, 3, 1, 1]
    assert [row.eager.kernels for row in rows] == [4, 7, 9, 9, 9, 1, 1]
    assert [row.chain for row in rows] == [True] * 5 + [False] * 2
    assert all(row.fused.flops == row.eager.flops for row in rows)
    assert all(row.fused.bytes < row.eager.bytes for row in rows if row.chain)
    eager_total, fused_total = counts.total(rows)
    assert (eager_total.kernels, fused_total.kernels) == (40, 15)
    assert not any(module._forward_hooks for module in fused.modules())


def test_a_chain_that_cannot_run_is_counted_one_by_one() -> None:
    """A convolution that pads by reflection: the same kernels before and after fuse."""
    eager = plain.BasicBlock(8, 8).eval()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    for model in (eager, fused):
        model.conv2.padding_mode = "reflect"
    (row,) = counts.compare(eager, fused, torch.randn(2, 8, 6, 6))
    assert row.eager == row.fused


def test_batch_statistics_are_counted_as_launches() -> None:
    eager = plain.ResNet(plain.BasicBlock, [1, 1, 1, 1]).train()
    rows = counts.compare(eager, fused_resnet.fuse(copy.deepcopy(eager)), torch.randn(2, 3, 33, 32))
    assert [row.fused.kernels for row in rows] == [2, 3, 4, 4, 4, 1, 1]
    assert all(row.fused.flops == row.eager.flops for row in rows)
    assert all(row.fused.bytes < row.eager.bytes for row in rows if row.chain)


def test_interleaved_takes_turns() -> None:
    order: list[str] = []
    parts: list[float] = []
    contenders = {name: lambda name=name: order.append(name) for name in ("a", "b", "c")}
    times = measure.interleaved(contenders, CPU, seconds=1e-9, rounds=(4, 9), warm_up=1, progress=parts.append)
    assert order[:3] == ["a", "b", "c"]  # warm-up
    rounds = [sorted(order[start : start + 3]) for start in range(3, len(order), 3)]
    assert rounds == [["a", "b", "c"]] * 4
    assert len({tuple(order[start : start + 3]) for start in range(3, 12, 3)}) == 3  # each round starts with another
    assert all(len(timing.samples) == 4 for timing in times.values())
    assert len(parts) == 4 and 0 < parts[0] <= parts[-1] == 1


def test_timing_in_units() -> None:
    timing = measure.Timing((0.5, 0.01, 0.02))
    assert timing.milliseconds == pytest.approx(20)
    assert timing.images_per_second(8) == pytest.approx(400)


def test_rotation_goes_round() -> None:
    inputs = measure.rotation(lambda: torch.zeros(1), CPU)
    first, second, third = next(inputs), next(inputs), next(inputs)
    assert first is third and first is not second


def test_errors_are_relative_to_the_truth() -> None:
    truth = torch.tensor([3.0, -4.0])
    assert measure.largest_difference(torch.tensor([3.0, -3.0]), truth) == (1.0, 0.25)
    assert measure.relative_error(torch.tensor([3.0, -3.0]), truth) == pytest.approx(0.2)


def test_circumstances_name_the_evidence() -> None:
    facts = measure.circumstances(CPU)
    assert facts["evidence"].startswith("measured on this CPU: ") or "interpreted" in facts["evidence"]
    assert facts["versions"]["torch"] == torch.__version__


def test_what_is_interpreted_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever chooses the backend: the environment, or a command's ``--backend``."""
    with backend("triton"):
        assert measure.circumstances(CPU)["evidence"].startswith("interpreted: ")
    with backend("cpu"):
        assert measure.evidence(CPU).startswith("measured on this CPU: ")
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "triton")
    assert measure.evidence(CPU).startswith("interpreted: ")


def test_calibrate_fills_untouched_norms_only() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).train()
    kept = model[3].running_mean.fill_(7.0).clone()
    assert specimens.calibrate(model, specimens.images(4, 12)) == 1
    assert model[1].running_mean.abs().min() > 0
    assert torch.equal(model[3].running_mean, kept)
    assert model[1].momentum == model[3].momentum == 0.1
    assert all(module.training for module in model.modules())
    assert specimens.calibrate(model, specimens.images(4, 12)) == 0


def rows_of_bench(tmp_path: Path, select: str, *more: str) -> tuple[list[dict[str, Any]], str]:
    """Tiny cases through pytest-benchmark, as ``make bench`` runs them: rows, and what was printed."""
    pytest.importorskip("pytest_benchmark")
    output = tmp_path / "bench.json"
    options = ["--batch", "2", "--size", "32", "--seconds", "0.01", "--device", "cpu", f"--benchmark-json={output}", *more]
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "-k", select, *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "FUSED_RESNET_"))}
    environment["OMP_NUM_THREADS"] = "1"
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run([*command, *plugins], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(output.read_text())["benchmarks"]
    for row in rows:
        facts = row["extra_info"]
        assert facts["evidence"].startswith("measured on this CPU")
        assert facts["images_per_s"] > 0 and facts["dtype"] == "fp32"
        assert ("speedup" in facts) == (row["name"] == "fused")
    return rows, result.stdout


def test_bench_fills_its_rows(tmp_path: Path) -> None:
    rows, printed = rows_of_bench(tmp_path, "test_block and (Stem or BasicBlock and projection) and not training")
    assert "fused against the faster eager, interleaved" in printed
    assert [row["name"] for row in rows] == ["eager contiguous", "eager channels_last", "fused"] * 2
    assert [row["extra_info"]["launches"] for row in rows] == [9, 9, 3, 4, 4, 2]
    assert [row["extra_info"].get("ran") for row in rows] == [None, None, {"cpu": 3}, None, None, {"cpu": 2}]
    assert not any("saved_bytes" in row["extra_info"] for row in rows)


def test_bench_trains(tmp_path: Path) -> None:
    """Two blocks by default, whose inputs need gradients: launches, and bytes kept, counted as they ran."""
    names = ["eager contiguous", "eager channels_last", "fused", 'fused, memory="low"']
    rows, printed = rows_of_bench(tmp_path, "block_training")
    assert "MB kept for the backward" in printed
    assert [row["name"] for row in rows] == names * 2
    assert [row["group"].split(",")[0] for row in rows] == ["BasicBlock"] * 4 + ["Bottleneck"] * 4
    launches = [row["extra_info"]["launches"] for row in rows]
    assert [launches[2:4], launches[6:8]] == [[3 + 5, 3 + 6], [4 + 7, 4 + 8]]
    assert [row["extra_info"]["ran"]["cpu"] for row in rows if "ran" in row["extra_info"]] == [8, 9, 11, 12]
    for group in (rows[:4], rows[4:]):
        contiguous, last, fused, low = (row["extra_info"]["saved_bytes"] for row in group)
        assert contiguous == last > fused > low > 0
        assert set(group[2]["extra_info"]["interleaved_ms"]) == set(names)


def test_bench_trains_each_direction(tmp_path: Path) -> None:
    rows, _ = rows_of_bench(tmp_path, "block_training and ConvBNReLU", "--training", "all", "--dtype", "fp32")
    fused = [row for row in rows if row["name"] == "fused"]
    assert [row["extra_info"]["work"] for row in fused] == ["training forward", "forward and backward", "training step"]
    assert [row["extra_info"]["launches"] for row in fused] == [2, 2 + 3, 2 + 3]
    assert len({row["extra_info"]["saved_bytes"] for row in fused}) == 1


@pytest.mark.slow
def test_bench_counts_memory(tmp_path: Path) -> None:
    """A ratio of docs/training.md, by default with every run of bench/; frozen statistics leave memory="low" nothing to do."""
    rows, printed = rows_of_bench(tmp_path, "test_memory and frozen", "--model", "resnet18")
    kept = [row["extra_info"]["saved_bytes"] for row in rows]
    assert [size / kept[0] for size in kept] == pytest.approx([1, 0.48, 0.48], abs=0.006)
    assert "resnet18, batch 1, 96x96, fp32, forward and backward, frozen statistics: eager channels_last" in printed


def test_autocast_is_for_training_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters stay in fp32 there, and do not move; in inference everything is in the type asked for."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    from contenders import FUSED, INFERENCE, STEP, Case, Contender

    for work, stored in ((INFERENCE, torch.bfloat16), (STEP, torch.float32)):
        case = Case("block", plain.BasicBlock(4, 4), 4, 2, 6, "bf16", work)
        contender = Contender(FUSED, case, CPU)
        assert {parameter.dtype for parameter in contender.module.parameters()} == {stored}
        contender()
        assert contender.forward().dtype == torch.bfloat16
        assert all((parameter.grad is not None) == case.training for parameter in contender.module.parameters())
        torch.testing.assert_close(contender.module.conv1.weight.float(), case.module.conv1.weight, atol=1e-2, rtol=0)


def test_bench_refuses_wrong_options() -> None:
    command = [sys.executable, "-m", "pytest", "bench/", "--batch", "0", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    assert "--batch: expected whole numbers of at least 1, got '0'" in result.stdout + result.stderr
