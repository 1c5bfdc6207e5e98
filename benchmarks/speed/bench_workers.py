"""Seconds of a search whose layers workers share, over threads, processes and a Dask cluster.

python benchmarks/speed/bench_workers.py --out workers.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from joblib import parallel_config
from rich.console import Console
from rich.table import Table

import nni_topo
from nni_topo import zoo

CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def layer_search(individuals: int, workers: int) -> Callable[[], object]:
    """Return the choice of half of every filter of VGG-16 by TopologicalPruner."""
    net = zoo.create_model("vgg16", num_classes=10, in_channels=3, image_size=32, seed=0)
    knobs = {"n_jobs": workers, "solver": {"population_size": individuals, "generations": 20}}
    return lambda: nni_topo.TopologicalPruner(copy.deepcopy(net), CONFIG, **knobs).compress()


SEARCHES = {"layers": layer_search}


def median_seconds(search: Callable[[], object], backend: str, workers: int, repeats: int) -> float:
    """Time a search, after one run that starts the workers."""
    with ExitStack() as stack:
        if backend == "dask":
            from distributed import Client, LocalCluster

            cluster = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
            stack.enter_context(Client(stack.enter_context(cluster)))
        stack.enter_context(nullcontext() if backend == "default" else parallel_config(backend=backend))
        search()
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            search()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--individuals", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backends", nargs="+", default=["threading", "loky", "dask"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("what is shared", "backend", title=f"1 and 2 workers, load {os.getloadavg()[0]:.1f}")
    for name in ("1 worker, s", "2 workers, s", "speed-up"):
        table.add_column(name, justify="right")
    records = []
    for what, make in SEARCHES.items():
        for backend in options.backends:
            one, two = (
                median_seconds(make(options.individuals, workers), backend, workers, options.repeats)
                for workers in (1, 2)
            )
            records.append({"shared": what, "backend": backend, "seconds": [one, two], "speedup": one / two})
            table.add_row(what, backend, f"{one:.2f}", f"{two:.2f}", f"{one / two:.2f}")
            if options.out:
                options.out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
