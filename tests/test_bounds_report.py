"""The table of Net Deviation shows means over seeds."""

from __future__ import annotations

import pytest
from bench_modules import BENCHMARKS, imported


@pytest.fixture
def report():
    with imported(BENCHMARKS / "clustering", "bounds_report") as module:
        yield module


def test_the_table_shows_means_over_seeds(report):
    records = [
        point(report, seed=0, error=1.0, bound=4.0, accuracy=0.5),
        point(report, seed=1, error=3.0, bound=8.0, accuracy=0.7),
    ]
    (line,) = (line for line in report.deviation_table(records).splitlines() if "random" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:6] == ["lenet5", "random", "0.5", "50.0", "2", "6"]
    assert cells[-2:] == ["60.0", "90.0"]


def point(report, *, seed: int, error: float, bound: float, accuracy: float) -> dict[str, object]:
    numbers = {"pruned": 0.5, "lipschitz": 2.0, "dev": error - bound, "sign": -1.0, "relative": (error - bound) / bound}
    return {
        "study": "deviation",
        "net": "lenet5",
        "images": 32,
        "accuracy_unpruned": 0.9,
        "pruner": "random",
        "ratio": 0.5,
        "seed": seed,
        "error": error,
        "bound": bound,
        "accuracy": accuracy,
        **numbers,
    }
