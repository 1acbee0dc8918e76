"""Checkpoints: one file with everything a run needs to go on, written whole or not at all, read with ``weights_only=True``."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path
from typing import Any

import torch

from ..stored import Fields, hold
from ..whole_file import write_whole
from .errors import TrainingError, UsageError

#: Raised when a reader of the old file would misread the new one.
SCHEMA = 1
FORMAT = "fused_resnet.checkpoint"
NAME = "checkpoint.pt"
BEST = "best.pt"


#: What is in every file, and of which types.
CONTENTS: Fields = {
    "identity": (dict,),
    "recipe": (dict,),
    "classes": (list,),
    "mean": (torch.Tensor,),
    "std": (torch.Tensor,),
    "step": (int,),
    "model": (dict,),
    "ema": (dict, type(None)),
    "best": (float, int),
}
#: What is needed beside it to go on. :data:`BEST` has none of it.
STATE: Fields = {
    "optimizer": (dict,),
    "scaler": (dict,),
    "window": (list,),
    "random": (list,),
    "untested": (bool,),
    "bad": (list,),
}
#: What is read of ``identity`` where a file is not gone on with.
_IDENTITY: Fields = {"model": (str,), "model_arguments": (dict,), "data": (str,)}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint. It is made in memory first, so that all that can fail on the disk is one write.

    Raises:
        OSError: it could not be written; an older one is still there.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "schema": SCHEMA, **state}, buffer)
    write_whole(path, buffer.getbuffer(), durable=True)


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, tensors on the CPU.

    Raises:
        UsageError: no such file, not a checkpoint, one of a newer version, or one without its :data:`CONTENTS`.
        TrainingError: it cannot be read.
    """
    state = tensors(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("schema"), int):
        raise UsageError(f"{path}: not a checkpoint of fused-resnet train")
    if state["schema"] > SCHEMA:
        raise UsageError(f"{path}: written by a newer version (schema {state['schema']}, this one reads up to {SCHEMA})")
    hold(state, CONTENTS, str(path), UsageError)
    hold(state["identity"], _IDENTITY, f"{path}: identity", UsageError)
    return state


def check_state(path: Path, state: dict[str, Any]) -> None:
    """What :func:`load` gave can be gone on with.

    Raises:
        UsageError: it holds the weights only, or less of a run's state than there should be.
    """
    if not STATE.keys() & state.keys():
        raise UsageError(f"{path}: holds the weights only ({BEST}): cannot be gone on behind")
    hold(state, STATE, str(path), UsageError)


def mark(state: dict[str, Any]) -> str:
    """What tells one checkpoint from another in a few words: its step, and a digest of its identity and weights.

    The digest is of bytes: a sum of floats may be rounded otherwise by another machine's processor.
    """
    digest = zlib.crc32(repr(state["identity"]).encode())
    for value in state["model"].values():
        if isinstance(value, torch.Tensor):
            digest = zlib.crc32(value.detach().reshape(-1).view(torch.uint8).numpy().data, digest)
    return f"step {state['step']} of weights {digest:08x}"


def tensors(path: Path) -> Any:
    """What ``torch.save`` wrote, of tensors and plain data only.

    Raises:
        UsageError: no such file, nothing that ``torch.save`` wrote, or other objects in it.
        TrainingError: it is cut off or damaged.
    """
    if os.path.isdir(path):  # not Path's, which raises where a name is too long
        raise UsageError(f"{path}: is a folder, expected a file")
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # of the unpickler, the archive or the tensors' sizes
        if "GLOBAL" in str(error) or "Unsupported global" in str(error):
            raise UsageError(f"{path}: holds more than tensors and plain data, and is not loaded") from error
        if not _begins_well(path):
            raise UsageError(f"{path}: not weights, expected a file that torch.save wrote") from error
        raise TrainingError(f"{path}: cut off or damaged, cannot be read") from error


def _begins_well(path: Path) -> bool:
    """As an archive of PyTorch (a zip; of old ones a pickle), or as what a power failure leaves of one: nothing, or zeros."""
    with path.open("rb") as file:
        start = file.read(4)
    return not start.strip(b"\0") or start.startswith((b"PK", b"\x80"))


def differences(saved: Any, wanted: Any, name: str = "") -> list[str]:
    """Where two pieces of plain data differ: ``recipe.lr 0.1 -> 0.05``."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        found = []
        for key in sorted(saved.keys() | wanted.keys()):
            found += differences(saved.get(key), wanted.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if saved == wanted else [f"{name} {saved!r} -> {wanted!r}"]
