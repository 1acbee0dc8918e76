"""Run as a program: trainings that are killed, each in a process of its own, forked from one that has imported everything.

``killing.py FOLDER BACKEND MOMENT...`` trains once undisturbed into ``FOLDER/whole``, then for each moment into ``FOLDER/i``:
until it is killed there, then with ``--resume`` to the end. A moment is ``step:K:S``, S seconds after step K began;
``evaluation:N:S``, likewise of the N-th evaluation; or ``before:N`` or ``after:N``, the N-th time a file is put in its place,
and with a name behind it, ``before:N:best.pt``, that file. On ``triton`` it is three steps without an evaluation.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import sklearn.datasets  # noqa: F401
import torch
import training

from fused_resnet.train import Config, Recipe, fit, loop, metrics

#: Epochs, of six of its 89 steps.
EVALUATE = 6 / 89


def child(config: Config, moment: str = "") -> int:
    """Train in a new process; its id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            if moment:
                kill_at(moment)
            fit(config)
            code = 0
        finally:
            os._exit(code)
    return process


def kill_at(moment: str) -> None:
    """Arrange for the end of this process."""
    where, number, *more = moment.split(":")
    if where == "step":
        kill_in_step(int(number), float(more[0]))
    elif where == "evaluation":
        kill_in_evaluation(int(number), float(more[0]))
    else:
        kill_in_replace(where, int(number), *more)


def kill() -> None:
    """What no process can catch."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_step(number: int, seconds: float) -> None:
    """Some time after a step has asked for its learning rate."""
    real = loop.learning_rate

    def asked(recipe: Recipe, step: int, *more: int) -> float:
        if step == number:
            threading.Timer(seconds, kill).start()
        return real(recipe, step, *more)

    loop.learning_rate = asked


def kill_in_evaluation(number: int, seconds: float) -> None:
    """Some time after an evaluation has begun."""
    real, calls = metrics.evaluate, iter(range(1, 1000))

    def evaluating(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            threading.Timer(seconds, kill).start()
        return real(*arguments, **named)

    metrics.evaluate = evaluating


def kill_in_replace(where: str, number: int, name: str = "") -> None:
    """Before or after a rename."""
    real, calls = os.replace, iter(range(1, 1000))

    def replacing(*arguments: object) -> None:
        last = (not name or Path(str(arguments[1])).name == name) and next(calls) == number
        if last and where == "before":
            kill()
        real(*arguments)  # type: ignore[arg-type]
        if last:
            kill()

    os.replace = replacing  # type: ignore[assignment]


def ended(process: int) -> int:
    """How it ended: 0, or minus the signal's number."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main() -> None:
    """The trainings."""
    folder, backend, moments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    config = training.config(folder / "whole", backend=backend, resume=True)
    if any("evaluation" in moment or "best.pt" in moment for moment in moments):
        config = replace(config, evaluate_every=EVALUATE)
    if backend == "triton":
        config = replace(config, recipe=training.recipe(batch=4), stop_after=3, checkpoint_every=1)
    assert ended(child(config)) == 0
    for index, moment in enumerate(moments):
        config = replace(config, out=folder / str(index))
        code = ended(child(config, moment))
        assert code == (-signal.SIGKILL if not moment.startswith(("step", "evaluation")) else code), f"{moment}: {code}"
        print(index, moment, "killed" if code == -signal.SIGKILL else "had ended", flush=True)
        assert ended(child(config)) == 0, f"{moment}: did not go on"


if __name__ == "__main__":
    main()
