"""Change one thing in the code, run the tests, see whether one fails: the score on random mutants.

``make mutants`` runs it; it goes on where the last run stopped. A mutant whose tests fail, crash or run out of time is
killed, one that no test sees has survived. Each runs in a fork, on a copy of the tree; those of `nni_topo.compat`,
which is imported before, in a process of their own. The table is about the draw that is asked for; ``--report`` prints
all draws.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import covering
import forking
from first_failure import tested, tested_afresh
from mutating import Mutant, draw
from reporting import KILLED, equivalents, records, report, shortfalls

PROJECT = Path(__file__).resolve().parents[2]
FOLDERS = ("maths", "pruners", "network", "recovery", "runs", "cli", "compat")
"""The package's folders whose code is mutated; which tests run it is measured."""

IMPORTED_BEFORE = f"{forking.PACKAGE}/compat/"
"""Where the files lie that a fork has imported before they are changed."""

LEAST = "per cent; end with status 1 if a package notices less, and more so than the draw's chance explains (default 0)"
TIME_IS_OVER = "the time is over; run it again to go on"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and print the table; 1 if that isn't finished, or a score is below ``--least``."""
    options = _parser().parse_args(arguments)
    os.environ.pop("NNI_TOPO_OUTCOMES", None)  # tests that fail on changed code are no outcomes of the project's tests
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out.resolve() / "mutants.jsonl"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; run it again to go on"))
    if options.report:
        print(report(records(log), equivalents()))
        return 0
    drawn = draw(PROJECT, [f"{forking.PACKAGE}/{folder}" for folder in options.folders], options.seed, options.count)
    with forking.copied(PROJECT) as copy:
        is_finished = _run(copy, drawn, log, options)
    # the file also holds the mutants of other draws, and of code that is gone
    done = records(log)
    found = {mutant.key: done[mutant.key] for mutant in drawn if mutant.key in done}
    print(report(found, equivalents()))
    below = shortfalls(found, equivalents(), options.least)
    print(*below, sep="\n")
    return 0 if is_finished and not below else 1


def _parser() -> argparse.ArgumentParser:
    """Say what can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PROJECT / "runs/mutants", help="where the results are kept")
    parser.add_argument("--count", type=int, default=300, help="how many mutants are drawn (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--minutes", type=float, default=60, help="stop after this time (default 60)")
    parser.add_argument("--budget", type=float, default=20, help="CPU seconds of tests per mutant (default 20)")
    parser.add_argument("--folders", nargs="+", default=FOLDERS, help=f"or files (default {' '.join(FOLDERS)})")
    parser.add_argument("--tests", nargs="+", default=["tests", forking.PACKAGE], help="where tests lie (default all)")
    parser.add_argument("--again", nargs="*", metavar="KEY", help="run these once more, without keys all survivors")
    parser.add_argument("--least", type=float, default=0, help=LEAST)
    parser.add_argument("--report", action="store_true", help="only print all that is there")
    return parser


def _run(copy: Path, drawn: Sequence[Mutant], log: Path, options: argparse.Namespace) -> bool:
    """Measure the tests where that isn't done, then run the mutants that have no result; False if the time is over."""
    until = time.monotonic() + 60 * options.minutes
    forking.preload(copy)
    files: list[covering.TestFile] = []
    for file in covering.measured(copy, log.with_name("tests.jsonl"), forking.PACKAGE, options.tests):
        files.append(file)
        if time.monotonic() > until:
            print(TIME_IS_OVER)
            return False
    for mutant in _open(drawn, records(log), options.again):
        if time.monotonic() > until:
            print(TIME_IS_OVER)
            return False
        record = try_mutant(copy, mutant, covering.choose(mutant, files, options.budget))
        with log.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
        print(f"{record['state']:9} {record['cpu_s']:5.1f} s  {mutant.path}:{mutant.line} {mutant.key}", flush=True)
    return True


def _open(drawn: Sequence[Mutant], done: dict[str, dict[str, Any]], again: Sequence[str] | None) -> list[Mutant]:
    """List the drawn mutants that have to run."""
    if again is None:
        return [mutant for mutant in drawn if mutant.key not in done]
    known = equivalents()
    survivors = [key for key, record in done.items() if record["state"] not in KILLED and key not in known]
    return [mutant for mutant in drawn if mutant.key in (again or survivors)]


def try_mutant(copy: Path, mutant: Mutant, chosen: covering.Chosen) -> dict[str, Any]:
    """Run a mutant's tests and return what is kept of it."""
    path = copy / mutant.path
    text = path.read_text()
    record = {
        "key": mutant.key, "path": mutant.path, "line": mutant.line, "function": mutant.function,
        "diff": mutant.diff(text), "tests": len(chosen.tests), "left_out": chosen.left_out,
    }  # fmt: skip
    if not chosen.tests:
        return {**record, "state": "untested", "by": None, "cpu_s": 0.0}
    run = tested_afresh if mutant.path.startswith(IMPORTED_BEFORE) else tested
    with forking.changed(path, mutant.source(text)):
        outcome = forking.in_child(lambda: run(chosen.tests), 2 * chosen.seconds + 20)
    state = outcome.state if outcome.state != "done" else outcome.answer["state"]
    by = outcome.answer["by"] if outcome.answer else None
    return {**record, "state": state, "by": by, "cpu_s": round(outcome.cpu_s, 1)}


if __name__ == "__main__":
    raise SystemExit(main())
