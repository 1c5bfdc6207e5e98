"""Seconds to choose the filters of a whole VGG-16: TopologicalPruner's defaults beside NNI's own pruners.

python benchmarks/speed/bench_pruner.py --out pruner.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import nni_topo
from nni_topo import zoo

ROWS = {
    "fpgm": ("fpgm", {}),
    "l1": ("l1", {}),
    "topological": ("topological", {}),
    "topological, greedy": ("topological", {"solver": "greedy"}),
    "topological, perera2022": ("perera2022", {"search": {"generations": 2, "population_size": 10}}),
}
CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def seconds(name: str, knobs: dict[str, object], model: torch.nn.Module) -> float:
    """Time ``compress()`` on a fresh copy; wrapping the model isn't counted."""
    pruner = nni_topo.create_pruner(name, copy.deepcopy(model), CONFIG, **knobs)
    began = time.process_time()
    pruner.compress()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = zoo.create_model("vgg16", num_classes=10, in_channels=3, image_size=32, width=options.width, seed=0)
    times: dict[str, list[float]] = {row: [] for row in ROWS}
    for row, (name, knobs) in ROWS.items():  # caches are warm afterwards
        seconds(name, knobs, zoo.create_model("small_cnn", num_classes=10, in_channels=3, image_size=8, seed=0))
        times[row].clear()
    for _ in range(options.repeats):
        for row, (name, knobs) in ROWS.items():
            times[row].append(seconds(name, knobs, model))
    medians = {row: statistics.median(values) for row, values in times.items()}
    table = Table("pruner", title=f"VGG-16 (32x32, width {options.width:g}), half of every layer", title_justify="left")
    table.add_column("CPU seconds", justify="right")
    table.add_column("of FPGM's", justify="right")
    for row, median in medians.items():
        table.add_row(row, f"{median:.3f}", f"{median / medians['fpgm']:.3f}")
    Console().print(table)
    if options.out:
        options.out.write_text(
            json.dumps({"width": options.width, "seconds": times, "median": medians}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
