"""All that changes in the course of a run, to and from plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from . import seeds
from .distributed import World, whole, write
from .ema import Average, tensors
from .errors import UsageError
from .metrics import Window
from .plateau import Falling


@dataclass
class State:
    """A run at one moment.

    Attributes:
        model: the network itself, without what is wrapped around it.
        optimizer, scaler, average: of it.
        step: steps done. Order of the images and augmentation follow from it, and but for a plateau the learning rate.
        window: sums for the next row of the log.
        falling: of the schedule ``plateau``.
        lr: learning rate of the last step.
        best: smallest test error so far.
        bad: files that could not be read.
        untested: an evaluation is due, and was not made since an image could not be read.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    step: int = 0
    window: Window = field(default_factory=Window)
    falling: Falling = field(default_factory=Falling)
    lr: float = 0.0
    best: float = float("inf")
    bad: list[str] = field(default_factory=list)
    untested: bool = False

    def save(self, world: World) -> dict[str, Any]:
        """As plain data; all processes have to call, and all get it."""
        momenta = {}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    momenta[f"{name}/{key}"] = whole(value)
        return {
            "step": self.step,
            "model": {name: whole(value) for name, value in tensors(self.model).items()},
            "ema": self.average and {name: whole(value) for name, value in self.average.values.items()},
            "optimizer": momenta,
            "scaler": self.scaler.state_dict(),
            "window": world.gather(self.window.sums()),
            "falling": asdict(self.falling),
            "lr": self.lr,
            "random": world.gather(seeds.states(world.device)),
            "best": self.best,
            "untested": self.untested,
            "bad": sorted({path for bad in world.gather(self.bad) for path in bad}),
        }

    def load(self, saved: dict[str, Any], world: World) -> None:
        """Put :meth:`save`'s data back.

        Raises:
            UsageError: of another model, or with other sums than a window has.
        """
        own = tensors(self.model)
        check_windows(saved["window"], len(saved["random"]))
        load_tensors(own, saved["model"])
        if (saved["ema"] is None) != (self.average is None):
            got, wanted = ("none", "one") if self.average is not None else ("one", "none")
            raise UsageError(f"'ema' in it, the average of the weights, must be {wanted} by the recipe, got {got}")
        if self.average is not None:
            load_tensors(self.average.values, saved["ema"])
        parameters = dict(self.model.named_parameters())
        for place, value in saved["optimizer"].items():
            name, _, key = place.rpartition("/")
            fresh = torch.zeros_like(parameters[name])
            write(fresh, value)
            self.optimizer.state[parameters[name]][key] = fresh
        self.scaler.load_state_dict(saved["scaler"])
        self.step, self.best, self.bad = saved["step"], saved["best"], list(saved["bad"])
        self.untested = saved["untested"]
        self.falling = Falling(**saved.get("falling", {}))
        self.lr = saved.get("lr", self.lr)
        if len(saved["random"]) == world.size:
            self.window = Window(*saved["window"][world.rank])
            seeds.restore(saved["random"][world.rank], world.device)
        else:  # another number of processes
            if world.first:
                self.window = Window(*(sum(values) for values in zip(*saved["window"])))
            seeds.seed_everything("resumed", self.step, world.rank)


def check_windows(windows: list[Any], processes: int) -> None:
    """The sums for the next row, of each process.

    Raises:
        UsageError: they are not.
    """
    most = len(Window().sums())
    for sums in windows:  # older checkpoints have fewer, and the others start at 0
        numbers = isinstance(sums, list) and all(isinstance(number, (int, float)) for number in sums)
        if not (numbers and len(sums) <= most):
            raise UsageError(f"'window' in it must be up to {most} numbers for each process, got {sums!r}")
    if len(windows) != processes:
        raise UsageError(f"'window' in it must be of {processes} processes as 'random' is, got {len(windows)}")


def load_tensors(into: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    """Write tensors by name.

    Raises:
        UsageError: the names or sizes are another model's.
    """
    for name in into.keys() ^ saved.keys():
        raise UsageError(f"the weights are of another model: {name!r} is only in {'the model' if name in into else 'the file'}")
    for name, value in saved.items():
        if not isinstance(value, torch.Tensor):
            raise UsageError(f"the weights must be tensors, {name!r} is a {type(value).__name__}")
        if value.shape != into[name].shape:
            shapes = f"{tuple(value.shape)} in the file, {tuple(into[name].shape)} in the model"
            raise UsageError(f"the weights are of another model: {name!r} is {shapes}")
        write(into[name], value)
