"""A start that does not ask Triton gives its launcher what Triton would give it: the checks are in starting.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def told() -> str:
    """What a process says in which Triton does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{TESTS.parent}{os.pathsep}{TESTS}"
    done = subprocess.run(
        [sys.executable, str(TESTS / "starting.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "check",
    [
        "every_start_of_a_network",
        "another_alignment_type_device_or_mode_is_another_kernel",
        "memory_that_32_bits_reach_is_another_kernel_on_amd",
        "vectors_that_are_not_dense_are_copied",
        "hooks_are_called",
        "what_started_is_counted_and_what_failed_forgets_its_counters",
    ],
)
def test_starts(check: str, told: str) -> None:
    assert f"{check} passed" in told.splitlines(), told
