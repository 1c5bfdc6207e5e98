"""The tables of sub-clustering's rules are those of their records, and the benchmark's rule is the package's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from bench_modules import BENCHMARKS, imported
from torch import nn

from nni_topo import zoo
from nni_topo.clustering import Growth, grow

_PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rules():
    with imported(BENCHMARKS / "clustering", "subcluster_rules") as module:
        yield module


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
    with imported(BENCHMARKS / "clustering", "subcluster_report") as report:
        assert {net: f"{share} %" for net, share in report.TEXT_NODES_REMOVE.items()} == found
    assert found["lenet300"] in page
    assert found["lenet5"] in page
    for net, name in (("lenet5_like", "LeNet-5-like"), ("cnn12", "12-layer CNN"), ("vgg16_modified", "VGG-16 to the")):
        (row,) = (line for line in page.splitlines() if re.search(rf"\| {name}.*removed", line))
        assert f"{found[net]} removed" in row, net
