"""Stage ``correct``: the values, on the device itself.

1. Every launch of the networks at the size it has there: fresh random operands, poisoned outputs, against the reference
   executor, and a second time bit for bit. Kernels compile in the background meanwhile, those of later stages too.
2. The repository's own tests, as the interpreter runs them (:mod:`.suite`).
3. compute-sanitizer on small launches, where it is installed and works.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ..network import Use
from ..tuning.choice import choose
from . import networks, operands, small, suite
from .launches import arch_of, multiprocessors_of, one_of_each
from .results import Row, finite
from .scope import Scope
from .stage import Stage
from .warm import Warm

#: Parts of the stage's time: a check of its own waits for its kernel, the tests and the sanitizer come behind.
CHECKS, TESTS = 0.48, 0.75
#: Seconds that a check waits for the background's compiler.
PATIENCE = 30.0

_SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


def checked(scope: Scope) -> Iterator[tuple[str, Use]]:
    """Every launch that is checked, with the network's name and mode; each signature once.

    bf16, of a single image too, whose products are split; then a few of fp32.
    """
    seen: set[str] = set()
    alone = [part for part in scope.layers if part[1] == "infer"]
    parts = [
        (torch.bfloat16, scope.batch, scope.layers),
        (torch.bfloat16, 1, alone),
        (torch.bfloat16, scope.batch, scope.checked),
    ]
    if scope.batch >= 8:  # not in the dry run: the interpreter multiplies in fp32 anyway
        parts.append((torch.float32, 8, scope.layers))
    for dtype, images, part in parts:
        for network, mode in part:
            for use in networks.uses(network, images, scope.size, dtype, mode):
                if use.launch.signature not in seen:
                    seen.add(use.launch.signature)
                    yield f"{network} {mode}", use


Entry = tuple[str, Use, str | None]


def in_ways(entries: Iterable[tuple[str, Use]], device: torch.device, gpu: str) -> Iterator[Entry]:
    """Each launch as it runs by choice; behind these, those that run in pieces by their own kernels as well, ``fused``."""
    entries = tuple(entries)
    yield from ((where, use, None) for where, use in entries)
    for where, use in entries:
        if _how(use, device, gpu) != "fused":
            yield where, use, "fused"


def _how(use: Use, device: torch.device, gpu: str) -> str:
    return choose(use.launch, arch_of(device) or "interpreter", gpu=gpu, multiprocessors=multiprocessors_of(device)).how


def run(stage: Stage) -> None:
    """All three parts."""
    whole = stage.left()
    ends = stage.ends
    gpu = stage.results.data["machine"].get("gpu") or ""
    with Warm(arch_of(stage.device), gpu, multiprocessors_of(stage.device)) as warm:
        entries = list(checked(stage.scope))
        if stage.dry:
            entries = one_of_each(entries)
        warm.add_chosen(use.launch for _, use in entries)
        warm.add_chosen(small.launches())
        for cell in stage.scope.cells:
            warm.add_cell(cell, stage.scope.size)
        stage.ends = ends - whole * (1 - CHECKS)
        seed = secrets.randbelow(1 << 31)
        stage.note(f"operands are seeded with {seed}")

        def check(entry: Entry) -> Row:
            where, use, how = entry
            warm.wait_chosen(use.launch, min(PATIENCE, stage.left()))
            row = _check(use, stage.device, seed, how, how or _how(use, stage.device, gpu))
            return {"where": where, "layers": list(use.layers), **row}

        def key(entry: Entry) -> str:
            _, use, how = entry
            return use.launch.signature if how is None else f"{use.launch.signature} {how}"

        stage.each("checks", in_ways(entries, stage.device, gpu), key, check)
        stage.ends = ends - whole * (1 - TESTS)
        suite.run(stage)
        stage.ends = ends
        _sanitizer(stage)
        if warm.unfinished():
            stage.note(f"{warm.unfinished()} of {len(warm.waiting)} launches were not compiled ahead")


def _check(use: Use, device: torch.device, seed: int, wanted: str | None, how: str) -> Row:
    """``wanted``: the way that is asked for, None for the choice, with its tile; ``how``: the way that is."""
    launch = use.launch
    given = operands.random_operands(launch, device, seed)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        first, second = (operands.run(launch, given, how=wanted) for _ in range(2))
    verdict = operands.compare(launch, given, first, operands.truth(launch, given))
    unequal = [role for role in first if not _same(first[role], second[role])]
    problems = list(verdict.wrong)
    if how != "vendor":  # whose sums may come in any order
        problems += [f"{role} differs from run to run" for role in unequal]
    return {
        "status": "wrong" if problems else "ok",
        "error": "; ".join(problems) or None,
        "how": how,
        "relative_error": finite(verdict.error),
        "allowed": verdict.allowed,
        "norm_error": finite(verdict.norm),
        "undecided": finite(verdict.undecided),
        "bitwise_twice": not unequal,
    }


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Bit for bit, NaN included."""
    if not first.is_floating_point():
        return torch.equal(first, second)
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _sanitizer(stage: Stage) -> None:
    program = next(filter(None, map(shutil.which, _SANITIZERS)), None)
    if program is None or stage.dry:
        row: Row = {"status": "skipped", "error": "dry run" if stage.dry else "compute-sanitizer is not installed"}
        stage.results.put("tests", {"key": "compute-sanitizer", "kind": "sanitizer", **row})
        return

    def check(tool: str) -> Row:
        own = ["--report-api-errors", "no"] if tool == "memcheck" else []  # PyTorch asks the driver for what it may not have
        command = [program, "--tool", tool, *own, "--error-exitcode", "9", sys.executable, "-m", "fused_resnet.gpu.small"]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        code, output = stage.watched(command, environment, stage.left())
        if code is None:
            return {"status": "skipped", "kind": "sanitizer", "error": "no time for it"}
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        if code == 0:
            return {"status": "ok", "kind": "sanitizer", "error": None}
        problem = next(
            (line for line in lines if "=========" in line and "COMPUTE-SANITIZER" not in line), lines[-1] if lines else ""
        )
        if "not supported" in " ".join(lines).lower():
            return {"status": "skipped", "kind": "sanitizer", "error": problem[:300]}
        return {"status": "wrong" if code == 9 else "failed", "kind": "sanitizer", "error": problem[:300]}

    stage.each("tests", ["memcheck", "racecheck"], lambda tool: f"compute-sanitizer {tool}", check)


def repository() -> Path | None:
    """The checkout, if the package runs from one."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "tests" / "conftest.py").exists() else None
