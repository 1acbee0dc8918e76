"""Training in two processes (gloo): DDP and FSDP2, against the same steps written out, and in pieces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
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

from fused_resnet.train import Config, data, fit, networks, sampler, seeds
from fused_resnet.train.distributed import World
from fused_resnet.train.evaluate import Result, evaluate
from fused_resnet.train.members import Member
from fused_resnet.train.recipe import learning_rate
from fused_resnet.train.views import Views

STEPS = 6


def config(out: Path, **changes: Any) -> Config:
    """Without dropout, whose random numbers the two processes draw on their own; with an average of the weights."""
    fields = {"recipe": training.recipe(length=STEPS), "model_arguments": {"dropout": 0.0}, "checkpoint_every": 2}
    return training.config(out, **{**fields, "backend": "cpu", **changes})


def evaluated(world: World) -> Result:
    """Of two networks, over 361 images of digits in ten crops."""
    digits = data.for_test("digits", None, Views("ten"), training.recipe(length=STEPS), None)
    assert isinstance(digits.test, data.Pixels)
    digits.test.images, digits.test.labels = digits.test.images[:361], digits.test.labels[:361]
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(Member(f"net {seed}", training.small(10).eval(), None, 10))
    return evaluate(found, digits, Views("ten"), world.device, batch=100, world=world)


def work(rank: int) -> dict[str, Any]:
    """Runs of both kinds, whole and in pieces."""
    folders: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folders)
    out = Path(folders[0])
    results: dict[str, Any] = {}
    for kind in ("ddp", "fsdp2"):
        whole = config(out / kind, distributed=kind)
        results[f"{kind} rows"] = fit(whole).rows
        pieces = replace(whole, out=out / f"{kind} pieces", resume=True)
        fit(replace(pieces, stop_after=3))
        fit(pieces)
    results["evaluated"] = evaluated(World.join("cpu"))
    if rank == 0:
        results |= {path.name: torch.load(path / "checkpoint.pt", weights_only=True) for path in out.iterdir()}
        shutil.rmtree(out)
    return results


def written_out() -> dict[str, torch.Tensor]:
    """The steps in fp64: gradients of the two halves of a batch, each with its own statistics, averaged."""
    recipe = training.recipe(length=STEPS)
    images = data.load("digits", None, recipe).train
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


def test_two_processes(tmp_path: Path) -> None:
    """DDP and FSDP2 take the steps as written out; in pieces bit for bit; and one process can go on behind two. They share
    images to evaluate.

    One test, since the processes are started once for all of it.
    """
    results, other = ranks.run("test_train_distributed", "work", tmp_path)
    alone = evaluated(World(torch.device("cpu")))
    for shared in (results["evaluated"], other["evaluated"]):
        assert replace(shared, seconds=0) == replace(alone, seconds=0), "each process has the result for all images"
    truth = written_out()
    for kind in ("ddp", "fsdp2"):
        whole, pieces, rows = results[kind], results[f"{kind} pieces"], results[f"{kind} rows"]
        assert list(whole["model"]) == list(truth)
        for key, value in truth.items():
            assert relative_error(whole["model"][key], value) < 1e-4, f"{kind}: {key}"
        train, test = rows[-2:]
        assert (train.split, test.split, test.step) == ("train", "test", STEPS) and 0 < test.error < 1
        assert whole["ema"] is not None and len(whole["random"]) == 2
        for saved in (whole, pieces):
            saved["window"] = [sums[:3] for sums in saved["window"]]
        assert training.same(whole, pieces) == [], kind
    (tmp_path / "run").mkdir()
    torch.save(results["fsdp2"], tmp_path / "run" / "checkpoint.pt")
    history = fit(config(tmp_path / "run", resume=True))
    assert history.finished and history.step == STEPS


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """The command as users start it."""
    path = tmp_path / "short.json"
    path.write_text(json.dumps(training.recipe(length=STEPS).data_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fused_resnet"]
    command += ["train", "--recipe", str(path), "--device", "cpu", "--distributed", "fsdp2", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ranks.ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("6 steps; test error") == 1
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == STEPS
