"""The parts of training that are pure functions: rates, order, augmentation, averages, recipes."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from torch import Tensor, nn

from fused_resnet.train import UsageError, WarmUp, augment, data, logs, metrics, networks, plateau, progress, recipe, sampler
from fused_resnet.train.distributed import World
from fused_resnet.train.ema import Average
from fused_resnet.train.loop import parameter_groups


def rates(name: str, *steps: int) -> list[float]:
    return [recipe.learning_rate(recipe.load(name), step, 391) for step in steps]


def test_the_papers_rates() -> None:
    """0.1, divided by 10 at 32k and 48k of 64k steps; for deep networks 0.01 at first (He et al. 2016, section 4.2)."""
    paper = recipe.load("cifar-paper")
    assert (paper.batch, paper.length, paper.unit, paper.momentum, paper.weight_decay) == (128, 64000, "steps", 0.9, 1e-4)
    expected = [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert rates("cifar-paper", 0, 31999, 32000, 47999, 48000, 63999) == pytest.approx(expected)
    assert rates("cifar-paper-deep", 0, 399, 400, 32000) == pytest.approx([0.01, 0.01, 0.1, 0.01])
    imagenet = recipe.load("imagenet-paper")
    assert imagenet.schedule == "plateau" and (imagenet.batch, imagenet.length) == (256, 600000)
    assert [recipe.learning_rate(imagenet, 9, 5004, divided) for divided in range(3)] == pytest.approx([0.1, 0.01, 0.001])


def test_a_cosine_behind_a_warm_up() -> None:
    short = training.recipe(length=10, unit="epochs", lr=2.0, warm_up=WarmUp(1, 0.25))
    got = [recipe.learning_rate(short, step, 8) for step in range(80)]
    assert got[:8] == pytest.approx([2 * (0.25 + 0.75 * step / 8) for step in range(8)])
    assert got[8:] == pytest.approx([1 + math.cos(math.pi * step / 72) for step in range(72)])
    assert recipe.learning_rate(training.recipe(schedule="constant", lr=0.5), 7, 8) == 0.5


@pytest.mark.parametrize("length", [10**400, 1e308, 2.0**54, 0])
def test_a_length_that_is_none(length: float) -> None:
    with pytest.raises(UsageError, match=r"steps must be above 0 and at most 9007199254740992, got (1|0)"):
        training.recipe().lasting(length, "steps")


def test_another_length_stretches_the_schedule() -> None:
    short = recipe.load("cifar-paper-deep").lasting(640, "steps")
    assert (short.milestones, short.warm_up) == ((320, 480), WarmUp(4, 0.1, "constant"))
    longer = recipe.load("imagenet-paper").lasting(96, "epochs").plateau
    assert longer is not None and longer.patience == pytest.approx(4)


def test_a_plateau() -> None:
    """An epoch is better if it is below the best by ``least``; without one for the patience the rate is divided, some times."""
    short = training.recipe(length=90, schedule="plateau", plateau=recipe.Plateau(20, 0.05, 2))
    falling = plateau.Falling()
    seen = []
    for epoch, error in enumerate((0.9, 0.8, 0.76, 0.74, 0.74, 0.70, 0.68, 0.67, 0.67, 0.67, 0.67, 0.1, 0.1), 1):
        falling.look(error, 10 * epoch, short, 10)
        seen.append((falling.divided, falling.since))
    assert seen == [
        (0, 10), (0, 20), (0, 20), (0, 40), (0, 40), (1, 60), (1, 70), (1, 70), (2, 90), (2, 90), (2, 90),
        (2, 120), (2, 120),
    ]  # fmt: skip
    short = training.recipe(length=9, unit="epochs", schedule="plateau", plateau=recipe.Plateau(2))
    falling = plateau.Falling(0.5, 100)
    for step, divided in ((110, 0), (120, 1), (130, 1), (140, 2)):
        falling.look(0.5, step, short, 10)
        assert falling.divided == divided


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_loads(name: str) -> None:
    found = recipe.load(name)
    assert found.name == name and found.about and found.data in data.DATA
    assert recipe.from_data(json.loads(json.dumps(found.data_dict())), "again") == found
    augment.check(found.augment, augment.NAMES, "a test")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colour": 1}, "unknown field 'colour'"),
        ({"unit": "years"}, "unit of recipe 'test' must be one of steps, epochs, got 'years'"),
        ({"lr": -1}, "lr of recipe 'test' must be a number above 0"),
        ({"ema": 1.5}, "ema of recipe 'test'"),
        ({"warm_up": {"length": 1, "shape": "square"}}, "warm_up.shape"),
        ({"warm_up": {"lenth": 1}}, "lenth"),
        ({"schedule": "plateau"}, "plateau of recipe 'test' must be given with the schedule 'plateau'"),
        ({"plateau": {"patience": 2}}, "plateau of recipe 'test' must be given with the schedule 'plateau', and with it alone"),
        ({"schedule": "plateau", "plateau": {"patience": 0}}, "plateau.patience of recipe 'test' must be a number above 0"),
        (
            {"schedule": "plateau", "plateau": {"patience": 1, "times": 0}},
            "plateau.times of recipe 'test' must be a whole number above 0, got 0",
        ),
        ({"schedule": "plateau", "plateau": {"patience": "a"}}, "plateau.patience of recipe 'test' must be a number above 0"),
        ({"schedule": "plateau", "plateau": 3}, "plateau must be an object or null, got 3"),
        ({"schedule": "plateau", "plateau": {"least": 0.1}}, "patience"),
        ({"batch": 16.5}, "batch of recipe 'test' must be a whole number above 0, got 16.5"),
        ({"batch": True}, "batch of recipe 'test' must be a whole number above 0, got True"),
        ({"lr": True}, "lr of recipe 'test' must be a number above 0, got True"),
        ({"length": 1e300}, "length of recipe 'test' must be a number above 0 and at most 9007199254740992, got 1e"),
        ({"momentum": "a"}, "momentum of recipe 'test' must be a number from 0, got 'a'"),
        ({"momentum": -1}, "momentum of recipe 'test' must be a number from 0, got -1"),
        ({"momentum": 0}, "momentum of recipe 'test' must be above 0 with nesterov, got 0"),
        ({"weight_decay": "x"}, "weight_decay of recipe 'test' must be a number from 0, got 'x'"),
        ({"weight_decay": -1}, "weight_decay of recipe 'test' must be a number from 0, got -1"),
        ({"label_smoothing": 2}, "label_smoothing of recipe 'test' must be from 0 to 1, got 2"),
        ({"label_smoothing": "x"}, "label_smoothing of recipe 'test' must be from 0 to 1, got 'x'"),
        ({"milestones": ["a"]}, "milestones of recipe 'test' must be a list of numbers"),
        ({"milestones": 5}, "milestones must be a list, got 5"),
        ({"augment": "flip"}, "augment must be a list, got 'flip'"),
        ({"lr": 10**400}, "lr of recipe 'test' must be a number above 0, got 1"),
        ({"factor": "a"}, "factor of recipe 'test' must be a number from 0, got 'a'"),
        ({"warm_up": {"length": "a"}}, "warm_up.length of recipe 'test' must be a number from 0"),
        ({"warm_up": {"length": 1, "factor": None}}, "warm_up.factor of recipe 'test' must be a number from 0, got None"),
        ({"warm_up": [1]}, r"warm_up must be an object or null, got \[1\]"),
        ({"ema": "x"}, "ema of recipe 'test' must be null, or at least 0 and below 1, got 'x'"),
        ({"nesterov": "no"}, "nesterov of recipe 'test' must be true or false, got 'no'"),
        ({"decay_all": "no"}, "decay_all of recipe 'test' must be true or false, got 'no'"),
        ({"name": 5}, "name of recipe 5 must be a name of a folder, without / and"),
        ({"name": "../outside"}, "name of recipe '../outside' must be a name of a folder"),
        ({"name": ".."}, "must be a name of a folder"),
        ({"model": 5}, "model of recipe 'test' must be text, got 5"),
        ({"data": 5}, "data of recipe 'test' must be text, got 5"),
        ({"data": ["x"]}, r"data of recipe 'test' must be text, got \['x'\]"),
        ({"unit": ["steps"]}, "unit of recipe 'test' must be one of steps, epochs"),
    ],
)
def test_a_recipe_that_is_none(changes: dict, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**training.recipe().data_dict(), **changes}))
    with pytest.raises(UsageError, match=says):
        recipe.load(str(path))
    path.write_text("{")
    with pytest.raises(UsageError, match=r"mine\.json"):
        recipe.load(str(path))
    with pytest.raises(UsageError, match="did you mean cifar-paper"):
        recipe.load("cifar-papr")


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"name": "pad_crop"}, "padding"),
        ({"name": "pad_crop", "pading": 4}, "pading"),
        ({"name": "scale_crop", "shorter": [200, 300], "size": 224}, "shorter must be at least the size 224"),
        ({"name": "flap"}, "unknown step 'flap'; did you mean flip"),
        ("flip", "not an object with a name"),
    ],
)
def test_a_step_that_does_not_run(step: Any, says: str) -> None:
    """Found out before the first image, on an example."""
    with pytest.raises(UsageError, match=says):
        augment.check((step,), augment.NAMES, "a test")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_image_once_an_epoch(world: int) -> None:
    """Ranks share a batch; epochs differ; what is left over at an epoch's end is fewer than a batch."""
    images, batch = 43, 8
    ranks = [list(sampler.draws(3, images, batch, range(15), rank, world)) for rank in range(world)]
    alone = list(sampler.draws(3, images, batch, range(15)))
    for step in range(15):
        parts = [index for rank in ranks for index in rank[step].indices]
        assert sorted(parts) == sorted(alone[step].indices) and len(parts) == batch
    epochs = [[index for draw in alone[start : start + 5] for index in draw.indices] for start in (0, 5, 10)]
    assert all(len(set(epoch)) == 40 for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert len({draw.seed for rank in ranks for draw in rank}) == 15 * world
    assert list(sampler.draws(3, images, batch, range(7, 15))) == alone[7:]
    tests = [
        [index for draw in sampler.in_order(images, batch, rank, world) for index in draw.indices] for rank in range(world)
    ]
    assert len({len(part) for part in tests}) == 1, "all have to compute as often"
    assert sorted(index for part in tests for index in part if index >= 0) == list(range(images))
    for many in (images, 1, 0):
        shares = [[draw.indices for draw in sampler.share(many, batch, rank, world)] for rank in range(world)]
        assert sorted(index for share in shares for part in share for index in part) == list(range(many))
        for share in shares:
            sizes = {len(part) for part in share}
            assert all(max(1, max(sizes) - 1) <= size <= batch for size in sizes), "none is left with a single image"


def test_pad_crop_is_a_window_of_the_padded_image() -> None:
    x = torch.randn(64, 3, 5, 7)
    y = augment.pad_crop(x, torch.Generator().manual_seed(0), 2)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    places = set()
    for image, whole in zip(y, padded):
        found = [(r, c) for r in range(5) for c in range(5) if torch.equal(image, whole[:, r : r + 5, c : c + 7])]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 20, "nearly all of the 25 windows"


def test_flip_mirrors_about_half() -> None:
    x = torch.randn(100, 1, 2, 5)
    y = augment.flip(x, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(b, a.flip(2)) for a, b in zip(x, y)]
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, x, y)) and 30 < sum(mirrored) < 70


def test_digits() -> None:
    """All 1797 images once, every class in both splits, a fifth for the test; the mean image is gone after normalising."""
    found = data.load("digits", None, training.recipe(augment=()))
    assert (len(found.train), len(found.test), found.size) == (1433, 364, 32)
    train = next(found.train.batches([data.Draw(list(range(1433)), 1)]))
    test = next(found.test.batches([data.Draw(list(range(364)))]))
    assert train.x.shape == (1433, 3, 32, 32) and train.x.dtype == torch.float32
    assert train.x.mean(0).abs().max() < 1e-4 and train.x.square().mean() == pytest.approx(1, abs=1e-3)
    for label in range(10):
        inside, outside = (test.labels == label).sum(), (train.labels == label).sum()
        assert inside == math.ceil((inside + outside) / 5)
    assert test.x.dtype == torch.uint8
    together = torch.cat([train.x, found.normalise(test.x)]).flatten(1)
    assert len(torch.unique(together, dim=0)) == 1797


def test_the_bar_tells_loss_error_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.Progress(100, 20, True, Terminal())
    now[0] += 30
    shown.bar(logs.Row(40, 2.0, "train", 0.51234, 0.125, 0.1, 1234.5))
    assert shown.stream.getvalue().endswith(
        "[########............] step 40/100  loss 0.5123  error 12.50%  1,234 images/s  1:30 left"
    )
    window = metrics.Window(loss=8.0, wrong=2.0, images=16.0)
    shown.between(41, window)
    assert "step 41" not in shown.stream.getvalue(), "drawn a moment ago"
    now[0] += 2
    shown.between(42, window)
    assert shown.stream.getvalue().endswith("step 42/100  loss 0.5000  error 12.50%  8 images/s  1:24 left")
    assert progress.duration(3700) == "1:01:40"


def test_an_image_that_fills_up_is_not_counted(tmp_path: Path) -> None:
    """Seven images over two processes: their sums are those of one."""

    class Alone(World):
        def sum(self, values: list[float]) -> list[float]:
            return values

        def together(self, batches: Any) -> Any:
            return batches

    split = data.Pixels(torch.randint(256, (7, 3, 32, 32), dtype=torch.uint8), torch.arange(7))
    images = data.in_memory("seven", list("abcdefg"), split, split, "pixel_mean")
    model, config, cpu = training.small(7), training.config(tmp_path), torch.device("cpu")
    loss, error, count, _ = metrics.evaluate(model, images, World(cpu), config, 3)
    parts = [metrics.evaluate(model, images, Alone(cpu, rank, 2), config, 2) for rank in (0, 1)]
    assert [part[2] for part in parts] == [4, 3] and count == 7 and model.training
    assert sum(part[0] * part[2] for part in parts) == pytest.approx(7 * loss, rel=1e-5)
    assert sum(part[1] * part[2] for part in parts) == pytest.approx(7 * error)


def test_average_of_weights() -> None:
    """Against the recursion in float64; counts of batches are copied; the context puts the model's own back."""
    model = training.small(10)
    average = Average(model, 0.8)
    truth = {name: value.double() for name, value in model.state_dict().items()}
    for step in range(1, 60):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(torch.randn(value.shape)) if value.is_floating_point() else value.add_(1)
        average.update(model, step)
        decay = min(0.8, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            truth[name] = decay * truth[name] + (1 - decay) * value.double()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with average.in_place_of(model):
        for name, value in model.state_dict().items():
            expected = truth[name] if value.is_floating_point() else torch.tensor(59)
            torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=1e-5)
    assert training.same(own, model.state_dict()) == []


def test_vectors_that_do_not_decay() -> None:
    model = training.small(10)
    decaying, free = parameter_groups(model, 0.1, decay_all=False)
    assert {p.ndim for p in decaying["params"]} == {2, 4} and {p.ndim for p in free["params"]} == {1}
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert len(decaying["params"]) + len(free["params"]) == len(parameter_groups(model, 0.1, True)[0]["params"])


class _Odd(nn.Module):
    """What two images alone, or no gradients, or a copy of its buffers would not do for."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 3)
        self.register_buffer("mask", torch.ones(1, 3).expand(4, 3), persistent=False)
        self.register_buffer("bank", torch.zeros(0, 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x.unflatten(0, (-1, 4)).flatten(0, 1).flatten(1)) * self.mask[:1]
        self.bank = torch.cat([self.bank, y.detach()])
        if self.training:
            assert self.head.weight.requires_grad and torch.autograd.grad(y.sum(), self.head.weight, retain_graph=True)
        return y


def test_a_network_that_wants_a_batch_and_gradients_is_tried_so() -> None:
    net = _Odd()
    bank = net.bank
    networks.try_out(net, "odd", 3, 8, torch.device("cpu"), batch=8)
    assert net.bank is bank and bank.shape == (0, 3) and net.training
    with pytest.raises(UsageError, match="model odd: fails in eval mode on images of 8x8: RuntimeError"):
        networks.try_out(net, "odd", 3, 8, torch.device("cpu"), batch=6)
