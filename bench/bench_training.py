"""Training: steps of blocks and of whole networks, and what they keep between forward and backward.

By default a training step of two blocks and of the first ``--model``, and the memory; ``--training all`` takes all of them, and
the forward, and forward and backward without the optimizer, too.
"""

from __future__ import annotations

from dataclasses import replace

from cases import block_case, model_case
from contenders import BACKWARD, Bench


def test_block_training(
    bench: Bench, training_block: str, last_batch: int, size: int, dtype_name: str, work: str, trainer: str
) -> None:
    """One block, whose input needs a gradient, as in a network."""
    bench(trainer, block_case(training_block, last_batch, size, dtype_name, work))


def test_model_training(
    bench: Bench, training_model: str, last_batch: int, size: int, dtype_name: str, work: str, trainer: str
) -> None:
    """A whole network, from images."""
    bench(trainer, model_case(training_model, last_batch, size, dtype_name, work))


def test_memory(bench: Bench, model_name: str, dtype_name: str, statistics: str, keeper: str) -> None:
    """What is kept for the backward of one image of 96x96; its time is of no interest, and gets little."""
    case = replace(model_case(model_name, 1, 96, dtype_name, BACKWARD), frozen=statistics == "frozen")
    replace(bench, seconds=bench.seconds / 10)(keeper, case)
