"""Published topological pruners in ``benchmarks/published_pruners``: numbers by hand and by GUDHI, and as pruners."""

from __future__ import annotations

import functools

import gudhi
import numpy as np
import pytest
import torch
from bench_modules import BENCHMARKS, imported
from torch import nn

from nni_topo.testing import STRUCTURED_CHECKS, toy_images

with imported(BENCHMARKS, "published_pruners.filter_betti") as filter_betti:
    FilterBettiPruner, betti_numbers = filter_betti.FilterBettiPruner, filter_betti.betti_numbers
with imported(BENCHMARKS, "published_pruners.obce") as obce:
    ObcePruner, merge_distance = obce.ObcePruner, obce.merge_distance
with imported(BENCHMARKS, "published_pruners.topology_hole") as topology_hole:
    TopologyHolePruner, count_holes = topology_hole.TopologyHolePruner, topology_hole.count_holes


def drawn(*rows: str) -> np.ndarray:
    """A map whose active places are drawn as #."""
    return np.array([[place == "#" for place in row] for row in rows])


@pytest.mark.parametrize(
    ("rows", "holes"),
    [
        (("....", "....", "...."), 0),
        (("###", "#.#", "###"), 1),
        # active places touch by their corners: the hole is closed
        ((".#.", "#.#", ".#."), 1),
        # silent places don't: there are two holes
        (("####", "#.##", "##.#", "####"), 2),
        # a hole that reaches the edge is none
        (("#.#", "#.#", "###"), 0),
        # a hole in an island in a hole
        (("#####", "#...#", "#.#.#", "#...#", "#####"), 1),
        (("#####", "#.#.#", "#####"), 2),
    ],
)
def test_holes_are_those_that_one_counts_by_eye(rows, holes):
    assert count_holes(drawn(*rows)[None]).tolist() == [holes]


def test_holes_are_the_first_betti_number_of_gudhis_cubical_complex():
    generator = np.random.default_rng(0)
    for share in (0.3, 0.5, 0.7):
        maps = generator.random((20, 9, 12)) < share
        found = count_holes(maps)
        assert found.max() > 0
        for each, holes in zip(maps, found, strict=True):
            # what is active is there from 0 on, what isn't comes at 1
            complex_ = gudhi.CubicalComplex(top_dimensional_cells=np.where(each, 0.0, 1.0))
            complex_.compute_persistence()
            loops = complex_.persistence_intervals_in_dimension(1)
            assert sum(birth <= 0.5 < death for birth, death in loops) == holes


def test_betti_numbers_are_gudhis():
    generator = np.random.default_rng(1)
    loops = 0
    for _ in range(5):
        points = generator.normal(size=(30, 2))
        for scale in (0.3, 0.6, 0.9):
            tree = gudhi.RipsComplex(points=points, max_edge_length=scale).create_simplex_tree(max_dimension=2)
            tree.compute_persistence()
            expected = tree.betti_numbers()
            expected += [0] * (2 - len(expected))
            assert list(betti_numbers(points, scale)) == expected[:2]
            loops += expected[1]
    assert loops > 0


def test_the_merge_distance_is_the_last_death_of_gudhis_components():
    assert merge_distance(np.array([[0.0], [1.0], [5.0], [6.5]])) == 4.0
    points = np.random.default_rng(2).normal(size=(40, 3))
    tree = gudhi.RipsComplex(points=points).create_simplex_tree(max_dimension=1)
    tree.compute_persistence()
    deaths = tree.persistence_intervals_in_dimension(0)[:, 1]
    assert merge_distance(points) == pytest.approx(deaths[np.isfinite(deaths)].max())
    assert merge_distance(np.ones((3, 2))) == 0.0


def kept_filters(pruner):
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return [index for index, kept in enumerate(masks["0"]["weight"].flatten(1)[:, 0]) if kept]


def planted_network():
    """Four 1x1 filters of one input channel: as it is, its negative, a silent one, and one that is always active."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        model[0].weight[:, 0, 0, 0] = torch.tensor([1.0, -1.0, 0.0, 0.0])
        model[0].bias[:] = torch.tensor([0.0, 0.0, -1.0, 1.0])
    return model


CONFIG = [{"op_names": ["0"], "sparse_ratio": 0.25}]


def test_topology_hole_removes_the_filter_whose_maps_have_most_holes():
    ring = torch.from_numpy(np.where(drawn("#####", "#.#.#", "#####"), 1.0, -1.0)).float()
    images = ring.expand(3, 1, 3, 5)
    # after ReLU the first filter's maps have two holes, the others' none: its negative's two points enclose nothing
    assert kept_filters(TopologyHolePruner(planted_network(), CONFIG, calibration=[images])) == [1, 2, 3]
    assert kept_filters(TopologyHolePruner(planted_network(), CONFIG, calibration=[-images])) == [0, 2, 3]


def test_topology_hole_averages_over_images_and_reads_maps_after_the_batch_norm():
    ring = torch.from_numpy(np.where(drawn("#####", "#.#.#", "#####"), 1.0, -1.0)).float()
    # one image with two holes for the first filter, two with two holes for the second
    batches = [ring[None, None], -ring.expand(2, 1, 3, 5)]
    assert kept_filters(TopologyHolePruner(planted_network(), CONFIG, calibration=batches)) == [0, 2, 3]
    model = planted_network()
    model.insert(1, nn.BatchNorm2d(4))
    with torch.no_grad():
        model[1].weight[0] = -1.0  # turns the first filter's maps into its negative's
        model[1].weight[1] = -1.0
    assert kept_filters(TopologyHolePruner(model.eval(), CONFIG, calibration=batches)) == [1, 2, 3]


def test_betti_numbers_remove_the_filter_that_tears_the_data_apart():
    # Two groups of images far apart. The second filter is silent on all but one, which is a point and a far point;
    # the first spreads all images evenly: at half their mean distance they fall into single points.
    images = torch.arange(8.0)[:, None, None, None] ** 3 * torch.ones(1, 1, 2, 2)
    model = planted_network()
    assert kept_filters(FilterBettiPruner(model, CONFIG, calibration=[images], scale=0.1)) == [1, 2, 3]


def test_obce_removes_the_neuron_whose_outputs_merge_first():
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[1.0], [2.0], [0.5], [4.0]])
        model[0].bias.zero_()
    inputs = torch.tensor([[0.0], [1.0], [3.0]])
    assert kept_filters(ObcePruner(model, CONFIG, calibration=[inputs])) == [0, 1, 3]
    half = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    assert kept_filters(ObcePruner(model, half, calibration=[inputs])) == [1, 3]


@pytest.mark.parametrize("check", STRUCTURED_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", [TopologyHolePruner, ObcePruner])
@pytest.mark.quick_every(12)
def test_they_keep_what_every_pruner_promises(kind, check):
    check(functools.partial(kind, calibration=[toy_images()]))
