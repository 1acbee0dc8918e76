"""Run as a program: trainings that are killed, each in a process of its own, forked from one that has imported everything.

``killing.py FOLDER BACKEND MOMENT...`` trains once undisturbed into ``FOLDER/whole``, then for each moment into ``FOLDER/i``:
until it is killed there, then with ``--resume`` to the end. A moment is ``step:K:S``, S seconds after step K began; or
``before:N`` or ``after:N``, the N-th time a file is put in its place.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import sklearn.datasets  # noqa: F401
import torch
import training

from fused_resnet.train import Config, Recipe, fit, loop


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
    where, *numbers = moment.split(":")
    if where == "step":
        kill_in_step(int(numbers[0]), float(numbers[1]))
    else:
        kill_in_replace(where, int(numbers[0]))


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


def kill_in_replace(where: str, number: int) -> None:
    """Before or after a rename."""
    real, calls = os.replace, iter(range(1, 1000))

    def replacing(*arguments: object) -> None:
        last = next(calls) == number
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
    assert ended(child(config)) == 0
    for index, moment in enumerate(moments):
        config = replace(config, out=folder / str(index))
        code = ended(child(config, moment))
        assert code == (-signal.SIGKILL if moment[0] != "s" else code), f"{moment}: {code}"
        print(index, moment, "killed" if code == -signal.SIGKILL else "had ended", flush=True)
        assert ended(child(config)) == 0, f"{moment}: did not go on"


if __name__ == "__main__":
    main()
