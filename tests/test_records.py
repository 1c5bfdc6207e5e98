"""Sentences and tables are what the records hold, and the runs of NNI's own tests are not old."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nni_topo.studies.tables import as_markdown, interval, tables_of

PROJECT = Path(__file__).parent.parent
RECORDS = PROJECT / "benchmarks" / "records" / "upstream.json"
OLD = 100
"""Commits of compat and network after which a run says little about the code."""


@pytest.fixture(scope="module")
def upstream():
    spec = importlib.util.spec_from_file_location("upstream_run", PROJECT / "tools" / "upstream" / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_readme_says_what_the_records_hold(upstream):
    records = json.loads(RECORDS.read_text())
    text = " ".join((PROJECT / "README.md").read_text(encoding="utf-8").split())
    said = re.search(r"with it all (\d+) pass on PyTorch ([\d., and]+?)\.(?= |$)", text)
    assert said, "README.md: with it all ... pass on PyTorch ..."
    assert int(said[1]) == sum(upstream.TESTS.values())
    assert set(re.findall(r"\d+\.\d+", said[2])) == records.keys()
    assert {(record["passed"], record["expected"]) for record in records.values()} == {(int(said[1]),) * 2}
    assert all(record["files"] == upstream.TESTS for record in records.values())


def test_the_last_run_is_not_old(upstream):
    command = ["git", "-C", str(PROJECT), "rev-parse", "--is-shallow-repository"]
    shallow = subprocess.run(command, capture_output=True, text=True)
    if shallow.stdout.strip() != "false":
        pytest.skip("needs the project's git history")
    last = max(record["commits"] for record in json.loads(RECORDS.read_text()).values())
    age = upstream.commits() - last
    assert age <= OLD, f"NNI's own tests ran {age} commits of compat and network ago: make upstream UPSTREAM=--record"


@pytest.mark.parametrize(
    ("records", "heading", "rows"),
    [
        ("convergence", "VGG-16 at a quarter of its width: convergence", 7),
        ("convergence_full_width", "VGG-16 at its full width: convergence", 4),
    ],
)
def test_the_tables_of_convergence_are_those_of_their_records(records, heading, rows):
    lines = (PROJECT / "benchmarks" / "records" / f"{records}.jsonl").read_text().splitlines()
    text = (PROJECT / "benchmarks" / "results" / "cnn_by_budget.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}")[1].split("\n## ")[0]
    table = as_markdown(tables_of([json.loads(line) for line in lines]))
    found = [line for line in table.splitlines() if line.startswith("|")]
    assert len(found) == 2 * rows + 5  # two tables, the unpruned network in the first, and the heads
    assert found == [line for line in section.splitlines() if line.startswith("|")]


def test_the_table_of_chosen_images_is_that_of_its_records():
    lines = (PROJECT / "benchmarks" / "records" / "choice.jsonl").read_text().splitlines()
    text = (PROJECT / "benchmarks" / "results" / "recovery.md").read_text(encoding="utf-8")
    section = text.split("## Which images of many")[1].split("\n## ")[0]
    found: dict[tuple[int, str], dict[int, list[float]]] = {}
    for record in map(json.loads, lines):
        seed, _, row, count = record["key"]
        runs = found.setdefault((count, row.split(",")[0]), {})
        runs.setdefault(seed, []).append(100 * record["reconstruct"])
    for count in (16, 32, 64, 128):
        means = {way: [np.mean(found[count, way][seed]) for seed in range(5)] for way in ("random", "kmeans", "cover")}
        cells = [str(count), *(interval(means[way]).show() for way in means)]
        for way in ("kmeans", "cover"):
            gain = interval(np.subtract(means[way], means["random"]))
            cells.append(f"{gain.mean:+.1f} ± {gain.show().split('± ')[1]}")
        assert f"| {' | '.join(cells)} |" in section


def test_the_table_of_distillation_is_that_of_its_records():
    lines = (PROJECT / "benchmarks" / "records" / "distillation.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    text = (PROJECT / "benchmarks" / "results" / "recovery.md").read_text(encoding="utf-8")
    gains: dict[tuple[str, int], list[float]] = {}
    for net, share in sorted({(record["net"], record["flops"]) for record in records}):
        runs = [record for record in records if (record["net"], record["flops"]) == (net, share)]
        columns = [[100 * run[step] for run in runs] for step in ("reconstruct", "before", "after")]
        found = [interval(column) for column in columns]
        differences = [after - before for before, after in zip(columns[1], columns[2], strict=True)]
        gain = interval(differences)
        for run, difference in zip(runs, differences, strict=True):
            gains.setdefault((net, run["seed"]), []).append(difference)
        cells = [f"{net}, {100 * share:g} %", *(f"{each.mean:.1f} ± {each.half:.1f}" for each in found)]
        cells += [f"{gain.mean:+.1f} ± {gain.half:.1f}"]
        cells += [f"{np.mean([run[step] for run in runs]):.0f}" for step in ("before_s", "after_s")]
        assert f"| {' | '.join(cells)} |" in text
    over_all = interval([float(np.mean(each)) for each in gains.values()])
    assert (
        f"Over the six networks (mean of both costs) the change gains {over_all.mean:.1f} ± {over_all.half:.1f}" in text
    )
