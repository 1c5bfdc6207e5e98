"""The runner of all checks, on checks of a moment; and that every list of checks names commands that exist."""

from __future__ import annotations

import argparse
import configparser
import importlib.util
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import yaml
from shares import share_of_slow_tests

PROJECT = Path(__file__).parent.parent
TEST = """
import pytest

@pytest.mark.parametrize("number", range(40))
@pytest.mark.slow
def test_slow(number):
    pass

def test_quick():
    pass

def test_elsewhere():
    pytest.skip("no CUDA device")
"""


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


def test_other_files_have_passed_nothing_but_the_records_say_when_they_did(nightly, runner):
    check = nightly.Check(
        "tests", outcome(["", "versions", 0, "Python 3.11"], ["tests/test_a.py::test", "passed", 1, ""])
    )
    runner(check, commits=7).run(None, until=float("inf"))
    later = runner(check, state="b", commits=10)
    assert later.results() == {}
    row = later.table().splitlines()[1].split()
    assert row[:2] == ["tests", "-"]
    assert row[3:5] == ["1", "0"]
    assert row[6:] == ["3", "Python", "3.11"]
    record = json.loads(later.records.read_text())["tests"]
    assert (record["commits"], record["versions"], record["tests"]["passed"]) == (7, "Python 3.11", 1)


def test_what_the_machine_lacks_is_named_and_only_hardware_is_excused(nightly, runner):
    program = nightly.Check("program", "true", programs=("no-such-program",), variables=("NO_SUCH_VARIABLE",))
    gpu = nightly.Check("GPU", "true", hardware="false", covers="no CUDA device")
    run = runner(program, gpu)
    run.run(None, until=float("inf"))
    assert run.verdict() == (1, ["program: not run, needs the program no-such-program, NO_SUCH_VARIABLE=..."])
    assert not run.records.exists()


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


def test_unknown_checks_are_refused(nightly, capsys):
    with pytest.raises(SystemExit):
        nightly.main(["--only", "no such check"])
    assert "--only must name checks (lint and types; tests; " in capsys.readouterr().err
    assert nightly.main(["--list"]) == 0


@pytest.mark.slow
def test_tests_are_divided_and_noted(tmp_path, monkeypatch):
    (tmp_path / "conftest.py").write_text((PROJECT / "tests" / "shares.py").read_text())
    (tmp_path / "test_some.py").write_text(TEST)
    (tmp_path / "setup.cfg").write_text("[tool:pytest]\nmarkers =\n    slow: x\n    cuda: y\n")
    ran = []
    for part in range(3):
        file = tmp_path / f"outcomes{part}"
        monkeypatch.setenv("NNI_TOPO_OUTCOMES", str(file))
        monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            f"--share={part}/3",
        ]
        done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert lines[0][1] == "versions"
        assert re.match(r"Python 3\.\d+\.\d+, torch 2\.\d+", lines[0][3])
        outcomes = {test: (outcome, reason) for test, outcome, _, reason in lines[1:]}
        assert outcomes.pop("test_some.py::test_quick") == ("passed", "")
        assert outcomes.pop("test_some.py::test_elsewhere") == ("skipped", "Skipped: no CUDA device")
        assert {test for test in outcomes if zlib.crc32(test.encode()) % 3 != part} == set()
        ran += outcomes
    assert len(ran) == len(set(ran)) == 40


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


@pytest.mark.parametrize(("expression", "count"), [("not slow", 2), ("slow", 5), ("not slow or further_case", 6)])
def test_further_cases_of_quick_tests_are_slow_and_may_be_asked_for(expression, count, tmp_path):
    (tmp_path / "conftest.py").write_text((PROJECT / "tests" / "shares.py").read_text())
    (tmp_path / "test_some.py").write_text(FURTHER)
    (tmp_path / "setup.cfg").write_text(
        "[tool:pytest]\nmarkers =\n    slow: x\n    quick_every: y\n    further_case: z\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", expression]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert f" {count} passed" in done.stdout


@pytest.mark.parametrize("text", ["3/3", "1", "-1/5", "a/b", "0/0", ""])
def test_a_share_is_a_part_of_parts(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"a share must be K/N with 0 <= K < N, got "):
        share_of_slow_tests(text)


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


CASES = """
import pytest

@pytest.mark.quick_every(3)
@pytest.mark.parametrize("letter", "ab")
@pytest.mark.parametrize("number", range(6))
def test_cases(number, letter):
    pass

@pytest.mark.quick_every(3)
def test_without_cases():
    pass
"""


@pytest.mark.slow
def test_every_nth_case_is_quick(tmp_path):
    (tmp_path / "conftest.py").write_text((PROJECT / "tests" / "shares.py").read_text())
    (tmp_path / "test_some.py").write_text(CASES)
    (tmp_path / "setup.cfg").write_text("[tool:pytest]\nmarkers =\n    slow: x\n    cuda: y\n    quick_every(n): z\n")
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-p", "no:xdist"]
    found = []
    for words in ("not slow", "slow"):
        done = subprocess.run([*command, "-m", words, str(tmp_path)], capture_output=True, text=True)
        found.append({line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line})
    quick, slow = found
    assert "test_without_cases" in quick
    assert (len(quick - {"test_without_cases"}), len(slow), len(quick | slow)) == (4, 8, 13)
