"""The parts of ``fused-resnet gpu``: values compared, times taken, traces reduced, tests recorded, kernels compiled ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet.backends.triton_compile import weightless_operands
from fused_resnet.gpu import correct, networks, operands, profile, scope, suite, summary, timing, warm
from fused_resnet.gpu.results import empty
from fused_resnet.launch import Launch, PoolGeometry
from fused_resnet.network import Use

CPU = torch.device("cpu")


def launch_of(kind: str, mode: str = "train", dtype: torch.dtype = torch.bfloat16, **ends: str) -> Launch:
    """The toy network's first launch of a kind."""
    found: list[Use] = networks.uses(scope.TOY, 2, 16, dtype, mode)
    return next(
        use.launch
        for use in found
        if use.launch.kind == kind and all(getattr(use.launch, name) == value for name, value in ends.items())
    )


# ---- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["conv", "dgrad", "wgrad", "bn_add_relu_backward", "max_pool_backward"])
def test_a_wrong_element_is_found(kind: str, dtype: torch.dtype) -> None:
    """Of every output one element, by a hundredth of the largest; or one that was not written."""
    launch = launch_of(kind, dtype=dtype)
    given = operands.random_operands(launch, CPU, 3)
    truth = operands.truth(launch, given)
    stored = {role: tensor.to(launch.dtype) if tensor.dim() == 4 else tensor for role, tensor in truth.items()}
    assert operands.compare(launch, given, stored, truth).wrong == ()
    for role, tensor in truth.items():
        if not tensor.is_floating_point():
            continue
        for value in (0.03 * tensor.abs().max().item(), torch.nan):
            changed = {**truth, role: tensor.clone()}
            changed[role][(-1,) * tensor.dim()] += value
            assert [text.split()[0] for text in operands.compare(launch, given, changed, truth).wrong] == [role]


def test_a_mask_may_fall_on_either_side_rarely() -> None:
    """Behind a ReLU whose input is computed anew, an element in a million may differ; a column may not."""
    launch = launch_of("dgrad", epilogue="bn_mask")
    truth = {"dx": torch.randn(64, 64, 64, 64)}
    one = {"dx": truth["dx"].clone()}
    one["dx"][3, 2, 1, 0] += 3
    verdict = operands.compare(launch, {}, one, truth)
    assert verdict.wrong == () and 0 < verdict.undecided < 1e-5
    column = {"dx": truth["dx"].clone()}
    column["dx"][0, :, :, -1] = 0
    assert operands.compare(launch, {}, column, truth).wrong
    plain = launch_of("dgrad", epilogue="store")
    assert operands.compare(plain, {}, one, truth).wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_choice_of_a_pooling_is_worth_its_maximum(dtype: torch.dtype) -> None:
    """Another one may be chosen rarely, of what is equal or apart by a rounding; never what is smaller, nor outside."""
    g = PoolGeometry(1, 40, 40, 20, kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    launch = Launch("max_pool", "", g, dtype, (("x", "x"),), (("y", "y"), ("indices", "indices")))
    x = torch.randn(1, 20, 40, 40).clamp_(max=2).to(dtype)
    x[0, 0, -3:, -3:] = torch.linspace(3, 8, 9, dtype=dtype).view(3, 3)
    given = {"x": x}

    def wrong_with(place: int, windows: int = 1) -> str:
        """As the truth but for the last windows of channel 0; the taps 0 to 8 of the last are the last nine pixels."""
        truth = operands.truth(launch, given)
        indices = truth["indices"].clone()
        indices[0, 0, -1, -windows:] = place
        return "".join(operands.compare(launch, given, {**truth, "indices": indices}, truth).wrong)

    assert operands.truth(launch, given)["indices"][0, 0, -1, -1] == 8 and wrong_with(8) == ""
    for place in (7, 0, 9, 255):
        assert wrong_with(place).endswith(" 1 of them not of a maximum"), place
    x[0, 0, -1, -2] = torch.nextafter(x[0, 0, -1, -1], torch.zeros((), dtype=dtype))
    assert wrong_with(7) == "" and wrong_with(6)
    x[0, 0, -1, -2] = x[0, 0, -1, -1]
    assert operands.truth(launch, given)["indices"][0, 0, -1, -1] == 7 and wrong_with(8) == ""
    x[0, 0] = 1  # all equal: too many others
    assert wrong_with(8, windows=9).endswith(" 0 of them not of a maximum")


def test_products_of_one_image_and_kernels_that_are_not_chosen_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that runs in pieces is checked so, and behind all others by its own kernel."""
    toy = scope.toy()
    entries = list(correct.checked(toy))
    assert {use.launch.geometry.N for _, use in entries} == {1, 2}
    assert len({use.launch.signature for _, use in entries}) == len(entries)
    monkeypatch.setattr(correct, "_how", lambda use, device, gpu: "apart" if use.launch.kind == "dgrad" else "fused")
    ways = list(correct.in_ways(iter(entries), CPU, ""))
    again = [entry for entry in entries if entry[1].launch.kind == "dgrad"]
    assert again and ways == [*((*entry, None) for entry in entries), *((*entry, "fused") for entry in again)]


def test_operands_are_fresh_and_of_the_roles() -> None:
    launch = launch_of("max_pool_backward")
    first, second, again = (operands.random_operands(launch, CPU, seed) for seed in (1, 2, 1))
    assert first.keys() == launch.roles and first["indices"].dtype == torch.uint8
    assert not torch.equal(first["x"], second["x"]) and torch.equal(first["x"], again["x"])
    assert first["indices"].unique().numel() > 4 and first["indices"].max() < 9
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in first.values() if t.dim() == 4)
    stats = launch_of("conv", epilogue="stats")
    given = operands.random_operands(stats, CPU, 1)
    copied = operands.copies(given)
    assert copied["running_mean"] is not given["running_mean"] and copied["x"] is given["x"]


@pytest.mark.parametrize("kind", ["conv", "dgrad", "wgrad"])
def test_the_vendors_convolution_is_that_of_the_launch(kind: str) -> None:
    launch = launch_of(kind)
    given = operands.random_operands(launch, CPU, 1)
    made = operands.vendor_convolution(launch, given)()
    shapes = {"conv": launch.geometry.y_shape, "dgrad": launch.geometry.x_shape, "wgrad": launch.geometry.w_shape}
    result = made if kind == "conv" else made[("dgrad", "wgrad").index(kind)]
    assert result.shape == shapes[kind] and result.dtype == launch.dtype
    assert operands.vendor_convolution(launch_of("max_pool"), {}) is None


# ---- times


class FakeGPU:
    """A clock that calls and the waiting kernel move on; stands where timing asks torch.cuda."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waited = 0.0, 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Any) -> float:
                return 1e3 * (other.at - self.at)

        def sleep(cycles: int) -> None:
            gpu.now += cycles / 2e9
            gpu.waited += cycles / 2e9

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    def call(self, seconds: float, log: list[str] | None = None, name: str = "") -> timing.Call:
        def work() -> None:
            self.now += seconds
            if log is not None:
                log.append(name)

        return work


def test_the_wait_in_front_is_not_in_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    log: list[str] = []
    contenders = {"a": gpu.call(1e-4, log, "a"), "b": gpu.call(3e-3, log, "b")}
    times = timing.interleaved(contenders, torch.device("cuda", 0), seconds=0.0, rounds=(5, 9))
    a, b = times["a"], times["b"]
    assert a is not None and b is not None and gpu.waited > 0
    assert a["median"] == pytest.approx(1e-4) and b["median"] == pytest.approx(3e-3)
    assert a["rounds"] == b["rounds"] == 5
    assert log.count("a") > 5 * 19 and log.count("b") < 20  # as many calls as make a sample of two milliseconds
    text = "".join(log[-60:])
    assert "ab" in text and "ba" in text


def test_quartiles() -> None:
    assert timing.summed([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "rounds": 3}
    assert timing.summed([1.0]) == {"median": 1.0, "low": 1.0, "high": 1.0, "rounds": 1}


def test_operands_rotate_through_twice_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 50 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 << 30, 80 << 30))
    for moved, sets in ((10 << 20, 11), (1 << 10, 16), (500 << 20, 2), (15 << 30, 1)):
        made: list[int] = []
        used: list[int] = []

        def make(number: int) -> timing.Call:
            made.append(number)  # noqa: B023
            return lambda: used.append(number)  # noqa: B023

        call = timing.rotating(make, moved, torch.device("cuda", 0))
        for _ in range(2 * sets):
            call()
        assert made == list(range(sets)) and used == 2 * made


# ---- profile


def test_a_trace_is_reduced() -> None:
    events = [
        {"cat": "kernel", "name": "conv_forward", "ts": 100, "dur": 50},
        {"cat": "kernel", "name": "dgrad", "ts": 150, "dur": 100},
        {"cat": "gpu_memset", "name": "Memset (Device)", "ts": 240, "dur": 20},  # overlaps
        {"cat": "kernel", "name": "void at::native::batch_norm_backward_kernel", "ts": 300, "dur": 30},
        {"cat": "kernel", "name": "conv_forward", "ts": 330, "dur": 70},
        {"cat": "cpu_op", "name": "aten::add", "ts": 0, "dur": 1000},
    ]
    made = profile.reduce(profile.read({"traceEvents": events[::-1]}), host=1e-4, whole=4e-4)
    assert made["span"] == pytest.approx(300e-6) and made["idle"] == pytest.approx(40e-6)
    assert made["busy"] == pytest.approx(260e-6) and made["launches"] == 5
    lines = {line["kind"]: (line["launches"], pytest.approx(line["seconds"])) for line in made["lines"]}
    assert lines == {
        "conv": (2, 120e-6),
        "dgrad": (1, 100e-6),
        "PyTorch: BatchNorm": (1, 30e-6),
        "copies and fills": (1, 20e-6),
    }
    assert made["lines"][0]["kind"] == "conv" and made["lines"][0]["part"] == pytest.approx(0.4)
    assert made["longest_gaps"][0] == {
        "seconds": pytest.approx(40e-6),
        "after": "copies and fills",
        "before": "PyTorch: BatchNorm",
    }
    assert made["cpu_bound"] is False
    assert profile.reduce(profile.read({"traceEvents": events}), host=4e-4, whole=4e-4)["cpu_bound"] is True


def test_all_our_kernels_have_a_kind() -> None:
    import fused_resnet.backends.triton as executor
    from fused_resnet.backends import triton_gradients

    names = set()
    for mode in ("infer", "train"):
        for use in networks.uses(scope.TOY, 2, 16, torch.bfloat16, mode):
            module = triton_gradients if use.launch.kind in executor.GRADIENTS else executor
            names.add((module.plan_start(use.launch, "sm_90").kernel.__name__, use.launch.kind))
    assert len(names) == 7
    assert all(profile.KERNELS[name] == kind for name, kind in names)


# ---- the tests' record

CASES = """
import pytest, fused_resnet.gpu.recorder as r
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
def test_slow(): r.time.past = True
def test_late(): pass
"""


def test_outcomes_are_written_as_they_happen(tmp_path: Path) -> None:
    (tmp_path / "test_cases.py").write_text(CASES)
    log = tmp_path / "log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"FUSED_RESNET_TEST_LOG": str(log), "FUSED_RESNET_TEST_END": "100"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    code = (  # the clock stands on either side of the end: what the test sees does not depend on the machine's speed
        "import sys, pytest, fused_resnet.gpu.recorder as r\n"
        "class Clock:\n"
        "    past = False\n"
        "    def time(self): return 101 if self.past else 0\n"
        "r.time = Clock()\n"
        "plugins = ['fused_resnet.gpu.recorder', 'no:cacheprovider', 'no:xdist']\n"
        "sys.exit(pytest.main(['-q', *(f'-p{name}' for name in plugins), 'test_cases.py']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["test"].rpartition("::")[2], line["outcome"]) for line in lines] == [
        ("test_good", "passed"),
        ("test_bad", "failed"),
        ("test_skipped", "skipped"),
        ("test_slow", "passed"),
        ("test_late", "skipped"),
    ], done.stdout
    whole, failed = suite.rows(lines)
    assert {name: whole[name] for name in ("passed", "failed", "skipped", "late")} == dict(
        passed=2, failed=1, skipped=1, late=1
    )
    assert whole["key"] == "test_cases.py" and whole["status"] == "failed"
    assert failed["key"].endswith("::test_bad") and failed["error"] == "AssertionError: one is not two"


def test_the_chosen_test_files_are_there() -> None:
    root = Path(__file__).resolve().parents[1]
    assert [name for name in (*suite.FILES, suite.FEW) if not (root / name).exists()] == []


# ---- kernels compiled ahead

WARM = """
import torch
from fused_resnet.gpu import networks, operands, warm
from fused_resnet.backends import triton, triton_start
warm._begin("sm_90")
launch = next(u.launch for u in networks.uses("toy", 2, 16, torch.bfloat16, "train") if u.launch.kind == "bn_add_relu")
seconds, error = warm.compile_one(warm.Item(launch, parameters=torch.bfloat16), "sm_90")
assert not error, error
given = operands.random_operands(launch, torch.device("cpu"), 1)
given |= {role: given[role].bfloat16() for role in ("gamma", "beta")}
start = triton.plan_start(launch, "sm_90")
outputs = triton_start.outputs_of(launch, torch.device("cpu"))
arguments = start.bind(start, launch, given, outputs, start.workspace(torch.device("cpu")))
assert len(start.kernel.device_caches[0][0]) == 1
start.kernel.warmup(grid=(start.programs,), **arguments, num_warps=start.num_warps, num_stages=start.num_stages)
assert len(start.kernel.device_caches[0][0]) == 1, "tensors with memory make another key"
_, error = warm.compile_one(warm.Item(launch, "no tile"), "sm_90")
assert error, "an error is told"
print("same")
"""


def test_what_is_compiled_ahead_is_what_a_launch_looks_for(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", WARM], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "same", done.stderr
    assert any(path.suffix == ".cubin" for path in tmp_path.rglob("*")), "not in the cache on disk"


# ---- summary and scope


def test_the_summary_is_short_and_starts_with_failures() -> None:
    time_of = {"median": 2e-3, "low": 1e-3, "high": 3e-3, "rounds": 5}
    data = empty(True, "2026-11-25")
    data["launches"] = [
        {
            "key": str(i),
            "status": "ok" if i % 3 else "wrong",
            "signature": f"conv {i}",
            "uses": 1,
            "roofline": 1e-3,
            "flops": 1,
            "bytes": 1,
            "times": {"fused": time_of},
            "error": "far off",
        }
        for i in range(60)
    ]
    lines = summary.lines(data)
    assert len(lines) <= summary.LINES
    assert lines[0] == "20 failures" and lines[1] == "  FAILED launches: 0: wrong: far off"
    assert "50% of the roofline" in "\n".join(lines)
    assert summary.markdown(data).count("FAILED") == 20


def test_speedup_is_against_the_faster_eager() -> None:
    times = {name: {"median": s} for name, s in {"eager contiguous": 3.0, "eager channels_last": 2.0, "fused": 1.0}.items()}
    assert summary.speedup({"times": times}) == 2.0
    assert summary.speedup({"times": {**times, "fused": None}}) is None


def test_the_scope_fits_the_memory() -> None:
    large, small = scope.full(80 << 30), scope.full(24 << 30)
    assert (large.batch, small.batch) == (256, 128)
    assert {(cell.network, cell.mode, cell.batch, cell.graph) for cell in large.cells} >= {
        (network, *rest)
        for network in ("resnet18", "resnet50", "resnet152", "resnext50_32x4d")
        for rest in (("infer", 1, True), ("infer", 32, False), ("infer", 256, False), ("train", 256, False))
    }
    assert len({cell.key for cell in large.cells}) == len(large.cells)
    narrow = scope.narrowed(large, {"batch": 8, "layers": [["resnet18", "infer"]], "dtype": "fp16"})
    assert (narrow.batch, narrow.layers, narrow.dtype, narrow.size) == (8, (("resnet18", "infer"),), torch.float16, 224)


def test_what_a_bf16_models_kernels_are_given() -> None:
    """BatchNorm's own vectors are bf16, the batch's statistics are fp32, in the backward too."""
    wgrad = launch_of("wgrad", prologue="bn_relu", gradient="bn_backward")
    types = {role: tensor.dtype for role, tensor in weightless_operands(wgrad, torch.bfloat16).items() if tensor.dim() == 1}
    assert {role for role in types if types[role] == torch.bfloat16} == {"gamma", "x_gamma", "x_beta"}
    assert {"mean", "invstd", "x_mean", "x_invstd", "sum", "dot"} <= types.keys()
    affine = weightless_operands(launch_of("conv", "infer", epilogue="affine"), torch.bfloat16)
    assert affine["mean"].dtype == affine["var"].dtype == torch.bfloat16
    cells = [replace(scope.toy().cells[0], precision=precision) for precision in ("bf16", "autocast")]
    assert [{item.parameters for item in warm.chosen_of(cell, 16, "sm_90", "", 132)} for cell in cells] == [
        {torch.bfloat16}, {torch.float32},
    ]  # fmt: skip
