"""A process that has imported everything but the package, and forks a child for each run of pytest.

Importing PyTorch, NNI and the rest takes seconds, a fork milliseconds. The package itself is imported in the child,
from a copy of the tree in which one file may be changed; only `nni_topo.compat`, which has to mend NNI while it is
imported, is there before.
"""

from __future__ import annotations

import compileall
import contextlib
import importlib
import importlib.util
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "nni_topo"
LONG_AGO = 1_000_000_000
"""When the copy's files were last changed: what a mutant writes is newer, so no cache takes it for the original."""

MEMORY = 4 << 30
"""How many bytes a child may take on top of what it is forked with."""

WALL_PER_CPU = 6
"""How many seconds may pass per second of CPU time: the machine may be busy, but a test that hangs uses none."""


@dataclass(frozen=True)
class Outcome:
    """How a child ended: ``state`` is "done", "timeout" or "died"; ``answer`` is what its task returned."""

    state: str
    answer: Any
    cpu_s: float
    output: str


@contextlib.contextmanager
def copied(root: Path) -> Iterator[Path]:
    """Copy the tree, without what git ignores, to a directory of its own while the block runs."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "tree"
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=root, check=True, capture_output=True, text=True,
        )  # fmt: skip
        for name in filter(lambda name: (root / name).is_file(), listed.stdout.splitlines()):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, copy / name)
            os.utime(copy / name, (LONG_AGO, LONG_AGO))
        compileall.compile_dir(copy / PACKAGE, quiet=2)
        yield copy


@contextlib.contextmanager
def changed(path: Path, text: str) -> Iterator[None]:
    """Give a file of the copy another text while the block runs."""
    original = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(original)
        os.utime(path, (LONG_AGO, LONG_AGO))


def preload(copy: Path) -> None:
    """Import what the tests import, without the package, and move into the copy."""
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ.update(PYTHONPATH=str(copy), OMP_NUM_THREADS="1")
    home = copy.parent / "home"
    home.mkdir()
    importlib.import_module("tests.own_home").use_home(home)  # before NNI is imported, which reads it
    stand_in = types.ModuleType(PACKAGE)
    stand_in.__path__ = [str(copy / PACKAGE)]
    sys.modules[PACKAGE] = stand_in
    importlib.import_module(f"{PACKAGE}.compat").enable()
    del sys.modules[PACKAGE]
    found = in_child(_imported_by_the_tests, 600)
    if found.state != "done":
        raise RuntimeError(f"the tests can't be collected: {found.output}")
    for name in found.answer:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    sys.dont_write_bytecode = True  # what is compiled by now is the original


def in_child(task: Callable[[], Any], cpu_s: float) -> Outcome:
    """Run a task in a fork with a limit on its CPU time; it returns something that JSON can hold."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        answer, output = Path(folder) / "answer", Path(folder) / "output"
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _run(task, cpu_s, answer, output)
        state, used = _wait(child, cpu_s * WALL_PER_CPU)
        text = output.read_text(errors="replace") if output.exists() else ""
        if state == "done" and not answer.exists():
            state = "died"
        return Outcome(state, json.loads(answer.read_text()) if state == "done" else None, used, text)


def _run(task: Callable[[], Any], cpu_s: float, answer: Path, output: Path) -> None:
    """Do a child's work; never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        written = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(written, 1)
        os.dup2(written, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ["TMPDIR"] = tempfile.tempdir = str(output.parent)
        _limit(cpu_s)
        answer.write_text(json.dumps(task()))
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def _limit(cpu_s: float) -> None:
    """Limit this process's CPU time and memory."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s) + 1, int(cpu_s) + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))


def _wait(child: int, wall_s: float) -> tuple[str, float]:
    """Wait for a child, end it and what it started when its time is over, and return its state and its CPU time."""
    opened = os.pidfd_open(child)
    try:
        ready, _, _ = select.select([opened], [], [], wall_s)
    finally:
        os.close(opened)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    cpu = used.ru_utime + used.ru_stime
    if not ready or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "timeout", cpu
    return ("done" if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 else "died"), cpu


def _imported_by_the_tests() -> list[str]:
    """Collect all tests and return the modules which that imports, without the package's and the tests' own."""
    pytest_run(["--collect-only", "-q"])
    modules = dict(sys.modules)
    return [name for name, module in modules.items() if _is_foreign(name, module)]


def _is_foreign(name: str, module: types.ModuleType) -> bool:
    """Say whether a module can be imported by its name from outside the copy."""
    place = getattr(module, "__file__", None) or ""
    own = name.split(".")[0] in (PACKAGE, "tests", "__main__", "__mp_main__", "conftest")
    return not own and not place.startswith(os.getcwd()) and getattr(module, "__spec__", None) is not None


def pytest_run(arguments: list[str], *plugins: object) -> int:
    """Run pytest in this process as the project's settings say, without a cache and without chance.

    Of the tests that aren't slow all cases run: what only one kind of network shows is noticed, too.
    """
    import hypothesis
    import pytest

    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, deadline=None)
    hypothesis.settings.load_profile("mutants")
    alone = ["-n0"] if importlib.util.find_spec("xdist") else []
    return int(
        pytest.main(
            ["-p", "no:cacheprovider", "-m", "(not slow or further_case) and not cuda", *alone, *arguments],
            plugins=[*plugins],
        )
    )
