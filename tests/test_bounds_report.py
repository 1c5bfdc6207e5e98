"""The tables of Net Deviation and theorem 1 are what their records say, and a run's points get there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_modules import BENCHMARKS, imported

from nni_topo.studies.records import read_records

PAGE = BENCHMARKS / "results" / "clustering.md"


@pytest.fixture
def report():
    with imported(BENCHMARKS, "bounds_report") as module:
        yield module


def test_the_tables_are_those_of_the_records(report):
    page = PAGE.read_text(encoding="utf-8")
    records = read_records(report.RECORDS)
    runs = {(record["study"], record["net"], record.get("most_epochs")) for record in records}
    assert runs == {
        ("deviation", "lenet300", None),
        ("deviation", "lenet5", None),
        ("retraining", "lenet300", 8),
        ("retraining", "lenet300", 25),
        ("retraining", "lenet5", 8),
    }
    assert report.with_bounds(page, records) == page


def test_the_table_shows_means_over_seeds(report):
    records = [
        point(report, seed=0, error=1.0, bound=4.0, accuracy=0.5),
        point(report, seed=1, error=3.0, bound=8.0, accuracy=0.7),
    ]
    (line,) = (line for line in report.deviation_table(records).splitlines() if "random" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:6] == ["lenet5", "random", "0.5", "50.0", "2", "6"]
    assert cells[-2:] == ["60.0", "90.0"]


def test_a_later_run_replaces_the_points_of_the_same_run(report, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RECORDS", tmp_path / "bounds.jsonl")
    out = tmp_path / "run"
    out.mkdir()
    for error in (1.0, 2.0):
        point_of_a_run = {
            key: value
            for key, value in point(report, seed=0, error=error, bound=4.0, accuracy=0.5).items()
            if key not in ("study", "net", "images", "accuracy_unpruned")
        }
        found = {"points": [point_of_a_run], "accuracy": 0.9, "images": 32}
        (out / "deviation.json").write_text(json.dumps(found))
        report.keep("lenet5", out)
    report.keep("lenet300", out)
    kept = read_records(tmp_path / "bounds.jsonl")
    assert [(record["net"], record["error"]) for record in kept] == [("lenet5", 2.0), ("lenet300", 2.0)]
    assert kept[0] == point(report, seed=0, error=2.0, bound=4.0, accuracy=0.5)


def test_a_folder_without_a_study_is_refused(report, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(report, "RECORDS", tmp_path / "bounds.jsonl")
    with pytest.raises(FileNotFoundError, match=r"deviation\.json or retraining\.json"):
        report.keep("lenet5", tmp_path)
    assert not (tmp_path / "bounds.jsonl").exists()


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
