"""Runs one by one, or in processes of their own: memory is given back, and a crash ends one run only."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from nni_topo.errors import NniTopoError
from nni_topo.runs.provenance import Record
from nni_topo.studies.cells import Trained, checkpoint

# Never a plain fork: the child would inherit locks that PyTorch's threads hold. The server imports the pipeline once.
_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
Results = Generator[tuple[int, "Record | str"], None, None]
_LOOK_SECONDS = 1.0  # how often it is looked whether a network that others wait for is trained


Job = TypeVar("Job", bound=Trained)


def in_turn(
    todo: Mapping[int, Job], out: Path, tell: Callable[[int], None], run: Callable[[Job, Path], Record]
) -> Results:
    """Run one by one in this process; yield each one's number and record."""
    for number, job in todo.items():
        tell(number)
        yield number, run(job, out)


def isolated(
    todo: Mapping[int, Job], out: Path, jobs: int, tell: Callable[[int], None], run: Callable[[Job, Path], Record]
) -> Results:
    """Run each in a process of its own, so many at a time; yield its number and its record, or why there is none.

    Of those that share a network one trains it; the others begin when it is there. ``run`` is a module's function. A
    process computes on one thread.
    """
    context: Any = multiprocessing.get_context(_START)
    if _START == "forkserver":
        context.set_forkserver_preload(["nni_topo.studies.cells"])
    waiting, running = dict(todo), dict[Connection, tuple[int, BaseProcess]]()
    try:
        while waiting or running:
            while len(running) < jobs and (number := _next(waiting, [todo[each] for each, _ in running.values()], out)):
                tell(number)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_send_record, args=(sender, run, waiting.pop(number), out))
                process.start()
                sender.close()  # the child's own end: when it is gone, so is the child
                running[receiver] = number, process
            for ready in wait(list(running), _LOOK_SECONDS):
                number, process = running.pop(cast(Connection, ready))
                yield number, _received(cast(Connection, ready), process)
    finally:
        for _, process in running.values():
            process.kill()


def _next(waiting: Mapping[int, Job], running: list[Job], out: Path) -> int | None:
    """Return the number of the first whose network is trained, or that none that runs is training."""
    training = {job.training_key for job in running}
    free = (n for n, job in waiting.items() if job.training_key not in training or checkpoint(job, out).exists())
    return next(free, None)


def _received(receiver: Connection, process: BaseProcess) -> Record | str:
    """Return what a process sent before it ended, or how it ended."""
    with receiver:
        try:
            return cast("Record | str", receiver.recv())
        except (EOFError, OSError):  # nothing, or not all of it
            process.join()
    code = process.exitcode or 0
    return f"killed by signal {-code} (out of memory?)" if code < 0 else f"ended with exit code {code}"


def _send_record(sender: Connection, run: Callable[[Job, Path], Record], job: Job, out: Path) -> None:
    """Run a job and send its record, or the reason why there is none."""
    _end_with_parent()
    torch.set_num_threads(1)
    result: Record | str
    try:
        result = run(job, out)
    except NniTopoError as error:
        result = str(error)
    except Exception:
        result = traceback.format_exc()
    sender.send(result)


def _end_with_parent() -> None:
    """Leave nothing running behind a parent that was killed; an interruption is the parent's to heed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        # sys.exit would end the thread alone
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
