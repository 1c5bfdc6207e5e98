"""Run a plan so that it can be killed anywhere and goes on where it was."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nni_topo.disk import only_process, write_json
from nni_topo.errors import ConfigError, NniTopoError, instance
from nni_topo.pruners.registry import check_knob_names
from nni_topo.runs.cells import run_cell
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
    given back, and a crash ends one cell only. ``on_cell`` is called with each cell, its number from 1 and their
    number before it runs. ConfigError if a name, a knob or the device is unknown, or the folder holds another
    comparison's records; DataError if the data can't be read, or
    another run is at work in the folder.
    """
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
    failures = []
    for number, cell in enumerate(cells, start=1):
        if cell.key in done:
            continue
        if on_cell is not None:
            on_cell(cell, number, len(cells))
        result = _isolated(cell, out) if isolate else run_cell(cell, out)
        if isinstance(result, str):
            failures.append(RunFailure(cell, result))
            continue
        append_record(out / "results.jsonl", result)
        done[cell.key] = result
    records = [done[cell.key] for cell in cells if cell.key in done]
    write_json(out / "results.json", records)
    write_report(out)
    return Comparison(records, failures)


def _check_choices(cells: list[Cell]) -> None:
    """Raise, before anything runs, what would stop every cell of a model, data set or pruner."""
    for pruner in {cell.pruner.name: cell.pruner for cell in cells}.values():
        if pruner.name != SCRATCH and not is_rival(pruner.name):
            check_knob_names(pruner.name, pruner.knobs)
    for cell in {(cell.model.name, cell.data): cell for cell in cells}.values():
        resolve_device(cell.device)
        load_model_data(cell.model, cell.data)


def _isolated(cell: Cell, out: Path) -> Record | str:
    """Run a cell in a process of its own; return its record, or the reason why there is none."""
    context = multiprocessing.get_context(_START)
    if _START == "forkserver":
        context.set_forkserver_preload(["nni_topo.runs.cells"])
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        before = set(multiprocessing.active_children())
        result = pool.submit(run_cell, cell, out)
        (process,) = set(multiprocessing.active_children()) - before
        try:
            return result.result()
        except BrokenProcessPool:
            pass  # how it ended can be read once: the pool's own thread does so while the pool is left
        except NniTopoError as error:
            return str(error)
        except Exception as error:
            return "".join(traceback.format_exception(error))
    code = process.exitcode or 0
    return f"killed by signal {-code} (out of memory?)" if code < 0 else f"ended with exit code {code}"


def _end_with_parent() -> None:
    """Leave nothing running behind a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        # sys.exit would end the thread alone
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
