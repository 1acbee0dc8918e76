"""Two processes that talk through gloo, for tests of what is distributed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]

_CODE = """
import sys, torch, torch.distributed as dist
rank, world, folder, module, function = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
torch.set_num_threads(1)
import importlib
work = getattr(importlib.import_module(module), function)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
torch.save(work(rank), f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def run(module: str, function: str, folder: Path, world: int = 2, seconds: float = 240) -> list[Any]:
    """What ``function(rank)`` of a test module returns in each of ``world`` fresh processes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _CODE]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder), module, function],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            said, _ = process.communicate(timeout=seconds)
            if process.returncode:
                raise AssertionError(f"a rank failed:\n{said}")
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
