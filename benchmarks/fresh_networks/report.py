"""Records and tables of the comparison on networks that chose no default; README.md beside this file is its protocol.

    python benchmarks/fresh_networks/report.py --keep runs/fresh/lenet5_like
    python benchmarks/fresh_networks/report.py
    python benchmarks/fresh_networks/report.py --into benchmarks/results/fresh_networks.md

``--keep`` adds what the tables need of a comparison's ``results.jsonl`` to the records. Without it the tables are
printed as Markdown, or replace what a page holds between the two comments that name this file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.tables import holm, outcome, with_tables
from nni_topo.disk import output_file
from nni_topo.studies.records import check_unpruned, read_records
from nni_topo.studies.tables import (
    Interval,
    best_baseline,
    cells_of,
    grouped,
    interval,
    markdown_table,
    paired_difference,
    show_accuracies,
    title_of,
)

Record = dict[str, Any]
Rows = dict[str, dict[int, Record]]

RECORDS = Path(__file__).parents[1] / "records" / "fresh_networks"
SOURCE = "benchmarks/fresh_networks/report.py"  # as the comments around a page's tables say
NETWORKS = {
    "lenet5_like": "LeNet-5-like",
    "resnet20": "ResNet-20",
    "mobilenet_like": "MobileNetV2, small",
    "vit_small": "ViT, small",
    "vgg16_quarter": "VGG-16, a quarter of its width",
}
"""By the name of their plan, in the order in which they run."""
CRITERIA = ("reconstruction", "topological, functional")
PUBLISHED = ("TopologyHole", "Betti numbers", "OBCE")
"""Rows that were added after the first run: no criteria of the primary cells, and no baselines."""
STEPS = {
    "accuracy_oneshot": "no recovery",
    "accuracy_recalibrated": "BN recal.",
    "accuracy_compensated": "weight reconstruction",
    "accuracy_distilled": "distilled",
    "accuracy_retrained": "fine-tuned",
}
PRIMARY_SHARE, PRIMARY_STEP = 0.1, "accuracy_compensated"
SEEDS = 5
DATA = "Fashion-MNIST, split anew"
_KEPT = {"pruner", "pruner_name", "seed", "target", "flops", "flops_before", "params", "params_before", "revision"}
_MEASURED = ("accuracy_before", "validation_before", "prune_seconds", "compensate_seconds", "distill_seconds")


def main() -> None:
    """Parse the command line; keep records, or print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="OUT", help="folder of a comparison, named as its plan")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="page whose tables are replaced")
    options = parser.parse_args()
    if options.keep is not None:
        keep(options.keep)
    elif options.into is not None:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(with_tables(page, SOURCE, tables(read())), encoding="utf-8")
    else:
        print(tables(read()))


def keep(out: Path) -> None:
    """Add the records of a comparison, without what the tables don't need, to those of the same plan.

    A cell that was kept before is replaced, so that the seeds of a plan may be run on several machines. ValueError if
    no plan has the folder's name.
    """
    if out.name not in NETWORKS:
        raise ValueError(f"the folder must be named as a plan, {', '.join(NETWORKS)}, got {out}")
    path = RECORDS / f"{out.name}.jsonl"
    cells = {_cell(record): record for record in read_records(path)}
    for record in read_records(out / "results.jsonl"):
        slim = {"model": NETWORKS[out.name], "data": DATA, "torch": record["versions"]["torch"]}
        names = _KEPT.union(STEPS, (step.replace("accuracy", "validation") for step in STEPS), _MEASURED)
        slim |= {name: record[name] for name in names & record.keys()}
        cells[_cell(slim)] = slim
        for cell in cells.values():
            if cell["seed"] == slim["seed"]:
                check_unpruned(slim, cell, path)
    lines = [json.dumps(cell, sort_keys=True) for cell in cells.values()]
    output_file(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} records: {path}")


def _cell(record: Record) -> tuple[str, str, int]:
    """Return which row, target and network a record is of."""
    return record["pruner"], record["target"], record["seed"]


def read() -> list[Record]:
    """Return all records, network after network."""
    return [record for name in NETWORKS for record in read_records(RECORDS / f"{name}.jsonl")]


@dataclass(frozen=True)
class Comparison:
    """One criterion against the best baseline in one cell.

    Accuracies are percentages, means over the networks; the difference is in points.
    """

    baseline: str
    ours: float
    theirs: float
    points: Interval
    p: float
    networks: int


def compared(rows: Rows, criterion: str, step: str) -> Comparison | None:
    """Compare a criterion with the best baseline of a step; None if one is missing or has fewer than two networks."""
    baseline = best_baseline(rows, step)
    if baseline is None or criterion not in rows:
        return None
    ours, theirs = rows[criterion], rows[baseline]
    seeds = [seed for seed in sorted(ours.keys() & theirs.keys()) if step in ours[seed] and step in theirs[seed]]
    if len(seeds) < 2:
        return None
    first = [ours[seed][step] for seed in seeds]
    second = [theirs[seed][step] for seed in seeds]
    found = paired_difference(ours, theirs, step)
    differences = np.subtract(first, second)
    # equal differences have no spread, and no test says anything of them
    p = float(stats.ttest_1samp(differences, 0.0).pvalue) if differences.std() > 0 else float(found.mean == 0.0)
    return Comparison(
        baseline,
        100 * interval(first).mean,
        100 * interval(second).mean,
        Interval(100 * found.mean, 100 * found.half),
        p,
        len(seeds),
    )


def tables(records: Iterable[Record]) -> str:
    """Return Markdown: the primary cells, the exploratory differences, and every row of every network.

    Of a kind of which some networks haven't been run the page says no figure: what is looked at more than once is more
    often found.
    """
    groups: dict[tuple[str, str], Rows] = {}
    titles = {}
    for group, rows in grouped(records).items():
        groups[group[0], group[2]] = rows
        titles[group[0], group[2]] = title_of(group, rows)
    blocks = ["### Primary cells", _primary(groups)]
    groups = {place: rows for place, rows in groups.items() if _networks(rows) == SEEDS}
    differences = _differences(groups)
    if differences:
        blocks += ["### Differences from the best baseline", *differences]
    if groups:
        blocks += ["### Against a new network of the same widths", _yardstick(groups), "### All rows"]
    for place, rows in groups.items():
        blocks += [f"**{titles[place]}**", markdown_table(*cells_of(rows))]
    return "\n\n".join(blocks)


def _primary(groups: dict[tuple[str, str], Rows]) -> str:
    """Return the table of the ten cells that were named before the first run."""
    target = f"{100 * PRIMARY_SHARE:g} % of the MACs left"
    cells = [(network, criterion) for network in NETWORKS.values() for criterion in CRITERIA]
    found = [compared(groups.get((network, target), {}), criterion, PRIMARY_STEP) for network, criterion in cells]
    values = [each.p if each is not None and each.networks == SEEDS else 1.0 for each in found]
    lines = []
    for (network, criterion), each, p in zip(cells, found, holm(values), strict=True):
        run = _networks(groups.get((network, target), {}))
        if each is None or run < SEEDS:
            state = f"open: {run} of {SEEDS} networks" if run else "not run"
            lines.append([network, criterion, "", state, *[""] * 6])
            continue
        accuracies = [f"{each.ours:.1f}", f"{each.theirs:.1f}"]
        numbers = [*accuracies, each.points.show(sign=True), f"{each.p:.4f}", f"{p:.3f}"]
        lines.append([network, criterion, each.baseline, outcome(each.points, p), str(each.networks), *numbers])
    head = ["network", "criterion", "best baseline", "outcome", "networks", "criterion %", "baseline %"]
    return markdown_table([*head, "difference", "p", "p by Holm"], lines, text_columns=4)


def _differences(groups: dict[tuple[str, str], Rows]) -> list[str]:
    """Return a table of exploratory differences for each network, and how many of their intervals exclude zero."""
    by_network: dict[str, list[list[str]]] = {}
    cells = above = below = 0
    for (network, target), rows in groups.items():
        for criterion in (*CRITERIA, *(row for row in PUBLISHED if row in rows)):
            line = [target.removesuffix(" of the MACs left"), criterion]
            for step in STEPS:
                each = compared(_rows_beside(criterion, rows, step), criterion, step)
                if step == "accuracy_recalibrated" and not _has_batch_norms(rows):
                    line.append("no batch norms")
                    continue
                if each is None:
                    line.append("not run")
                    continue
                line.append(f"{each.points.show(sign=True)} ({each.baseline})")
                is_primary_cell = target.startswith(f"{100 * PRIMARY_SHARE:g} ") and step == PRIMARY_STEP
                if is_primary_cell and criterion in CRITERIA:
                    continue
                cells += 1
                above += each.points.mean > each.points.half
                below += each.points.mean < -each.points.half
            by_network.setdefault(network, []).append(line)
    blocks = []
    for network, lines in by_network.items():
        head = ["MACs left", "criterion", *STEPS.values()]
        blocks += [f"**{network}: points, best baseline in brackets**", markdown_table(head, lines, text_columns=2)]
    if cells:
        outside = f"{above} lie above zero and {below} below it with their whole 95 % interval"
        by_chance = f"By chance alone about {round(0.05 * cells)} would lie outside."
        blocks.append(f"Of the {cells} exploratory differences, {outside}. {by_chance}")
    return blocks


def _rows_beside(row: str, rows: Rows, step: str) -> Rows:
    """Return the rows that a row is compared with after a step.

    Published methods weren't distilled before they were fine-tuned: beside them stand baselines that weren't either.
    """
    if row not in PUBLISHED or step != "accuracy_retrained":
        return rows
    return {
        name: runs for name, runs in rows.items() if not any("accuracy_distilled" in record for record in runs.values())
    }


def _yardstick(groups: dict[tuple[str, str], Rows]) -> str:
    """Return the table of fine-tuned criteria less a new network that was trained by the whole recipe."""
    lines = []
    for (network, target), rows in groups.items():
        new = rows.get("scratch", {})
        line = [network, target.removesuffix(" of the MACs left")]
        line.append(show_accuracies([record["accuracy_retrained"] for record in new.values()]) if new else "")
        for criterion in CRITERIA:
            is_run = bool(new) and criterion in rows
            found = paired_difference(rows[criterion], new, "accuracy_retrained") if is_run else None
            line.append("" if found is None else found.show(100, sign=True))
        lines.append(line)
    head = ["network", "MACs left", "new network, trained %", *(f"{name}, fine-tuned, points" for name in CRITERIA)]
    return markdown_table(head, lines, text_columns=2)


def _networks(rows: Rows) -> int:
    """Return how many networks all rows have been run on."""
    return min((len(runs) for runs in rows.values()), default=0)


def _has_batch_norms(rows: Rows) -> bool:
    """Tell whether recalibrating batch norms changed any accuracy."""
    records = [record for runs in rows.values() for record in runs.values() if "accuracy_recalibrated" in record]
    return any(record["accuracy_recalibrated"] != record["accuracy_oneshot"] for record in records)


if __name__ == "__main__":
    main()
