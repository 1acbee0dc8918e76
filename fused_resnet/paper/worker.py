"""One run in a process of its own: ``python -m fused_resnet.paper.worker FILE`` with what to do as JSON in the file."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..whole_file import write_whole
from .networks import responses
from .scales import Run

#: Of a run's folder.
LOG, RESPONSES, DONE = "log.csv", "responses.json", "done.json"
#: Of :data:`DONE`: processor time of the whole run, start and responses included.
PROCESSOR = "processor_seconds"
#: Images whose layer responses are looked at.
WATCHED = 256


def is_done(out: Path, run: Run) -> bool:
    """Whether a run has come to its end."""
    return (out / run.name / DONE).exists()


def run(job: dict[str, Any]) -> None:
    """Train, then write the responses of the layers.

    Args:
        job: ``network``, ``seed``, ``pool``, ``data``, ``data_folder``, ``recipe``, ``epochs``, ``out``, ``threads``,
            ``responses``, and of the trainer's options ``backend``, ``device``, ``memory``, ``amp``, ``compile``,
            ``workers``, ``on_corrupt``.
    """
    from ..train import Config, checkpoint, fit
    from ..train import data as datasets
    from ..train import recipe as recipes
    from ..train.networks import make as make_network

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    recipe = recipes.load(job["recipe"])
    if job["epochs"] is not None:
        recipe = recipe.lasting(job["epochs"], "epochs")
    out = Path(job["out"])
    from_the_start = not (out / checkpoint.NAME).exists()
    config = Config(
        recipe,
        model="fused_resnet.paper.networks:make",
        model_arguments={"network": job["network"], "pool": job["pool"]},
        data=job["data"],
        data_folder=job["data_folder"] and Path(job["data_folder"]),
        seed=job["seed"],
        out=out,
        resume=True,
        backend=job["backend"],
        device=job["device"],
        memory=job["memory"],
        amp=job["amp"],
        compile=job["compile"],
        workers=job["workers"],
        on_corrupt=job["on_corrupt"],
        evaluate_every=recipe.length / 3 if recipe.unit == "epochs" else 10,
        quiet=True,
    )
    history = fit(config)
    if job["responses"]:
        data = datasets.load(config.data_name, config.data_folder, recipe, config.on_corrupt)
        model = make_network(config.network, len(data.classes), "eager", **config.model_arguments)
        model.load_state_dict(checkpoint.load(history.checkpoint)["model"])
        batch = next(iter(data.test.batches([datasets.Draw(list(range(min(WATCHED, len(data.test)))))])))
        write_whole(out / RESPONSES, json.dumps(responses(model, data.normalise(batch.x))).encode(), durable=True)
    done = {**job, "steps": history.step, "recipe_data": dataclasses.asdict(recipe), "threads": torch.get_num_threads()}
    if from_the_start:  # else the time before the interruption is not known
        done[PROCESSOR] = time.process_time()
    write_whole(out / DONE, json.dumps(done, indent=1, default=str).encode(), durable=True)


def main(path: str) -> int:
    """Do the job of a file; what went wrong is the last line on stderr, which the command tells."""
    from ..train import TrainingError, UsageError

    try:
        run(json.loads(Path(path).read_text(encoding="utf-8")))
    except (UsageError, TrainingError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
