"""fused-resnet profile: what is counted adds up; what is timed is only told, not judged."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from nets import saved_bytes

from fused_resnet import count_launches, profiling
from fused_resnet.backends import clock_launches
from fused_resnet.cli import main
from fused_resnet.profiling import Ceilings, Line, Pair, Subject, Times

CPU = torch.device("cpu")


@pytest.mark.parametrize("memory", ["default", "less", "low"])
@pytest.mark.parametrize("name", ["cifar_resnet14", "cifar_plain14", "cifar_highway14_b"])
def test_what_layers_keep_adds_up(name: str, memory: str) -> None:
    """To the bytes that saved_tensors_hooks counts for the whole network; each block has a row."""
    subject = Subject(name, 2, 16)
    pair = Pair.of(subject, CPU, torch.float32, memory)
    x = subject.images(CPU, torch.float32)
    rows = profiling.kept_by_layer(pair, x)
    assert sum(eager for _, eager, _ in rows) == saved_bytes(pair.eager, x)
    assert sum(fused for _, _, fused in rows) == saved_bytes(pair.fused, x)
    places = [place for place, _, _ in rows]
    assert places[0] == "stem" and places[-1] == "outside the chains"
    blocks = ["layer1.conv1", "layer2.conv1", "layer3.conv1"] if "plain" in name else ["layer1.0", "layer1.1", "layer3.1"]
    assert set(blocks) <= set(places) and all(eager > 0 and fused > 0 for _, eager, fused in rows[:-1])


def test_launches_are_those_that_ran() -> None:
    subject = Subject("cifar_resnet8", 2, 8)
    pair = Pair.of(subject, CPU, torch.float32)
    call = profiling.call_of(pair.fused, subject.images(CPU, torch.float32), "train")
    with count_launches() as log:
        call()
    spent = profiling.launches(call, CPU, Ceilings(1e9, 1e9), rounds=2)
    assert sum(line.times for line in spent.kinds) == sum(line.times for line in spent.launches) == len(log)
    assert sum(line.flops for line in spent.kinds) == sum(launch.flops for _, launch in log.launches)
    assert sum(line.bytes for line in spent.launches) == sum(launch.bytes for _, launch in log.launches)
    assert 0 < spent.inside <= spent.whole and spent.host <= spent.whole


def test_clocks_may_be_nested_and_end() -> None:
    subject = Subject("cifar_resnet8", 2, 8, "infer")
    pair = Pair.of(subject, CPU, torch.float32)
    call = profiling.call_of(pair.fused, subject.images(CPU, torch.float32), "infer")
    ticks = iter(range(10**6))
    with clock_launches(lambda: next(ticks)) as outer, clock_launches(lambda: "now") as inner:
        call()
    call()
    assert len(outer) == len(inner) > 7 and all(end == start + 1 for _, start, end in outer)
    assert {(start, end) for _, start, end in inner} == {("now", "now")}


@pytest.mark.parametrize(
    ("flops", "moved", "bound"),
    [(0, 80, "bandwidth"), (90, 60, "arithmetic"), (10, 20, "host or size"), (60, 90, "bandwidth")],
)
def test_what_bounds_a_launch(flops: int, moved: int, bound: str) -> None:
    """The ceiling it is nearest to, if it is past half of one."""
    assert profiling.bound_of(1.0, flops, moved, Ceilings(100, 100), CPU) == bound
    other = profiling.bound_of(1.0, flops, moved, Ceilings(100, 100), torch.device("cuda"))
    assert other == bound.replace("arithmetic", "tensor cores")


def test_flags() -> None:
    def times(host: float, whole: float) -> Times:
        lines = (Line("a", 1, 0.6, 0, 0, "bandwidth"), Line("b", 1, 0.2, 0, 0, "tensor cores"))
        return Times(whole, host, lines, lines)

    gpu = torch.device("cuda")
    assert [flag.split(":")[0] for flag in times(0.95, 1.0).flags(gpu)] == ["host", "bandwidth"]
    assert times(0.2, 1.0).flags(gpu) == ["bandwidth: 75% of the launches' time"]
    assert times(2.0, 2.0).flags(CPU)[0].startswith("host: more than half of the time is outside the launches")


def test_ceilings_are_positive() -> None:
    limits = profiling.ceilings(CPU, torch.float32, size=1 << 14)
    assert limits.bandwidth > 0 and limits.arithmetic > 0


@pytest.mark.parametrize("mode", profiling.MODES)
def test_the_command(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "ceilings", lambda *_: Ceilings(1e9, 1e9))
    command = ["profile", "cifar_resnet8", "cifar_plain8", "--batch", "2,3", "--size", "8", "--seconds", "0.01", "--mode", mode]
    assert main([*command, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "images a second, eager and fused in turn" in text and "outside the launches" in text
    assert ("kept for the backward" in text) == (mode == "train")
    document = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))
    assert [(row["model"], row["batch"]) for row in document["throughput"]] == [
        ("cifar_resnet8", 2), ("cifar_resnet8", 3), ("cifar_plain8", 2), ("cifar_plain8", 3),
    ]  # fmt: skip
    assert document["subject"]["model"] == "cifar_plain8" and document["evidence"]
    assert json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    for name in ("throughput.svg", "launches.svg"):
        ElementTree.fromstring((tmp_path / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet17"], "unknown model 'resnet17'"),
        (["cifar_resnet21"], "depth must be 6n + 2"),
        (["resnet18", "--batch", "0"], "at least 1"),
        (["resnet18", "--backend", "triton", "--device", "cuda:7"], "is not there"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err
