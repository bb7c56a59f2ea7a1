"""A pytest plugin, `-p gpu_outcomes`: a line of JSON in $ERNET_TEST_OUTCOMES for each test that begins or ends.

Each is on disk as it comes, so a run that is cut off, or crashes, keeps those before, and tells what was running.
"""

from __future__ import annotations

import json
import os
from typing import Any


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(nodeid, "started")


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        failed = "failure" if report.when == "call" else "error"
        _write(report.nodeid, failed if report.failed else report.outcome, report)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write(report.nodeid, "error", report)


def _write(test: str, outcome: str, report: Any = None) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # whoever gave it the test hears of it too
        return
    with open(os.environ["ERNET_TEST_OUTCOMES"], "a") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "message": _message(report)}) + "\n")


def _message(report: Any) -> str:
    """What went wrong, on one line."""
    text = getattr(report, "longrepr", None)
    if isinstance(text, tuple):  # of a test that was skipped: file, line, reason
        text = text[2]
    crash = getattr(text, "reprcrash", None)
    lines = str(crash.message if crash is not None else text or "").strip().splitlines()
    return " ".join((lines[0] if crash is not None and lines else lines[-1] if lines else "").split())[:200]
