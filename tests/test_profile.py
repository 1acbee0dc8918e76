"""fused-resnet profile: what is counted adds up; what is timed is only told, not judged."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nets import saved_bytes
from torch import nn

from fused_resnet import count_launches, kept, profiling
from fused_resnet.backends import clock_launches
from fused_resnet.cli import main
from fused_resnet.cli.arguments import CommandError
from fused_resnet.cli.inspect import write_text
from fused_resnet.cli.profile import _show_loading
from fused_resnet.profiling import Ceilings, Line, Subject, Times, pair_of
from fused_resnet.train import UsageError, data, recipe, supply

CPU = torch.device("cpu")


@pytest.mark.parametrize("memory", ["default", "less", "low"])
@pytest.mark.parametrize("name", ["cifar_resnet14", "cifar_plain14", "cifar_highway14_b"])
def test_what_layers_keep_adds_up(name: str, memory: str) -> None:
    """To the bytes that saved_tensors_hooks counts for the whole network; each block has a row."""
    subject = Subject(name, 2, 16)
    pair = pair_of(subject, CPU, torch.float32, memory)
    x = subject.images(CPU, torch.float32)
    rows = kept.by_layer(pair, x)
    assert sum(eager for _, eager, _ in rows) == saved_bytes(pair.eager, x)
    assert sum(fused for _, _, fused in rows) == saved_bytes(pair.fused, x)
    places = [place for place, _, _ in rows]
    assert places[0] == "stem" and places[-1] == "outside the chains"
    blocks = ["layer1.conv1", "layer2.conv1", "layer3.conv1"] if "plain" in name else ["layer1.0", "layer1.1", "layer3.1"]
    assert set(blocks) <= set(places) and all(eager > 0 and fused > 0 for _, eager, fused in rows[:-1])


def test_launches_are_those_that_ran() -> None:
    subject = Subject("cifar_resnet8", 2, 8)
    pair = pair_of(subject, CPU, torch.float32)
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
    pair = pair_of(subject, CPU, torch.float32)
    call = profiling.call_of(pair.fused, subject.images(CPU, torch.float32), "infer")
    ticks = iter(range(10**6))
    with clock_launches(lambda: next(ticks)) as outer, clock_launches(lambda: "now") as inner:
        call()
    call()
    assert len(outer) == len(inner) > 7 and all(end == start + 1 for _, start, end in outer)
    assert {(start, end) for _, start, end in inner} == {("now", "now")}


@pytest.mark.parametrize(
    ("flops", "moved", "bound"),
    [
        (0, 80, "bandwidth"),
        (90, 60, "arithmetic"),
        (10, 20, "host"),
        (45, 31, "neither"),
        (29, 31, "neither"),
        (29, 29, "host"),
        (60, 90, "bandwidth"),
    ],
)
def test_what_bounds_a_launch(flops: int, moved: int, bound: str) -> None:
    """The ceiling it is nearest to, if it is past half of one; else its start, of 0.3 s here, if its work takes less."""
    limits = Ceilings(100, 100, 0.3)
    assert profiling.bound_of(1.0, flops, moved, limits, CPU) == bound
    assert profiling.bound_of(1.0, flops, moved, limits, torch.device("cuda")) == bound.replace("arithmetic", "tensor cores")
    assert profiling.bound_of(2.0, 2 * flops, 2 * moved, limits, CPU, times=2) == bound


def test_flags() -> None:
    def times(host: float, whole: float) -> Times:
        lines = (Line("a", 1, 0.6, 0, 0, "bandwidth"), Line("b", 1, 0.2, 0, 0, "tensor cores"))
        return Times(whole, host, lines, lines)

    gpu = torch.device("cuda")
    assert [flag.split(":")[0] for flag in times(0.95, 1.0).flags(gpu)] == ["host", "bandwidth"]
    assert times(0.2, 1.0).flags(gpu) == ["bandwidth: 75% of the launches' time"]
    assert times(2.0, 2.0).flags(CPU)[0].startswith("host: more than half of the time is outside the launches")
    few = tuple(Line(str(index), 1, 0.2, 0, 0, bound) for index, bound in enumerate(("neither", "host", "a", "b", "c")))
    assert Times(1.0, 0.5, few, few).flags(gpu) == [f"{profiling.WORDS['neither']}: 20% of the launches' time"], "never silent"


def test_ceilings_are_positive() -> None:
    limits = profiling.ceilings(CPU, torch.float32, size=1 << 14)
    assert limits.bandwidth > 0 and limits.arithmetic > 0 and 0 < limits.start < 1


# ------------------------------------------------------------------------------------------------- memory by mode, loading


@pytest.mark.parametrize("name", ["cifar_resnet14_b", "cifar_plain14", "cifar_highway14"])
def test_what_autograd_holds_with_stages_checkpointed(name: str) -> None:
    """Behind the forward each stage's input, and what is outside the stages; at most that of the stage that is computed again.

    The truth is put together from the parts: what each, by itself, saves for its backward.
    """
    pair = pair_of(Subject(name, 2, 16), CPU, torch.float32)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    rows = {row.how: row for row in kept.by_mode(pair, x)}
    assert list(rows) == [
        "eager", "eager, stages checkpointed", 'fused, memory="default"', 'fused, memory="less"', 'fused, memory="low"',
        'fused, memory="low", stages checkpointed',
    ]  # fmt: skip
    shapes: list[torch.Size] = []
    hooks = [
        getattr(pair.eager, stage).register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
        for stage in ("layer1", "layer2", "layer3")
    ]
    pair.eager(x)
    for hook in hooks:
        hook.remove()
    slack = 8192  # statistics, pooling, logits
    for how, model in {"eager": pair.eager, 'fused, memory="low"': kept.with_memory(pair.fused, "low")}.items():
        assert rows[how].behind == rows[how].most == saved_bytes(model, x)
        inputs, at_most = 0, 0
        for stage, shape in zip((model.layer1, model.layer2, model.layer3), shapes, strict=True):
            given = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
            inputs += given.nbytes
            at_most = max(at_most, inputs + saved_bytes(stage, given) - given.nbytes)
        stem = nn.Sequential(*list(model.children())[: 3 if how == "eager" else 1])
        output = shapes[0].numel() * 4  # of the stem; it is the first stage's input
        again = rows[f"{how}, stages checkpointed"]
        outside = again.behind - inputs
        assert -slack <= saved_bytes(stem, x) - outside <= output + slack
        assert abs(again.most - outside - at_most) <= slack
        assert again.behind < again.most < rows[how].most


def test_what_is_held_is_counted_once_and_let_go() -> None:
    """Two products of one tensor: held once, and the first half of the step's holdings are gone when the second comes."""

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * x * x).sum()

    x = torch.randn(16, requires_grad=True)
    assert kept.through_a_step(Twice(), x) == (2 * x.nbytes, 2 * x.nbytes)


class Clock:
    """Time that passes by being told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("loading", "beside", "workers", "why", "says"),
    [
        (1.0, 9.0, 0, "", "the steps wait 10.0% of the time: loading is not what bounds the training\n"),
        (4.0, 6.0, 0, "waits", "the steps wait 40.0% of the time: waiting for images is what bounds the training\n"),
        (4.0, 6.0, 1, "waits", "40.0% of the time: waiting for images is what bounds the training; more --workers help where"),
        (0.2, 9.8, 2, "shares", "wait 2.0% of the time: sharing the processor with the loader's workers is what bounds the"),
        (0.2, 7.0, 2, "", "the steps wait 2.8% of the time: loading is not what bounds the training\n"),
    ],
)
def test_data_loading(
    loading: float, beside: float, workers: int, why: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With seconds that are given: steps and loading alone, together, and the part that is waited; images are the recipe's.

    A step takes 6 s alone and ``beside`` in the loop. Steps wait, or are much slower beside workers, or a little. Without
    workers what is slower is so for other reasons.
    """
    clock, asked = Clock(), []
    digits = data.load("digits", None, recipe.load("digits"))
    real = digits.train.batches

    class Slow:
        def __len__(self) -> int:
            return len(digits.train)

        def batches(self, draws: Iterator[data.Draw], workers: int = 0) -> Iterator[data.Batch]:
            asked.append(workers)
            for got in real(draws):
                clock.now += loading
                yield got

    seen: list[torch.Tensor] = []

    def step(x: torch.Tensor) -> None:
        clock.now += beside if len(asked) > 1 else 6.0
        seen.append(x)

    folder = replace(digits, train=Slow(), name="folder" if workers else "digits")
    found = supply.watch(folder, step, CPU, 4, workers, 35.0, clock)
    assert (found.alone, found.stepping) == pytest.approx((4 / loading, 4 / 6))
    assert found.taken == pytest.approx(4 / (loading + beside)) and found.share == pytest.approx(6 / (loading + beside))
    assert found.waited == pytest.approx(loading / (loading + beside))
    assert (found.why, found.bounds, found.workers) == (why, bool(why), workers)
    _show_loading(folder, found)
    text = capsys.readouterr().out
    assert says in text and f"0.7 taken by steps alone, {found.taken:.1f} by both together, {found.share:.2f} of" in text
    assert asked == [0, workers], "the batch that is there is made before there are workers"
    assert all(x.shape == (4, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[-1], seen[-2]), "one batch alone, then others"
    assert abs(float(torch.cat(seen).mean())) < 1


def test_a_set_with_fewer_images_than_a_batch_is_not_looked_at() -> None:
    digits = data.load("digits", None, recipe.load("digits"))
    with pytest.raises(UsageError, match="batch must be at most the 1433 training images of data 'digits', got 1434"):
        supply.watch(digits, lambda x: None, CPU, 1434, 0, 0.01)


@pytest.mark.parametrize("mode", profiling.MODES)
def test_the_command(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "ceilings", lambda *_: Ceilings(1e9, 1e9))
    command = ["profile", "cifar_resnet8", "cifar_plain8", "--batch", "2,3", "--size", "8", "--seconds", "0.01", "--mode", mode]
    assert main([*command, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "images a second, eager and fused in turn" in text and "outside the launches" in text
    assert ("kept for the backward" in text) == (mode == "train")
    assert ("data loading: digits, batch 3" in text) == (mode == "train")
    assert "\n  bound by " in text
    document = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))
    assert [(row["model"], row["batch"]) for row in document["throughput"]] == [
        ("cifar_resnet8", 2), ("cifar_resnet8", 3), ("cifar_plain8", 2), ("cifar_plain8", 3),
    ]  # fmt: skip
    assert document["subject"]["model"] == "cifar_plain8" and document["evidence"]
    assert json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert (document["loading"] is not None) == (mode == "train") == (tmp_path / "memory.svg").exists()
    for name in ("throughput.svg", "launches.svg", *["memory.svg"] * (mode == "train")):
        ElementTree.fromstring((tmp_path / name).read_text(encoding="utf-8"))


def test_what_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of each model eager and fused; nothing is timed."""
    assert main(["profile", "cifar_resnet8", "cifar_resnet14", "--growth", "--memory", "less", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "cifar_resnet14, fused        61" in text and "images a second" not in text
    rows = json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))
    assert [(row["model"], row["how"]) for row in rows] == [
        ("cifar_resnet8", "eager"), ("cifar_resnet8", "fused"), ("cifar_resnet14", "eager"), ("cifar_resnet14", "fused"),
    ]  # fmt: skip
    assert rows[3]["launches"] == 61 and rows[3]["graph"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["growth.json"]
    with pytest.raises(CommandError, match=r"there\.json: cannot be written \(Is a directory\)"):
        (tmp_path / "there.json").mkdir()
        write_text(tmp_path / "there.json", "{}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar_resnet8", "--compile"], "--compile is for --growth"),
        *(
            (["cifar_resnet8", "--growth", option, value], f"small fp32 images on the CPU: leave out {option}\n")
            for option, value in (
                ("--mode", "train"),
                ("--batch", "8"),
                ("--dtype", "fp32"),
                ("--size", "16"),
                ("--seconds", "1"),
                ("--device", "cpu"),
                ("--recipe", "digits"),
                ("--data", "digits"),
                ("--data-dir", "here"),
                ("--workers", "0"),
            )
        ),
        (["cifar_resnet8", "--growth", "--batch", "4", "--mode", "infer"], "leave out --batch, --mode"),
        (["resnet17"], "unknown model 'resnet17'"),
        (["cifar_resnet21"], "depth must be 6n + 2"),
        (["resnet18", "--batch", "0"], "at least 1"),
        (["cifar_resnet8", "--mode", "infer", "--data", "digits"], "--recipe and --data are for --mode train"),
        (["cifar_resnet8", "--data", "cifar10", "--data-dir", "nowhere"], "bring cifar-10-python.tar.gz"),
        (["cifar_resnet8", "--recipe", "paper"], "unknown recipe 'paper'"),
        (
            ["cifar_resnet8", "--data", "digits", "--batch", "2,1434"],
            "at most the 1433 training images of data 'digits', got 1434",
        ),
        (["resnet18", "--backend", "triton", "--device", "cuda:7"], "is not there"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err
