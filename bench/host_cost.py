"""What a launch costs the host: ResNet-50 as on an H100, up to Triton's launcher, on a machine without a GPU.

``python bench/host_cost.py`` prints microseconds a kernel, by kind of launch, each launch at its best of several steps: with
Triton asked for the compiled kernel at every start, and as it is. Tensors have no memory, a stand-in takes what the launcher
would get, and nothing is compiled. So Triton's launcher, the driver and PyTorch's allocator for GPUs are not in it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    steps: int = parser.parse_args().steps

    import torch
    from starting import as_on
    from torchvision.models import resnet50

    from fused_resnet import fuse

    torch.set_num_threads(1)
    # A tensor without memory has address 0, like all others: what looks for shared memory would copy.
    torch.Tensor.clone = lambda self, **_: self
    model = fuse(resnet50(), backend="triton").to("meta", torch.bfloat16).to(memory_format=torch.channels_last)
    x = torch.empty(256, 3, 224, 224, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)

    def train() -> None:
        model.train().zero_grad(set_to_none=True)
        model(x).sum().backward()

    @torch.no_grad()
    def infer() -> None:
        model.eval()(x)

    with as_on():
        for name, step in {"training step": train, "inference": infer}.items():
            for title, asks in {"Triton asked at every start": True, "as it is": False}.items():
                print(f"{name}, {title}")
                report(step, steps, asks)


def report(step: Callable[[], None], steps: int, asks: bool) -> None:
    """Run a step several times and print what its launches took."""
    from fused_resnet import backends
    from fused_resnet.backends import count_launches, triton, triton_start

    run, begin = triton.run, triton_start.begin
    seen: list[tuple[str, float, int]] = []
    inside = [0]

    def timed(launch: Any, *args: Any, **named: Any) -> Any:
        inside[0] += 1
        start, before = time.perf_counter(), len(log.kernels)
        try:
            return run(launch, *args, **named)
        finally:
            inside[0] -= 1
            if not inside[0]:
                seen.append((launch.kind, time.perf_counter() - start, len(log.kernels) - before))

    def asking(start: Any, *args: Any) -> None:
        start.compiled.clear()
        begin(start, *args)

    triton.run, triton_start.begin = timed, asking if asks else begin
    backends._program.cache_clear()
    try:
        best: list[tuple[str, float, int]] = []
        whole = float("inf")
        for _ in range(steps + 2):
            seen.clear()
            with count_launches() as log:
                start = time.perf_counter()
                step()
                whole = min(whole, time.perf_counter() - start)
            best = [min(pair, key=lambda one: one[1]) for pair in zip(best or seen, seen, strict=True)]
    finally:
        triton.run, triton_start.begin = run, begin
        backends._program.cache_clear()
    kinds: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for kind, seconds, kernels in best:
        kinds[kind].append((seconds, kernels))
        kinds["all"].append((seconds, kernels))
    for kind, rows in sorted(kinds.items()):
        kernels = sum(count for _, count in rows)
        mean = sum(seconds for seconds, _ in rows) / kernels * 1e6
        print(f"  {kind:22} {len(rows):4} launches {kernels:4} kernels  {mean:6.1f} us a kernel")
    print(f"  the whole: {whole * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
