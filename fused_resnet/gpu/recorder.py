"""A pytest plugin, ``-p fused_resnet.gpu.recorder``: each test's outcome as a line of JSON, at once, and an end to the time.

The file is ``FUSED_RESNET_TEST_LOG``, the end ``FUSED_RESNET_TEST_END`` (seconds since 1970): tests that would start later are
skipped. A run that is killed has told what it knew.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

LATE = "no time left"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Not one more test behind the end."""
    if time.time() > float(os.environ.get("FUSED_RESNET_TEST_END", "inf")):
        pytest.skip(LATE)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line a test: of its call, or of what kept it from being called."""
    path = os.environ.get("FUSED_RESNET_TEST_LOG")
    if not path or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    if report.when == "teardown" and not report.failed:
        return
    reason = ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = (crash.message if crash else str(report.longrepr)).strip().splitlines()[0]
    elif report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2])
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "reason": reason[:300]}
    with Path(path).open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
