"""The processes of a run: one by itself, or as many as torchrun starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..measure import automatic_device
from .errors import UsageError


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        device: where it computes.
        rank, size: its number, and how many there are.
        ours: this object made the process group, and ends it.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    ours: bool = False

    @staticmethod
    def join(device: str) -> World:
        """Join the processes that torchrun started, by nccl on GPUs and gloo elsewhere; alone where it started none.

        Raises:
            UsageError: the device is not there.
        """
        where = automatic_device() if device == "auto" else _device(device)
        started = dist.is_available() and (dist.is_initialized() or "TORCHELASTIC_RUN_ID" in os.environ)
        if not started:
            return World(where)
        if where == torch.device("cuda"):  # no number given
            where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(where)
        ours = not dist.is_initialized()
        if ours:
            dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
        return World(where, dist.get_rank(), dist.get_world_size(), ours)

    @property
    def first(self) -> bool:
        """This is the process that writes."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the processes, in fp64."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in order of rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def share_buffers(self, model: nn.Module) -> None:
        """Running statistics become those of process 0, which are the ones that are saved."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def leave(self) -> None:
        """End the process group, if it was made here."""
        if self.ours:
            dist.destroy_process_group()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r}: PyTorch sees no GPU here")
    return device


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece on the CPU, a copy; of a sharded one every process gets all, and all have to call."""
    value = tensor.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu().clone()


@torch.no_grad()
def write(into: Tensor, value: Tensor) -> None:
    """A whole tensor into one that may be sharded."""
    if hasattr(into, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(into, DTensor)

        value = distribute_tensor(value.to(into.device), into.device_mesh, into.placements)
    into.copy_(value)
