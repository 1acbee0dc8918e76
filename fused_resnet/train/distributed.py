"""The processes of a run: one by itself, or as many as torchrun starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..fused import Fused
from ..measure import automatic_device
from .errors import DataError, UsageError

T = TypeVar("T")


def told() -> bool:
    """Whether somebody, torchrun for one, says in the environment that this process is one of several."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        device: where it computes.
        rank, size: its number, and how many there are.
        ours: this object made the process group, and ends it.
        beside: processes on the CPUs' side, where what is exchanged does not wait for a GPU; None for those of all else.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    ours: bool = False
    beside: dist.ProcessGroup | None = None

    @staticmethod
    def join(device: str) -> World:
        """Join the processes that torchrun started, by nccl on GPUs and gloo elsewhere; alone where none were started.

        Raises:
            UsageError: the device is not there.
        """
        where = automatic_device() if device == "auto" else _device(device)
        started = dist.is_available() and (dist.is_initialized() or told())
        if not started:
            return World(where)
        if where == torch.device("cuda"):  # no number given
            where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(where)
        ours = not dist.is_initialized()
        if ours:
            dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
        beside: Any = dist.new_group(backend="gloo") if where.type == "cuda" else None
        return World(where, dist.get_rank(), dist.get_world_size(), ours, beside)

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

    def together(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches, as many in each process. Where one process cannot make its next one, all raise its error in place of
        it: else the others would wait in the step for one that never comes, and could not save what was done.

        Raises:
            DataError: of the first process that has one.
        """
        if self.size == 1:
            yield from batches
            return
        while True:
            got, own = None, None
            try:
                got = next(batches)
            except StopIteration:
                return
            except DataError as error:
                own = error
            failed = torch.tensor(float(own is not None))
            dist.all_reduce(failed, group=self.beside)
            if failed:
                raise DataError(next(text for text in self.gather(own and str(own)) if text is not None)) from own
            assert got is not None
            yield got

    def share_buffers(self, model: nn.Module) -> None:
        """Running statistics become those of process 0, which are the ones that are saved."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def leave(self) -> None:
        """End the process group, if it was made here."""
        if self.ours:
            dist.destroy_process_group()


def wrap(model: nn.Module, kind: str, world: World) -> nn.Module:
    """What shares a step among the processes, around ``model`` or in it; the model itself where there is one process.

    Args:
        kind: ``ddp``: each has all weights, gradients are averaged. ``fsdp2``: parameters become shards, block by block.
    """
    if kind != "fsdp2" or world.size == 1:  # filters of a shard have to be contiguous
        model.to(memory_format=torch.channels_last)
    if world.size == 1:
        return model
    if kind == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in list(_blocks(model)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Parts whose parameters are gathered together: fused modules, which read their children's weights themselves, and in an
    eager network the modules of more than one layer in a Sequential.
    """
    for child in model.children():
        whole_block = isinstance(model, nn.Sequential) and not isinstance(child, nn.Sequential) and list(child.children())
        if (isinstance(child, Fused) and child.chains()) or whole_block:
            yield child
        else:
            yield from _blocks(child)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r}: PyTorch sees no GPU here")
    return device


def part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may be sharded; the same memory."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


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
