"""Every list of checks names commands that exist, and further cases of quick tests may be asked for."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tools import nightly

PROJECT = Path(__file__).parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(PROJECT / "setup.cfg")


FURTHER = """
import pytest

@pytest.mark.parametrize("number", range(6))
@pytest.mark.quick_every(3)
def test_cases(number):
    pass

@pytest.mark.slow
def test_slow():
    pass
"""


@pytest.mark.parametrize(("expression", "count"), [("not slow", 2), ("not slow or further_case", 6)])
def test_further_cases_of_quick_tests_are_slow_and_may_be_asked_for(expression, count, tmp_path):
    (tmp_path / "conftest.py").write_text((PROJECT / "tests" / "shares.py").read_text())
    (tmp_path / "test_some.py").write_text(FURTHER)
    markers = "    slow: x\n    quick_every: y\n    further_case: z\n"
    (tmp_path / "setup.cfg").write_text(f"[tool:pytest]\nmarkers =\n{markers}")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", expression]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert f" {count} passed" in done.stdout


def test_what_the_lists_of_checks_call_exists():
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    workflow = (PROJECT / ".github" / "workflows" / "checks.yml").read_text()
    called = {
        "nightly": {word for check in nightly.checks() for word in re.findall(r"make ([\w-]+)", check.command)},
        "workflow": set(re.findall(r"make ([\w-]+)", workflow)),
        "commit": set(re.findall(r"^make ([\w-]+)", (PROJECT / ".ci" / "run").read_text(), re.MULTILINE)),
    }
    assert all(names <= targets for names in called.values()), called
    assert {"lint", "test", "demo", "docs", "test-slow"} <= called["commit"]
    # work, and parts of others, not checks
    ours = {"test-all", "start", "compare", "pictures", "checkout", "clean", "test-nightly"}
    assert called["nightly"] == targets - ours - {"tables", "trained", "trained-packages", "trained-table"}
    for file in (nightly.OF_ALL, *nightly.COMMANDS.split()):
        assert (PROJECT / file).exists()


def test_the_workflow_runs_every_python_that_the_package_takes():
    jobs = yaml.safe_load((PROJECT / ".github" / "workflows" / "checks.yml").read_text())["jobs"]
    matrix = jobs["versions"]["strategy"]["matrix"]
    assert matrix["python"] == re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    lowest, newest = re.search(r"torch>=([\d.]+),<([\d.]+)", SETUP["options"]["install_requires"]).groups()
    assert matrix["torch"] == [f"torch=={lowest}.*", f"torch<{newest}"]
