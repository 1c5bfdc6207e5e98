"""What fewer steps of distillation cost: ten passes over the images, and more, beside the 600 steps of the default.

    python benchmarks/fresh_networks/split.py --data-dir DIR --out runs/fresh/images.npz
    PYTHONPATH=benchmarks python benchmarks/recovery/bench_course.py --out runs/course

The networks, data and seeds are those of fresh_networks/. `shrink` keeps a share of the multiply-accumulates without
distillation; then each number of steps distils the same network, from the same images, an eighth of which judges.
A line per network, share, number of images and number of steps goes to ``course.jsonl``; the same command goes on where
it was stopped. ``--report`` only prints the table. Kept in records/, the lines make the table of results/recovery.md.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import nni_topo
from nni_topo.runs.provenance import provenance
from nni_topo.studies.cells import start_of
from nni_topo.studies.plan import load_plan
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table, show_accuracies

PLANS = Path(__file__).parents[1] / "fresh_networks"
KINDS = ("lenet5_like", "mobilenet_like", "resnet20", "vit_small")
FULL = 600  # steps of the default
STEPS = {1024: (140, FULL), 128: (20, 140, FULL)}
"""By number of images, the steps: the first are ten passes over seven eighths of them, in batches of 64."""
SHARES = (0.5, 0.25)


def main() -> None:
    """Measure what isn't there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", default="runs/fresh/images.npz", help="what split.py has written")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS[:2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", type=Path, help="folder of trained networks (default: OUT)")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / "course.jsonl"
    if not options.report:
        options.out.mkdir(parents=True, exist_ok=True)
        done = {tuple(record["key"]) for record in read_records(path)}
        for seed in range(options.seeds):
            for kind in options.kinds:
                for record in measured(kind, seed, options, done):
                    append_record(path, record | provenance())
                    print(record, flush=True)
    print(table(read_records(path)))


def measured(kind: str, seed: int, options: argparse.Namespace, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Distil a network of a kind by each number of steps that isn't done."""
    plan = load_plan(PLANS / f"{kind}.yaml")
    plan = replace(plan, data=tuple(replace(data, name=options.images) for data in plan.data))
    cell = next(cell for cell in plan.cells() if cell.seed == plan.first_seed + seed)
    keys = [
        (kind, cell.seed, share, count, steps) for share in SHARES for count, some in STEPS.items() for steps in some
    ]
    if done.issuperset(keys):
        return
    folder = options.out / kind if options.networks is None else options.networks / kind
    start = start_of(cell, folder)
    for share in SHARES:
        for count, some in STEPS.items():
            left = [steps for steps in some if (kind, cell.seed, share, count, steps) not in done]
            if not left:
                continue
            images = start.images(count)
            solved = nni_topo.shrink(start.net, images, {"flops": share}, distill=False, progress=False)
            for steps in left:
                began = time.process_time()
                found = nni_topo.distillation(solved, start.net, images, steps=steps, progress=False)
                yield {
                    "key": (kind, cell.seed, share, count, steps),
                    "unpruned": start.accuracy,
                    "solved": start.tested(solved),
                    "distilled": start.tested(found.model),
                    "steps": found.steps,
                    "lr": found.lr,
                    "is_kept": found.is_kept,
                    "loss": [found.loss_before, found.loss_after],
                    "cpu_seconds": time.process_time() - began,
                }


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each kind, share, number of images and of steps, with differences from the full course."""
    by_row = defaultdict(dict)
    for record in records:
        kind, seed, share, count, steps = record["key"]
        by_row[kind, share, count, steps][seed] = record
    rows = []
    for (kind, share, count, steps), runs in sorted(
        by_row.items(), key=lambda item: (KINDS.index(item[0][0]), *item[0])
    ):
        full = by_row[kind, share, count, FULL]
        both = sorted(runs.keys() & full.keys())
        less = interval([100 * (runs[seed]["distilled"] - full[seed]["distilled"]) for seed in both])
        seconds = [runs[seed]["cpu_seconds"] / full[seed]["cpu_seconds"] for seed in both]
        rows.append(
            [
                kind,
                f"{share:g}",
                f"{count:,}",
                str(steps),
                str(len(runs)),
                show_accuracies([run["solved"] for run in runs.values()]),
                show_accuracies([run["distilled"] for run in runs.values()]),
                "-" if steps == FULL else less.show(1, sign=True),
                "1" if steps == FULL else f"{interval(seconds).mean:.2f}",
            ]
        )
    head = ["network", "MACs kept", "images", "steps", "networks", "reconstructed %", "distilled %"]
    return markdown_table([*head, f"less {FULL} steps", "CPU time"], rows)


if __name__ == "__main__":
    main()
