"""What the benchmarks of HYPOTHESES.md share: command line, the networks' seeds, the paired differences that decide."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.tables import with_tables
from nni_topo.studies.records import read_records
from nni_topo.studies.tables import interval

EXPLORATION, CONFIRMATION = range(300, 305), range(310, 325)  # seeds of the networks

Figures = Mapping[str, Mapping[int, float]]
"""A figure by method, then by seed."""


def benchmark(
    description: str | None,
    source: str,
    tables: Callable[[list[dict[str, Any]]], str],
    measure: Callable[[Path, Path, Path], None],
) -> None:
    """Parse a benchmark's command line; measure what is missing and print the tables, or write them into a page.

    ``source`` is the benchmark's file: the records beside it have its name, and so have the comments around a page's
    tables. ``measure`` gets the file of the images, the output folder and the file of the records.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="the .npz file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--into", type=Path, metavar="PAGE", help="page whose tables are replaced; nothing is run")
    options = parser.parse_args()
    path = options.out / f"{Path(source).stem}.jsonl"
    if options.into is not None:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(with_tables(page, source, tables(read_records(path))), encoding="utf-8")
        return
    if options.images is None:
        parser.error("--images is needed to run the benchmark, --into to write a page from its records")
    torch.set_num_threads(1)
    measure(options.images, options.out, path)
    print(tables(read_records(path)))


def best_of(names: tuple[str, ...], explored: Figures) -> str:
    """Return the method with the highest mean figure over the networks of exploration; of equal ones the first."""
    return max(names, key=lambda name: float(np.mean(list(explored[name].values()))))


def difference_row(
    ours: Mapping[int, float], theirs: Mapping[int, float], scale: float = 100.0, digits: int = 1
) -> list[str]:
    """Return the mean paired difference with its 95 % interval, and the p-value of the t-test, as text.

    The difference is multiplied by ``scale``: it is in points by default.
    """
    gains = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    p = float(stats.ttest_1samp(gains, 0.0).pvalue)
    return [interval(gains).show(scale, digits, sign=True), f"{p:.2g}"]
