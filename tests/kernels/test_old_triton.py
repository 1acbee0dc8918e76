"""What Triton 3.6 (PyTorch 2.11) cannot compile, looked for in the kernels' source: newer ones can, no other test would tell.

``make test-all`` compiles them with 3.6.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = sorted(Path(__file__).parents[2].joinpath("kernels").glob("*.py"))


def functions(path: Path) -> list[ast.FunctionDef]:
    """Those that Triton compiles."""
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return [node for node in found if any("triton.jit" in ast.unparse(mark) for mark in node.decorator_list)]


def is_none(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_no_function_returns_none(path: Path) -> None:
    """Nor a tuple that holds it: "cannot convert None of type <class 'NoneType'> to tensor"."""
    for function in functions(path):
        compared = {node.left.id for node in ast.walk(function) if _asks_for_none(node)}
        for node in ast.walk(function):
            if isinstance(node, ast.Return):
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                names = {value.id for value in values if isinstance(value, ast.Name)}
                assert not any(map(is_none, values)) and not names & compared, f"{path.name}:{node.lineno}"


def _asks_for_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and is_none(node.comparators[0])


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_no_tuple_of_vectors_is_compared_with_none(path: Path) -> None:
    """A tuple that holds None cannot be compared, "'NoneType' object has no attribute 'type'": its first element is."""
    for function in functions(path):
        unpacked = {
            part.value.id for part in ast.walk(function) if isinstance(part, ast.Starred) and isinstance(part.value, ast.Name)
        }
        for node in ast.walk(function):
            assert not (_asks_for_none(node) and node.left.id in unpacked), f"{path.name}:{node.lineno}"
