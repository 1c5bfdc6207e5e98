"""Run a plan so that it can be killed anywhere and goes on where it was."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from joblib import effective_n_jobs

from nni_topo.disk import only_process, write_json
from nni_topo.errors import ConfigError, NniTopoError, instance
from nni_topo.pruners.registry import check_knob_names
from nni_topo.runs.cells import checkpoint, run_cell
from nni_topo.runs.plan import SCRATCH, Cell, Plan
from nni_topo.runs.records import COMPARED, Record, append_record, read_records
from nni_topo.runs.report import write_report
from nni_topo.runs.rivals import is_rival
from nni_topo.runs.run import load_model_data, resolve_device
from nni_topo.runs.tables import markdown_report

if TYPE_CHECKING:
    import pandas

# Never a plain fork: the child would inherit locks that PyTorch's threads hold. The server imports the pipeline once.
_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
Results = Generator[tuple[int, "Record | str"], None, None]
_LOOK_SECONDS = 1.0  # how often it is looked whether a network that others wait for is trained


@dataclass(frozen=True)
class RunFailure:
    """A cell that ended without a record, and why."""

    cell: Cell
    reason: str


class Comparison(NamedTuple):
    """What a comparison found; its ``repr`` is the tables, in Markdown."""

    records: list[Record]  # of the plan's cells that ran, in its order
    failures: list[RunFailure]  # cells that raised or were killed; the same command tries them again

    def to_frame(self) -> pandas.DataFrame:
        """Return the records as a table, one row each, what is nested as columns with dots in their names."""
        import pandas

        return pandas.json_normalize(self.records)

    def __repr__(self) -> str:
        failed = [f"failed: {each.cell.pruner.row}, seed {each.cell.seed}" for each in self.failures]
        return "\n".join([markdown_report(self.records), *failed])


def compare(
    plan: Plan,
    out: str | Path,
    *,
    isolate: bool = True,
    on_cell: Callable[[Cell, int, int], None] | None = None,
) -> Comparison:
    """Run the cells of a plan that have no record yet; return all records, in the plan's order, and the failed cells.

    The folder gets a line per finished cell in ``results.jsonl``, all records at the end in ``results.json``, the
    plan, ``report.html`` and the trained models. With ``isolate`` each cell has a process of its own: its memory is
    given back, a crash ends one cell only, and the plan's ``n_jobs`` of them run at a time. ``on_cell`` is called with
    each cell, its number from 1 and their number before it runs. ConfigError if a name, a knob or the device is
    unknown, or the folder holds another comparison's records; DataError if the data can't be read, or another run is at
    work in the folder.
    """
    if not isolate and plan.n_jobs != 1:
        raise ConfigError(f"cells that share a process must run one by one, got n_jobs {plan.n_jobs} (compare)")
    out = Path(out)
    cells = list(plan.cells())
    _check_choices(cells)
    with only_process(out, wait=False):
        return _all_cells(plan, cells, out, isolate, on_cell)


def _all_cells(
    plan: Plan, cells: list[Cell], out: Path, isolate: bool, on_cell: Callable[[Cell, int, int], None] | None
) -> Comparison:
    done = {record["key"]: record for record in read_records(out / "results.jsonl", {"key": instance(str), **COMPARED})}
    # results.json and the tables are of one comparison; a changed plan in an old folder would mix two
    strangers = [record for key, record in done.items() if key not in {cell.key for cell in cells}]
    if strangers:
        one = strangers[0]
        raise ConfigError(
            f"an output folder must hold one comparison, got {len(strangers)} records of another one, e.g. "
            f"{one['model']}, {one['data']}, {one['pruner']}, {one['target']} ({out})"
        )
    write_json(out / "plan.json", asdict(plan), sort=False, default=repr)

    def tell(number: int) -> None:
        if on_cell is not None:
            on_cell(cells[number - 1], number, len(cells))

    todo = {number: cell for number, cell in enumerate(cells, start=1) if cell.key not in done}
    jobs = effective_n_jobs(plan.n_jobs)
    failures = {}
    with closing(_isolated(todo, out, jobs, tell) if isolate else _in_process(todo, out, tell)) as results:
        for number, result in results:
            if isinstance(result, str):
                failures[number] = RunFailure(todo[number], result)
                continue
            append_record(out / "results.jsonl", result)
            done[todo[number].key] = result
    records = [done[cell.key] for cell in cells if cell.key in done]
    write_json(out / "results.json", records)
    write_report(out)
    return Comparison(records, [failures[number] for number in sorted(failures)])


def _check_choices(cells: list[Cell]) -> None:
    """Raise, before anything runs, what would stop every cell of a model, data set or pruner."""
    for pruner in {cell.pruner.name: cell.pruner for cell in cells}.values():
        if pruner.name != SCRATCH and not is_rival(pruner.name):
            check_knob_names(pruner.name, pruner.knobs)
    for cell in {(cell.model.name, cell.data): cell for cell in cells}.values():
        resolve_device(cell.device)
        load_model_data(cell.model, cell.data)


def _in_process(todo: Mapping[int, Cell], out: Path, tell: Callable[[int], None]) -> Results:
    """Run cells one by one; yield each one's number and record."""
    for number, cell in todo.items():
        tell(number)
        yield number, run_cell(cell, out)


def _isolated(todo: Mapping[int, Cell], out: Path, jobs: int, tell: Callable[[int], None]) -> Results:
    """Run each cell in a process of its own, so many at a time; yield its number and its record, or why there is none.

    Of cells that share a network one trains it; the others begin when it is there.
    """
    context: Any = multiprocessing.get_context(_START)
    if _START == "forkserver":
        context.set_forkserver_preload(["nni_topo.runs.cells"])
    waiting, running = dict(todo), dict[Connection, tuple[int, BaseProcess]]()
    try:
        while waiting or running:
            while len(running) < jobs and (number := _next(waiting, [todo[each] for each, _ in running.values()], out)):
                tell(number)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_send_record, args=(sender, waiting.pop(number), out))
                process.start()
                sender.close()  # the child's own end: when it is gone, so is the child
                running[receiver] = number, process
            for ready in wait(list(running), _LOOK_SECONDS):
                number, process = running.pop(cast(Connection, ready))
                yield number, _received(cast(Connection, ready), process)
    finally:
        for _, process in running.values():
            process.kill()


def _next(waiting: Mapping[int, Cell], running: list[Cell], out: Path) -> int | None:
    """Return the number of the first cell whose network is trained, or that no running cell is training."""
    training = {cell.training_key for cell in running}
    free = (n for n, cell in waiting.items() if cell.training_key not in training or checkpoint(cell, out).exists())
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


def _send_record(sender: Connection, cell: Cell, out: Path) -> None:
    """Run a cell and send its record, or the reason why there is none."""
    _end_with_parent()
    result: Record | str
    try:
        result = run_cell(cell, out)
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
