"""Which tests run which functions: measured once per test file, and again when the file changes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coverage
import forking
import pytest
from mutating import Functions, Mutant, python_files

LONGEST_FILE = 900
"""CPU seconds that one test file may take while it is measured."""


@dataclass
class TestFile:
    """What one file's tests run; only tests that passed are in it."""

    path: str
    digest: str
    seconds: dict[str, float] = field(default_factory=dict)
    """CPU seconds per test."""
    runs: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Tests per source file and function."""


@dataclass(frozen=True)
class Chosen:
    """Tests for a mutant in the order in which they run, and how many more would run its function or file."""

    tests: tuple[str, ...]
    seconds: float
    left_out: int


def measured(copy: Path, kept: Path, package: str, under: Iterable[str]) -> Iterator[TestFile]:
    """Yield the measurements of the test files under some paths; those that ``kept`` lacks are added to it.

    The digest holds a test file's text and the names of all source files: whatever moves is measured again.
    """
    known = _known(kept)
    layout = "\n".join(sorted(str(path.relative_to(copy)) for path in (copy / package).rglob("*.py")))
    for path in _test_files(copy, under):
        digest = hashlib.sha256((layout + path.read_text()).encode()).hexdigest()[:16]
        name = str(path.relative_to(copy))
        if name not in known or known[name].digest != digest:
            known[name] = _measure(copy, name, digest, package)
            with kept.open("a") as lines:
                lines.write(json.dumps(vars(known[name])) + "\n")
        yield known[name]


def choose(mutant: Mutant, files: Iterable[TestFile], budget_s: float) -> Chosen:
    """Choose the tests of a mutant: those that run its function, then others of the same files, the quickest first.

    Files in a folder that is named as the mutant's go first. Where no test is seen to run the function
    the tests that run anything in the file do. What doesn't fit in the budget is left out.
    """
    folder = Path(mutant.path).parent.name
    ranked: list[tuple[bool, bool, float, str]] = []
    files = list(files)
    for exact in (True, False):
        for file in files:
            functions = file.runs.get(mutant.path, {})
            running = set(functions.get(mutant.function, ()) if exact and mutant.function else _all(functions))
            if running:
                far = Path(file.path).parent.name != folder
                ranked += [(test not in running, far, seconds, test) for test, seconds in file.seconds.items()]
        if ranked:
            break
    return _fitting(sorted(ranked), budget_s)


def _fitting(ranked: list[tuple[bool, bool, float, str]], budget_s: float) -> Chosen:
    """Take tests from the front while they fit, at least one."""
    taken: list[str] = []
    spent = 0.0
    for *_, seconds, test in ranked:
        if not taken or spent + seconds <= budget_s:
            taken.append(test)
            spent += seconds
    return Chosen(tuple(taken), spent, len(ranked) - len(taken))


def _all(functions: Mapping[str, list[str]]) -> Iterator[str]:
    """Yield the tests of all of a file's functions."""
    for tests in functions.values():
        yield from tests


def _known(kept: Path) -> dict[str, TestFile]:
    """Read the measurements of earlier runs; of two the later one counts."""
    lines = kept.read_text().splitlines() if kept.exists() else []
    return {file.path: file for file in (TestFile(**json.loads(line)) for line in lines)}


def _test_files(copy: Path, under: Iterable[str]) -> list[Path]:
    """List the files with tests under some paths: those named so, and sources with doctests."""
    files = [path for name in under for path in python_files(copy / name)]
    return [path for path in files if path.name.startswith("test_") or _has_doctests(path)]


def _has_doctests(path: Path) -> bool:
    """Say whether a source file has examples; what lies under tests has none."""
    return "tests" not in path.parts and ">>> " in path.read_text()


def _measure(copy: Path, name: str, digest: str, package: str) -> TestFile:
    """Run a file's tests and note what they run."""
    outcome = forking.in_child(lambda: _watched(copy, name, package), LONGEST_FILE)
    found = outcome.answer or {"seconds": {}, "runs": {}}
    print(f"{name}: {len(found['seconds'])} tests, {outcome.cpu_s:.0f} s CPU, {outcome.state}", flush=True)
    return TestFile(name, digest, found["seconds"], found["runs"])


def _watched(copy: Path, name: str, package: str) -> dict[str, Any]:
    """Run a file's tests under coverage, in a child."""
    watch = coverage.Coverage(data_file=None, source=[str(copy / package)], config_file=False)
    noting = _Noting(watch)
    watch.start()
    forking.pytest_run([name, "-q"], noting)
    watch.stop()
    runs: dict[str, dict[str, list[str]]] = {}
    data = watch.get_data()
    for path in data.measured_files():
        functions = Functions(Path(path).read_text())
        per_function: dict[str, set[str]] = {}
        for line, tests in data.contexts_by_lineno(path).items():
            per_function.setdefault(functions.at(line), set()).update(noting.seconds.keys() & set(tests))
        named = {function: sorted(tests) for function, tests in per_function.items() if function and tests}
        if named:
            runs[str(Path(path).relative_to(copy))] = named
    return {"seconds": noting.seconds, "runs": runs}


class _Noting:
    """A plugin of pytest that tells coverage which test runs, and notes the CPU time of those that pass."""

    def __init__(self, watch: coverage.Coverage) -> None:
        self.seconds: dict[str, float] = {}
        self._watch = watch
        self._passed: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        began = time.process_time()
        self._watch.switch_context(item.nodeid)
        result = yield
        self._watch.switch_context("")
        if item.nodeid in self._passed:
            self.seconds[item.nodeid] = round(time.process_time() - began, 3)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._passed.add(report.nodeid)
