"""Random numbers that depend on where they are used, not on what was drawn before.

The order of an epoch and the crop of an image come from seeds made of the run's seed and of the place: the epoch, the step, the
image. So a run that goes on at step 1234 sees what it would have seen, however often it was interrupted and by however many
workers the images are read.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def mix(*parts: int | str) -> int:
    """A seed of 63 bits for a place."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A generator for a place."""
    return torch.Generator().manual_seed(mix(*parts))


def seed_everything(*parts: int | str) -> None:
    """Start the generators that models and libraries draw from by themselves."""
    seed = mix(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def states(device: torch.device) -> dict[str, Any]:
    """The state of these generators, of types that ``torch.load(weights_only=True)`` reads."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    found: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore(saved: dict[str, Any], device: torch.device) -> None:
    """Put :func:`states` back."""
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(saved["torch"])
    if device.type == "cuda" and "cuda" in saved:
        torch.cuda.set_rng_state(saved["cuda"], device)
