"""The ratios that an experiment found, beside equal ratios at the same MACs, over seeds that the search didn't see.

nni-topo experiment run configs/experiments/tpe_fashion_mnist.yml --out runs/tpe_fashion_mnist
python benchmarks/selection/bench_ratios.py --best runs/tpe_fashion_mnist/best --out runs/ratios

Killed anywhere, the same command goes on. The search looked at seed 0's net and its validation images.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nni_topo.runs.trial import TrialSettings, run_trial
from nni_topo.studies.tables import interval

ROWS = ("uniform", "found")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--best", type=Path, required=True, help="folder that nni-topo experiment export wrote")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cache", type=Path, help="folder of trained nets (default: nets in --out)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = TrialSettings(**json.loads((options.best / "settings.json").read_text(encoding="utf-8")))
    settings = {"uniform": replace(found, ratios={}), "found": found}
    metrics: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
    for seed in range(options.seeds):
        for row in ROWS:
            folder = options.out / f"{row}-{seed}"
            cache = options.cache or options.out / "nets"
            metrics[row].append(run_trial(replace(settings[row], seed=seed), folder, cache=cache))
    table = Table(
        "ratios", "widths", title=f"{found.model} on {found.data}, {options.seeds} seeds", title_justify="left"
    )
    for name in (
        "MACs kept %",
        "unpruned, test %",
        "weight reconstruction, validation %",
        "fine-tuned, validation %",
        "test %",
    ):
        table.add_column(name, justify="right")
    for row, entries in metrics.items():
        keys = ("flops_share", "test_accuracy_before", "accuracy_pruned", "accuracy", "test_accuracy")
        share, *accuracies = ([entry[key] for entry in entries] for key in keys)
        widths = "-".join(str(width) for width in entries[0]["widths"].values())
        table.add_row(
            row, widths, f"{100 * statistics.mean(share):.2f}", *(interval(found).show(100) for found in accuracies)
        )
    pairs = zip(metrics["found"], metrics["uniform"], strict=True)
    gains = [one["test_accuracy"] - other["test_accuracy"] for one, other in pairs]
    console = Console(width=140)
    console.print(table)
    console.print(f"found less uniform, test accuracy by seed: {interval(gains).show(100)} points")


if __name__ == "__main__":
    main()
