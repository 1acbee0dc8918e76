"""Kernels compiled in processes of their own: once each, read many at a time as each alone, and what went wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fused_resnet import network
from fused_resnet.inspect import compiling
from fused_resnet.inspect.assembly import Reading
from fused_resnet.inspect.cache import Cache
from fused_resnet.inspect.compiling import Job, Planned, compile_all
from fused_resnet.inspect.facts import Facts

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import os, subprocess, sys, tempfile
import torch, triton
from fused_resnet import network
from fused_resnet.backends.cubin import read_cubins
from fused_resnet.backends.triton_compile import build, prepare
from fused_resnet.inspect.assembly import parse, read

uses = network.uses("resnet18", 2, 64, torch.bfloat16, "infer")
launches = [use.launch for use in uses if use.layers[0] in ("pool", "layer1.0.conv1", "layer1.0.conv2")]
cubins = [build(prepare(launch, "sm_90")).asm["cubin"] for launch in launches]
tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
for cubin, together in zip(cubins, read_cubins(cubins, "sm_90"), strict=True):
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        alone = subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout
    same = [(i.opcode, i.target) for i in parse(alone)] == [(i.opcode, i.target) for i in parse(together.assembly)]
    print(same and read(alone) == read(together.assembly), len(parse(alone)) > 100, together.stack, 16 < together.registers)
"""


def test_kernels_read_together_are_as_each_alone() -> None:
    """Three that differ in length, with branches forward, back and out of line; against the disassembler with its labels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["True True 0 True"] * 3, done.stdout + done.stderr


COMPILE = """
import sys
from pathlib import Path
import torch
from fused_resnet import network
from fused_resnet.inspect.cache import Cache
from fused_resnet.inspect.compiling import Job, compile_all, pool

if __name__ == "__main__":
    launch = next(use.launch for use in network.uses("resnet18", 2, 64, torch.bfloat16, "infer") if use.layers[0] == "pool")
    with pool(1) as executor:
        (outcome,) = compile_all([Job(launch, "sm_90")], kept := Cache(), executor=executor)
    print(outcome.error, outcome.facts is not None and outcome.facts.kernel, kept.broken is not None)
"""


@pytest.mark.parametrize("there", [True, False], ids=["a folder", "a file"])
def test_processes_have_a_cache_that_triton_can_write(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own where that can be; else one that goes with the process. Triton compiles nothing where it cannot keep it."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir() if there else home.write_text("in the way")
    temporary.mkdir()
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(temporary))
    with compiling.pool(1) as executor:
        folder = executor.submit(os.getenv, "TRITON_CACHE_DIR").result()
        assert (folder is None) == there and (folder is None or (Path(folder).parent == temporary and Path(folder).is_dir()))
    assert list(temporary.iterdir()) == []


@pytest.mark.slow  # most of it is PyTorch's import, in three processes
def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    """Nothing is kept there, neither by us nor by Triton, and we leave nothing elsewhere; but it compiles."""
    home, temporary, script = (tmp_path / name for name in ("file", "tmp", "compile_one.py"))
    home.write_text("in the way")
    temporary.mkdir()
    script.write_text(COMPILE)
    theirs = {"TRITON_INTERPRET", "TRITON_CACHE_DIR", "TRITON_HOME", "XDG_CACHE_HOME"}
    environment = {key: value for key, value in os.environ.items() if key not in theirs}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(home), "TMPDIR": str(temporary)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["max_pool", "True"], done.stdout + done.stderr
    assert not list(temporary.glob("fused-resnet*"))


# ---- with a stand-in for the compiler


FACTS = Facts("conv_forward", 98, 0, 1 << 16, 0, 8, 4, (3, 4), Reading("", "", (), 0, 0, 0, 9, None))


def jobs(number: int, arch: str = "sm_90") -> list[Job]:
    launches = [use.launch for use in network.uses("resnet18", 2, 64, torch.bfloat16, "infer")]
    return [Job(launch, arch) for launch in launches[:number]]


class Here:
    """An executor that works at once, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.compiled: list[list[Job]] = []

    def submit(self, work: Any, given: Sequence[Job], assembly: bool = False) -> Future[Any]:
        future: Future[Any] = Future()
        if work is compiling.plan:  # the second and the third are one kernel
            future.set_result([Planned(f"{job.arch} {min(n, 1)}", None, n) for n, job in enumerate(given)])
        else:
            self.compiled.append(list(given))
            future.set_result([(FACTS, "text" if assembly else None) for _ in given])
        return future

    def shutdown(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture
def interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "interpreting", lambda: True)


def test_what_is_the_same_kernel_is_compiled_once_and_kept(interpreting: None, tmp_path: Path) -> None:
    executor, seen = Here(), []
    outcomes = compile_all(
        jobs(3),
        Cache(tmp_path),
        executor=executor,
        progress=lambda done, of: seen.append((done, of)),  # type: ignore[arg-type]
    )
    assert [outcome.facts for outcome in outcomes] == [FACTS] * 3
    assert [outcome.planned.programs for outcome in outcomes if outcome.planned] == [0, 1, 2]
    assert sum(map(len, executor.compiled)) == 2 and seen[0] == (0, 2) and seen[-1] == (2, 2)
    again = Here()
    assert compile_all(jobs(3), Cache(tmp_path), executor=again) == outcomes and again.compiled == []  # type: ignore[arg-type]
    wanted = Here()
    outcomes = compile_all(jobs(3), Cache(tmp_path), assembly=True, executor=wanted)  # type: ignore[arg-type]
    assert {outcome.assembly for outcome in outcomes} == {"text"} and wanted.compiled  # it had not been kept


def test_handfuls_are_of_one_architecture_and_enough_for_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "workers", lambda: 2)
    missing = {f"{arch} {n}": job for arch in ("sm_90", "gfx942") for n, job in enumerate(jobs(10, arch))}
    parts = list(compiling._handfuls(missing))
    assert [key for part in parts for key in part] == list(missing)
    assert all(len({missing[key].arch for key in part}) == 1 and len(part) <= compiling.HANDFUL for part in parts)
    few = {key: missing[key] for key in list(missing)[:4]}
    assert [len(part) for part in compiling._handfuls(few)] == [2, 2]


def test_a_process_that_dies_is_an_error(interpreting: None, tmp_path: Path) -> None:
    class Dying(Here):
        def submit(self, work: Any, given: Sequence[Job], *rest: Any) -> Future[Any]:
            future = super().submit(work, given, *rest)
            if work is not compiling.plan:
                future = Future()
                future.set_exception(BrokenProcessPool("killed"))
            return future

    with pytest.raises(RuntimeError, match="ended from outside"):
        compile_all(jobs(3), Cache(tmp_path), executor=Dying())  # type: ignore[arg-type]
