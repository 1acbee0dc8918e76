"""The gate: every launch of ResNet-18 and ResNet-50 by default, compiled for GPUs this machine need not have.

Each kernel is compiled once, a handful of them a test, so that test processes share them out. What is wanted of them is in
``tools/compiled.py``; what they are is in ``compiled.json``, which ``make compiled`` writes. An architecture that the table
does not have yet is held to what is wanted alone.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from test_compile import stack_of_descriptors

from fused_resnet.inspect import compiling
from fused_resnet.inspect.assembly import Loop, Reading
from fused_resnet.inspect.compiling import Job, Outcome, Planned
from fused_resnet.inspect.facts import Facts

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import compiled  # noqa: E402

#: Tests an architecture's kernels are dealt out to.
PARTS = 8


@cache
def passes() -> list[list[tuple[str, compiled.Launch]]]:
    return compiled.launches()


@cache
def jobs(arch: str) -> dict[str, Job]:
    return compiled.jobs(arch, passes())


@pytest.fixture(scope="module")
def compiler() -> Iterator[Executor]:
    """One process that does not interpret; nothing of what it compiles is taken from a cache of facts."""
    with compiling.pool(1) as executor:
        yield executor


_planned: dict[str, dict[str, Planned]] = {}


def planned(arch: str, compiler: Executor) -> dict[str, Planned]:
    """How each launch is started, by label."""
    if arch not in _planned:
        plans = compiler.submit(compiling.plan, list(jobs(arch).values())).result()
        assert not [plan for plan in plans if isinstance(plan, str)]
        _planned[arch] = dict(zip(jobs(arch), plans, strict=True))
    return _planned[arch]


@pytest.mark.parametrize("arch", compiled.table()["compiled"])
def test_the_table_has_every_launch(arch: str) -> None:
    """And no other: after a change of what runs, ``make compiled``."""
    assert sorted(compiled.table()["compiled"][arch]) == sorted(jobs(arch))


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("arch", compiled.ARCHS)
def test_every_kernel(arch: str, part: int, compiler: Executor) -> None:
    """No spill, products on the tensor cores, TMA where there is one; for the table's Triton, what the table says."""
    plans = planned(arch, compiler)
    keys = sorted({plan.key for plan in plans.values()})[part::PARTS]
    first = {plans[name].key: name for name in reversed(plans)}
    made = compiler.submit(compiling.compile_some, [jobs(arch)[first[key]] for key in keys]).result()
    assert {key: one for key, one in zip(keys, made, strict=True) if isinstance(one, str)} == {}
    facts = {key: one[0] for key, one in zip(keys, made, strict=True) if not isinstance(one, str)}
    names = [name for name in plans if plans[name].key in facts]
    wrong = {name: compiled.faults(jobs(arch)[name], facts[plans[name].key]) for name in names}
    assert {name: found for name, found in wrong.items() if found} == {}
    table = compiled.table()
    if table["triton"] == compiled.triton_version() and arch in table["compiled"]:
        rows = {name: compiled.row(Outcome(plans[name], facts[plans[name].key])) for name in names}
        assert rows == {name: table["compiled"][arch].get(name) for name in names}, "if it is meant so: make compiled"


#: Architecture -> launches in which ptxas spills 8 bytes to come down to 128 registers, with which two programs of 256 threads
#: run at a time (docs/evidence.md has more such). The choice has no table of these architectures, it takes sm_80's.
SECOND_PROGRAM = {
    "sm_86": {
        "conv 1x1 64>256 56x56 affine_add+relu", "conv 1x1 512>128 28x28 affine+relu", "conv 1x1 512>256 28x28 affine+relu",
        "conv 1x1 1024>256 14x14 affine+relu", "conv 1x1 1024>512 14x14 affine+relu", "conv 1x1 2048>512 7x7 affine+relu",
    },
    "sm_89": {"conv 1x1 512>256 28x28 affine+relu", "conv 1x1 1024>512 14x14 affine+relu"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in compiled.MEANT if arch not in compiled.ARCHS])
def test_inference_on_other_architectures(arch: str, compiler: Executor) -> None:
    """ResNet-50's, without a table."""
    infer = compiled.jobs(
        arch, [compiled.network.launches(compiled.network.network("resnet50"), 256, 224, compiled.DTYPE, "infer")]
    )
    made = compiler.submit(compiling.compile_some, list(infer.values())).result()
    for (name, job), one in zip(infer.items(), made, strict=True):
        assert not isinstance(one, str), one
        stack = stack_of_descriptors(arch, one[0].reading.tma)
        if name in SECOND_PROGRAM.get(arch, ()) and one[0].registers == 128:
            stack += 8
        assert compiled.faults(job, replace(one[0], spills=max(one[0].spills - stack, 0))) == [], name


GOOD = Facts("conv_forward", 98, 0, 1 << 16, 0, 8, 4, (4, 4), Reading("", "shared-shared", (), 4, 8, 0, 99, Loop(4, 0, 12, 80)))
WAYS = {"sm_80": "cp.async", "sm_90": "TMA", "sm_100": "TMA", "gfx942": "registers"}
SHAPES = {"sm_80": "HMMA 16816", "sm_90": "HGMMA 64x128x16", "sm_100": "UTCHMMA", "gfx942": "MFMA 32x32x8"}


def good(arch: str) -> Facts:
    return replace(GOOD, reading=replace(GOOD.reading, matrix=SHAPES[arch], loads=(WAYS[arch],)))


@pytest.mark.parametrize("arch", compiled.ARCHS)
def test_what_the_gate_refuses(arch: str) -> None:
    """One fault at a time; pooling has no products, and the RGB image is not aligned."""
    job = jobs(arch)["conv 3x3 64>64 56x56 affine+relu"]
    fine = good(arch)
    assert compiled.faults(job, fine) == []
    reading = fine.reading
    broken = {
        "4 bytes are spilled": replace(fine, spills=4),
        "do not fit": replace(fine, shared=1 << 18),
        "no matrix instruction": replace(fine, reading=replace(reading, loop=None)),
        "no matrix instruction in": replace(fine, reading=replace(reading, loop=Loop(0, 4, 0, 80))),
        "multiplies with": replace(fine, reading=replace(reading, matrix=f"{reading.matrix} + FMMA 8")),
    }
    if arch in ("sm_90", "sm_100"):
        broken["operands are register-shared"] = replace(fine, reading=replace(reading, operands="register-shared"))
    if arch != "gfx942":
        broken["are loaded by registers"] = replace(fine, reading=replace(reading, loads=("registers",)))
    for text, facts in broken.items():
        (fault,) = compiled.faults(job, facts)
        assert text in fault
    stem = jobs(arch)["conv 7x7/2 3>64 224x224 affine+relu"]
    assert compiled.faults(stem, replace(fine, reading=replace(reading, loads=("registers",)))) == []
    pool = jobs(arch)["max_pool 3x3/2 64 112x112"]
    assert compiled.faults(pool, replace(fine, reading=replace(reading, matrix="", loop=None))) == []


def test_the_page_is_written_between_its_marks() -> None:
    page = "a\n<!-- compiled: written by tools/compiled.py -->\nold\n<!-- compiled: end -->\nb\n"
    assert compiled.replaced(page, "compiled", "new\n") == page.replace("old", "new")
    with pytest.raises(ValueError, match="no marks"):
        compiled.replaced("nothing", "compiled", "new\n")


def test_the_page_is_of_the_table() -> None:
    table = compiled.table()
    if table["triton"] == compiled.triton_version() and table["compiled"]:
        assert compiled.summary(table["compiled"]) in compiled.EVIDENCE.read_text(encoding="utf-8"), "make compiled"


def test_the_table_is_a_line_a_launch() -> None:
    rows = {"sm_80": {"a": {"registers": 9}, "b": {"registers": 8}}, "sm_90": {"a": {"loop": "4/2/8/80"}}}
    text = compiled.text_of(rows)
    assert json.loads(text)["compiled"] == rows and json.loads(compiled.text_of({}))["compiled"] == {}
    assert [line for line in text.splitlines() if '"a"' in line] == [
        '   "a": {"registers": 9},', '   "a": {"loop": "4/2/8/80"}',
    ]  # fmt: skip
