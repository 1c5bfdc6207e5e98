"""What the benchmarks of topology's hypotheses compute: scores, selections and tables with known answers."""

from __future__ import annotations

import functools
from itertools import combinations
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from bench_modules import BENCHMARKS, imported
from scipy.spatial.distance import cdist
from torch.nn.functional import one_hot

from nni_topo.topology import h0_deaths


@functools.cache
def bench(name: str) -> ModuleType:
    """A module of ``benchmarks/topology``."""
    with imported(BENCHMARKS / "topology", name) as module:
        return module


def symmetric(points):
    """Distances; the halves of cdist's may differ in the last bit."""
    distances = cdist(points, points)
    return np.maximum(distances, distances.T)


# Magnitude


def test_the_magnitude_of_equal_distances_of_a_line_and_of_points_on_one_place():
    magnitude = bench("metric_magnitude").metric_magnitude
    for scale in (0.1, 1.0, 7.0):
        distances = 0.8 * (1.0 - np.eye(5))
        assert magnitude(distances, scale) == pytest.approx(5 / (1 + 4 * np.exp(-0.8 * scale)), rel=1e-12)
    # Leinster 2013, corollary 2.3.4: one and the sum of tanh of half the gaps
    line = np.array([0.0, 0.3, 1.1, 4.0])
    distances = abs(np.subtract.outer(line, line))
    assert magnitude(distances) == pytest.approx(1.0 + np.tanh(np.diff(line) / 2.0).sum(), rel=1e-12)
    twice = np.ix_([0, 1, 2, 2, 3, 3, 3], [0, 1, 2, 2, 3, 3, 3])
    assert magnitude(distances[twice]) == pytest.approx(magnitude(distances), rel=1e-12)


def test_each_removal_costs_the_least_magnitude():
    module = bench("metric_magnitude")
    distances = symmetric(np.random.default_rng(0).normal(size=(9, 3)))
    kept = np.arange(9)
    for keep in range(8, 0, -1):
        values = {}
        for subset in combinations(kept.tolist(), keep):
            values[subset] = module.metric_magnitude(distances[np.ix_(subset, subset)])
        kept = module.magnitude_subset(distances, keep)
        assert values[tuple(kept.tolist())] == pytest.approx(max(values.values()), rel=1e-9)


def test_exact_selection_finds_the_largest_magnitude_and_no_exchange_adds_any():
    module = bench("which_filters_exact")
    similarities = np.exp(-0.7 * symmetric(np.random.default_rng(0).standard_normal((9, 3))))
    subsets = [[0, *others] for others in combinations(range(1, 9), 3)]
    magnitudes = [np.linalg.inv(similarities[np.ix_(some, some)]).sum() for some in subsets]
    assert module.largest_by_enumeration(similarities, 3).tolist() == subsets[int(np.argmax(magnitudes))]
    similarities = np.exp(-0.5 * symmetric(np.random.default_rng(1).standard_normal((14, 3))))
    start = np.array([0, 1, 2, 3, 4, 5])
    kept = module.largest_by_exchange(similarities, start)
    found = module.magnitude_of(similarities, kept)
    assert kept[0] == 0
    assert len(set(kept.tolist())) == 6
    assert found > module.magnitude_of(similarities, start)
    for place in range(1, 6):
        for other in set(range(14)) - set(kept.tolist()):
            exchanged = kept.copy()
            exchanged[place] = other
            assert module.magnitude_of(similarities, exchanged) <= found * (1.0 + 1e-8)


# RTD-Lite


def test_rtd_lite_is_the_difference_of_spanning_trees_in_any_unit_and_order():
    rtd_lite = bench("rtd").rtd_lite
    generator = np.random.default_rng(0)
    points = generator.normal(size=(40, 3))
    first, second = symmetric(points), symmetric(points[:, :2] + 0.7 * generator.normal(size=(40, 2)))
    lengths = [h0_deaths(matrix).sum() for matrix in (first, second, np.minimum(first, second))]
    plain = rtd_lite(first, second, normalise=False)
    assert plain == pytest.approx((lengths[0] + lengths[1]) / 2 - lengths[2], rel=1e-12)
    assert rtd_lite(first, first) == 0.0
    found, order = rtd_lite(first, second), generator.permutation(40)
    assert found > 0.1
    assert rtd_lite(100.0 * first[np.ix_(order, order)], second[np.ix_(order, order)]) == pytest.approx(found)
    # the first three points are one in the first cloud, the last three in the second
    apart = abs(np.subtract.outer([0, 0, 0, 4, 6], [0, 0, 0, 4, 6])).astype(float)
    other = abs(np.subtract.outer([0, 1, 5, 5, 5], [0, 1, 5, 5, 5])).astype(float)
    assert rtd_lite(apart, other, normalise=False) == 5.5  # trees of 6 and 5, the minimum's of nothing


# Filters, clouds and blocks


def test_contributions_are_what_a_channel_brings_its_reader_and_one_without_any_goes_first():
    module = bench("which_filters")
    torch.manual_seed(0)
    model = module.four_convolutions(3, 1).eval()
    images = torch.randn(6, 1, 8, 8)
    found = list(module.contributions(model, images))
    assert [len(gram) for gram in found] == list(module.WIDTHS)
    # The linear layer reads each averaged channel once: its contributions are vectors, and theirs is the Gram matrix.
    features = model[:-1](images).detach().double()
    weight = model[-1].weight.detach().double()
    vectors = (features - features.mean(0)).T[:, :, None] * weight.T[:, None, :] / len(images) ** 0.5
    vectors = vectors.flatten(1)
    torch.testing.assert_close(found[-1], vectors @ vectors.T, rtol=1e-5, atol=1e-9)
    vectors = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 2.0], [2.9, 0.1]], dtype=torch.float64)
    for scale in (0.25, 4.0):
        assert module.most_magnitude(vectors @ vectors.T, 3, scale).tolist() == [0, 2, 3]


def test_loops_live_through_a_zigzag_by_hand():
    zigzag = bench("which_blocks_zigzag")
    square = {(0, 1), (1, 2), (2, 3), (0, 3)}
    filled = square | {(0, 2)}
    longer = {(0, 1), (1, 2), (2, 4), (3, 4), (0, 3)}
    assert [zigzag.bars_through(square, other, 5) for other in (square, filled, longer)] == [1, 0, 0]
    assert zigzag.lost_loops(square, square, 5) == zigzag.lost_loops(filled, square, 5) == 0.0
    assert zigzag.lost_loops(square, filled, 5) == 1.0


def test_equal_filters_are_merged_without_loss():
    widths = bench("which_widths")
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
    torch.testing.assert_close(merged(images), model(images), rtol=1e-4, atol=1e-5)
    assert [len(layer.weight) for layer, _ in widths.convolutions(merged)] == [12, 12, 24, 24]


# Encoders and ratios


def test_recall_accuracy_of_neighbours_and_alignment_by_hand():
    encoders, ratio = bench("encoders"), bench("which_ratio")
    wanted = torch.tensor([[0, 1], [2, 3]])
    assert encoders.recall(torch.tensor([[1, 0], [3, 9]]), wanted) == 0.75
    gallery = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(12, 1), torch.tensor([[0.0, 1.0]]).repeat(12, 1)])
    labels = torch.tensor([0] * 12 + [1] * 12)
    queries = torch.tensor([[3.0, 0.1], [0.1, 1.0], [1.0, 0.2]])
    assert encoders.neighbour_accuracy(queries, torch.tensor([0, 1, 1]), gallery, labels) == pytest.approx(2 / 3)
    # for many features by Gram matrices, for few by the features' own
    for one, other in (
        (torch.randn(9, 30).double(), torch.randn(9, 12).double()),
        (torch.randn(9, 5), torch.randn(9, 4)),
    ):
        first, second = ((each - each.mean(0)) @ (each - each.mean(0)).T for each in (one, other))
        wanted = float((first * second).sum() / (first.norm() * second.norm()))
        assert ratio.linear_cka(one, other) == pytest.approx(wanted, rel=1e-5)


# Scenes


def test_intersection_over_union_by_hand():
    scenes = bench("scenes")
    pixels = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [2, 2]]])
    found = torch.tensor([[[0, 0], [1, 0]], [[0, 0], [1, 2]]])
    logits = one_hot(found, 11).permute(0, 3, 1, 2).float()
    # background 4 of 5, class 1: 1 of 3, class 2: 1 of 2; no other class occurs
    assert scenes.mean_intersection_over_union(logits, pixels) == pytest.approx((4 / 5 + 1 / 3 + 1 / 2) / 3)


def test_average_precision_by_hand():
    scenes = bench("scenes")
    box, away = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([[30.0, 30.0, 40.0, 40.0]])
    boxes = torch.stack([torch.cat([box, away]), torch.cat([box, away])])
    labels = torch.tensor([[3, 3], [3, 5]])
    near = box + torch.tensor([0.0, 0.0, 0.0, 8.0])  # overlap 10 of 18
    first = torch.cat([box, near, box]), torch.tensor([0.9, 0.8, 0.7]), torch.tensor([3, 3, 5])
    second = torch.cat([near, away]), torch.tensor([0.6, 0.5]), torch.tensor([3, 3])
    # class 3 by score: right, the object is taken, right, wrong class there: precision 1 and 2/3 at two of 3 objects
    # class 5 is never found where it is
    wanted = ((1.0 + 2 / 3) / 3 + 0.0) / 2
    assert scenes.mean_average_precision([first, second], boxes, labels) == pytest.approx(wanted)
    # wrong, right, right: a later right detection raises the precision before it, 2/3 at both recalls
    spots = torch.cat([torch.tensor([[15.0, 15.0, 25.0, 25.0]]), boxes[0]])
    found = spots, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 1, 1])
    assert scenes.mean_average_precision([found], boxes[:1], torch.tensor([[1, 1]])) == pytest.approx(2 / 3)
