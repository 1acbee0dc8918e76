"""Training in two processes (gloo): DDP and FSDP2, against the same steps written out, and in pieces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
import training
from tolerances import relative_error

from fused_resnet.train import Config, data, fit, sampler
from fused_resnet.train.recipe import learning_rate

STEPS = 6


def config(out: Path, **changes: Any) -> Config:
    """Without dropout, whose random numbers the two processes draw on their own."""
    recipe = training.recipe(length=STEPS, ema=None)
    fields = {"recipe": recipe, "model_arguments": {"dropout": 0.0}, "backend": "cpu", "checkpoint_every": 2}
    return training.config(out, **{**fields, **changes})


def work(rank: int) -> dict[str, Any]:
    """Runs of both kinds, whole and in pieces, and one that process 0 goes on with alone."""
    paths: list[Any] = [None]
    if rank == 0:
        import tempfile

        paths = [tempfile.mkdtemp()]
    dist.broadcast_object_list(paths)
    out = Path(paths[0])
    results: dict[str, Any] = {}
    for kind in ("ddp", "fsdp2"):
        for changes in ({}, {"recipe": training.recipe(length=STEPS)}, {"backend": "eager"}):
            name = " ".join([kind, *changes])
            whole = config(out / name, distributed=kind, **changes)
            results[f"{name} rows"] = fit(whole).rows
            if name != f"{kind} backend":
                pieces = replace(whole, out=out / f"{name} pieces", resume=True)
                fit(replace(pieces, stop_after=3))
                fit(pieces)
    dist.barrier()
    if rank == 0:
        results |= {path.name: torch.load(path / "checkpoint.pt", weights_only=True) for path in out.iterdir()}
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks.run("test_train_distributed", "work", tmp_path_factory.mktemp("ranks"))[0]


def written_out() -> dict[str, torch.Tensor]:
    """The steps in fp64: gradients of the two halves of a batch, each with its own statistics, averaged."""
    recipe = training.recipe(length=STEPS, ema=None)
    images = data.load("digits", None, recipe).train
    from fused_resnet.train import networks, seeds

    seeds.seed_everything("weights", 0)
    model = networks.make(training.SMALL, 10, "eager", dropout=0.0).double().train()
    optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9, weight_decay=1e-4, nesterov=True)
    draws = [list(sampler.draws(0, len(images), 16, range(STEPS), rank, 2)) for rank in (0, 1)]
    for step in range(STEPS):
        optimizer.zero_grad()
        statistics = None
        for rank in (0, 1):
            got = next(images.batches([draws[rank][step]]))
            loss = F.cross_entropy(model(got.x.double()), got.labels, label_smoothing=0.1)
            (loss / 2).backward()
            if statistics is None:  # process 0's are those that are kept
                statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, len(images) // 16)
        optimizer.step()
        for name, buffer in model.named_buffers():
            buffer.copy_(statistics[name])
    return model.state_dict()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_written_out(kind: str, results: dict[str, Any]) -> None:
    truth = written_out()
    for name in (kind, f"{kind} backend"):
        saved = results[name]["model"]
        assert list(saved) == list(truth)
        for key, value in truth.items():
            assert relative_error(saved[key], value) < 1e-4, f"{name}: {key}"
    train, test = results[f"{kind} rows"][-2:]
    assert (train.split, test.split, test.step) == ("train", "test", STEPS) and 0 < test.error < 1


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "ddp recipe", "fsdp2 recipe"])
def test_two_processes_in_pieces(kind: str, results: dict[str, Any]) -> None:
    """Bit for bit, with an average of the weights too."""
    whole, pieces = results[kind], results[f"{kind} pieces"]
    for saved in (whole, pieces):
        saved["window"] = [sums[:3] for sums in saved["window"]]
    assert (whole["ema"] is not None) == ("recipe" in kind)
    assert training.same(whole, pieces) == []
