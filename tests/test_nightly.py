"""The runner of all checks, on checks of a moment; and that every list of checks names commands that exist."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def nightly():
    spec = importlib.util.spec_from_file_location("nightly", PROJECT / "tools" / "nightly.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def runner(nightly, tmp_path):
    """Return a function that makes the runner of some checks on files in a given state."""

    def make(*checks, state="a", commits=7):
        return nightly.Nightly(checks, tmp_path / "out", tmp_path / "records/checks.json", state, commits)

    return make


def outcome(*lines):
    """Return a command that writes such lines of outcomes, as the tests do."""
    return " && ".join(f"echo '{json.dumps(line)}' >> $NNI_TOPO_OUTCOMES" for line in lines)


def test_a_stopped_run_goes_on_and_what_failed_runs_again(nightly, runner, tmp_path):
    first = nightly.Check("first", f"echo ran >> {tmp_path}/first")
    second = nightly.Check("second", f"echo ran >> {tmp_path}/second; test -f {tmp_path}/mended")
    assert not runner(first, second).run(None, until=0)  # no time
    assert runner(first, second).run(["first"], until=float("inf"))
    assert runner(first, second).verdict() == (1, ["second: has not run yet; run it again to go on"])
    for _ in range(2):
        assert runner(first, second).run(None, until=float("inf"))
    status, said = runner(first, second).verdict()
    assert status == 1
    assert re.fullmatch(r"second: failed, exit status 1, .*out/second\.log", said[0])
    (tmp_path / "mended").touch()
    runner(first, second).run(None, until=float("inf"))
    assert runner(first, second).verdict() == (0, [])
    assert (tmp_path / "first").read_text().count("ran") == 1
    assert (tmp_path / "second").read_text().count("ran") == 3


def test_a_test_that_every_check_skips_is_an_error(nightly, runner):
    one = nightly.Check(
        "one",
        outcome(
            ["tests/test_a.py::test_gpu", "skipped", 0, "no CUDA device"],
            ["tests/test_a.py::test_other", "skipped", 0, "no Chromium"],
            ["tests/test_a.py::test_both", "skipped", 0, "Transformers 4"],
            ["tests/test_file.py", "skipped", 0, "no mutmut"],
            ["tests/test_second.py", "skipped", 0, "no timm"],
        ),
    )
    two = nightly.Check(
        "two",
        outcome(["tests/test_a.py::test_both", "passed", 0, ""], ["tests/test_second.py::test", "failed", 0, ""]),
    )
    gpu = nightly.Check("GPU", "true", hardware="false", covers="no CUDA device")
    run = runner(one, two, gpu)
    run.run(None, until=float("inf"))
    status, said = run.verdict()
    assert status == 1
    assert said == [
        "tests/test_a.py::test_other was skipped in every check: no Chromium",
        "tests/test_file.py was skipped in every check: no mutmut",
    ]
    there = runner(one, two, nightly.Check("GPU", "true", hardware="true", covers="no CUDA device"))
    there.run(None, until=float("inf"))
    assert "tests/test_a.py::test_gpu was skipped in every check: no CUDA device" not in said
    (there.folder / "results.jsonl").unlink()
    there.run(None, until=float("inf"))
    assert "tests/test_a.py::test_gpu was skipped in every check: no CUDA device" in there.verdict()[1]


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
    (tmp_path / "setup.cfg").write_text(
        "[tool:pytest]\nmarkers =\n    slow: x\n    quick_every: y\n    further_case: z\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", expression]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert f" {count} passed" in done.stdout


def targets():
    return set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))


def test_what_the_lists_of_checks_call_exists(nightly):
    workflow = (PROJECT / ".github" / "workflows" / "checks.yml").read_text()
    called = {
        "nightly": {word for check in nightly.checks() for word in re.findall(r"make ([\w-]+)", check.command)},
        "workflow": set(re.findall(r"make ([\w-]+)", workflow)),
        "commit": set(re.findall(r"^make ([\w-]+)", (PROJECT / ".ci" / "run").read_text(), re.MULTILINE)),
    }
    assert all(names <= targets() for names in called.values()), called
    assert {"lint", "test", "demo", "docs", "test-slow"} <= called["commit"]
    # work, and parts of others, not checks
    measured = {"tables", "trained", "trained-packages", "trained-table"}
    ours = {"test-all", "start", "compare", "pictures", "checkout", "clean", "test-nightly"} | measured
    assert called["nightly"] == targets() - ours
    assert nightly.SHARES % 5 == 0


COME_WITH = {"PIL": "torchvision", "huggingface_hub": "transformers"}
"""Packages that tests need and others install."""


def test_every_package_without_which_tests_are_skipped_is_installed_by_a_check(nightly):
    asked = re.compile(r"""importorskip\(\s*["']([\w.]+)""")
    needed = {name for path in (PROJECT / "tests").rglob("*.py") for name in asked.findall(path.read_text())}
    tops = {name.partition(".")[0] for name in needed}
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    trained = (PROJECT / "benchmarks" / "trained" / "requirements.txt").read_text()
    lists = [setup["options"]["install_requires"], *setup["options.extras_require"].values(), trained]
    lists += re.findall(r"AFTER='([^']+)'", " ".join(check.command for check in nightly.checks()))
    installed = {word.lower().replace("-", "_") for text in lists for word in re.findall(r"^[ ]*([\w.-]+)", text, re.M)}
    installed |= set(re.findall(r"\[(\w+)\]", " ".join(lists)))  # dask[distributed]
    assert "timm" in tops
    assert {name for name in tops if COME_WITH.get(name, name).lower() not in installed} == set()


def test_the_workflow_runs_every_python_that_the_package_takes():
    jobs = yaml.safe_load((PROJECT / ".github" / "workflows" / "checks.yml").read_text())["jobs"]
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    classifiers = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    assert jobs["versions"]["strategy"]["matrix"]["python"] == classifiers
    lowest, newest = re.search(r"torch>=([\d.]+),<([\d.]+)", setup["options"]["install_requires"]).groups()
    assert jobs["versions"]["strategy"]["matrix"]["torch"] == [f"torch=={lowest}.*", f"torch<{newest}"]
    assert {"macos-latest", "windows-latest"} == set(jobs["systems"]["strategy"]["matrix"]["system"])
