"""Records of finished cells, one JSON line each, and the loop that runs the cells without a record."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed

from nni_topo.disk import disk_errors, output_file
from nni_topo.errors import ConfigError, DataError, NniTopoError
from nni_topo.rules import Rule, check_knobs, instance, number, whole
from nni_topo.runs.provenance import Record

COMPARED: dict[str, Rule] = {
    **dict.fromkeys(("model", "data", "target", "pruner"), instance(str)),
    **dict.fromkeys(("flops", "flops_before", "params", "params_before"), number(0.0)),
    "seed": whole(0),
    "accuracy_before": number(0.0, 1.0),
}
"""Keys that every record of a comparison has, with their rules."""
UNPRUNED = ("accuracy_before", "validation_before")
"""Keys with the accuracies of the unpruned network, which all rows of one trained network share."""
Job = Any  # its `key` identifies its record, its `training_key` its trained network; equal settings have equal keys
_KILLED = "its process or a parallel one was killed (out of memory?); the same command runs it again"


def read_records(path: Path, rules: Mapping[str, Rule] | None = None, with_key: str | None = None) -> list[Record]:
    """Read the records of ``results.jsonl`` and check their keys by rules; DataError names a line that breaks a rule.

    Records without the key ``with_key`` are skipped. A last line without a line break is ignored: it was cut short by a
    crash, or another process is writing it.
    """
    if not path.exists():
        return []
    rules = rules or {}
    lines = path.read_bytes().splitlines(keepends=True)
    records = []
    for index, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):  # the last one, cut short
            continue
        place = f"{path}:{index}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"every line must be a JSON record, got: {error} ({place})") from error
        if not isinstance(record, dict):
            raise DataError(f"every line must be a JSON record of a run, got a {type(record).__name__} ({place})")
        if with_key is not None and with_key not in record:
            continue
        if not record.keys() >= rules.keys():
            keys = ", ".join(record)[:80]
            raise DataError(f"every line must be a JSON record of a run, got the keys {keys} ({place})")
        try:
            check_knobs(place, record, rules)
        except ConfigError as error:
            raise DataError(f"every line must be a JSON record of a run: {error}") from None
        records.append(record)
    return records


def compared_records(path: Path) -> list[Record]:
    """Read the records of comparisons; records of studies, which have no target, are skipped."""
    return read_records(path, COMPARED, with_key="target")


def append_record(path: Path, record: Record) -> None:
    """Append a record to ``results.jsonl`` and sync the file; a last line that was cut short is replaced."""
    with disk_errors(path), output_file(path).open("ab") as stream:
        if path.stat().st_size:
            before = path.read_bytes()
            if not before.endswith(b"\n"):
                stream.truncate(before.rfind(b"\n") + 1)
        stream.write(json.dumps(record, sort_keys=True).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def check_unpruned(record: Record, earlier: Record, place: Path) -> None:
    """Raise DataError if a row began with another unpruned network than an earlier row of the same trained network."""
    differences = [name for name in UNPRUNED if name in record and name in earlier and record[name] != earlier[name]]
    if differences:
        name = differences[0]
        raise DataError(
            f"all rows of a trained network must begin with the same unpruned network, got {name} {record[name]:g} "
            f"beside {earlier[name]:g} of earlier rows: it was trained again and came out different; put its file back "
            f"into checkpoints, or remove the earlier rows of seed {record['seed']} ({place})"
        )


def run_missing(
    jobs: Sequence[Job],
    done: dict[str, Record],
    out: Path,
    run: Callable[[Job, Path], Record],
    *,
    n_jobs: int,
    announce: Callable[[Job, int, int], None] | None = None,
) -> list[tuple[Job, str]]:
    """Run the jobs whose key isn't in ``done``; add their records to ``done`` and to ``results.jsonl``.

    ``n_jobs`` jobs run in parallel, each in a process with one thread; -1: one per core; 1: one after another in this
    process. ``announce`` is called before each job with the job, its number from 1 and the number of jobs. Return the
    jobs that failed, with the reasons; a job whose unpruned network isn't that of the records ends the run with a
    DataError.
    """
    path = out / "results.jsonl"
    first_rows = {job.training_key: done[job.key] for job in reversed(jobs) if job.key in done}
    todo = {number: job for number, job in enumerate(jobs, start=1) if job.key not in done}
    failures: dict[int, str] = {}
    threads = torch.get_num_threads() if n_jobs == 1 else 1

    def attempts(numbers: Sequence[int]) -> Iterator[Any]:
        for number in numbers:
            if announce is not None:
                announce(todo[number], number, len(jobs))
            yield delayed(_attempt)(number, run, todo[number], out, threads)

    stages = [list(todo)]
    if n_jobs != 1:
        # first one job per network, which trains it, then all other jobs
        first = set({job.training_key: number for number, job in reversed(todo.items())}.values())
        stages = [sorted(first), [number for number in todo if number not in first]]
    for stage in stages:
        try:
            parallel = Parallel(n_jobs, return_as="generator_unordered", pre_dispatch="n_jobs")
            for number, record in parallel(attempts(stage)):
                if isinstance(record, str):  # the reason why there is none
                    failures[number] = record
                else:
                    check_unpruned(record, first_rows.setdefault(todo[number].training_key, record), path)
                    append_record(path, record)
                    done[todo[number].key] = record
        except BrokenProcessPool:
            lost = [number for number in stage if todo[number].key not in done]
            failures = {**dict.fromkeys(lost, _KILLED), **failures}
    return [(todo[number], failures[number]) for number in sorted(failures)]


def _attempt(
    number: int, run: Callable[[Job, Path], Record], job: Job, out: Path, threads: int
) -> tuple[int, Record | str]:
    """Run a job; return its number with its record, or with the reason of its failure."""
    torch.set_num_threads(threads)
    try:
        return number, run(job, out)
    except NniTopoError as error:
        return number, str(error)
    except Exception:
        return number, traceback.format_exc()
