"""Run a comparison's plan; after an interruption, a new run continues with the cells that have no record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from nni_topo.disk import only_process, write_json
from nni_topo.errors import ConfigError
from nni_topo.pruners.registry import check_pruner_knobs
from nni_topo.rules import instance
from nni_topo.runs.choices import Cell
from nni_topo.runs.provenance import Record
from nni_topo.runs.run import load_model_data, resolve_device
from nni_topo.studies.baselines import is_baseline
from nni_topo.studies.cells import cell_facts, run_cell
from nni_topo.studies.plan import SCRATCH, ComparisonPlan
from nni_topo.studies.records import COMPARED, read_records, run_missing
from nni_topo.studies.report import write_report


def compare(
    plan: ComparisonPlan, out: str | Path, *, on_cell: Callable[[Cell, int, int], None] | None = None
) -> tuple[list[Record], list[Record]]:
    """Run the cells of a plan that have no record yet; return all records, in the plan's order, and the failed cells.

    The output folder gets a line per finished cell in ``results.jsonl``; at the end all records in ``results.json`` and
    the failed cells with a ``reason`` in ``failures.json``; also ``plan.json``, ``report.html`` and the trained models.
    ``on_cell`` is called before each cell with the cell, its number from 1 and the number of cells.
    """
    out = Path(out)
    cells = list(plan.cells())
    # Pruners, knobs, devices and data are checked before the first cell runs.
    for pruner in {cell.pruner.name: cell.pruner for cell in cells}.values():
        if pruner.name != SCRATCH and not is_baseline(pruner.name):
            check_pruner_knobs(pruner.name, pruner.knobs, "pruners")
    for cell in {(cell.model.name, cell.data): cell for cell in cells}.values():
        resolve_device(cell.device)
        data = load_model_data(cell.model, cell.data)
        if cell.until is not None and not len(data.validation):
            raise ConfigError(f"until needs validation images, got none ({cell.data.name})")
    with only_process(out, wait=False):
        earlier = read_records(out / "results.jsonl", {"key": instance(str), **COMPARED})
        done = {record["key"]: record for record in earlier}
        # a changed plan in an old folder would mix two comparisons in results.json and the tables
        foreign = [record for key, record in done.items() if key not in {cell.key for cell in cells}]
        if foreign:
            example = foreign[0]
            raise ConfigError(
                f"an output folder must hold one comparison, got {len(foreign)} records of another one, e.g. "
                f"{example['model']}, {example['data']}, {example['pruner']}, {example['target']} ({out})"
            )
        write_json(out / "plan.json", asdict(plan), sort=False, default=repr)
        failed = run_missing(cells, done, out, run_cell, n_jobs=plan.n_jobs, announce=on_cell)
        failures = [{**cell_facts(cell), "reason": reason} for cell, reason in failed]
        records = [done[cell.key] for cell in cells if cell.key in done]
        write_json(out / "results.json", records)
        write_json(out / "failures.json", failures)
        write_report(out)
    return records, failures
