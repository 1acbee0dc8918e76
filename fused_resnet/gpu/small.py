"""A few small launches of every kind, for compute-sanitizer: ``python -m fused_resnet.gpu.small``."""

from __future__ import annotations

import sys

import torch

from . import networks, operands
from .scope import TOY


def main() -> int:
    """Run them; 1 if a value is off."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = 0
    for mode in ("infer", "train"):
        for use in networks.uses(TOY, 2, 16, torch.bfloat16, mode):
            given = operands.random_operands(use.launch, device, 0)
            verdict = operands.compare(use.launch, operands.run(use.launch, given), operands.truth(use.launch, given))
            wrong += bool(verdict.wrong)
    print(f"{wrong} launches are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
