"""Options of ``pytest bench/ --benchmark-only``, and what they turn into: parameters, the clock, the summary."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
import torch
from cases import BLOCKS
from contenders import CHANNELS_LAST, CONTENDERS, FUSED, LOW, STEP, TRAINERS, TRAINING, Bench

from fused_resnet import measure, specimens


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused_resnet", "what bench/ measures")
    group.addoption("--batch", default="1,8", help="images at once, separated by commas (1,8; blocks and training: the last)")
    group.addoption("--dtype", default="fp32", help="fp32, fp16, bf16, separated by commas (fp32)")
    group.addoption("--size", default="224", help="rows and columns of an image, separated by commas (224)")
    group.addoption("--model", default="resnet18,resnet50", help="torchvision names, separated by commas (resnet18,resnet50)")
    group.addoption("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:N")
    group.addoption(
        "--training",
        choices=("step", "all"),
        default="step",
        help="what is trained: step (whole steps: two blocks, the first --model), all (each direction, all blocks and models)",
    )
    group.addoption("--compile", action="store_true", help="torch.compile for every case (on a CPU: minutes each)")
    group.addoption("--seconds", type=float, default=1.0, help="time for each row, and for each interleaved comparison (1)")


def pytest_configure(config: pytest.Config) -> None:
    """Fewer columns than pytest-benchmark shows by itself, so that a table fits a screen."""
    if not any(str(argument).startswith("--benchmark-columns") for argument in config.invocation_params.args):
        config.option.benchmark_columns = ["min", "median", "iqr", "rounds"]


def _list(config: pytest.Config, option: str, kind: Callable[[str], Any] = str) -> list[Any]:
    try:
        values = [kind(part.strip()) for part in config.getoption(option).split(",")]
    except ValueError as error:
        raise pytest.UsageError(f"{option}: {error}") from error
    if any(isinstance(value, int) and value < 1 for value in values):
        raise pytest.UsageError(f"{option}: expected whole numbers of at least 1, got {config.getoption(option)!r}")
    return values


def _dtypes(config: pytest.Config) -> list[str]:
    names = _list(config, "--dtype")
    if not set(names) <= set(specimens.DTYPES):
        raise pytest.UsageError(f"--dtype: expected some of {', '.join(specimens.DTYPES)}, got {config.getoption('--dtype')!r}")
    return names


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Options -> parameters, after the decorators' own; the contenders innermost: a group's rows run in a row."""
    batches = _list(metafunc.config, "--batch", int)
    models = _list(metafunc.config, "--model")
    everything = metafunc.config.getoption("--training") == "all"
    choices = {
        "model_name": models,
        "training_block": list(BLOCKS) if everything else ["BasicBlock", "Bottleneck"],
        "training_model": models if everything else models[:1],
        "work": TRAINING if everything else [STEP],
        "dtype_name": _dtypes(metafunc.config),
        "size": _list(metafunc.config, "--size", int),
        "batch": batches,
        "last_batch": batches[-1:],
        "contender": CONTENDERS,
        "trainer": TRAINERS,
        "statistics": ["batch", "frozen"],
        "keeper": (CHANNELS_LAST, FUSED, LOW),
    }
    for name, values in choices.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU rows are timed by CUDA events."""
    device = chosen_device(config)
    if device.type == "cuda":
        mark = pytest.mark.benchmark(timer=measure.cuda_clock())
        for item in items:
            item.add_marker(mark)


def chosen_device(config: pytest.Config) -> torch.device:
    """``--device``."""
    name = config.getoption("--device")
    try:
        return measure.automatic_device() if name == "auto" else torch.device(name)
    except RuntimeError as error:
        raise pytest.UsageError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error


@pytest.fixture
def bench(benchmark: Any, pytestconfig: pytest.Config) -> Bench:
    """Times one contender of one case: ``bench(contender, case)``."""
    return Bench(
        benchmark, chosen_device(pytestconfig), pytestconfig.getoption("--seconds"), pytestconfig.getoption("--compile")
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The interleaved ratios and what is kept for the backward, below pytest-benchmark's table."""
    rows = getattr(getattr(config, "_benchmarksession", None), "benchmarks", [])
    fused = [row for row in rows if "speedup" in row.extra_info]
    if fused:
        terminalreporter.section("fused against the faster eager, interleaved")
        terminalreporter.write_line(fused[0].extra_info["evidence"])
    for row in fused:
        info = row.extra_info
        times = ", ".join(f"{name} {value:.2f} ms" for name, value in info["interleaved_ms"].items())
        terminalreporter.write_line(f"{info['speedup']:5.2f}x  {row.group}: {times}, {info['launches']} launches")
    trained = [row for row in rows if "saved_bytes" in row.extra_info]
    if trained:
        terminalreporter.section("MB kept for the backward, counted as it ran")
    for group, members in groupby(trained, lambda row: row.group):
        kept = {row.name: row.extra_info["saved_bytes"] for row in members}
        whole = kept.get(CHANNELS_LAST, 0)
        parts = (f"{name} {size / 1e6:.1f}" + (f" ({size / whole:.2f})" if whole else "") for name, size in kept.items())
        terminalreporter.write_line(f"{group}: {', '.join(parts)}")
