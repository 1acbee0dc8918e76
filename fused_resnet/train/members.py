"""Networks to evaluate: from checkpoints of ``fused-resnet train``, or by name with a file of weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, networks
from .data import normalise
from .ema import tensors
from .errors import UsageError
from .recipe import Recipe, from_data
from .state import load_tensors


@dataclass
class Member:
    """One network of an ensemble.

    Attributes:
        name: for messages.
        model: in eval mode, on its device.
        classes: names of its outputs, if they are known.
        mean, std: what its images are normalised by; None: by the data set's.
        recipe, data: of a checkpoint; None of a file of weights.
    """

    name: str
    model: nn.Module
    classes: list[str] | None
    outputs: int
    mean: Tensor | None = None
    std: Tensor | None = None
    recipe: Recipe | None = None
    data: str = ""

    def normalise(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """uint8 images by its own mean and deviation, or by those given."""
        return normalise(x, mean if self.mean is None else self.mean, std if self.std is None else self.std)


def _ready(model: nn.Module, device: torch.device) -> nn.Module:
    return model.eval().to(device).to(memory_format=torch.channels_last)


def from_checkpoint(path: Path, device: torch.device, backend: str) -> Member:
    """The network of a checkpoint, with the average of its weights where there is one.

    Raises:
        UsageError, TrainingError: see :func:`fused_resnet.train.checkpoint.load`.
    """
    saved = checkpoint.load(path / checkpoint.BEST if os.path.isdir(path) else path)
    identity, classes = saved["identity"], list(saved["classes"])
    model = networks.make(identity["model"], len(classes), backend, **identity["model_arguments"])
    load_tensors(tensors(model), saved["ema"] or saved["model"])
    recipe = from_data(saved["recipe"], str(path))
    return Member(
        str(path), _ready(model, device), classes, len(classes), saved["mean"], saved["std"], recipe, identity["data"]
    )


def from_weights(
    name: str,
    path: Path,
    device: torch.device,
    backend: str,
    arguments: dict[str, Any] | None = None,
    classes: Callable[[], int] | None = None,
) -> Member:
    """The network ``name`` with the state_dict of a file, such as torchvision's own; also where it lies under ``model`` or
    ``state_dict``, and with DistributedDataParallel's ``module.`` in front of the names.

    The last matrix tells the number of classes. Where there is none (SqueezeNet's classifier is a convolution), ``classes``
    does, which is called then only.

    Raises:
        UsageError: not the weights of this network, or no weights at all.
        TrainingError: the file cannot be read.
    """
    saved = checkpoint.tensors(path)
    for key in ("state_dict", "model"):
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    if not isinstance(saved, dict) or not saved or not all(isinstance(value, Tensor) for value in saved.values()):
        raise UsageError(f"{path}: not a state_dict, a dict of tensors by name")
    weights = {key.removeprefix("module."): value for key, value in saved.items()}
    matrices = [value for value in weights.values() if value.ndim == 2]
    if not matrices and classes is None:
        raise UsageError(f"{path}: no classifier in it, which would tell the number of classes")
    outputs = len(matrices[-1]) if matrices or classes is None else classes()
    model = networks.make(name, outputs, backend, **(arguments or {}))
    try:
        load_tensors(tensors(model), weights)
    except UsageError as error:
        raise UsageError(f"{path}, for {name}: {error}") from error
    return Member(f"{name} of {path}", _ready(model, device), None, outputs)
