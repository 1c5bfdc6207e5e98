"""Benchmarks of what the sources leave to the future: rounding, loops of a network, and Net Deviation."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def quantised():
    return importlib.import_module("benchmarks.clustering.bench_quantised")


@pytest.fixture(scope="module")
def topology():
    return importlib.import_module("benchmarks.trees.bench_network_topology")


def test_weights_are_rounded_to_multiples_of_the_rows_step(quantised):
    # three bits: steps of a third of the row's largest weight
    weight = torch.tensor([[3.0, -1.4, 1.6, 0.4], [0.0, 0.0, 0.0, 0.0], [-0.6, 0.2, 0.31, -0.09]])
    wanted = torch.tensor([[3.0, -1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-0.6, 0.2, 0.4, 0.0]])
    torch.testing.assert_close(quantised.rounded_rows(weight, 3), wanted)
    # two bits: -1, 0 and 1 times the largest
    assert quantised.rounded_rows(torch.tensor([[2.0, -1.5, 0.9]]), 2).tolist() == [[2.0, -2.0, 0.0]]
    kernels = torch.tensor([[[[2.0, -1.5], [0.9, 0.0]]]])
    assert quantised.rounded_rows(kernels, 2).tolist() == [[[[2.0, -2.0], [0.0, 0.0]]]]


def test_loops_of_a_network_by_hand(topology):
    # born with the weight 0.8, filled when the output reads the second hidden neuron with 0.5
    filled = [np.array([[1.0, 0.9], [0.9, 0.8]]), np.array([[1.0, 0.5]])]
    assert topology.loops(filled) == {"filled": 1.0, "sum": pytest.approx(0.3), "open": 0.0}
    # alone, the layer's loop is never filled
    assert topology.loops(filled[:1]) == {"filled": 0.0, "sum": 0.0, "open": 1.0}


def test_the_largest_weights_of_a_network_and_its_counts(topology):
    masks = topology.largest_weights([np.array([[1.0, -5.0], [3.0, 0.0]]), np.array([[4.0, -3.0]])], 3)
    assert [mask.tolist() for mask in masks] == [[[False, True], [True, False]], [[True, False]]]
    _, rows = topology.counts_table()
    # LeNet-300-100: 784-300-100-10
    weights = 784 * 300 + 300 * 100 + 100 * 10
    assert rows[0][:3] == ["lenet300", f"{weights:,}", str(784 + 300 - 1 + 300 + 100 - 1 + 100 + 10 - 1)]
    assert rows[0][4] == str(784 + 300 + 100 + 10 - 1)
    assert float(rows[0][5]) == pytest.approx(weights / 1193, abs=0.05)
