"""Data sets from disk: CIFAR's files, folders of images, and what is said where they are missing or damaged."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import training
from PIL import Image

from fused_resnet.train import Recipe, TrainingError, UsageError, data, fit
from fused_resnet.train import folder as folders
from fused_resnet.train.data import Draw
from fused_resnet.train.recipe import load

STEPS = ({"name": "scale_crop", "shorter": [40, 60], "size": 32}, {"name": "flip"}, {"name": "colour"}, {"name": "trivial"})


def recipe(steps: tuple = STEPS) -> Recipe:
    return training.recipe(data="folder", normalise="channels", augment=steps, batch=4, length=9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 training and 6 test images of three classes, of odd sizes, JPEG and PNG."""
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 80, (50 + index, 41, 3), dtype=np.uint8)
                pixels[:, :, label] += 150
                Image.fromarray(pixels).save(tmp_path / "set" / part / name / f"{index}.{('jpg', 'png')[index % 2]}")
    return tmp_path / "set"


def damage(folder: Path) -> list[Path]:
    """Cuts one training image off, and puts text into another's place."""
    cut, text = folder / "train" / "bee" / "0.jpg", folder / "train" / "cat" / "1.png"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    text.write_text("no image")
    return [cut, text]


@pytest.mark.parametrize("steps", [STEPS, ({"name": "resized_crop", "size": 32}, {"name": "pad_crop", "padding": 3})])
def test_a_folder_is_the_same_by_any_number_of_workers(steps: tuple, folder: Path) -> None:
    (folder / "train" / "ant" / "2.jpg").write_bytes((folder / "train" / "ant" / "0.jpg").read_bytes())
    found = data.load("folder", folder, recipe(steps))
    twins = next(found.train.batches([Draw([0, 2], 1)])).x
    assert not torch.equal(twins[0], twins[1]), "each image has random numbers of its own"
    assert (found.classes, len(found.train), len(found.test), found.size) == (["ant", "bee", "cat"], 12, 6, 32)
    draws = [Draw([0, 5, 9], 1), Draw([11, 5, 0], 2), Draw([0, 5, 9], 1)]
    state = torch.get_rng_state()
    alone, shared = (list(found.train.batches(draws, workers)) for workers in (0, 2))
    assert torch.equal(torch.get_rng_state(), state), "the run's own random numbers are left alone"
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.labels, other.labels)
        assert one.x.dtype == torch.uint8 and one.x.shape == (3, 3, 32, 32)
    assert alone[0].labels.tolist() == [0, 1, 2]
    assert torch.equal(alone[0].x, alone[2].x) and not torch.equal(alone[0].x[1], alone[1].x[1])


def test_the_test_view_is_the_centre(folder: Path) -> None:
    """The shorter side to 37 (256 / 224 of 32), the crop of 32 in the middle, ImageNet's mean and deviation."""
    found = data.load("folder", folder, recipe())
    batch = next(found.test.batches([Draw([0, 3])]))
    for image, name in zip(batch.x, ("ant/0.jpg", "bee/1.png")):
        with Image.open(folder / "val" / name) as file:
            small = file.convert("RGB").resize((37, int(37 * file.height / 41)), Image.Resampling.BILINEAR)
        left, top = round((small.width - 32) / 2), round((small.height - 32) / 2)
        assert torch.equal(image, torch.from_numpy(np.array(small)[top : top + 32, left : left + 32]).permute(2, 0, 1))
    normal = found.normalise(batch.x).double()
    expected = (batch.x.double() / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    torch.testing.assert_close(normal, expected, rtol=1e-5, atol=1e-5)


def test_a_damaged_image_stops_or_is_skipped_with_a_count(folder: Path, tmp_path: Path) -> None:
    """Named; a run that skips goes on behind an interruption bit for bit, and knows what it skipped."""
    bad = damage(folder)
    config = training.config(tmp_path / "stop", recipe=recipe(), data_folder=folder, backend="cpu", workers=0)
    with pytest.raises(TrainingError, match=r"(bee/0\.jpg|cat/1\.png): cannot be read as an image"):
        fit(config)
    whole = replace(config, out=tmp_path / "whole", on_corrupt="skip")
    assert sorted(fit(whole).bad) == sorted(map(str, bad))
    pieces = replace(whole, out=tmp_path / "pieces", resume=True, workers=1)
    fit(replace(pieces, stop_after=4))
    assert sorted(fit(pieces).bad) == sorted(map(str, bad))
    weights = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["model"] for run in ("whole", "pieces")]
    assert training.same(*weights) == []


@pytest.mark.parametrize("part", ["train/bee/0.jpg", "val/bee/0.jpg"])
def test_nothing_is_lost_at_a_damaged_image(part: str, folder: Path, tmp_path: Path) -> None:
    """Steps before it are saved, an evaluation that was due is made later: with the file repaired all is as without."""
    whole = training.config(
        tmp_path / "whole", recipe=recipe(), data_folder=folder, backend="cpu", workers=0, checkpoint_every=100,
        evaluate_every=1, log_every=2,
    )  # fmt: skip
    history = fit(whole)
    good = (folder / part).read_bytes()
    (folder / part).write_bytes(good[:300])
    config = replace(whole, out=tmp_path / "run", resume=True)
    with pytest.raises(TrainingError, match=r"stopped behind step (\d): .*bee/0\.jpg: cannot.*checkpoint\.pt, of step \1"):
        fit(replace(config, seed=0))
    (folder / part).write_bytes(good)
    rows = [[replace(row, images_per_second=0) for row in found.rows] for found in (history, fit(config))]
    assert rows[0] == rows[1] and [row.step for row in rows[0] if row.split == "test"] == [3, 6, 9]
    for name in ("checkpoint.pt", "best.pt"):
        saved = [torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "run")]
        for contents in saved:
            contents.pop("window", None)
        assert training.same(*saved) == []


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm"])
def test_16_bits_are_read_as_8(name: str, tmp_path: Path) -> None:
    """Pillow's own conversion would make all above 255 white."""
    wide = np.arange(0, 65536, 37, dtype=np.uint16)[:1764].reshape(42, 42)
    Image.fromarray(wide).save(tmp_path / name)
    got = np.asarray(folders.decoded(str(tmp_path / name)))
    assert got.dtype == np.uint8 and got.shape == (42, 42, 3)
    np.testing.assert_array_equal(got, np.rint(wide / 257)[:, :, None].repeat(3, 2))
    colours = (wide[:, :, None].repeat(3, 2) >> 8).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / "colours.png")
    np.testing.assert_array_equal(np.asarray(folders.decoded(str(tmp_path / "colours.png"))), colours)


@pytest.mark.parametrize(("kind", "says"), [(np.int32, "32-bit pixels"), (np.float32, "float pixels")])
def test_pixels_without_a_white_are_not_read(kind: type, says: str, folder: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((50, 50), 1000, dtype=kind)).save(folder / "train" / "bee" / "9.tif")
    config = training.config(tmp_path / "run", recipe=recipe(), data_folder=folder, backend="cpu", workers=0)
    with pytest.raises(TrainingError, match=rf"bee/9\.tif: cannot be read as an image \(ValueError: {says}, expected 8 or 16"):
        fit(config)
    assert fit(replace(config, out=tmp_path / "skip", on_corrupt="skip")).bad == [str(folder / "train" / "bee" / "9.tif")]


def test_what_fills_up_a_process_that_is_one_image_short_is_no_file(folder: Path) -> None:
    """Else a damaged first image would be read, and end the test pass, where it is the only one of that batch."""
    (folder / "val" / "ant" / "0.jpg").write_text("no image")
    found = data.load("folder", folder, recipe())
    for workers in (0, 2):
        alone, beside = found.test.batches([Draw([-1]), Draw([1, -1])], workers)
        assert alone.labels.tolist() == [-1] and alone.x.shape == (1, 3, 32, 32) and not alone.bad
        assert beside.labels.tolist() == [0, -1] and beside.x.shape == (2, 3, 32, 32)
        assert torch.equal(beside.x[1], alone.x[0]) and not torch.equal(beside.x[0], alone.x[0])


def test_a_name_that_is_not_utf8(folder: Path, tmp_path: Path) -> None:
    """A checkpoint takes it, and the run goes on behind it."""
    odd = folder / "train" / "bee" / os.fsdecode(b"\xff.jpg")
    try:
        odd.write_text("no image")
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    config = training.config(tmp_path / "run", recipe=recipe(), data_folder=folder, backend="cpu", workers=0)
    config = replace(config, on_corrupt="skip", resume=True)
    fit(replace(config, stop_after=6))
    assert fit(config).bad == [str(odd)]


def test_a_folder_that_is_none(folder: Path, tmp_path: Path) -> None:
    def refused(path: Path, says: str, wanted: Recipe | None = None) -> None:
        with pytest.raises(UsageError, match=says):
            data.load("folder", path, wanted or recipe())

    refused(tmp_path / "nowhere", r"there is no .*train: bring a folder with train/CLASS/\*.jpg and val/CLASS/\*.jpg")
    refused(folder, "is not for a folder: its augment has none of scale_crop", recipe(({"name": "flip"},)))
    refused(folder, "; imagenet-modern and imagenet-paper are for a folder", load("digits"))
    refused(folder, "normalise must be 'channels'", replace(recipe(), normalise="pixel_mean"))
    refused(folder, "unknown step 'flap'; did you mean flip", recipe(({"name": "flap"},)))
    (folder / "val" / "ant").rename(folder / "val" / "ape")
    refused(folder, "class 'ant' is only in .*train")
    for image in (folder / "train" / "cat").iterdir():
        image.unlink()
    refused(folder, "cat")


def write_cifar10(root: Path) -> np.ndarray:
    """Files as CIFAR-10's archive has them, with two images each; the training pixels, [10, 3, 32, 32]."""
    inside = root / "cifar-10-batches-py"
    inside.mkdir(parents=True)
    random, pixels = np.random.default_rng(0), []
    for name in [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]:
        images = random.integers(0, 256, (2, 3072), dtype=np.uint8)
        pixels.append(images.reshape(2, 3, 32, 32))
        (inside / name).write_bytes(pickle.dumps({"data": images, "labels": [len(pixels), 0]}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (inside / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return np.concatenate(pixels[:5])


def test_cifar_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # the checksums are the real files'
    for place in (tmp_path, tmp_path / "cifar-10-batches-py"):
        found = data.load("cifar10", place, training.recipe(augment=()))
        assert (len(found.train), len(found.test), len(found.classes), found.classes[3]) == (10, 2, 10, "cat")
        batch = next(found.train.batches([Draw([4, 0], 1)]))
        assert batch.labels.tolist() == [3, 1]
        mean = pixels.astype(np.float64).mean(0)
        expected = (pixels[[4, 0]] - mean) / np.sqrt(np.square(pixels - mean).mean())
        np.testing.assert_allclose(batch.x.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_cifar_that_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"bring cifar-100-python.tar.gz from https.* and unpack it in .*--data-dir"):
        data.load("cifar100", tmp_path, training.recipe())
    write_cifar10(tmp_path)
    with pytest.raises(UsageError, match=r"is not whole .* unpack cifar-10-python.tar.gz again"):
        data.load("cifar10", tmp_path, training.recipe())
    with pytest.raises(UsageError, match="unknown data set 'cifar'; did you mean"):
        data.load("cifar", tmp_path, training.recipe())


def test_going_on_with_classes_of_other_names(folder: Path, tmp_path: Path) -> None:
    """As many classes, but others: the labels would mean something else."""
    config = training.config(tmp_path / "run", recipe=recipe(), data_folder=folder, workers=0, backend="cpu", resume=True)
    fit(replace(config, stop_after=3))
    for part in ("train", "val"):
        (folder / part / "ant").rename(folder / part / "dog")
    with pytest.raises(
        UsageError, match=r"is of another run, .*: class 0 'ant' -> 'bee'; class 1 'bee' -> 'cat'; class 2 'cat'"
    ):
        fit(config)
    for part in ("train", "val"):
        (folder / part / "dog").rename(folder / part / "ant")
    assert fit(config).finished
