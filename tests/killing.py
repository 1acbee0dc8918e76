"""Run as a program: trainings that are killed, each in a process of its own, forked from one that has imported everything.

``killing.py FOLDER BACKEND MOMENT...`` trains once undisturbed into ``FOLDER/whole``, then for each moment into ``FOLDER/i``:
until it is killed there, then with ``--resume`` to the end. A moment is a part of the undisturbed run's time (``0.37``), or
``before:N`` or ``after:N``: the N-th time a file is put in its place.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import sklearn.datasets  # noqa: F401
import torch
import training

from fused_resnet.train import Config, fit


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
    """The N-th ``os.replace`` of this process is its end."""
    where, _, number = moment.partition(":")
    real, calls = os.replace, iter(range(1, 1000))

    def replacing(*arguments: object) -> None:
        last = next(calls) == int(number)
        if last and where == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)  # type: ignore[arg-type]
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replacing  # type: ignore[assignment]


def ended(process: int) -> int:
    """How it ended: 0, or minus the signal's number."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main() -> None:
    """The trainings."""
    folder, backend, moments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    config = training.config(folder / "whole", backend=backend, resume=True)
    began = time.monotonic()
    assert ended(child(config)) == 0
    seconds = time.monotonic() - began
    for index, moment in enumerate(moments):
        config = replace(config, out=folder / str(index))
        if ":" in moment:
            code = ended(child(config, moment))
            assert code == -signal.SIGKILL, f"{moment}: {code}"
        else:
            process = child(config)
            time.sleep(float(moment) * seconds)
            os.kill(process, signal.SIGKILL)
            code = ended(process)
        print(index, moment, "killed" if code == -signal.SIGKILL else "had ended", flush=True)
        assert ended(child(config)) == 0, f"{moment}: did not go on"


if __name__ == "__main__":
    main()
