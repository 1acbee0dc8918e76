"""Training in two processes (gloo): DDP and FSDP2, against the same steps written out, and in pieces."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr
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

from fused_resnet.cli import main
from fused_resnet.train import Config, data, files, fit, networks, sampler, seeds
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
        fit(replace(whole, out=out / f"{kind} bf16", amp="bf16"))
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
    """DDP and FSDP2 take the steps as written out; in pieces bit for bit; in bf16 the same steps, and near those; and one
    process can go on behind two. They share images to evaluate.

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
    ddp, fsdp2 = (results[f"{kind} bf16"]["model"] for kind in ("ddp", "fsdp2"))
    for key, value in truth.items():
        assert relative_error(fsdp2[key], ddp[key]) < 1e-5, f"bf16: {key}"
        if value.ndim > 1:  # a filter: the steps of bf16, not those of fp32
            assert 1e-4 < relative_error(ddp[key], value) < 0.1, f"bf16: {key}"
    (tmp_path / "run").mkdir()
    torch.save(results["fsdp2"], tmp_path / "run" / "checkpoint.pt")
    history = fit(config(tmp_path / "run", resume=True))
    assert history.finished and history.step == STEPS


def command(root: Path, out: Path, *more: str) -> list[str]:
    """To train on a CPU after the recipe that lies beside."""
    return ["train", "--recipe", str(root / "short.json"), "--device", "cpu", "--out", str(out), *more]


def apart(rank: int) -> list[tuple[int, str]]:
    """Going on with a folder for each process, by the command, as torchrun starts it: exit codes, and what it says."""
    root = Path(os.environ["FUSED_RESNET_TEST_FOLDER"])
    os.environ["RANK"] = str(rank)
    found = []
    for case in sorted((root / "cases").iterdir()):
        kind = ("ddp", "fsdp2")[len(found) % 2]
        with redirect_stderr(io.StringIO()) as said:
            code = main(command(root, case / str(rank), "--resume", "--distributed", kind))
        found.append((code, said.getvalue()))
    return found


def test_folders_that_are_not_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going on where ``--out`` is another folder for each process: all stop in one line before anything is written, where one
    finds no checkpoint, that of another step, other weights of the same step, or a file that is none.
    """
    (tmp_path / "short.json").write_text(json.dumps(training.recipe(length=2).data_dict()))
    assert main(command(tmp_path, tmp_path / "run")) == 0
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    others = copy.deepcopy(saved)
    next(iter(others["model"].values())).mul_(1 + 1e-6)
    two, one = (rf"step {step} of weights [0-9a-f]{{8}}" for step in (2, 1))
    no, none = r"no checkpoint\.pt", "a file that it cannot go on behind"
    cases = [
        ((saved, two), (None, no)),
        ((None, no), (saved, two)),
        ((saved, two), ({**saved, "step": 1}, one)),
        ((saved, two), (others, two)),
        ((saved, two), ({"format": "another"}, none)),
    ]
    for index, case in enumerate(cases):
        for rank, (content, _) in enumerate(case):
            out = tmp_path / "cases" / str(index) / str(rank)
            out.mkdir(parents=True)
            if content is not None:
                torch.save(content, out / "checkpoint.pt")

    def written() -> dict[Path, str]:
        found = (path for path in (tmp_path / "cases").rglob("*") if path.is_file() and path.name != files.LOCK)
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

    before = written()
    monkeypatch.setenv("FUSED_RESNET_TEST_FOLDER", str(tmp_path))
    first, other = ranks.run("test_train_distributed", "apart", tmp_path, seconds=120)
    assert written() == before
    assert other == [(2, "")] * len(first), "the first tells it for both"
    for index, ((code, said), ((_, here), (_, there))) in enumerate(zip(first, cases, strict=True)):
        out = re.escape(str(tmp_path / "cases" / str(index) / "0"))
        says = f"{out}: --out must be one folder that all processes see: process 0 finds {here}, process 1 {there}"
        assert code == 2 and re.fullmatch(rf"fused-resnet: error: {says}\n", said), said


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """The command as users start it."""
    (tmp_path / "short.json").write_text(json.dumps(training.recipe(length=STEPS).data_dict()))
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fused_resnet"]
    started += command(tmp_path, tmp_path / "run", "--distributed", "fsdp2")
    environment = {**os.environ, "PYTHONPATH": str(ranks.ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(started, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("6 steps; test error") == 1
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == STEPS
