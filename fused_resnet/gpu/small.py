"""A few small launches of every kind, for compute-sanitizer: ``python -m fused_resnet.gpu.small``. The truth is the CPU's."""

from __future__ import annotations

import sys

import torch

from ..launch import Launch
from . import networks, operands
from .launches import one_of_each
from .scope import TOY


def launches() -> list[Launch]:
    """One of each kind."""
    entries = [(mode, use) for mode in ("infer", "train") for use in networks.uses(TOY, 2, 16, torch.bfloat16, mode)]
    return [use.launch for _, use in one_of_each(entries)]


def main() -> int:
    """Run them; 1 if a value is off."""
    device, wrong = torch.device("cuda" if torch.cuda.is_available() else "cpu"), 0
    for launch in launches():
        given = operands.random_operands(launch, device, 0)
        on_cpu = {role: tensor.cpu() for role, tensor in given.items()}
        made = {role: tensor.cpu() for role, tensor in operands.run(launch, given, how="fused").items()}
        wrong += bool(operands.compare(launch, on_cpu, made, operands.truth(launch, on_cpu)).wrong)
    print(f"{wrong} launches are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
