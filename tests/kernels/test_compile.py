"""What the compiler makes of launches that are not in compiled.json (test_compiled.py), for GPUs this machine need not have."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from fused_resnet.tuning.tile import ARCHS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

HERE = Path(__file__).parent
#: Of these several programs share a tile's sum.
SHARED = ["3x3 at 7x7, batch 1", "dgrad 3x3 at 7x7, batch 1"]
FEW = ["32x4d", "3x3 fp32", "dgrad mask", "wgrad 32x4d", *SHARED]


#: Bytes that ptxas spills (Triton 3.8) to fit one program more on a multiprocessor, by (target, case, tf32): the
#: registers are at a step of the occupancy then, 64 to 128, far from the 255 there are, and the same launch in
#: another tile or with fewer warps takes more of them and spills nothing. docs/evidence.md has the registers.
SPILLED = {
    ("sm_80", "dgrad 3x3 at 14x14 fp32", True): 16,
    ("sm_80", "dgrad 3x3 stride 2 fp32", True): 16,
    ("sm_86", "dgrad 1x1 fp32", False): 8,
    ("sm_86", "dgrad silu 3x3", False): 16,
    ("sm_86", "gelu on load 3x3 fp32", False): 8,
    ("sm_90", "dgrad 3x3 at 14x14 fp32", False): 8,
    ("sm_100", "wgrad silu 3x3 fp32", True): 8,
}


def compiled(target: str, *names: str) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parent.parent)
    command = [sys.executable, str(HERE / "compile_cases.py"), target, *names]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return list(json.loads(process.stdout))


def stack_of_descriptors(target: str, tma_loads: int) -> int:
    """Bytes of stack that are no spill: on sm_120 Triton 3.6 gives every kernel with descriptors 8, whatever its registers."""
    old = tuple(int(part) for part in metadata.version("triton").split(".")[:2]) < (3, 7)
    return 8 if old and target == "sm_120" and tma_loads else 0


#: Beginnings of the names of cases that have no matrix products.
NO_PRODUCTS = ("depthwise", "max", "zero_pad", "bn_add_relu", "gate", "statistics", "output_gradient")


def check(target: str, results: list[dict[str, Any]]) -> None:
    for result in results:
        case = result["case"]
        by_choice = result["registers"] <= 128 and result["spills_with_all"] == 0
        few = SPILLED.get((target, case, result["tf32"]), 0) if by_choice else 0
        assert result["spills"] <= stack_of_descriptors(target, result["tma"]) + few, result
        assert result["shared"] <= ARCHS[target].shared * 1024, result
        convolution = not case.startswith(NO_PRODUCTS)
        products = convolution and ("fp32" not in case or result["tf32"] or target.startswith("gfx"))
        assert (result["tensor_core"] > 0) == products, result
        if target.startswith("sm") and int(target[3:]) >= 90 and case.startswith(("3x3", "1x1", "32x4d")):
            assert result["tma"] > 0, result
        if target == "sm_80" and case.startswith(("3x3", "1x1")):
            assert result["async_copies"] > 0, result
        if case in SHARED:
            assert result["partials"] > 0, result


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_few_cases(target: str) -> None:
    check(target, compiled(target, *FEW))


def test_gates() -> None:
    check("sm_90", compiled("sm_90", "gate", "gate_backward", "zero_pad", "zero_pad_backward"))


def test_exponentials() -> None:
    check("sm_90", compiled("sm_90", "silu on load 3x3", "max_pool gelu and indices"))


ENTRY = ("entry 1x1", "dgrad entry", "wgrad entry", "statistics", "output_gradient", "output_gradient given")


@pytest.mark.parametrize("target", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_around_an_entry(target: str) -> None:
    check(target, compiled(target, *ENTRY))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_all_cases(target: str) -> None:
    check(target, compiled(target))


def test_unknown_target_and_interpreting_process_are_errors() -> None:
    script = """
import os, sys
from launches import conv
from fused_resnet.backends.triton_compile import compile_launch
try:
    compile_launch(conv(1, 5, 6, 16, 16, 1, 1), "pentium")
except (ValueError, RuntimeError) as error:
    print(type(error).__name__, error)
"""
    for interpret, message in ((None, "ValueError target must look like 'sm_90'"), ("1", "RuntimeError compile_launch needs")):
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent.parent), str(HERE)])
        if interpret:
            environment["TRITON_INTERPRET"] = interpret
        process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
        assert process.stdout.startswith(message), process.stdout + process.stderr


KEYS = """
import sys
from dataclasses import replace
import torch
from triton.runtime.jit import JITFunction
from fused_resnet.backends import triton_compile
from fused_resnet.gpu import networks, warm
from fused_resnet.tuning.choice import by_rule

warm._begin("sm_90")
keys = []
JITFunction._do_compile = lambda self, key, *rest: keys.append(key)
launches = {}
for mode in ("infer", "train"):
    for use in networks.uses("toy", 64, 48, torch.bfloat16, mode):
        launches.setdefault((use.launch.kind, use.launch.prologue, use.launch.gradient), use.launch)
kinds = set()
for launch in launches.values():
    tile, found = by_rule(launch, "sm_90"), set()
    for batch, rows, columns in ((64, 48, 48), (63, 48, 48), (5, 48, 48), (64, 80, 48), (3, 48, 112)):
        g = launch.geometry
        one = replace(launch, geometry=replace(g, N=batch, H=g.H * rows // 48, W=g.W * columns // 48))
        start, arguments = triton_compile._start_of(one, "sm_90", tile, False, torch.float32)
        keys.clear()
        start.kernel.warmup(grid=(start.programs,), **arguments, num_warps=start.num_warps, num_stages=start.num_stages)
        rim = start.constants.get("RIM")  # a kernel for either
        found.add((rim, keys[0], triton_compile.prepare(one, "sm_90", tile).key))
    assert len(found) == len({rim for rim, *_ in found}), launch.kind
    kinds.add(launch.kind)
print(*sorted(kinds))
"""


def test_another_batch_or_image_is_no_other_kernel() -> None:
    """By Triton's own rule and by ours, with the same tile; of filters' gradients it is one where a rim comes or goes."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parent.parent)
    done = subprocess.run([sys.executable, "-c", KEYS], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [
        "bn_add_relu", "bn_add_relu_backward", "conv", "dgrad", "max_pool", "max_pool_backward", "wgrad",
    ], done.stderr  # fmt: skip
