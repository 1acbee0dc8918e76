"""Stage ``compiled``: torch.compile joins the cells that matter most; it comes last, for it is slow."""

from __future__ import annotations

import torch

from .contenders import CHANNELS_LAST, FUSED, compiled_name
from .models import compared
from .results import Row
from .scope import Cell
from .stage import Stage


def run(stage: Stage) -> None:
    """A row for each cell and mode: torch.compile, eager channels_last and fused in turns once more."""
    torch.backends.cudnn.benchmark = True

    def row(entry: tuple[Cell, str]) -> Row:
        cell, mode = entry
        made = compared(cell, [CHANNELS_LAST, compiled_name(mode), FUSED], stage, check=False)
        problem = made["problems"].get(compiled_name(mode))
        return {**made, "compiled": mode, **({"status": "skipped", "error": problem} if problem else {})}

    stage.each("models", stage.scope.compiled, key_of, row)


def key_of(entry: tuple[Cell, str]) -> str:
    """The cell's, and torch.compile's mode."""
    return f"{entry[0].key}, torch.compile {entry[1]}"
