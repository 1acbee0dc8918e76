"""What the documentation shows is run: the README's Python, and the example of docs/add-a-fusion.md."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch._dynamo

import fused_resnet
import fused_resnet.compiling

ROOT = Path(__file__).resolve().parents[1]


def load_check_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_docs", ROOT / "tools" / "check_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_docs = load_check_docs()


def python_blocks(name: str) -> list[tuple[int, str]]:
    """Line and text of the Python blocks of a Markdown file."""
    _, blocks = check_docs.split((ROOT / name).read_text(encoding="utf-8"))
    return [(line, code) for line, language, code in blocks if language == "python"]


def execute(code: str, path: Path, namespace: dict[str, Any]) -> None:
    """Run a block from a file of its own, since Triton reads the source of its functions."""
    path.write_text(code, encoding="utf-8")
    exec(compile(code, str(path), "exec"), namespace)


def test_links_and_code_of_all_documents() -> None:
    assert check_docs.main([]) == 0


def test_predicted_times_are_those_of_the_benchmarks() -> None:
    """The README's GPU row, docs/evidence.md and docs/kernels.md say what the model's page says of ResNet-50 on the H200."""
    page = (ROOT / "docs" / "benchmarks" / "predicted.md").read_text(encoding="utf-8")
    table = page.partition("| inference: eager, fused")[2]
    cells = next(line for line in table.splitlines() if line.startswith("| H200 |")).split("|")
    eager, fused, factor = re.findall(r"[\d.]+", cells[3])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"NVIDIA H200 | {eager} ms | {fused} ms ({factor}x) | **predicted**" in readme
    assert f"{eager} ms in eager PyTorch and {fused} ms fused" in (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert f"{factor}x ({fused} against {eager} ms)" in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_the_api_lists_what_the_package_offers() -> None:
    """Each name of ``__all__``, and nothing that is not there once what the page says is imported."""
    importlib.import_module("fused_resnet.train")
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert "`import fused_resnet.train` brings these" in text
    listed = [line.removeprefix("::: fused_resnet.") for line in text.splitlines() if line.startswith("::: fused_resnet.")]
    for path in listed:
        if not path.startswith("swap.explain."):  # of a module that has a function's name
            operator.attrgetter(path)(fused_resnet)
    assert set(fused_resnet.__all__) <= {path.rpartition(".")[2] for path in listed}


def names_of(name: str) -> list[str]:
    return [f"{name}:{line}" for line, _ in python_blocks(name)]


@pytest.mark.parametrize("place", [*names_of("README.md"), *names_of("docs/swap.md")])
def test_snippets_run(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each block alone: a reader copies one. Where it fuses and calls a model, chains run."""
    name, line = place.rsplit(":", 1)
    code = dict(python_blocks(name))[int(line)]
    for package in ("timm", "transformers"):
        if package in code:
            pytest.importorskip(package)
    if 'backend="fused_resnet"' in code and "fused_resnet" not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(fused_resnet.compiling.fused_resnet)  # a checkout that is not installed
    with fused_resnet.count_launches() as log:
        execute(code, tmp_path / "snippet.py", {"__name__": "snippet"})
    fuses = any(called in code for called in ("fuse(", "build(", 'backend="fused_resnet"'))
    assert log or not (fuses and re.search(r"\bmodel\(", code)), "nothing ran fused"


def test_the_first_screen() -> None:
    """What the readme must show early: the two commands, use, numbers; and the way to the epilogues."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    screen = "\n".join(lines[:60])
    for wanted in ("make demo", "make test", "fused_resnet.fuse(model)", "fused_resnet.explain(model)", "| grade |"):
        assert wanted in screen, wanted
    assert "(kernels/epilogues.py)" in "\n".join(lines)


# ------------------------------------------------------------------------------------------- docs/add-a-fusion.md

MODULES = {
    "fused_resnet/activations.py": "fused_resnet.activations",
    "fused_resnet/launch.py": "fused_resnet.launch",
    "kernels/activations.py": "fused_resnet.kernels.activations",
    "kernels/prologues.py": "fused_resnet.kernels.prologues",
    "kernels/epilogues.py": "fused_resnet.kernels.epilogues",
    "fused_resnet/backends/reference.py": "fused_resnet.backends.reference",
    "fused_resnet/describe.py": "fused_resnet.describe",
}


def forget() -> None:
    """Empty the caches that remember who runs what, so that no other test meets the example's functions."""
    from fused_resnet import backends, describe

    for cached in (backends.assign, backends._program, describe._cached_layer, describe._cached_chain):
        cached.cache_clear()


def patch(target: str, code: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module be, for one test, as if the block stood at its end, also for those who imported names from it."""
    module = importlib.import_module(target)
    before = {key: dict(value) if isinstance(value, dict) and key.isupper() else value for key, value in vars(module).items()}
    namespace = {**before}
    execute(code, path, namespace)
    for name, value in namespace.items():
        old = vars(module).get(name)
        if name.startswith("__") or value is old or (isinstance(value, dict) and value == old):
            continue
        monkeypatch.setattr(module, name, value, raising=False)
        for other in [m for key, m in list(sys.modules.items()) if key.split(".")[0] == "fused_resnet" and m is not module]:
            if old is not None and vars(other).get(name) is old:
                monkeypatch.setattr(other, name, value)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The page's code in place; the names its test blocks define."""
    pytest.importorskip("triton")
    importlib.import_module("fused_resnet.backends.triton")
    namespace: dict[str, Any] = {"__name__": "add_a_fusion"}
    forget()
    tests = []
    for number, (_, code) in enumerate(python_blocks("docs/add-a-fusion.md")):
        target = code.splitlines()[0].removeprefix("# ")
        path = tmp_path / f"block{number}.py"
        if target == "tests":
            tests.append((code, path))
        else:
            patch(MODULES[target], code, path, monkeypatch)
    for code, path in tests:
        execute(code, path, namespace)
    yield namespace
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("backend", ["reference", "triton", "cpu"])
@pytest.mark.parametrize("name", ["test_elu", "test_scale"])
def test_add_a_fusion(name: str, backend: str, example: dict[str, Any]) -> None:
    if backend == "cpu" and example["DEVICE"] != "cpu":
        pytest.skip("the CPU executor takes CPU tensors")
    example[name](backend)


def test_the_example_leaves_nothing_behind() -> None:
    """After the tests above the package is as it was."""
    from fused_resnet import activations, describe, launch

    assert "elu" not in activations.ACTIVATIONS
    assert "scale" not in launch.EPILOGUES
    assert "elu" not in describe._ACTIVATIONS.values()
