"""What the benchmarks of topology's hypotheses compute themselves: exact subsets, merged filters, bars of a zigzag."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bench_modules import BENCHMARKS, imported

import nni_topo

FOLDER = BENCHMARKS / "topology"


@pytest.fixture(scope="module")
def exact():
    with imported(FOLDER, "which_filters_exact") as module:
        yield module


@pytest.fixture(scope="module")
def zigzag():
    with imported(FOLDER, "which_blocks_zigzag") as module:
        yield module


@pytest.fixture(scope="module")
def widths():
    with imported(FOLDER, "which_widths") as module:
        yield module


def cloud(seed, points, scale):
    values = np.random.default_rng(seed).standard_normal((points, 3))
    distances = nni_topo.topology.pairwise_distances(values)
    return distances, np.exp(-scale * distances)


def test_enumeration_finds_the_largest_magnitude_of_all_subsets(exact):
    _, similarities = cloud(0, 9, 0.7)
    subsets = [[0, *others] for others in combinations(range(1, 9), 3)]
    magnitudes = [np.linalg.inv(similarities[np.ix_(some, some)]).sum() for some in subsets]
    assert exact.largest_by_enumeration(similarities, 3).tolist() == subsets[int(np.argmax(magnitudes))]


@pytest.mark.parametrize("seed", range(2))
def test_no_exchange_adds_magnitude_to_what_the_search_returns(exact, seed):
    _, similarities = cloud(seed, 14, 0.5)
    drawn = np.random.default_rng(seed).permutation(np.arange(1, 14))[:5]
    start = np.concatenate([[0], drawn])
    kept = exact.largest_by_exchange(similarities, start)
    found = exact.magnitude_of(similarities, kept)
    assert kept[0] == 0
    assert len(set(kept.tolist())) == 6
    assert found > exact.magnitude_of(similarities, start)
    for place in range(1, 6):
        for other in set(range(14)) - set(kept.tolist()):
            exchanged = kept.copy()
            exchanged[place] = other
            assert exact.magnitude_of(similarities, exchanged) <= found * (1.0 + 1e-8)


def test_loops_live_through_a_zigzag_by_hand(zigzag):
    square = {(0, 1), (1, 2), (2, 3), (0, 3)}
    filled = square | {(0, 2)}
    longer = {(0, 1), (1, 2), (2, 4), (3, 4), (0, 3)}
    assert zigzag.bars_through(square, square, 5) == 1
    assert zigzag.bars_through(square, filled, 5) == 0
    assert zigzag.bars_through(square, longer, 5) == 0
    assert zigzag.lost_loops(square, square, 5) == 0.0
    assert zigzag.lost_loops(square, filled, 5) == 1.0
    assert zigzag.lost_loops(filled, square, 5) == 0.0


def test_equal_filters_are_merged_without_loss(widths):
    torch.manual_seed(0)
    data = SimpleNamespace(num_classes=10, in_channels=1)
    model = widths.four_convolutions(10, 1, widths.WIDTHS, widths.POOLED).eval()
    # the second half of each layer's filters are copies of the first
    with torch.no_grad():
        for layer, norm in widths.convolutions(model):
            half = len(layer.weight) // 2
            layer.weight[half:] = layer.weight[:half]
            norm.running_var.uniform_(0.5, 2.0)
            norm.running_var[half:] = norm.running_var[:half]
    clouds = [widths.folded_filters(layer, norm) for layer, norm in widths.convolutions(model)]
    clusters = [widths.clusters_of(points, len(points) // 2) for points in clouds]
    images = torch.randn(4, 1, 28, 28)
    merged = widths.narrowed(model, clusters, data, merge=True)
    plain = widths.narrowed(model, clusters, data, merge=False)
    torch.testing.assert_close(merged(images), model(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain(images), model(images), rtol=1e-2, atol=1e-2)
    assert [len(layer.weight) for layer, _ in widths.convolutions(merged)] == [12, 12, 24, 24]
