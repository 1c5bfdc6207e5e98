"""Every rule of recovery on identical masks, and distillation behind them: what is recovered without a label.

    python -m benchmarks.recovery.bench_recovery_rules --plan PLAN.yaml --data-dir DIR --out runs/rules_resnet20

takes model, data, recipes and targets from a comparison's plan, its trained nets from ``checkpoints`` in the folder
(trained first where they are missing; those of ``nni-topo compare`` fit), prunes each by the L2 norm and by
``ReconstructionPruner`` (512 images) to the same widths, by the latter also with swaps behind its choice and to widths
of its own at the same cost, and recovers it by each rule from the same unlabelled training images. A line per figure
goes to ``rules.jsonl``; the same command goes on where it was stopped. Each net runs in a process of its own, on one
thread. Further counts of images (``--images 1024 512``) are for a few rows only; "reconstruct, no data" takes 256 that
are made from the net alone.

Rows with labels stand beside it and go on from ``reconstruct`` with the plan's recipe of retraining: one epoch on the
same images, as many steps on them as distillation takes, one epoch on all training images. "From new weights" are nets
as wide, trained by the plan's whole recipe: what these widths can learn.
"""

from __future__ import annotations

import argparse
import copy
import math
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.recovery import recovery_rules  # noqa: F401  (registers methods by name)
from nni_topo import compensate, synthetic_images, to_dense
from nni_topo.runs.choices import Cell, CompensationChoice, DistillationChoice, PrunerChoice
from nni_topo.runs.run import Start, distilled, made_dense, retrain
from nni_topo.studies.cells import pruned_cell, shared_ratios, start_of, with_new_weights
from nni_topo.studies.plan import load_plan
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval
from nni_topo.zoo import DataBundle, Recipe

SWAPPED = "least squares, swapped"
MASKS = {
    "L2 norm": PrunerChoice("l2"),
    "least squares": PrunerChoice("reconstruction", calibration=512),
    SWAPPED: PrunerChoice("exchange:ExchangePruner", calibration=512),
    "widths by error": PrunerChoice("reconstruction", calibration=512, knobs={"budget": {"allocation": "error"}}),
}
RULES = ("recalibrate", "mean", "merge", "scalar", "pair", "channel", "layer", "sequential", "reconstruct")
DISTILLED = ("distilled alone", "reconstruct, distilled")
LABELLED = ("one epoch, same labels", "as many steps, same labels", "one epoch, all labels")
NO_DATA = "reconstruct, no data"
NEW = "from new weights"
ROWS = ("none", *RULES, NO_DATA, *DISTILLED, *LABELLED, NEW)
CURVE = ("reconstruct", "reconstruct, distilled", "as many steps, same labels")
VERSUS = ("reconstruct", *LABELLED)
_STEPS = 600
_UNJUDGED = "without the images that judge distillation"


def main() -> None:
    """Parse the command line, run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True, help="a comparison's plan; its pruners aren't looked at")
    parser.add_argument("--data-dir", type=Path, help="folder of the data set's files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, nargs="+", default=[1024], help="unlabelled; all rows at the first count")
    parser.add_argument("--flops", type=float, nargs="+", help="shares of the MACs to keep (default: the plan's)")
    parser.add_argument("--masks", nargs="+", choices=tuple(MASKS), default=list(MASKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, help="of distillation (default: its own)")
    parser.add_argument("--precision", help="that the networks are trained in (default: the plan's)")
    parser.add_argument("--net", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.net is not None:
        _run(options, options.net)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--net", str(seed)], check=True)
    records = read_records(options.out / "rules.jsonl")
    _print(records)
    _print_comparisons(records)
    _print_choices(records)


def _run(options: argparse.Namespace, seed: int) -> None:
    """Recover one net by every rule from every mask."""
    torch.set_num_threads(1)
    path = options.out / "rules.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    for cell in _cells(options, seed):
        start = start_of(cell, options.out)
        wanted = [
            (count, row)
            for index, count in enumerate(options.images)
            for row in (options.rows if not index else CURVE)
            if (*_place(cell), count, row) not in done
        ]
        if not wanted:
            continue
        ratios = shared_ratios(cell, start, options.out)
        masks = pruned_cell(cell, start, ratios).masks
        for count in dict.fromkeys(count for count, _ in wanted):
            rows = [row for each, row in wanted if each == count]
            _recover(cell, start, masks, count, rows, path, steps=options.steps)


def _cells(options: argparse.Namespace, seed: int) -> Iterator[Cell]:
    plan = load_plan(options.plan)
    train = {**plan.train, **({} if options.precision is None else {"precision": options.precision})}
    folder = None if options.data_dir is None else str(options.data_dir)
    data = tuple(replace(choice, data_dir=folder) for choice in plan.data)
    plan = replace(plan, data=data, train=train, seeds=1, first_seed=seed)
    targets = tuple(t for t in plan.targets if options.flops is None or t.value in options.flops)
    pruners = tuple(replace(MASKS[label], label=label) for label in options.masks)
    yield from replace(plan, targets=targets, pruners=pruners).cells()


def _place(cell: Cell) -> tuple[Any, ...]:
    return cell.model.label, cell.seed, cell.pruner.row, cell.target.value


def _recover(
    cell: Cell, start: Start, masks: Any, count: int, rows: list[str], path: Path, *, steps: int | None
) -> None:
    """Measure the rows that are missing for so many images; those that go on from another share its seconds."""
    made: dict[str, tuple[nn.Module, float]] = {}

    def timed(run: Callable[[], nn.Module], since: float = 0.0) -> tuple[nn.Module, float]:
        began = time.process_time()
        return run(), since + time.process_time() - began

    def of(row: str) -> tuple[nn.Module, float]:
        if row not in made:
            made[row] = find(row)
        return made[row]

    def find(row: str) -> tuple[nn.Module, float]:
        if row == "none":
            return timed(lambda: made_dense(start, masks)[0])
        if row in RULES:
            method: Any = row
            return timed(lambda: made_dense(start, masks, CompensationChoice(count, method))[0])
        if row == NO_DATA:

            def without_data() -> nn.Module:
                images = synthetic_images(start.net, start.example, seed=start.seed)
                return to_dense(compensate(start.net, masks, images), start.example, masks)

            return timed(without_data)
        if row == NEW:
            fresh = with_new_weights(of("none")[0], cell.seed)
            return timed(lambda: _retrained(fresh, start.data, cell.train, cell.seed))
        choice = DistillationChoice(count * 8 // 9, steps=steps)  # the last ninth judges
        rule, _, then = row.partition(", ")
        if then == _UNJUDGED:
            unjudged: Any = rule
            return timed(lambda: made_dense(start, masks, CompensationChoice(choice.images, unjudged))[0])
        if row in DISTILLED:
            dense, seconds = of(f"{rule}, {_UNJUDGED}" if then else "none")
            return timed(lambda: distilled(start, dense, choice).model, seconds)
        dense, seconds = of("reconstruct")
        recipe, data = cell.train.for_retraining(1), start.data
        if row != "one epoch, all labels":
            data = replace(data, train=TensorDataset(*data.train[:count]))
        if row == "as many steps, same labels":
            passes = math.ceil((steps or _STEPS) / math.ceil(count / choice.batch_size))
            recipe = replace(recipe, epochs=passes, batch_size=choice.batch_size, augmentation=choice.augmentation)
        data = replace(data, validation=TensorDataset(*data.validation[:0]))
        return timed(lambda: _retrained(dense, data, recipe, cell.seed), seconds)

    pruned = start.tested(of("none")[0])
    for row in rows:
        net, seconds = of(row)
        figures = {"whole": start.accuracy, "pruned": pruned, "accuracy": start.tested(net), "seconds": seconds}
        append_record(path, {"key": (*_place(cell), count, row), **figures})
        print(*_place(cell), count, row, f"{100 * figures['accuracy']:.2f} {seconds:.1f} s", flush=True)


def _retrained(dense: nn.Module, data: DataBundle, recipe: Recipe, seed: int) -> nn.Module:
    net = copy.deepcopy(dense)
    retrain(net, data, recipe, seed=seed)
    return net


def _print(records: list[dict[str, Any]]) -> None:
    """Print a Markdown table for each mask and count of images: accuracy, recovered share, points lost, CPU seconds."""
    tables: dict[tuple[Any, ...], dict[str, dict[float, list[dict[str, Any]]]]] = defaultdict(_rows)
    for record in records:
        model, _, mask, target, count, row = record["key"]
        tables[model, mask, count][row][target].append(record)
    for (model, mask, count), rows in tables.items():
        targets = sorted({target for found in rows.values() for target in found}, reverse=True)
        titles = [f"{100 * target:g} %: accuracy | r | lost | CPU s" for target in targets]
        print(f"\n**{model}, masks by {mask}, {count} images**\n\n| rule | {' | '.join(titles)} |")
        print("|---|" + "---:|" * (4 * len(targets)))
        for row in (row for row in ROWS if row in rows):
            cells = [_cells_of(rows[row][target]) for target in targets]
            print(f"| {row} | {' | '.join(cells)} |")


def _rows() -> dict[str, dict[float, list[dict[str, Any]]]]:
    return defaultdict(lambda: defaultdict(list))


def _cells_of(found: list[dict[str, Any]]) -> str:
    """Return accuracy in percent, recovered share in percent, points lost and CPU seconds: means and 95 % intervals."""
    if not found:
        return " | | | "
    shares = [(each["accuracy"] - each["pruned"]) / (each["whole"] - each["pruned"]) for each in found]
    lost = [each["whole"] - each["accuracy"] for each in found]
    seconds = interval([each["seconds"] for each in found]).mean
    accuracy = interval([each["accuracy"] for each in found])
    return f"{accuracy.show(100)} | {interval(shares).show(100)} | {interval(lost).show(100)} | {seconds:.0f}"


def _print_comparisons(records: list[dict[str, Any]]) -> None:
    """Print paired differences over all nets of what the tables are about."""
    by_place: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        model, seed, mask, target, count, row = record["key"]
        by_place[model, mask, target, count, seed][row] = record
    groups: dict[tuple[Any, ...], list[dict[str, dict[str, Any]]]] = defaultdict(list)
    for (*group, _), rows in by_place.items():
        groups[tuple(group)].append(rows)
    titles = [f"distilled - {other}, points" for other in VERSUS]
    print(f"\n| net, masks, MACs kept, images | {' | '.join(titles)} | error of the channel ridge gone, % |")
    print("|---|" + "---:|" * (len(titles) + 1))
    for (model, mask, target, count), nets in sorted(groups.items(), key=str):
        nets = [rows for rows in nets if DISTILLED[1] in rows]
        ours = DISTILLED[1]
        differences = [[rows[ours]["accuracy"] - rows[o]["accuracy"] for rows in nets if o in rows] for o in VERSUS]
        cells = [interval(each).show(100, sign=True) if each else "" for each in differences]
        gone = [
            1.0 - (rows[ours]["whole"] - rows[ours]["accuracy"]) / (rows[ours]["whole"] - rows["channel"]["accuracy"])
            for rows in nets
            if "channel" in rows
        ]
        cells.append(interval(gone).show(100) if gone else "")
        print(f"| {model}, {mask}, {100 * target:g} %, {count} | {' | '.join(cells)} |")


def _print_choices(records: list[dict[str, Any]]) -> None:
    """Print what swaps, and widths by error, add to least squares alone, paired by net, row by row."""
    found = {tuple(record["key"]): record["accuracy"] for record in records}
    gains: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for (model, seed, mask, *rest), accuracy in found.items():
        plain = found.get((model, seed, "least squares", *rest))
        if mask in (SWAPPED, "widths by error") and plain is not None:
            gains[(model, mask, *rest)].append(accuracy - plain)
    for (model, mask, target, count, row), each in gains.items():
        gain = interval(each).show(100, sign=True)
        print(f"{model}, {100 * target:g} %, {count} images, {row}: {mask} - least squares {gain} points")


if __name__ == "__main__":
    main()
