"""Run every check of the project, one after the other, and say which of them last passed when: ``make test-nightly``.

A check is a command. One that passed on the files as they are now is not run again, so a stopped run goes on where it
stopped. What every check last passed on is kept in ``benchmarks/records/checks.json``. The run ends with exit status 1
if a check failed or could not run, or if a test was skipped in every check that holds it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
RECORDS = PROJECT / "benchmarks/records/checks.json"
SHARES = 20
"""Parts of the slow tests. A multiple of the five parts that `.ci/run` takes in turn."""

MUTATED = ("maths", "pruners", "network", "recovery", "runs", "cli", "compat")
"""Packages whose tests are tried on changed code."""
OF_ALL = "tests/test_defaults.py"
"""Tests of all packages, of what docstrings say of the defaults."""
COMMANDS = "tests/test_cli.py tests/test_commands.py tests/test_data_commands.py tests/cli/test_doctor.py"
"""Tests of the commands that aren't in the folder of their package."""


@dataclass(frozen=True)
class Check:
    """A command for the shell and what it needs.

    ``programs`` and ``variables`` must be there, or the check can't run. ``hardware`` is a command that succeeds on
    a machine with the hardware; a machine without it is excused. Tests that are skipped with a reason that matches
    ``covers`` run in this check alone.
    """

    name: str
    command: str
    programs: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    hardware: str = ""
    covers: str = ""

    def missing(self) -> str:
        """Return what the machine lacks; an empty text if the check can run."""
        lacks = [f"the program {name}" for name in self.programs if shutil.which(name) is None]
        lacks += [f"{name}=..." for name in self.variables if not os.environ.get(name)]
        return ", ".join(lacks)

    def is_excused(self) -> bool:
        """Whether the machine lacks hardware that nobody can install."""
        return bool(self.hardware) and subprocess.run(self.hardware, shell=True, capture_output=True).returncode != 0


def checks() -> list[Check]:
    """List all checks, the quick ones first."""
    in_random_order = 'make test OPTIONS="--random-order --random-order-seed=$COMMITS"'
    return [
        Check("lint and types", "make lint"),
        Check("tests", "make test"),
        Check("demonstration", "make demo"),
        Check("site", "make docs"),
        *(
            Check(f"slow tests, part {part} of {SHARES}", f"make test-slow SHARE={part}/{SHARES}")
            for part in range(SHARES)
        ),
        Check("reliability", "make reliability"),
        Check("random requests", "make fuzz"),
        Check("damaged files and killed jobs", "make faults"),
        Check("processors", "make test-processors"),
        Check("all networks of the zoo", "make zoo ZOO=--without-times"),
        Check(
            "a third of the networks from files",
            "rm -f runs/zoo_imports.jsonl; $BIN/python -m benchmarks.export.zoo_imports --out runs/zoo_imports.jsonl "
            "--turn $COMMITS --against benchmarks/records/zoo_imports.jsonl",
        ),
        Check("other people's packages", "rm -f runs/packages.jsonl; make packages"),
        Check("speed beside the pages", "$BIN/python -m benchmarks.speed.quick --out runs/quick"),
        Check("NNI's own tests", "make upstream UPSTREAM=--record", variables=("NNI",)),
        Check("lowest versions", "make test-lowest", programs=("python3.10",)),
        Check("PyTorch 2.12, Python 3.12", "make test-with PYTHON=python3.12 WITH='torch==2.12.*'", ("python3.12",)),
        Check("PyTorch 2.13, Python 3.13", "make test-with PYTHON=python3.13 WITH='torch==2.13.*'", ("python3.13",)),
        Check("Transformers 5", "make test-with AFTER='transformers>=5,<6'"),
        Check("LiteRT", "make test-with AFTER='litert-torch' TESTS='-m slow tests/test_runtimes.py'"),
        Check("random order", in_random_order),
        Check(
            "random order, busy machine",
            f"stress-ng --quiet --cpu 0 --timeout 3h & busy=$!; trap 'kill $busy' EXIT; {in_random_order}",
            ("stress-ng",),
        ),
        *(Check(f"mutants of {package}", mutants_of(package)) for package in MUTATED),
        Check(
            "GPU",
            'make cuda PY="${PY:-$BIN/python}"',
            hardware="${PY:-$BIN/python} -c 'import torch; raise SystemExit(not torch.cuda.is_available())'",
            covers="no CUDA device",
        ),
    ]


def mutants_of(package: str) -> str:
    """Return the command for some random changes to a package, other ones after every commit, by its own tests."""
    tests = f"tests/{package} nni_topo/{package} {OF_ALL}" + (f" {COMMANDS}" if package == "cli" else "")
    own = f"--folders {package} --tests {tests} --out runs/mutants/{package}"
    return f'make mutants MUTANTS="{own} --count 60 --seed $COMMITS --budget 60 --minutes 120 --least 88"'


@dataclass
class Outcomes:
    """What became of the tests in the files that `tests/conftest.py` writes, one a check."""

    ran: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    versions: str = ""
    counts: dict[str, int] = field(default_factory=lambda: {"passed": 0, "failed": 0, "skipped": 0})

    def read(self, file: Path) -> Outcomes:
        """Add a file's lines; a file that isn't there has none."""
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            test, outcome, _, reason = json.loads(line)
            if outcome == "versions":
                self.versions = reason
                continue
            self.counts[outcome] += 1
            if outcome == "skipped":
                self.skipped[test] = reason
            else:
                self.ran.add(test)
        return self

    def never_ran(self) -> dict[str, str]:
        """Return the tests that were skipped wherever they were collected, with the reason; of a file, its path."""
        files_that_ran = {test.partition("::")[0] for test in self.ran}
        return {
            test: reason
            for test, reason in sorted(self.skipped.items())
            if test not in self.ran and not ("::" not in test and test in files_that_ran)
        }


def git(*words: str, **environment: str) -> str:
    """Return what git says of the project."""
    command = ["git", "-C", str(PROJECT), *words]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **environment}
    ).stdout.strip()


def tree() -> str:
    """Return a hash of all files as they are, but for the records that the checks themselves write."""
    with tempfile.TemporaryDirectory() as folder:
        index = str(Path(folder) / "index")
        git("read-tree", "HEAD", GIT_INDEX_FILE=index)
        git("add", "--all", GIT_INDEX_FILE=index)
        records = RECORDS.parent.relative_to(PROJECT).as_posix()
        git("rm", "-r", "--quiet", "--cached", "--ignore-unmatch", records, GIT_INDEX_FILE=index)
        return git("write-tree", GIT_INDEX_FILE=index)


class Nightly:
    """Checks, their results in a folder, and the records of their last passes."""

    def __init__(self, listed: Sequence[Check], folder: Path, records: Path, state: str, commits: int) -> None:
        self.checks = list(listed)
        self.folder = folder
        self.records = records
        self.state = state
        self.commits = commits
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, check: Check, ending: str) -> Path:
        """Return the place of a check's output or outcomes."""
        return self.folder / (re.sub(r"\W+", "-", check.name).strip("-") + ending)

    def results(self) -> dict[str, dict[str, Any]]:
        """Return the latest result of every check on the files as they are now."""
        log = self.folder / "results.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return {line["check"]: line for line in lines if line["state"] == self.state}

    def passes(self) -> dict[str, dict[str, Any]]:
        """Return what every check last passed on."""
        return json.loads(self.records.read_text()) if self.records.exists() else {}

    def run(self, only: Sequence[str] | None, until: float) -> bool:
        """Run the checks that have not passed on these files; False if the time was over before the last."""
        done = self.results()
        for check in self.checks:
            if only is not None and check.name not in only:
                continue
            if done.get(check.name, {}).get("result") == "passed":
                continue
            if time.monotonic() > until:
                return False
            result = self.run_one(check)
            print(f"{check.name:34} {result['result']:8} {result['seconds']:7.0f} s  {result['why']}", flush=True)
        return True

    def run_one(self, check: Check) -> dict[str, Any]:
        """Run a check, note its result, and enter a pass in the records."""
        outcomes = self.file(check, ".outcomes.jsonl")
        outcomes.unlink(missing_ok=True)
        start = time.monotonic()
        if check.is_excused():
            result, why = "excused", "the machine lacks the hardware"
        elif why := check.missing():
            result, why = "not run", f"needs {why}"
        else:
            status = self.start(check, outcomes)
            result = "failed" if status else "passed"
            why = f"exit status {status}, {self.file(check, '.log')}" if status else ""
        line: dict[str, Any] = {
            "check": check.name,
            "state": self.state,
            "result": result,
            "seconds": round(time.monotonic() - start),
            "why": why,
        }
        with (self.folder / "results.jsonl").open("a") as lines:
            print(json.dumps(line), file=lines)
        if result == "passed":
            self.enter(check, line["seconds"], Outcomes().read(outcomes))
        return line

    def start(self, check: Check, outcomes: Path) -> int:
        """Run a check's command with its output in a file; its processes end with this one."""
        environment = {
            "BIN": os.environ.get("BIN", f"{os.environ.get('VENV', '.venv')}/bin"),
            "COMMITS": str(self.commits),
            "NNI_TOPO_OUTCOMES": str(outcomes.resolve()),
        }
        with self.file(check, ".log").open("w") as log:
            process = subprocess.Popen(
                check.command,
                shell=True,
                cwd=PROJECT,
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait()
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)

    def enter(self, check: Check, seconds: int, outcomes: Outcomes) -> None:
        """Put a pass into the records."""
        passes = self.passes()
        passes[check.name] = {
            "date": datetime.date.today().isoformat(),
            "commits": self.commits,
            "seconds": seconds,
            **({"tests": outcomes.counts, "versions": outcomes.versions} if outcomes.versions else {}),
        }
        ordered = {each.name: passes[each.name] for each in self.checks if each.name in passes}
        self.records.parent.mkdir(parents=True, exist_ok=True)
        self.records.write_text(json.dumps(ordered, indent=1) + "\n")

    def table(self) -> str:
        """Return a row a check: its result on these files, and how long ago it last passed on any."""
        results, passes = self.results(), self.passes()
        rows = [("check", "now", "seconds", "passed", "skipped", "last pass", "commits ago", "versions")]
        for check in self.checks:
            last = passes.get(check.name)
            now = results.get(check.name, {"result": "-", "seconds": "-"})
            if last is None:
                rows.append((check.name, now["result"], str(now["seconds"]), "", "", "never", "", ""))
                continue
            counts = last.get("tests", {"passed": "", "skipped": ""})
            rows.append(
                (
                    check.name,
                    now["result"],
                    str(last["seconds"]),
                    str(counts["passed"]),
                    str(counts["skipped"]),
                    last["date"],
                    str(self.commits - last["commits"]),
                    last.get("versions", ""),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)

    def unexplained_skips(self) -> dict[str, str]:
        """Return the tests that no check ran, but for those that only hardware which isn't here can run."""
        results = self.results()
        outcomes = Outcomes()
        for check in self.checks:
            if results.get(check.name, {}).get("result") in ("passed", "failed"):
                outcomes.read(self.file(check, ".outcomes.jsonl"))
        excused = [
            check.covers
            for check in self.checks
            if check.covers and results.get(check.name, {}).get("result") == "excused"
        ]
        return {
            test: reason
            for test, reason in outcomes.never_ran().items()
            if not any(re.search(pattern, reason) for pattern in excused)
        }

    def verdict(self) -> tuple[int, list[str]]:
        """Return the exit status and what is wrong, a line each."""
        results = self.results()
        said = []
        for check in self.checks:
            result = results.get(check.name)
            if result is None:
                said.append(f"{check.name}: has not run yet; run it again to go on")
            elif result["result"] not in ("passed", "excused"):
                said.append(f"{check.name}: {result['result']}, {result['why']}")
        if all(check.name in results for check in self.checks):
            skips = self.unexplained_skips()
            said += [f"{test} was skipped in every check: {reason}" for test, reason in skips.items()]
        return (1 if said else 0), said


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and print the table."""
    known = checks()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="these checks; default all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no check after this time")
    parser.add_argument("--list", action="store_true", help="print the checks and their commands, and end")
    parser.add_argument("--report", action="store_true", help="only print the table")
    parser.add_argument("--out", type=Path, default=PROJECT / "runs/nightly", help="where outputs and results are kept")
    options = parser.parse_args(arguments)
    refuse_unknown(parser, options.only or (), known)
    if options.list:
        print(*(f"{check.name:34} {check.command}" for check in known), sep="\n")
        return 0
    nightly = Nightly(known, options.out, RECORDS, tree(), int(git("rev-list", "--count", "HEAD")))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; run it again to go on"))
    if not options.report:
        nightly.run(options.only, time.monotonic() + 60 * options.minutes)
    print(nightly.table())
    status, said = nightly.verdict()
    print(*said, sep="\n")
    return status


def refuse_unknown(parser: argparse.ArgumentParser, names: Iterable[str], known: Sequence[Check]) -> None:
    """End with a message if a name is not one of a check."""
    listed = [check.name for check in known]
    for name in names:
        if name not in listed:
            parser.error(f"--only must name checks ({'; '.join(listed)}), got {name!r}")


if __name__ == "__main__":
    raise SystemExit(main())
