"""The training loop."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import checkpoint, data, files, metrics, networks, sampler, seeds
from .config import Config
from .distributed import World, whole, wrap
from .ema import Average, tensors
from .errors import DataError, TrainingError, UsageError, ended_elsewhere
from .fields import LONGEST
from .logs import Log, Row
from .progress import Progress
from .recipe import learning_rate
from .state import State

#: What a full disk says: no room, the user's quota (not known on Windows), a limit of the process.
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)


@dataclass(frozen=True)
class History:
    """What :func:`fit` returns.

    Attributes:
        rows: of the log, in order.
        step: steps done.
        finished: all of them.
        best: smallest test error, 0 to 1.
        checkpoint: the last one.
        bad: files that could not be read, and were skipped.
        waited: part of the time in which the loop waited for images.
    """

    rows: list[Row]
    step: int
    finished: bool
    best: float
    checkpoint: Path
    bad: list[str]
    waited: float


def fit(config: Config) -> History:
    """Train a network.

    Writes into ``config.out``: ``log.csv`` (the columns of :class:`fused_resnet.train.Row`), ``checkpoint.pt``, and
    ``best.pt`` (the weights with the smallest test error). With ``config.resume`` it goes on behind the checkpoint, and ends at
    the same weights as a run that was never interrupted.

    Raises:
        UsageError: wrong input.
        TrainingError: the loss is not finite, an image cannot be read, the disk is full.
    """
    world = World.join(config.device)
    history = _Run(config, world)()
    world.leave()  # not after an error: the others may be waiting for this process, which torchrun ends with it
    return history


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool) -> list[dict[str, Any]]:
    """One group; or two, in which vectors (gamma, beta, biases) do not decay."""
    parameters = list(model.parameters())
    if decay_all:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


class _Run:
    """One call of :func:`fit`."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world, recipe = config, world, config.recipe
        networks.check_backend(config.backend, world.device)
        self.path = config.out / checkpoint.NAME
        self.data = data.load(config.data_name, config.data_folder, recipe, config.on_corrupt)
        self.identity = {**config.identity(), "images": len(self.data.train), "classes": len(self.data.classes)}
        self.per_epoch = len(self.data.train) // recipe.batch
        if self.per_epoch == 0:
            raise UsageError(f"batch must be at most the {len(self.data.train)} training images, got {recipe.batch}")
        if recipe.batch % world.size:
            raise UsageError(f"batch must be a multiple of the {world.size} processes, got {recipe.batch}")
        self.total = recipe.total(self.per_epoch)
        if not 0 <= config.evaluate_every <= LONGEST:
            raise UsageError(f"evaluate_every must be from 0 to {LONGEST} epochs, got {config.evaluate_every}")
        seeds.seed_everything("weights", config.seed)
        model = networks.make(config.network, len(self.data.classes), config.backend, config.memory, **config.model_arguments)
        model = model.to(world.device).train()
        share = recipe.batch // world.size
        networks.try_out(model, config.network, len(self.data.classes), self.data.size, world.device, config.amp, share)
        self.wrapped: Any = wrap(model, config.distributed, world)
        # DistributedDataParallel's own forward would exchange buffers; with shards there is no other forward
        self.testing: Any = self.wrapped if config.distributed == "fsdp2" else model
        if config.compile:
            self.wrapped, self.testing = torch.compile(self.wrapped), torch.compile(self.testing)
        groups = parameter_groups(model, recipe.weight_decay, recipe.decay_all)
        optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)
        scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "fp16")
        average = Average(model, recipe.ema) if recipe.ema is not None else None
        seeds.seed_everything("training", config.seed, world.rank)
        self.state = State(model, optimizer, scaler, average)
        between = max(1, round(config.evaluate_every * self.per_epoch))
        self.evaluate_every = between if config.evaluate_every else self.total
        self.log_every = config.log_every or max(1, self.per_epoch // 10)
        self.checkpoint_every = config.checkpoint_every or min(self.per_epoch, 1000)
        self.seconds = self.waited = 0.0

    def _saved(self) -> dict[str, Any] | None:
        """The checkpoint to go on behind, if that is wanted and there is one."""
        if not self.path.exists():
            return None
        if not self.config.resume:
            raise UsageError(f"{self.path} is there already: --resume goes on behind it, another --out starts anew")
        saved = checkpoint.load(self.path)
        checkpoint.check_state(self.path, saved)
        changed = checkpoint.differences(saved["identity"], self.identity)
        if not changed:  # as many classes
            pairs = zip(saved["classes"], self.data.classes)
            changed = [f"class {i} {was!r} -> {now!r}" for i, (was, now) in enumerate(pairs) if was != now]
            changed[3:] = [f"and {len(changed) - 3} more"] if len(changed) > 3 else []
        if changed:
            raise UsageError(f"{self.path} is of another run, --resume goes on with the same only: {'; '.join(changed)}")
        return saved

    def _saved_by_all(self) -> dict[str, Any] | None:
        """:meth:`_saved`, which each process reads of its own folder: the same one, or networks of different steps would be
        averaged, and the first process's checkpoint lost.
        """
        if self.world.size == 1 or not self.config.resume:
            return self._saved()
        saved, failed = None, None
        try:
            saved = self._saved()
        except (UsageError, TrainingError) as error:
            failed = error
        mark = "a file that it cannot go on behind" if failed is not None else saved and checkpoint.mark(saved)
        marks = self.world.gather(mark)
        other = next((rank for rank, mark in enumerate(marks) if mark != marks[0]), None)
        if other is not None:
            here, there = (marks[rank] or f"no {checkpoint.NAME}" for rank in (0, other))
            differing = UsageError(
                f"{self.config.out}: --out must be one folder that all processes see: process 0 finds {here}, "
                f"process {other} {there}"
            )
            differing.of_all = True
            raise differing from failed
        if failed is not None:
            raise failed
        return saved

    def _load(self, saved: dict[str, Any]) -> None:
        try:
            self.state.load(saved, self.world)
        except UsageError as error:
            raise UsageError(f"{self.path}: {error}") from error
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # whatever a file may hold
            what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'in it'}"
            raise UsageError(f"{self.path}: its state is not as train writes it ({what}): cannot be gone on behind") from error

    def __call__(self) -> History:
        """Go on behind the checkpoint, or start; no other process writes into the folder meanwhile."""
        with ExitStack() as held:
            if self.world.first:
                try:
                    self.config.out.mkdir(parents=True, exist_ok=True)
                    held.enter_context(files.alone(self.config.out))
                except OSError as error:
                    raise UsageError(f"{self.config.out}: cannot be written ({error.strerror})") from error
            self.world.gather(None)  # the others read the checkpoint behind that
            return self._run()

    def _run(self) -> History:
        state, config = self.state, self.config
        saved = self._saved_by_all()
        if saved is not None:
            self._load(saved)
        self.saved_step: int | None = state.step if saved is not None else None
        self.progress = Progress(self.total, state.step, self.world.first and not config.quiet)
        self.log: Log | None = None
        if self.world.first:
            try:
                self.log = Log(config.out, state.step, config.tensorboard)
            except OSError as error:
                raise UsageError(f"{config.out}: cannot be written ({error.strerror})") from error
        if config.resume:
            self.progress.say(
                f"going on behind step {state.step}" if self.saved_step else f"{self.path}: not there yet, starting anew"
            )
        try:
            self._train()
        except DataError as error:
            raise self._stopped(f"stopped behind step {state.step}: {error}; {self._last()}") from error
        except metrics.NotFinite as error:
            raise self._stopped(f"stopped: {error}; {self._last()}") from error
        except OSError as error:
            reason = "the disk is full" if error.errno in _FULL else f"a file could not be read or written ({error})"
            raise TrainingError(f"stopped: {reason} at step {state.step}; {self._last()}") from error
        except RuntimeError as error:
            why = ended_elsewhere(error)
            if why is None:
                raise
            raise TrainingError(f"stopped at step {state.step}: {why}; {self._last()}") from error
        finally:
            if self.log is not None:
                self.log.close()
        rows = self.log.rows if self.log is not None else []
        waited = self.waited / max(self.seconds, 1e-9)
        return History(rows, state.step, state.step >= self.total, state.best, self.path, state.bad, waited)

    def _stopped(self, why: str) -> TrainingError:
        """What every process of the run comes to know, and the first one tells."""
        error = TrainingError(why)
        error.of_all = self.world.size > 1
        return error

    def _last(self) -> str:
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.path}, of step {self.saved_step}"

    def _train(self) -> None:
        """All steps; where an image stops them, what was done is saved."""
        try:
            self._steps()
        except DataError:
            try:
                if self.state.step:
                    self._save()
            finally:
                self.world.gather(None)  # torchrun ends all with the first that ends, and that should not be amid a file
            raise

    def _steps(self) -> None:
        state, config = self.state, self.config
        end = min(self.total, config.stop_after) if config.stop_after else self.total
        draws = sampler.draws(
            config.seed, len(self.data.train), config.recipe.batch, range(state.step, end), self.world.rank, self.world.size
        )
        self.clock = time.perf_counter()
        if state.untested:
            self._test(None)
        batches = self.world.together(self.data.train.batches(draws, config.workers))
        while state.step < end:
            asked = time.perf_counter()
            got = next(batches)
            state.window.waited += time.perf_counter() - asked
            self._note(got.bad)
            self._step(got)
            if self.world.size == 1 and (self.world.device.type == "cpu" or self.progress.due()):
                state.window.read()
                self.progress.between(state.step, state.window)
            self._after(end)

    def _note(self, bad: Iterable[str]) -> None:
        """Files that could not be read, told the first time."""
        for path in bad:
            if path not in self.state.bad:
                self.state.bad.append(path)
                self.progress.say(f"{path}: cannot be read as an image, skipped ({len(self.state.bad)} so far)")

    def _step(self, got: data.Batch) -> None:
        """Forward, backward, and one step of the optimizer."""
        state, recipe, device = self.state, self.config.recipe, self.world.device
        x = self.data.normalise(got.x.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
        labels = got.labels.to(device, non_blocking=True)
        state.lr = learning_rate(recipe, state.step, self.per_epoch, state.falling.divided)
        for group in state.optimizer.param_groups:
            group["lr"] = state.lr
        state.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=metrics.amp_dtype(self.config.amp), enabled=self.config.amp != "off"):
            logits = self.wrapped(x)
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.step += 1
        if state.average is not None:
            state.average.update(state.model, state.step)
        state.window.add(state.step, len(labels), loss, (logits.detach().argmax(1) != labels).sum())

    def _after(self, end: int) -> None:
        """Rows of the log, evaluation, checkpoint: each where its turn is."""
        step = self.state.step
        if self.config.recipe.plateau is not None and step % self.per_epoch == 0:
            self._epoch_ended()
        train = self._train_row() if step % self.log_every == 0 or step == self.total else None
        if step % self.evaluate_every == 0 or step == self.total:
            self._test(train)
        if step % self.checkpoint_every == 0 or step == end:
            self._save()

    def _epoch_ended(self) -> None:
        """Whether the training error still falls."""
        self._read()
        window = self.state.window
        wrong, images = self.world.sum([window.epoch_wrong, window.epoch_images])
        window.epoch_wrong = window.epoch_images = 0.0
        self.state.falling.look(wrong / images, self.state.step, self.config.recipe, self.per_epoch)

    def _epoch(self) -> float:
        return self.state.step / self.per_epoch

    def _train_row(self) -> Row:
        window = self.state.window
        self._read()
        self._tick()
        seconds = window.seconds
        loss, wrong, images = self.world.sum([window.loss, window.wrong, window.images])
        self.seconds += seconds
        self.waited += window.waited
        self.state.window = window.next()
        row = Row(
            self.state.step, self._epoch(), "train", loss / images, wrong / images, self.state.lr, images / max(seconds, 1e-9)
        )
        self._write(row)
        self.progress.bar(row)
        return row

    def _tick(self) -> None:
        """The time since the last call is training time of this window."""
        now = time.perf_counter()
        self.state.window.seconds += now - self.clock
        self.clock = now

    def _read(self) -> None:
        """Read the window; where one process finds a loss that is not finite, all stop."""
        error: metrics.NotFinite | None = None
        try:
            self.state.window.read()
        except metrics.NotFinite as found:
            error = found
        if self.world.size > 1:
            steps = [entry for entry in self.world.gather(error and (error.step, error.loss)) if entry is not None]
            error = metrics.NotFinite(*min(steps)) if steps else None
        if error is not None:
            raise error

    def _write(self, row: Row) -> None:
        if self.log is not None:
            self.log.write(row)

    def _test(self, train: Row | None) -> None:
        state = self.state
        state.untested = True
        self._tick()
        with state.average.in_place_of(state.model) if state.average is not None else nullcontext():
            self.world.share_buffers(state.model)  # process 0's: of an average, too, each has its own
            loss, error, images, bad = metrics.evaluate(
                self.testing, self.data, self.world, self.config, self.config.recipe.batch // self.world.size
            )
        self._note(bad)
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        state.untested = False
        row = Row(state.step, self._epoch(), "test", loss, error, self.state.lr, images / max(seconds, 1e-9))
        self._write(row)
        self.progress.tested(train, row)
        if math.isfinite(loss) and error < state.best:  # of scores that are NaN the first class is the answer
            state.best = error
            self._save_best()

    def _contents(self) -> dict[str, Any]:
        """What every checkpoint says about itself."""
        return {
            "identity": self.identity,
            "manner": self.config.manner(),
            "recipe": self.config.recipe.data_dict(),
            "classes": self.data.classes,
            "size": self.data.size,
            "mean": self.data.mean,
            "std": self.data.std,
        }

    def _save_best(self) -> None:
        state = self.state
        values = state.average.values if state.average is not None else tensors(state.model)
        weights = {name: whole(value) for name, value in values.items()}
        self._check_finite(weights)
        if self.world.first:
            contents = {**self._contents(), "step": state.step, "model": weights, "ema": None, "best": state.best}
            checkpoint.save(self.config.out / checkpoint.BEST, contents)

    def _check_finite(self, weights: dict[str, torch.Tensor]) -> None:
        """Raise before weights are written that are NaN or infinite; all processes have the same ones."""
        broken = next((name for name, value in weights.items() if not value.isfinite().all()), None)
        if broken is not None:
            raise self._stopped(f"stopped: after step {self.state.step} {broken} is not finite; {self._last()}")

    def _save(self) -> None:
        """Write the checkpoint, unless it would be of weights that are not finite."""
        self._read()
        self._tick()
        state = self.state
        self.world.share_buffers(state.model)
        saved = state.save(self.world)
        for weights in (saved["model"], saved["ema"] or {}):
            self._check_finite(weights)
        if self.log is not None:
            self.log.sync()
            checkpoint.save(self.path, {**self._contents(), **saved})
        self.saved_step = state.step
