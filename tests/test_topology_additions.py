"""What the benchmarks of topology's hypotheses compute themselves: exact subsets, merged filters, bars of a zigzag."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bench_modules import BENCHMARKS, imported
from torch import nn

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
    distances, similarities = cloud(0, 9, 0.7)
    subsets = [[0, *others] for others in combinations(range(1, 9), 3)]
    magnitudes = [nni_topo.topology.metric_magnitude(distances[np.ix_(some, some)], 0.7) for some in subsets]
    assert exact.largest_by_enumeration(similarities, 3).tolist() == subsets[int(np.argmax(magnitudes))]


@pytest.mark.parametrize("seed", range(5))
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


def test_a_mobilenet_loses_what_only_projections_and_the_classifier_read(exact):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Conv2d(4, 8, 1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 4, 1),
        nn.Conv2d(4, 6, 1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    assert exact.pruned_and_readers(model) == [("1", "3"), ("4", "6")]
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    assert exact.pruned_and_readers(plain) == [("0", "1"), ("1", "3")]


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


@pytest.mark.parametrize("seed", range(12))
def test_bars_through_a_zigzag_are_those_of_its_matrices(zigzag, seed):
    generator = np.random.default_rng(seed)
    every = list(combinations(range(9), 2))
    one = {edge for edge in every if generator.random() < 0.35}
    other = {edge for edge in one if generator.random() < 0.7} | {edge for edge in every if generator.random() < 0.12}
    assert zigzag.bars_through(one, other, 9) == bars_by_matrices(one, other, every)


def bars_by_matrices(one, other, every):
    """Count the bars with ranks of matrices modulo 2: loops of the intersection, and what triangles bound."""
    bounded = [triangles(edges, every) for edges in (one, other)]
    both = one & other
    edges = np.zeros((9, len(every)), dtype=bool)
    for place, (first, second) in enumerate(every):
        edges[[first, second], place] = (first, second) in both
    loops = null_space(edges, [place for place, edge in enumerate(every) if edge in both])
    zero = np.zeros((0, len(every)), dtype=bool)

    def rank_of_loops(parts):
        # loops beside their bounding triangles, one block of columns for each complex
        wide = [np.concatenate([loops] * len(parts), axis=1)]
        for place, part in enumerate(parts):
            block = np.zeros((len(part), len(parts) * len(every)), dtype=bool)
            block[:, place * len(every) : (place + 1) * len(every)] = part
            wide.append(block)
        return rank(np.concatenate(wide)) - sum(rank(part) if len(part) else rank(zero) for part in parts)

    return rank_of_loops(bounded[:1]) + rank_of_loops(bounded[1:]) - rank_of_loops(bounded)


def triangles(edges, every):
    """Return the boundaries of a graph's triangles, (triangles, edges)."""
    found = []
    for corners in combinations(range(9), 3):
        sides = list(combinations(corners, 2))
        if edges.issuperset(sides):
            found.append([edge in sides for edge in every])
    return np.array(found, dtype=bool).reshape(len(found), len(every))


def rank(matrix):
    """Return the rank modulo 2."""
    return len(reduced(matrix)[1])


def reduced(matrix):
    """Return the reduced rows modulo 2, and their pivots."""
    rows, pivots = matrix.copy(), []
    for column in range(rows.shape[1]):
        candidates = np.flatnonzero(rows[len(pivots) :, column])
        if len(candidates):
            place = len(pivots)
            rows[[place, place + candidates[0]]] = rows[[place + candidates[0], place]]
            others = np.flatnonzero(rows[:, column])
            rows[others[others != place]] ^= rows[place]
            pivots.append(column)
    return rows, pivots


def null_space(matrix, columns):
    """Return a basis modulo 2 of what a matrix maps to zero, with entries in some columns alone."""
    rows, pivots = reduced(matrix[:, columns])
    found = []
    for free in sorted(set(range(len(columns))) - set(pivots)):
        vector = np.zeros(matrix.shape[1], dtype=bool)
        vector[columns[free]] = True
        for place, pivot in enumerate(pivots):
            vector[columns[pivot]] = rows[place, free]
        found.append(vector)
    return np.array(found, dtype=bool).reshape(len(found), matrix.shape[1])


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


def test_scaled_widths_meet_the_share_of_the_multiplications(widths):
    data = SimpleNamespace(num_classes=10, in_channels=1)
    places = [784, 196, 49, 49]
    whole = widths.macs(widths.WIDTHS, places, data)
    assert whole == 784 * 9 * 24 + 196 * 9 * 24 * 24 + 49 * 9 * 24 * 48 + 49 * 9 * 48 * 48 + 480
    for counts in ([12, 12, 24, 24], [2, 20, 47, 3], [23, 2, 2, 2]):
        found = widths.scaled_widths(counts, places, data, 0.5)
        assert widths.macs(found, places, data) <= 0.5 * whole
        assert all(1 <= width <= most for width, most in zip(found, widths.WIDTHS, strict=True))
