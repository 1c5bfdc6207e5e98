"""Run jobs one by one, or each in its own process: memory is freed, and a crash ends one job only."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import torch

from nni_topo.errors import NniTopoError
from nni_topo.runs.provenance import Record
from nni_topo.studies.cells import checkpoint
from nni_topo.studies.records import append_record

# Never a plain fork: the child would inherit locks of PyTorch's threads. The fork server imports the pipeline once.
_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_POLL_SECONDS = 1.0  # how often to check whether a network that other jobs wait for is trained
Job = Any  # with a `key` of its record and a `training_key` of its network: equal settings, equal keys


def run_missing(
    jobs: Sequence[Job],
    done: dict[str, Record],
    out: Path,
    run: Callable[[Job, Path], Record],
    *,
    at_a_time: int | None,
    announce: Callable[[Job, int, int], None] | None = None,
) -> dict[int, str]:
    """Run the jobs whose key isn't in ``done``, and put their records there and into ``results.jsonl``.

    ``at_a_time`` jobs run in processes of their own, each on one thread; ``run`` must then be a function of a module.
    If several jobs share a trained network, one trains it and the others start when its checkpoint exists. None: one by
    one in this process. ``announce`` is called before each job with the job, its number from 1 and the number of jobs.
    Return, by number, why jobs have no record.
    """
    todo = {number: job for number, job in enumerate(jobs, start=1) if job.key not in done}
    failures: dict[int, str] = {}

    def tell(number: int) -> None:
        if announce is not None:
            announce(todo[number], number, len(jobs))

    def note(number: int, result: Record | str) -> None:
        if isinstance(result, str):
            failures[number] = result
        else:
            append_record(out / "results.jsonl", result)
            done[todo[number].key] = result

    if at_a_time is None:
        for number, job in todo.items():
            tell(number)
            note(number, run(job, out))
        return failures
    context: Any = multiprocessing.get_context(_START)
    if _START == "forkserver":
        context.set_forkserver_preload(["nni_topo.studies.cells"])
    waiting, running = dict(todo), dict[Any, tuple[int, BaseProcess]]()
    try:
        while waiting or running:
            while len(running) < at_a_time:
                next_number = _next(waiting, [todo[number] for number, _ in running.values()], out)
                if next_number is None:
                    break
                tell(next_number)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_send_record, args=(sender, run, waiting.pop(next_number), out))
                process.start()
                sender.close()  # the child holds the other copy: the pipe closes when the child ends
                running[receiver] = next_number, process
            for ready in wait(list(running), _POLL_SECONDS):
                number, process = running.pop(ready)
                result: Record | str
                with cast(Connection, ready) as pipe:
                    try:
                        result = pipe.recv()
                    except (EOFError, OSError):  # the process sent nothing, or only a part
                        process.join()
                        code = process.exitcode or 0
                        killed = f"killed by signal {-code} (out of memory?)"
                        result = killed if code < 0 else f"ended with exit code {code}"
                note(number, result)
    finally:
        for _, process in running.values():
            process.kill()
    return failures


def _next(waiting: Mapping[int, Job], running: list[Job], out: Path) -> int | None:
    """Return the number of the first waiting job whose network is trained, or isn't being trained by a running job."""
    training = {job.training_key for job in running}
    for number, job in waiting.items():
        if job.training_key not in training or checkpoint(job.training_key, out).exists():
            return number
    return None


def _send_record(sender: Connection, run: Callable[[Job, Path], Record], job: Job, out: Path) -> None:
    """Run a job and send its record, or the reason why there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = multiprocessing.parent_process()
    if parent is not None:
        # ends this process once its parent is killed; sys.exit would end this thread only
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    result: Record | str
    try:
        result = run(job, out)
    except NniTopoError as error:
        result = str(error)
    except Exception:
        result = traceback.format_exc()
    sender.send(result)
