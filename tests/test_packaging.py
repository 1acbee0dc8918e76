"""What is installed, what an import pulls in, and that the kernels are found wherever the package comes from."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import zoo

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]

#: Modules that an import of the package must leave alone: slow to load, or not there on every machine.
HEAVY = ("triton", "torchvision", "torch._dynamo", "torch._inductor", "matplotlib", "sympy", "fused_resnet.kernels")


def python(code: str, *, path: Path = ROOT, cwd: Path | None = None) -> str:
    """Runs ``code`` in a new interpreter that finds the package under ``path``, and returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def project() -> dict:
    """The contents of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built offline from a copy of the tree, so that no build product lands in the checkout."""
    setuptools = pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for name in ("fused_resnet", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "import setuptools.build_meta as build; print(build.build_wheel('dist'))"
    name = python(code, path=Path(setuptools.__file__).parents[1], cwd=source).splitlines()[-1]
    return source / "dist" / name


def test_every_package_is_listed(project: dict) -> None:
    """A new subpackage that pyproject.toml does not name would be missing from the wheel alone."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "fused_resnet").rglob("__init__.py")}
    found = {".".join(folder.parts) for folder in folders if "kernels" not in folder.parts}
    found |= {
        ".".join(("fused_resnet", *path.parent.relative_to(ROOT).parts)) for path in (ROOT / "kernels").rglob("__init__.py")
    }
    assert sorted(found) == sorted(project["tool"]["setuptools"]["packages"])


def test_version_is_stated_once(project: dict) -> None:
    import fused_resnet

    assert "version" in project["project"]["dynamic"]
    assert fused_resnet.__version__.count(".") == 2


def test_import_is_light() -> None:
    """What ``import fused_resnet`` adds to ``import torch`` contains none of the heavy modules."""
    code = "import sys, torch; before = set(sys.modules); import fused_resnet; print(*sorted(set(sys.modules) - before))"
    added = python(code).split()
    assert "fused_resnet" in added
    assert [name for name in added if name.startswith(HEAVY)] == []


def test_import_without_triton(tmp_path: Path) -> None:
    """macOS and Windows have no Triton: the package imports there, and the command line answers."""
    code = "import sys; sys.modules['triton'] = None; import fused_resnet, fused_resnet.cli; print(fused_resnet.__version__)"
    assert python(code, cwd=tmp_path)


def test_import_without_torchvision(tmp_path: Path) -> None:
    """torchvision is an extra."""
    code = (
        "import sys; sys.modules['torchvision'] = None; import fused_resnet, fused_resnet.cli; print(fused_resnet.__version__)"
    )
    assert python(code, cwd=tmp_path)


def test_checkout_finds_the_kernels(tmp_path: Path) -> None:
    """A plain checkout needs no install: from any working folder ``fused_resnet.kernels`` is the folder kernels/."""
    code = "from importlib.util import find_spec; print(find_spec('fused_resnet.kernels').origin)"
    assert Path(python(code, cwd=tmp_path)).resolve() == ROOT / "kernels" / "__init__.py"


def test_no_top_level_package_but_our_own(wheel: Path) -> None:
    """A top-level package named ``kernels`` would collide with the one on the package index."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert sorted(top.split("-")[0] for top in tops) == ["fused_resnet", "fused_resnet"], tops


def test_wheel_holds_every_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"fused_resnet/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    for pattern in ("*.py", "*.json", "py.typed"):
        files = {path.relative_to(ROOT) for path in (ROOT / "fused_resnet").rglob(pattern)}
        expected |= {file.as_posix() for file in files if "kernels" not in file.parts}
    assert expected - names == set()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_metadata(wheel: Path, project: dict) -> None:
    import fused_resnet

    with zipfile.ZipFile(wheel) as archive:
        folder = f"fused_resnet-{fused_resnet.__version__}.dist-info"
        metadata = archive.read(f"{folder}/METADATA").decode()
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
    assert f"Version: {fused_resnet.__version__}\n" in metadata
    for extra in project["project"]["optional-dependencies"]:
        assert f"Provides-Extra: {extra}\n" in metadata
    assert "fused-resnet = fused_resnet.cli:main" in entry_points


def test_all_tests_have_their_packages(project: dict) -> None:
    """What a test is skipped without is among what ``make test-all`` installs (or an extra of users brings)."""
    makefile = (ROOT / "Makefile").read_text()
    (extras,) = re.findall(r"^test-all: \.venv/\.with-(\S+) \.venv-oldest/\.with-test ", makefile, re.MULTILINE)
    assert extras.split(",") == ["test", "zoo", "dropin", "train"]
    optional = project["project"]["optional-dependencies"]
    listed = [entry for extra in (*extras.split(","), "models") for entry in optional[extra]]
    installed = {re.split(r"[<>=\[]", entry)[0].replace("-", "_").removesuffix("_torch") for entry in listed}
    wanted = {
        re.split(r"\W", name)[0]
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"importorskip\(\s*\"([^\"]+)\"", path.read_text())
    } | {package.split(".")[0] for package, *_ in zoo.ZOO.values()}
    names = {"sklearn": "scikit_learn", "smp": "segmentation_models_pytorch"}
    elsewhere = {"torch", "triton", "resource", "matplotlib"}
    assert {names.get(name, name) for name in wanted} - elsewhere <= installed


def test_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Unpacked as an installer does it, the package and its kernels are found there and not in the checkout."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "import fused_resnet; from importlib.util import find_spec as find; "
    code += (
        "print(fused_resnet.__file__, find('fused_resnet.kernels').origin, find('fused_resnet.kernels.conv').origin, sep='\\n')"
    )
    for origin in python(code, path=site, cwd=tmp_path).splitlines():
        assert Path(origin).resolve().is_relative_to(site.resolve()), origin


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("source", ["checkout", "wheel"])
def test_kernels_import(source: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Every kernel module imports where Triton is, from a checkout and from a wheel."""
    path = ROOT
    if source == "wheel":
        path = tmp_path / "site"
        zipfile.ZipFile(request.getfixturevalue("wheel")).extractall(path)
    modules = sorted(file.stem for file in (ROOT / "kernels").glob("*.py") if file.stem != "__init__")
    imports = "; ".join(f"import fused_resnet.kernels.{module}" for module in modules)
    python(f"import os; os.environ['TRITON_INTERPRET'] = '1'; {imports}", path=path, cwd=tmp_path)
