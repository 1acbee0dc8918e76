"""What a run is: everything :func:`fused_resnet.train.fit` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .recipe import Recipe

#: ``--amp``: element types of autocast.
AMP = ("off", "bf16", "fp16")
BACKENDS = ("auto", "eager", "cpu", "reference", "triton")
DISTRIBUTED = ("ddp", "fsdp2")


@dataclass(frozen=True)
class Config:
    """A run.

    The first group decides what is computed: it is kept in checkpoints, and a run only goes on with the same. The second group
    says how and where; going on with another backend or device is allowed, but then not bit for bit.

    Attributes:
        recipe: how to train.
        model: name of the network; empty for the recipe's.
        model_arguments: for its builder.
        data: name of the data set; empty for the recipe's.
        seed: of weights, order and augmentation.
        amp: element type of autocast, one of :data:`AMP`.
        out: folder for log, checkpoints and TensorBoard's events.
        data_folder: where the data set lies, if it has to be brought.
        resume: go on behind the folder's checkpoint, if there is one.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        backend: ``auto`` (by the device), ``eager`` for the unfused network, or one of fused_resnet's.
        memory: ``default``, ``less`` or ``low``, see :func:`fused_resnet.fuse`; None for the network's own.
        compile: through ``torch.compile``.
        distributed: what shares the work under torchrun, ``ddp`` or ``fsdp2``.
        workers: processes that decode images of a folder.
        on_corrupt: ``stop`` at an image that cannot be read, or ``skip`` it.
        log_every: steps between rows of the training split; 0 for ten an epoch.
        checkpoint_every: steps between checkpoints; 0 for one an epoch, and at least one in 1000 steps.
        evaluate_every: epochs between evaluations; 0 for one at the end.
        stop_after: end after this many steps, as if interrupted; 0 for never.
        tensorboard: write events too.
        quiet: no progress on stderr.
    """

    recipe: Recipe
    model: str = ""
    model_arguments: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    seed: int = 0
    amp: str = "off"

    out: Path = Path("run")
    data_folder: Path | None = None
    resume: bool = False
    device: str = "auto"
    backend: str = "auto"
    memory: str | None = None
    compile: bool = False
    distributed: str = "ddp"
    workers: int = 2
    on_corrupt: str = "stop"
    log_every: int = 0
    checkpoint_every: int = 0
    evaluate_every: float = 1
    stop_after: int = 0
    tensorboard: bool = False
    quiet: bool = False

    @property
    def network(self) -> str:
        """The network's name."""
        return self.model or self.recipe.model

    @property
    def data_name(self) -> str:
        """The data set's name."""
        return self.data or self.recipe.data

    def identity(self) -> dict[str, Any]:
        """What decides the weights, as plain data: a checkpoint is gone on with by the same only."""
        recipe = self.recipe.data_dict()
        for name in ("name", "about", "data", "model"):
            del recipe[name]
        return {
            "model": self.network,
            "model_arguments": dict(self.model_arguments),
            "data": self.data_name,
            "seed": self.seed,
            "amp": self.amp,
            "recipe": recipe,
        }

    def manner(self) -> dict[str, Any]:
        """What may decide the last bits: where and how the same is computed."""
        return {"backend": self.backend, "memory": self.memory, "compile": self.compile}
