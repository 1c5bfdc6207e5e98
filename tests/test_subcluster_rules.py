"""The tables of sub-clustering's rules are those of their records, and the benchmark's rule is the package's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from bench_modules import BENCHMARKS, imported
from torch import nn

from nni_topo import zoo
from nni_topo.clustering import Growth, grow
from nni_topo.studies.tables import interval

_PROJECT = Path(__file__).parents[1]
_RECORDS = _PROJECT / "benchmarks" / "records" / "subcluster_rules.jsonl"


@pytest.fixture(scope="module")
def rules():
    with imported(BENCHMARKS, "subcluster_rules") as module:
        yield module


def test_the_page_holds_the_table_of_the_records(rules):
    page = (_PROJECT / "benchmarks" / "results" / "clustering.md").read_text(encoding="utf-8")
    records = [json.loads(line) for line in _RECORDS.read_text().splitlines()]
    assert {(record["net"], record["seed"]) for record in records} == {
        (net, seed) for net in rules.SOURCE for seed in range(3)
    }
    assert "\n".join(rules.tables(records)) in page


def test_the_table_of_the_default_holds_what_its_records_say():
    page = (_PROJECT / "benchmarks" / "results" / "clustering.md").read_text(encoding="utf-8")
    section = page.split("## Sub-clustering with the default")[1].split("\n## ")[0]
    rows = {cells[1].strip(): [each.strip() for each in cells] for cells in map(cells_of, section.splitlines())}
    lines = _RECORDS.with_name("subcluster_networks.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 15
    with imported(BENCHMARKS, "subcluster_report") as report:
        assert report.with_part_tables(page, records) == page
    for net in dict.fromkeys(record["net"] for record in records):
        runs = [record for record in records if record["net"] == net]
        nodes = ["-".join(str(n) for layer, n in run["widths"].items() if layer in run["initial"]) for run in runs]
        removed = [f"{100 * (1 - run['params'] / run['params_before']):.1f}" for run in runs]
        steps = ("before", "pruned", "updated", "rebuilt", "retrained", "retrained_updated")
        accuracies = [interval([100 * run[step] for run in runs]).show() for step in steps]
        assert rows[net][2] == ", ".join(nodes)
        assert rows[net][4] == ", ".join(removed)
        assert rows[net][7:13] == accuracies
        assert rows[net][13] == ", ".join(str(run["depth"]) for run in runs)


def test_the_tables_of_parts_are_those_of_their_records():
    page = (_PROJECT / "benchmarks" / "results" / "clustering.md").read_text(encoding="utf-8")
    lines = _RECORDS.with_name("subcluster_parts.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["part"] for record in records} == {
        "choice",
        "statistics",
        "energy",
        "baselines",
        "algorithms",
        "survivors",
    }
    with imported(BENCHMARKS, "subcluster_report") as report:
        assert report.with_part_tables(page, records) == page


def cells_of(line):
    return line.split("|") if line.startswith("|") else ["", ""]


@pytest.mark.parametrize("reading", ["scott", "10", "3"])
@pytest.mark.quick_every(2)
def test_a_cut_tree_is_what_grows_to_the_threshold(rules, reading):
    generator = np.random.default_rng(0)
    for seed in range(3):
        points = np.maximum(generator.normal(size=(50, 4)) @ generator.normal(size=(4, 60)), 0.0)
        covariance = np.cov(points, bias=True)
        layer = rules.GrownLayer(points, covariance, 12, 0.3, seed)
        bins = rules.READINGS[reading].bins
        tree = grow(points, covariance, 12, Growth(bins=bins), energy=0.3, seed=seed)
        assert layer.kept(rules.READINGS[reading]) == (len(tree.leaves), tree.depth)
        assert layer.unsplit() == (12, 0)


def test_what_the_page_on_the_sources_says_the_nodes_leave(rules):
    page = (_PROJECT / "docs" / "sources.md").read_text(encoding="utf-8")
    found = {}
    for net, (channels, size) in {
        "lenet300": (1, 28),
        "lenet5": (1, 32),
        "lenet5_like": (1, 28),
        "cnn12": (3, 32),
        "vgg16_modified": (3, 32),
    }.items():
        model = zoo.create_model(net, num_classes=10, in_channels=channels, image_size=size)
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)][:-1]
        if net == "lenet5":
            layers.remove("classifier.fc1")
        found[net] = f"{100 * rules.removed_by_source(net, model, layers):.1f} %"
    with imported(BENCHMARKS, "subcluster_report") as report:
        assert {net: f"{share} %" for net, share in report.TEXT_NODES_REMOVE.items()} == found
    assert found["lenet300"] in page
    assert found["lenet5"] in page
    for net, name in (("lenet5_like", "LeNet-5-like"), ("cnn12", "12-layer CNN"), ("vgg16_modified", "VGG-16 to the")):
        (row,) = (line for line in page.splitlines() if re.search(rf"\| {name}.*removed", line))
        assert f"{found[net]} removed" in row, net
