"""The tables of the plan that compares every pruner: what they show, and when."""

from __future__ import annotations

import json

import pytest
from bench_modules import BENCHMARKS, imported

from nni_topo.studies.cells import cell_facts


@pytest.fixture
def bench(tmp_path, monkeypatch):
    with imported(BENCHMARKS / "selection", "bench_named") as module:
        monkeypatch.setattr(module, "RECORDS", tmp_path / "kept")
        (tmp_path / "kept").mkdir()
        yield module


def results(cells, rows):
    """A record of each cell; the further down its row, the worse, but `energy` is the best one on the test images."""
    for cell in cells:
        place = rows.index(cell.pruner.row)
        record = {**cell_facts(cell), "flops": 1e6, "flops_before": 4e6, "params": 1e3, "params_before": 5e3}
        for step in ("before", "oneshot", "recalibrated", "compensated", "distilled", "retrained"):
            record[f"accuracy_{step}"] = record[f"validation_{step}"] = 0.9 - 0.001 * place
        record["accuracy_compensated"] += 0.05 * (cell.pruner.row == "energy") + 0.001 * (cell.seed % 3)
        record["cpu_seconds"] = {"prune": 2.5, "compensate": 1.0, "distill": 3.0, "retrain": 3.0}
        yield {**record, "curve": [0.1], "widths": {"conv1": 3}, "versions": {"torch": "2.x"}}


def write(folder, records, failures=()):
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "failures.json").write_text(json.dumps(failures))


def test_a_network_is_shown_once_all_of_its_cells_ran(bench, tmp_path):
    cells = list(bench.plan_of("small_cnn").cells())
    assert len(cells) == 13 * 2 * 5
    refused = [cell for cell in cells if cell.pruner.row == "cluster"]
    failures = [{**cell_facts(cell), "reason": "Traceback\nConfigError: no features"} for cell in refused]
    rows = [pruner.row for pruner in bench.plan_of("small_cnn").pruners]
    ran = list(results([cell for cell in cells if cell.pruner.row != "cluster"], rows))
    write(tmp_path / "out", ran[:-1], failures)
    bench.keep("small_cnn", None, tmp_path / "out")
    assert "| small_cnn | 119 | 10 | 130 |" in bench.tables()
    assert "energy" not in bench.tables()
    write(tmp_path / "out", ran[-1:], failures)
    bench.keep("small_cnn", None, tmp_path / "out")
    shown = bench.tables()
    assert "| small_cnn | 120 | 10 | 130 |" in shown
    assert shown.count("| energy |") == 2
    assert "`cluster` doesn't apply: ConfigError: no features" in shown
    (line, _) = (line for line in shown.splitlines() if line.startswith("| energy |"))
    # Random selection, the first row, is the best baseline on validation images; energy is nine rows below it.
    assert "| +4.1 ± 0.0 |" in line
    assert line.endswith("| 2.5 | 1.0 | 3.0 | 3.0 |")
