"""Run tests until one fails.

    python tools/mutants/first_failure.py TESTS.json ANSWER.json

A fork has imported `nni_topo.compat` before its file is changed. This command imports the changed one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forking
import pytest


def tested(tests: Sequence[str]) -> dict[str, Any]:
    """Run tests in this process until one fails, and say whether the mutant is killed and by which test."""
    first = _FirstFailure(tests)
    files = list(dict.fromkeys(test.split("::")[0] for test in tests))
    code = forking.pytest_run([*files, "-x", "-q", "--tb=line"], first)
    return {"state": "killed" if code else "survived", "by": first.failed}


def tested_afresh(tests: Sequence[str]) -> dict[str, Any]:
    """Run tests as ``tested`` does, in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "tests.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(list(tests)))
        own = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
        subprocess.run([sys.executable, __file__, str(asked), str(answer)], check=False, env=own)
        if not answer.exists():  # the changed code can't even be imported, or time or memory were over
            return {"state": "killed", "by": None}
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


class _FirstFailure:
    """A plugin of pytest that runs the given tests in their order and notes the one that fails."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._rank = {test: rank for rank, test in enumerate(tests)}
        self.failed: str | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self._rank), key=lambda i: self._rank[i.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(tested(json.loads(Path(sys.argv[1]).read_text()))))
