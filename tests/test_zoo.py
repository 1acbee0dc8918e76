"""fuse on the models that people have: outputs, gradients, running statistics, state_dict, the share that is fused.

And what ``fused-resnet zoo`` keeps of them where it was stopped, or where a model failed.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import zoo
import zoo_check

from fused_resnet import fuse
from fused_resnet.cli import main
from fused_resnet.cli import zoo as command
from fused_resnet.counts import fused_share

#: What `make test` takes; `make test-all` takes all.
SAMPLE = ("by hand CifarNet", "by hand PreActivationNet", "timm resnet18 features_only=True", "timm regnety_002")
ALL = [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in zoo.ZOO]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ALL)
def test_it_computes_what_it_did(name: str, training: bool) -> None:
    zoo_check.check(name, training)


#: Those that are not looked at as a whole: with code that cannot be traced, or of this folder; or it is one part of them that
#: holds all chains. (Of the last three packages it was not tried.)
IN_PARTS = ("vgg", "maxvit", "without the choice of boxes", "by hand", "transformers", "smp", "open_clip")


@pytest.mark.parametrize("name", ALL)
def test_called_again_and_again(name: str) -> None:
    """Without gradients: the third call looks at all of it, those behind it once."""
    looked = zoo_check.check_again(name)
    assert looked or any(part in name for part in IN_PARTS)


@pytest.mark.parametrize("name", ALL)
def test_the_fused_share_of_the_convolutions(name: str) -> None:
    model, x = zoo.build(name)
    fuse(model.eval())
    with torch.no_grad():
        share = fused_share(model, x)
    assert share >= zoo.ZOO[name][3], share


# ---- the command's file

HEADER = ",".join((*command.COLUMNS, *command.TIMES)) + "\n"
OLD_HEADER = ",".join(command.COLUMNS) + "\n"
NAMES = ("resnet18", "resnet34", "resnet50")


def line_of(name: str, agrees: str = "yes", note: str = "") -> str:
    return f"{name},9,68,23,117.0,72.6,1.000,1.7e-06,1.7e-06,{agrees},1.21,{note},,,,\n"


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Models are not made but looked up: a list of those asked for; resnet50 fails the first time."""
    asked: list[str] = []

    def row(name: str, size: int, counted: int, seconds: float | None = None) -> dict[str, object]:
        asked.append(name)
        if name == "resnet50" and asked.count(name) == 1:
            return {"model": name, "agrees": "", "note": "MemoryError: out of memory"}
        made = dict(zip((*command.COLUMNS, *command.TIMES), line_of(name).rstrip("\n").split(",")))
        return made if seconds is None else {**made, "ms_eager": 3.0, "ms_channels_last": 2.0, "ms_fused": 1.6, "timed": "here"}

    monkeypatch.setattr(command, "row", row)
    return asked


@pytest.mark.parametrize(
    ("there", "kept"),
    [
        (HEADER + line_of("resnet18") + line_of("resnet34")[:25], ["resnet18"]),
        (HEADER + line_of("resnet18") + line_of("resnet34")[:-1], ["resnet18"]),
        (HEADER[:-1], []),
        (HEADER[:9], []),
        ("", []),
        (HEADER + line_of("resnet18") + "é", ["resnet18"]),
    ],
    ids=["half a row", "no newline", "header", "half a header", "empty", "half a letter"],
)
def test_a_file_that_was_cut_off_is_gone_on_with(there: str, kept: list[str], tried: list[str], tmp_path: Path) -> None:
    """A kill, a full disk, an editor: the last line counts where it has an end, and no row is glued onto another."""
    path, page = tmp_path / "zoo.csv", tmp_path / "models.md"
    content = there.encode()
    path.write_bytes(content[:-1] if there.endswith("é") else content)
    assert main(["zoo", "resnet18", "resnet34", "--csv", str(path), "--markdown", str(page)]) == 0
    assert tried == [name for name in NAMES[:2] if name not in kept]
    assert path.read_text() == HEADER + line_of("resnet18") + line_of("resnet34")
    assert page.read_text().count("| agrees |") == 2
    assert {file.name for file in tmp_path.iterdir()} - {".zoo.csv.lock"} == {"zoo.csv", "models.md"}


def test_what_was_not_timed_is_timed_in_a_file_of_before_there_were_times(tried: list[str], tmp_path: Path) -> None:
    path, page = tmp_path / "zoo.csv", tmp_path / "models.md"
    path.write_text((HEADER + line_of("resnet18") + line_of("resnet34")).replace(",,,,", "").replace(HEADER, OLD_HEADER))
    run = ["zoo", "resnet18", "--csv", str(path), "--markdown", str(page), "--time", "1"]
    assert main(run) == 0 and main(run) == 0
    assert tried == ["resnet18"], "once"
    assert path.read_text().splitlines()[1].endswith(",,3.0,2.0,1.6,here")
    text = page.read_text()
    assert "| agrees | 3.0, 2.0; 1.6 | 1.25 |" in text and "| agrees | - | - |" in text and text.count("Timed on here.") == 1


def test_names_are_of_all_that_takes_images_and_of_functions() -> None:
    assert command.names(["fcn_resnet50", "fasterrcnn_*", "resnet18", "bench/others.py:smp_unet_resnet34"]) == [
        "fcn_resnet50", "fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_resnet50_fpn",
        "fasterrcnn_resnet50_fpn_v2", "resnet18", "bench/others.py:smp_unet_resnet34",
    ]  # fmt: skip


def test_a_row_of_a_detector_and_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both whole, though one asks for values, which the meta device has not; what fails is told in the row."""
    small = f"{Path(__file__).parent / 'test_detection.py'}:small"
    made = command.row(small, 64, 64)
    assert (made["agrees"], made["note"], made["fused_share"]) == ("yes", "", "1.000")
    made = command.row(f"{__file__}:no_model", 64, 64)
    assert made["agrees"] == "" and "returned a int, expected an nn.Module" in made["note"]


def no_model() -> int:
    return 3


def test_a_row_that_is_not_whole_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It agreed, but was not counted."""

    def fails(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(command, "_work", fails)
    made = command.row("resnet18", 32, 32)
    assert (made["agrees"], made["note"]) == ("", "RuntimeError: no memory")


def test_a_row_is_timed(tmp_path: Path) -> None:
    made = command.row("resnet18", 32, 32, 0.01)
    assert made["agrees"] == "yes" and made["note"] == ""
    assert all(float(made[name]) > 0 for name in command.TIMES[:3]) and torch.__version__ in made["timed"]


def test_what_failed_is_told_and_tried_again(tried: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "zoo.csv"
    run = ["zoo", "resnet50", "resnet18", "--csv", str(path)]
    assert main(run) == 1
    assert capsys.readouterr().out.endswith("2 of them new; 0 disagree; 1 failed resnet50\n")
    assert main(["zoo", "resnet18", "--csv", str(path)]) == 1, "it is in the file still"
    assert main(run) == 0 and tried == ["resnet50", "resnet18", "resnet50"]
    assert capsys.readouterr().out.endswith("2 models in " + f"{path}, 1 of them new; 0 disagree\n")
    with path.open(newline="") as file:
        assert [(row["model"], row["agrees"]) for row in csv.DictReader(file)] == [("resnet50", "yes"), ("resnet18", "yes")]


def test_a_full_disk_leaves_the_file_as_it_was(
    tried: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "zoo.csv"
    path.write_text(HEADER + line_of("resnet18"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fused_resnet.whole_file.write_whole", full)
    assert main(["zoo", "resnet34", "--csv", str(path)]) == 2
    assert "No space left on device" in capsys.readouterr().err and path.read_text() == HEADER + line_of("resnet18")
    assert main(["zoo", "resnet34", "--csv", "/dev/null"]) == 2, "nothing is written over a device"
    assert main(["zoo", "resnet34", "--csv", str(path), "--size", "99999999"]) == 2
    assert "fit into memory, got 8 x 3 x 99999999" in capsys.readouterr().err and tried == ["resnet34"]


def test_no_folder_is_made_for_a_file(tried: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of the files of other commands."""
    folder = tmp_path / "none"
    for command_line in (
        ["zoo", "resnet18", "--csv", str(folder / "zoo.csv")],
        ["zoo", "resnet18", "--csv", str(tmp_path / "zoo.csv"), "--markdown", str(folder / "models.md")],
        ["inspect", "--model", "resnet18", "--json", str(folder / "report.json")],
    ):
        assert main(command_line) == 2
        assert f"cannot write to the folder {folder}: it does not exist, and is not made for a file" in capsys.readouterr().err
    assert tried == [] and not folder.exists()
