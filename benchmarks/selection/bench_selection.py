"""Selection alone: which filters go, by cloud, criterion and solver, with nothing to make up for them but batch norms.

    python benchmarks/selection/bench_selection.py --net lenet5_like --data-dir DIR --out runs/selection
    python benchmarks/selection/bench_selection.py --net resnet20 --data-dir DIR --out runs/selection
    python benchmarks/selection/bench_selection.py --net small_cnn --out runs/selection  # digits, minutes

Every layer but the output is pruned, residual groups included, to the same widths in all rows (but "own widths", which
has the same MACs); measured without recovery, with batch norms re-calibrated, and after one pass over training images
(``SETTINGS``). A line a figure goes to NET.jsonl; the same command goes on where it was stopped. ``--report`` only
prints.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from nni_topo import recalibrate_batch_norm, zoo
from nni_topo.runs.choices import Cell, DataChoice, ModelChoice, PrunerChoice, Target
from nni_topo.runs.provenance import Record, provenance
from nni_topo.runs.run import made_dense
from nni_topo.studies.cells import cell_facts, pruned_cell, shared_ratios, start_of
from nni_topo.studies.plan import ComparisonPlan
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import best_baseline, grouped, interval, markdown_table, paired_difference, show_accuracies

CALIBRATION = 512
TARGETS = (0.5, 0.25, 0.1, 0.03)
BASELINES = ("random", "l1", "l2", "fpgm", "torch-pruning")
CLOUDS = ("weight", "functional")
SEARCHES = (
    ("weight", "hausdorff"),
    ("weight", "cover"),
    ("functional", "hausdorff"),
    ("functional", "cover"),
    ("functional", "bottleneck"),
    ("functional", "wasserstein"),
)
THESIS: dict[str, dict[str, Any]] = {
    "perera2022, the larger of H0 and H1": {"combine": "max"},
    "perera2022, H0 and H1 added": {"combine": "sum"},
    "perera2022, H1 alone": {"homology_dimensions": [1]},
}
COLUMNS = {
    "accuracy_oneshot": "no recovery %",
    "accuracy_recalibrated": "BN recal. %",
    "accuracy_retrained": "fine-tuned %",
}


@dataclass(frozen=True)
class Setting:
    """A net, its data, how it was trained, and on how many images it is measured and fine-tuned."""

    data: str
    limit: int | None
    stored_test_limit: int | None
    epochs: int
    test_images: int
    retrain_images: int


SETTINGS = {
    "lenet5_like": Setting("fashion-mnist", 20_000, None, 5, 5_000, 5_000),
    "resnet20": Setting("fashion-mnist", 5_000, 5_000, 10, 3_000, 2_560),
    "small_cnn": Setting("digits", None, None, 25, 10_000, 10_000),
}


def main() -> None:
    """Parse the command line, run what isn't there yet, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=tuple(SETTINGS), required=True)
    parser.add_argument("--data-dir", help="folder of Fashion-MNIST's files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS, help="shares of the MACs to keep")
    parser.add_argument("--rows", nargs="+", metavar="LABEL", help="these rows alone, e.g. random l1 (default: all)")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.net}.jsonl"
    if not options.report:
        done = {record["key"] for record in read_records(path)}
        for record in _run(options, done):
            append_record(path, record)
            print(f"{record['seed']} {record['target']}: {record['pruner']}, {record['seconds']:.0f} s", flush=True)
    _print(read_records(path))


def _rows() -> Iterator[PrunerChoice]:
    """The baselines, then ours: our reconstruction of a thesis, covers of every cloud, searches, reconstruction."""
    for name in BASELINES:
        yield PrunerChoice(name)
    for label, knobs in THESIS.items():
        yield PrunerChoice("perera2022", label, knobs)
    for cloud in CLOUDS:
        yield _topological(f"{cloud}, hausdorff, greedy", cloud=cloud, criterion="hausdorff", solver="greedy")
    for cloud, criterion in SEARCHES:
        yield _topological(f"{cloud}, {criterion}, genetic", cloud=cloud, criterion=criterion, solver="genetic")
    yield PrunerChoice("reconstruction", "reconstruction, greedy", calibration=CALIBRATION)
    yield _topological(
        "functional, hausdorff, greedy, own widths",
        cloud="functional",
        criterion="hausdorff",
        solver="greedy",
        budget={"allocation": "topological"},
    )


def _topological(label: str, **knobs: Any) -> PrunerChoice:
    needs_images = knobs.get("cloud") != "weight"
    return PrunerChoice("topological", label, knobs, CALIBRATION if needs_images else 0)


def _run(options: argparse.Namespace, done: set[str]) -> Iterator[Record]:
    setting = SETTINGS[options.net]
    rows = {choice.row: choice for choice in _rows()}
    if unknown := set(options.rows or ()) - set(rows):
        raise SystemExit(f"--rows must be among {', '.join(rows)}, got {', '.join(sorted(unknown))}")
    plan = ComparisonPlan(
        models=(ModelChoice(options.net),),
        data=(DataChoice(setting.data, options.data_dir, setting.limit, setting.stored_test_limit),),
        pruners=tuple(rows[label] for label in options.rows or rows),
        targets=tuple(Target("flops", value) for value in options.targets),
        seeds=options.seeds,
        train={"epochs": setting.epochs},
    )
    for cell in plan.cells():
        if cell.key not in done:
            yield _measure(cell, setting, options.out)


def _measure(cell: Cell, setting: Setting, out: Path) -> Record:
    began = time.perf_counter()
    start = start_of(cell, out)
    data = start.data
    masks, prune_seconds, _ = pruned_cell(cell, start, shared_ratios(cell, start, out))
    dense, _ = made_dense(start, masks)
    test = TensorDataset(*data.test[: setting.test_images])
    record = {
        **cell_facts(cell),
        "flops": zoo.count_macs(dense, start.example),
        "accuracy_before": start.accuracy,
        "accuracy_oneshot": zoo.evaluate(dense, test),
        "prune_seconds": prune_seconds,
    }
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in dense.modules()):
        images = start.images(2 * CALIBRATION)
        record["accuracy_recalibrated"] = zoo.evaluate(recalibrate_batch_norm(dense, images), test)
    few = TensorDataset(*data.train[: setting.retrain_images])
    zoo.train(dense, replace(data, train=few, validation=TensorDataset(*few[:1])), cell.retrain, seed=cell.seed)
    record["accuracy_retrained"] = zoo.evaluate(dense, test)
    record["seconds"] = time.perf_counter() - began
    return {**record, **provenance()}


def _print(records: list[Record]) -> None:
    """Print a Markdown table a target: means over the seeds, 95 % intervals, paired differences to the best baseline.

    Then what each search is worth over the greedy cover of its cloud, and our reconstruction of a thesis over random
    selection, in points.
    """
    for (model, data, target), rows in grouped(records).items():
        seeds = max(len(runs) for runs in rows.values())
        columns = [name for name in COLUMNS if any(name in run for runs in rows.values() for run in runs.values())]
        titles = [title for name in columns for title in (COLUMNS[name], "vs best baseline")]
        print(f"\n**{model} on {data}, {target} ({seeds} seeds)**\n")
        print(f"| selection | MACs (M) | {' | '.join(titles)} | prune s |\n|---|{'---:|' * (len(titles) + 2)}")
        baselines = {name: best_baseline(rows, name) for name in columns}
        for row, runs in rows.items():
            cells = [f"{interval([run['flops'] for run in runs.values()]).mean / 1e6:.2f}"]
            for name in columns:
                cells.append(show_accuracies([run[name] for run in runs.values()]))
                baseline = baselines[name]
                is_best = baseline is None or row == baseline
                versus = "" if baseline is None else paired_difference(runs, rows[baseline], name).show(100, sign=True)
                cells.append("best baseline" if is_best else versus)
            cells.append(f"{interval([run['prune_seconds'] for run in runs.values()]).mean:.1f}")
            print(f"| {row} | {' | '.join(cells)} |")
        searches = {f"{c}, {k}": (f"{c}, {k}, genetic", f"{c}, hausdorff, greedy") for c, k in SEARCHES}
        for head, pairs in (
            ("genetic less greedy", searches),
            ("less random", {row: (row, "random") for row in THESIS}),
        ):
            lines = [
                (name, *(paired_difference(rows[one], rows[other], c).show(100, sign=True) for c in columns))
                for name, (one, other) in pairs.items()
                if one in rows and other in rows
            ]
            print("\n" + markdown_table((head, *(COLUMNS[name] for name in columns)), lines))


if __name__ == "__main__":
    main()
