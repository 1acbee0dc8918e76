"""The gate of compiled kernels: what the compiler makes of every launch of ResNet-18 and ResNet-50, held in a table.

``make compiled`` (``python tools/compiled.py``) compiles the launches of both networks, inference and training, as they run by
default (batch 256, bf16, in pieces where the choice says so) for four architectures. It writes ``tests/kernels/compiled.json``,
one line a launch, so that a change of a kernel or of a tile shows in review, and the tables of docs/evidence.md between their
marks. No GPU is needed; what was compiled before, by this command or by ``fused-resnet inspect``, is taken from the cache.
``python tools/compiled.py sm_90`` does one architecture alone. ``--cases`` writes the page's other table instead.
``--note-spills`` also writes tiles that spill into ``fused_resnet/tuning/registers.json``: another is chosen the next time.

``tests/kernels/test_compiled.py`` compiles them again: each has to pass :func:`faults`, and to be what the table says where
Triton is the release that the table was made with.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

import torch

from fused_resnet import network
from fused_resnet.cli.text import kernel_progress
from fused_resnet.inspect.compiling import Job, Outcome, compile_all
from fused_resnet.inspect.facts import Facts
from fused_resnet.inspect.report import label, triton_version
from fused_resnet.inspect.started import started
from fused_resnet.launch import Geometry, Launch
from fused_resnet.tuning import Tile
from fused_resnet.tuning.classes import DATA, class_of
from fused_resnet.tuning.devices import limits
from fused_resnet.tuning.tile import Strip
from fused_resnet.whole_file import write_whole

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests" / "kernels" / "compiled.json"
EVIDENCE = ROOT / "docs" / "evidence.md"

NETWORKS = ("resnet18", "resnet50")
BATCH, SIZE, DTYPE = 256, 224, torch.bfloat16

#: Those of the table.
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
#: Architecture -> the matrix instruction its tensor cores are meant to be used with, and how tiles come from memory (on AMD
#: loads wait in registers).
MEANT: dict[str, tuple[str, str | None]] = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89"), ("HMMA", "cp.async")),
    "sm_90": ("HGMMA", "TMA"),
    "sm_100": ("UTCHMMA", "TMA"),
    "sm_120": ("HMMA", "TMA"),
    **dict.fromkeys(("gfx942", "gfx950"), ("MFMA", None)),
}

Rows = dict[str, dict[str, Any]]


def launches(networks: Sequence[str] = NETWORKS) -> list[list[tuple[str, Launch]]]:
    """Of each network and mode all launches of the plan, with their layers."""
    return [network.launches(network.network(name), BATCH, SIZE, DTYPE, mode) for name in networks for mode in network.MODES]


def jobs(arch: str, passes: Sequence[Sequence[tuple[str, Launch]]]) -> dict[str, Job]:
    """The distinct launches as they run on ``arch``, by label.

    Args:
        arch: a key of :data:`MEANT`.
        passes: of :func:`launches`.

    Raises:
        ValueError: two different launches have one label.
    """
    found: dict[str, Job] = {}
    for named in passes:
        for _, launch in started(named, arch):
            job = found.setdefault(label(launch), Job(launch, arch))
            if job.launch.signature != launch.signature:
                raise ValueError(
                    f"{label(launch)!r} is what two launches are called: {job.launch.signature}; {launch.signature}"
                )
    return found


def faults(job: Job, facts: Facts) -> list[str]:
    """What is wrong with a kernel, whatever Triton made it."""
    g, reading, limit = job.launch.geometry, facts.reading, limits(job.arch)
    found = []
    if facts.spills:
        found.append(f"{facts.spills} bytes are spilled")
    if facts.shared > limit.shared_per_program * 1024:
        found.append(f"{facts.shared} bytes of shared memory do not fit into {limit.shared_per_program} KiB")
    if job.launch.flops and isinstance(g, Geometry) and max(g.C, g.K) // g.groups > 2:  # not depthwise
        instruction, way = MEANT[job.arch]
        if reading.loop is None or not reading.loop.matrix:
            found.append("no matrix instruction in the main loop")
        elif {part.split()[0] for part in reading.matrix.split(" + ")} != {instruction}:
            found.append(f"the main loop multiplies with {reading.matrix}, not with {instruction}")
        as_it_is = job.launch.kind != "wgrad" and job.launch.prologue == job.launch.gradient == "identity"
        if as_it_is and instruction in ("HGMMA", "UTCHMMA") and reading.operands != "shared-shared":
            found.append(f"operands are {reading.operands}, though nothing is done to them on load")
        aligned = all(channels * job.launch.dtype.itemsize % 16 == 0 for channels in (g.C, g.K))
        if aligned and way is not None and way not in reading.loads:
            found.append(f"aligned tiles are loaded by {', '.join(reading.loads) or 'nothing'}, not by {way}")
    return found


def row(outcome: Outcome) -> dict[str, Any]:
    """A line of the table."""
    assert outcome.facts is not None and outcome.planned is not None
    facts, loop = outcome.facts, outcome.facts.reading.loop
    made: dict[str, Any] = {
        "tile": tile_text(outcome.planned.tile),
        "registers": facts.registers,
        "spills": facts.spills,
        "shared": facts.shared,
    }
    if facts.tensor_memory:
        made["tensor_memory"] = facts.tensor_memory
    if loop is not None:
        made |= {"matrix": facts.reading.matrix, "operands": facts.reading.operands}
        made["loop"] = "/".join(map(str, (loop.matrix, loop.load, loop.barrier, loop.other)))
    made["loads"] = " + ".join(facts.reading.loads)
    return made


def tile_text(tile: Tile | Strip | None) -> str:
    """``4x2x16 128x64, 8 warps, 4 stages``: the box of pixels, filters by channels; or a strip's pixels by channels."""
    if isinstance(tile, Tile):
        shares = f", {tile.splits} shares" if tile.splits > 1 else ""
        box = f"{tile.images}x{tile.rows}x{tile.columns}"
        return f"{box} {tile.filters}x{tile.channels}, {tile.num_warps} warps, {tile.num_stages} stages{shares}"
    if isinstance(tile, Strip):
        steps = f", {tile.steps} steps" if tile.steps > 1 else ""
        return f"{tile.pixels}x{tile.channels}, {tile.num_warps} warps{steps}"
    return "-"


def table() -> dict[str, Any]:
    """The table as it is committed."""
    data: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return data


def text_of(compiled: Mapping[str, Rows]) -> str:
    """The table's file: one line a launch."""
    about = "every launch of ResNet-18 and ResNet-50 as it runs by default, batch 256, bf16; compiled; written by make compiled"
    parts = []
    for arch, rows in compiled.items():
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(values)}" for name, values in rows.items())
        parts.append(f"  {json.dumps(arch)}: {{\n{lines}\n  }}")
    head = f' "about": {json.dumps(about)},\n "triton": {json.dumps(triton_version())},\n'
    return f'{{\n{head} "compiled": {{\n' + ",\n".join(parts) + "\n }\n}\n"


def summary(compiled: Mapping[str, Rows]) -> str:
    """Markdown for docs/evidence.md: each architecture in a row, and the launches of ResNet-50's inference."""
    lines = [
        f"Triton {triton_version()}, batch {BATCH}, bf16, 224x224; {' and '.join(NETWORKS)}, inference and training.",
        "",
        "| | launches | spilling | registers at most | shared memory at most | matrix instructions | loads in their loops |",
        "|---|---|---|---|---|---|---|",
    ]
    for arch, rows in compiled.items():
        products = [values for values in rows.values() if "loop" in values]
        kinds = sorted({part.split()[0] for values in products for part in values["matrix"].split(" + ")})
        ways = sorted({way for values in products for way in values["loads"].split(" + ")} - {""})
        lines.append(
            f"| {arch} | {len(rows)} | {sum(values['spills'] > 0 for values in rows.values())} "
            f"| {max(values['registers'] for values in rows.values())} "
            f"| {max(values['shared'] for values in rows.values()) / 1024:.0f} KiB | {', '.join(kinds)} | {', '.join(ways)} |"
        )
    lines += ["", f"| launch | {' | '.join(compiled)} |", "|---" * (1 + len(compiled)) + "|"]
    shown = [label(launch) for _, launch in network.launches(network.network("resnet50"), BATCH, SIZE, DTYPE, "infer")]
    for name in dict.fromkeys(shown):
        cells = [_cell(rows.get(name)) for rows in compiled.values()]
        lines.append(f"| {name.replace('>', ' to ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return "-"
    spilled = f", {values['spills']} B spilled" if values["spills"] else ""
    loop = values.get("loop", "-").replace("/", "-")
    return f"{values['registers']} / {values['shared'] / 1024:.0f} / {loop}{spilled}"


def replaced(text: str, name: str, by: str) -> str:
    """A page with what is between the marks ``name`` replaced.

    Raises:
        ValueError: the marks are not there.
    """
    first, last = f"<!-- {name}: written by tools/compiled.py -->\n", f"<!-- {name}: end -->\n"
    if first not in text or last not in text:
        raise ValueError(f"no marks {first.strip()} and {last.strip()}")
    return text[: text.index(first)] + first + by + text[text.index(last) :]


def note(job: Job, tile: Tile, facts: Facts) -> None:
    """Write that a tile spills into the registers that tiles are chosen by, so that launches of its class no longer take it."""
    from tile_registers import write

    rows, columns = tile.pixels, tile.filters if job.launch.kind == "conv" else tile.channels
    if job.launch.kind == "wgrad":
        rows = tile.filters
    data = json.loads(DATA.read_text(encoding="utf-8"))
    shapes = data["compiled"][job.arch][class_of(job.launch)]
    shapes[f"{rows}x{columns}x{tile.num_warps}"] = [facts.registers, facts.spills]
    write(data)


def main(archs: Sequence[str] = ARCHS, noting: bool = False) -> int:
    """Compile all, write the table and the docs; 1 where something is wrong with a kernel.

    Args:
        archs: some of :data:`ARCHS`. What the table says of others stays.
        noting: :func:`note` tiles that spill. They are chosen no more the next time.
    """
    passes = launches()
    wanted = {arch: jobs(arch, passes) for arch in archs}
    flat = [(arch, name) for arch, named in wanted.items() for name in named]
    outcomes = compile_all([wanted[arch][name] for arch, name in flat], progress=kernel_progress())
    compiled: dict[str, Rows] = {arch: {} for arch in archs}
    wrong = []
    for (arch, name), outcome in zip(flat, outcomes, strict=True):
        job, facts = wanted[arch][name], outcome.facts
        if facts is None or outcome.planned is None:
            wrong.append(f"{arch}: {name}: {outcome.error}")
            continue
        compiled[arch][name] = row(outcome)
        wrong += [f"{arch}: {name}: {fault}; {compiled[arch][name]}" for fault in faults(job, facts)]
        if noting and facts.spills and isinstance(outcome.planned.tile, Tile) and class_of(job.launch) is not None:
            note(job, outcome.planned.tile, facts)
    print("\n".join([*wrong, f"{len(flat)} launches, {len(wrong)} faults"]))
    if any(outcome.facts is None for outcome in outcomes):
        print("nothing is written: some do not compile")
        return 1
    before: dict[str, Rows] = table()["compiled"] if TABLE.exists() and table()["triton"] == triton_version() else {}
    compiled = {arch: rows for arch in ARCHS if (rows := compiled.get(arch, before.get(arch)))}
    page = replaced(EVIDENCE.read_text(encoding="utf-8"), "compiled", summary(compiled))
    write_whole(TABLE, text_of(compiled).encode())
    write_whole(EVIDENCE, page.encode())
    print(f"written: {TABLE.relative_to(ROOT)} and the tables of {EVIDENCE.relative_to(ROOT)}")
    return 1 if wrong else 0


def cases() -> int:
    """Compile the launches of tests/kernels/compile_cases.py, and write their table; 1 where one does not compile."""
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    sys.path.insert(0, str(ROOT / "tests"))
    CASES: dict[str, Launch] = import_module("compile_cases").CASES
    named = [
        (", ".join(filter(None, (name, precision))), [Job(launch, arch, precision == "tf32") for arch in ARCHS])
        for name, launch in CASES.items()
        for precision in (("exact", "tf32") if "fp32" in name and launch.flops else ("",))
    ]
    # AMD has no tf32 here.
    wanted = [job for _, row_jobs in named for job in row_jobs if not (job.tf32 and job.arch.startswith("gfx"))]
    outcomes = dict(zip(map(id, wanted), compile_all(wanted, progress=kernel_progress()), strict=True))
    wrong = [f"{job.arch}: {job.launch}: {outcomes[id(job)].error}" for job in wanted if outcomes[id(job)].facts is None]
    if wrong:
        print("\n".join(wrong))
        return 1
    lines = [
        f"Triton {triton_version()}, {date.today()}.",
        "",
        f"| launch | {' | '.join(ARCHS)} |",
        "|---" * (1 + len(ARCHS)) + "|",
    ]
    for name, row_jobs in named:
        cells = [_cell(row(outcomes[id(job)]) if id(job) in outcomes else None) for job in row_jobs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    page = replaced(EVIDENCE.read_text(encoding="utf-8"), "cases", "\n".join(lines) + "\n")
    write_whole(EVIDENCE, page.encode())
    return 0


if __name__ == "__main__":
    options = sys.argv[1:]
    unknown = [name for name in options if name not in (*ARCHS, "--cases", "--note-spills")]
    if unknown:
        sys.exit(f"unknown {unknown[0]!r}: expected some of {', '.join(ARCHS)}, --note-spills, or --cases")
    chosen = [name for name in options if name in ARCHS]
    sys.exit(cases() if "--cases" in options else main(chosen or ARCHS, "--note-spills" in options))
