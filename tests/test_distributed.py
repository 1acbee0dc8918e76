"""Data-parallel training in two processes (gloo, CPU): DDP and FSDP2 around a fused model, against an eager one.

The models are of torchvision's blocks, known by their class, and of blocks written by hand, which are fused as regions.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from nets import TinyNet, randomise
from tolerances import relative_error
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from zoo import CifarNet

from fused_resnet import count_launches, fuse

STEPS = 3

#: Name -> arguments of DistributedDataParallel.
WRAPPERS: dict[str, dict[str, Any]] = {
    "default": {},
    "views of the buckets": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "own statistics on each rank": {"broadcast_buffers": False},
}


def learner(kind: type[nn.Module] = TinyNet) -> nn.Module:
    torch.manual_seed(0)
    net = kind()
    randomise(net)
    return net.double().train()


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(3, 3, 33, 35, dtype=torch.float64, generator=generator), torch.tensor([0, 1 + rank, 4 - step])


def plain(tensor: Tensor) -> Tensor:
    """A sharded tensor in one piece."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(model: nn.Module, rank: int, average: bool = False) -> dict[str, Tensor]:
    """Some SGD steps: the last gradients, then parameters and buffers, and how many launches a step had."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        with count_launches() as log:
            nn.functional.cross_entropy(model(x), y).backward()
        if average:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
        optimizer.step()
    result = {f"gradient of {key}": plain(p.grad) for key, p in model.named_parameters()}
    result |= {key: plain(value) for key, value in model.state_dict().items()}
    return {key.replace("module.", ""): value for key, value in result.items()} | {"launches": torch.tensor(len(log))}


def sharded(model: nn.Module, reshard: bool) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for part in model.stages if isinstance(model, CifarNet) else (model.basic, model.bottleneck):
        fully_shard(part, reshard_after_forward=reshard)
    return fully_shard(model, reshard_after_forward=reshard)


def accumulated(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """Gradients of two micro-batches, exchanged once."""
    model = DistributedDataParallel(model)
    (x, y), (x2, y2) = batch(rank, 0), batch(rank, 1)
    with model.no_sync():
        nn.functional.cross_entropy(model(x), y).backward()
    nn.functional.cross_entropy(model(x2), y2).backward()
    return {key: p.grad.clone() for key, p in model.module.named_parameters()}


def work(rank: int) -> dict[str, Any]:
    """All that one rank does; the tests look at the results."""
    net = learner()
    results: dict[str, Any] = {}
    for name, arguments in WRAPPERS.items():
        results[f"eager {name}"] = train(DistributedDataParallel(copy.deepcopy(net), **arguments), rank)
        results[f"fused {name}"] = train(DistributedDataParallel(fuse(copy.deepcopy(net)), **arguments), rank)
    results["eager accumulated"] = accumulated(copy.deepcopy(net), rank)
    results["fused accumulated"] = accumulated(fuse(copy.deepcopy(net)), rank)
    for reshard in (True, False):
        results[f"eager sharded {reshard}"] = train(sharded(copy.deepcopy(net), reshard), rank)
        results[f"fused sharded {reshard}"] = train(sharded(fuse(copy.deepcopy(net)), reshard), rank)
    for kind in (TinyNet, CifarNet):
        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(learner(kind))
        # DDP refuses SyncBatchNorm on a CPU
        results[f"fused synchronised {kind.__name__}"] = train(fuse(synchronised), rank, average=True)
    return results | regions(rank)


def regions(rank: int) -> dict[str, Any]:
    """A model of blocks written by hand, fused before and after it is wrapped."""
    net = learner(CifarNet)
    results = {"eager region": train(DistributedDataParallel(copy.deepcopy(net)), rank)}
    results["fused region"] = train(DistributedDataParallel(fuse(copy.deepcopy(net))), rank)
    results["fused region, wrapped first"] = train(fuse(DistributedDataParallel(copy.deepcopy(net))), rank)
    for reshard in (True, False):
        results[f"eager region sharded {reshard}"] = train(sharded(copy.deepcopy(net), reshard), rank)
        results[f"fused region sharded {reshard}"] = train(sharded(fuse(copy.deepcopy(net)), reshard), rank)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return ranks.run("test_distributed", "work", folder)


def same(results: list[dict[str, Any]], name: str, theirs: str | None = None) -> None:
    for rank, result in enumerate(results):
        eager, fused = dict(result[f"eager {theirs or name}"]), dict(result[f"fused {name}"])
        assert eager.pop("launches", 0) == 0 and fused.pop("launches", 1) > 0
        assert list(eager) == list(fused)
        for what, truth in eager.items():
            assert relative_error(fused[what], truth) < 1e-8, f"{what} on rank {rank}"


@pytest.mark.parametrize("name", WRAPPERS)
def test_distributed_data_parallel(name: str, results: list[dict[str, Any]]) -> None:
    """Gradients, weights and running statistics after some steps are those of eager DDP, on each rank."""
    same(results, name)
    for what, value in results[0][f"fused {name}"].items():
        if what.startswith("gradient"):
            assert torch.equal(value, results[1][f"fused {name}"][what]), "averaged over the ranks"


def test_gradients_accumulate_without_an_exchange(results: list[dict[str, Any]]) -> None:
    same(results, "accumulated")


@pytest.mark.parametrize("reshard", [True, False])
def test_fully_sharded(reshard: bool, results: list[dict[str, Any]]) -> None:
    """Parameters are whole only while a block runs; the backward reads them when they are whole again."""
    same(results, f"sharded {reshard}")


@pytest.mark.parametrize("name", ["region", "region, wrapped first", "region sharded True", "region sharded False"])
def test_regions(name: str, results: list[dict[str, Any]]) -> None:
    """Each step has the launches of one process, hooks of the wrappers or not."""
    same(results, name, name.split(",")[0])
    with count_launches() as log:
        x, y = batch(0, 0)
        nn.functional.cross_entropy(fuse(learner(CifarNet))(x), y).backward()
    assert all(result[f"fused {name}"]["launches"] == len(log) for result in results)


@pytest.mark.parametrize("kind", [TinyNet, CifarNet])
def test_synchronised_batch_norm_is_one_big_batch(kind: type[nn.Module], results: list[dict[str, Any]]) -> None:
    """With averaged gradients: training on all images in one process."""
    net = learner(kind)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        images, labels = (torch.cat(parts) for parts in zip(*(batch(rank, step) for rank in range(2)), strict=True))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    for result in results:
        for key, truth in net.state_dict().items():
            assert relative_error(result[f"fused synchronised {kind.__name__}"][key], truth) < 1e-8, key
