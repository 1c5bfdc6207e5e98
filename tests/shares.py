"""Hooks of pytest: the slow tests in shares, and a file that says which tests ran and which were skipped."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import zlib
from importlib import metadata

import pytest


def share_of_slow_tests(text: str) -> tuple[int, int]:
    """Read ``K/N``: of N parts of the slow tests the one with number K, from 0 on."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"a share must be K/N with 0 <= K < N, got {text!r} (--share)")
    return int(found[1]), int(found[2])


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the slow tests be divided."""
    parser.addoption(
        "--share", metavar="K/N", type=share_of_slow_tests, help="of N parts of the slow tests only part K, from 0 on"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the cases that aren't quick as slow, and deselect the slow tests of other shares.

    ``quick_every(n)``: of a test's cases every n-th is quick; the others are marked ``further_case``, too. A test's
    share follows from its name alone.
    """
    for item in items:
        quick, call = item.get_closest_marker("quick_every"), getattr(item, "callspec", None)
        if quick is not None and call is not None and sum(call.indices.values()) % quick.args[0]:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.further_case)
    share = config.getoption("--share")
    if share is None:
        return
    part, parts = share
    elsewhere = [
        item
        for item in items
        if item.get_closest_marker("slow") is not None and zlib.crc32(item.nodeid.encode()) % parts != part
    ]
    config.hook.pytest_deselected(items=elsewhere)
    left_out = set(elsewhere)
    items[:] = [item for item in items if item not in left_out]


def note_outcome(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Add a line to the file that ``NNI_TOPO_OUTCOMES`` names: which test ran, which was skipped and why."""
    file = os.environ.get("NNI_TOPO_OUTCOMES")
    if not file or "PYTEST_XDIST_WORKER" in os.environ:  # the process that starts the others sees all reports
        return
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    outcome = "passed" if hasattr(report, "wasxfail") else report.outcome
    seconds = round(getattr(report, "duration", 0.0), 2)
    with open(file, "a", encoding="utf-8") as lines:
        print(json.dumps([report.nodeid, outcome, seconds, reason]), file=lines)


def pytest_sessionstart() -> None:
    """Note what the outcomes were seen with."""
    file = os.environ.get("NNI_TOPO_OUTCOMES")
    if not file or "PYTEST_XDIST_WORKER" in os.environ:
        return
    versions = [f"Python {platform.python_version()}"]
    for name in ("torch", "numpy", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    with open(file, "a", encoding="utf-8") as lines:
        print(json.dumps(["", "versions", 0.0, ", ".join(versions)]), file=lines)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a test's call, or the failure or skip before it."""
    if report.when == "call" or not report.passed:
        note_outcome(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note files that skip or break as a whole."""
    if not report.passed:
        note_outcome(report)
