from __future__ import annotations

import gudhi
import numpy as np
import pytest
import torch
from gudhi.wasserstein import wasserstein_distance
from scipy.spatial.distance import cdist
from torch import nn

from nni_topo import GeneticSearch
from nni_topo.errors import ConfigError
from nni_topo.hooks import WeightCollector
from nni_topo.maths import topology
from nni_topo.pruners.selection import Cloud
from nni_topo.pruners.topological import TopologicalPruner
from nni_topo.testing import toy_evaluator, toy_images, toy_model

HALF = [{"op_names": ["hidden"], "sparse_ratio": 0.5}]


def kept(masks, name):
    return masks[name]["weight"].flatten(1)[:, 0].bool().numpy()


def layer_of(points):
    """A one-layer model whose weight cloud is the given points."""
    layer = nn.Linear(len(points[0]), len(points))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(points))
    return nn.Sequential(layer)


def pruned(points, ratio=None, **knobs):
    make = knobs.pop("make", TopologicalPruner)
    rule = {"sparse_threshold": knobs.pop("threshold")} if ratio is None else {"sparse_ratio": ratio}
    _, masks = make(layer_of(points), [{"op_names": ["0"], **rule}], **knobs).compress()
    return kept(masks, "0").tolist()


SMALL = {"population_size": 6, "generations": 3}
FOUR_CLUSTERS = [
    [5.0, 0.0],
    [5.1, 0.0],
    [0.0, 5.0],
    [0.0, 5.1],
    [-5.0, 0.0],
    [-5.1, 0.0],
    [0.1, 0.0],
    [0.0, 0.1],
]


@pytest.mark.parametrize("solver", ["genetic", "greedy"])
def test_one_filter_of_each_cluster_stays_and_those_near_zero_go(solver):
    # k = 3 of 8: one of each pair; the two filters near the origin cost nothing.
    mask = pruned(FOUR_CLUSTERS, 0.625, solver=solver)
    assert [sum(mask[i : i + 2]) for i in (0, 2, 4, 6)] == [1, 1, 1, 0]


def test_threshold_says_how_many():
    # Deaths: three long (about 5), two short ones (0.1) within the pairs and two short ones at the origin.
    assert sum(pruned(FOUR_CLUSTERS, threshold=0.5)) == 3
    assert sum(pruned(FOUR_CLUSTERS, threshold=0.0001)) == 8
    assert sum(pruned(FOUR_CLUSTERS, threshold=1000.0)) == 1


def test_blocks_are_worth_half_the_death_times_in_units_of_their_mean():
    points = topology.with_origin(np.array(FOUR_CLUSTERS))
    deaths = topology.h0_deaths(topology.pairwise_distances(points))
    losses = Cloud(points, 8).losses()
    np.testing.assert_allclose(losses, deaths / (2 * deaths.mean()), atol=1e-9)
    assert (np.diff(losses) <= 0).all()
    # Without the origin one time is missing: the component that never dies counts as much as the longest other one.
    alone = Cloud(points[:8], 8).losses()
    assert alone[0] == alone[1]
    assert alone.mean() == pytest.approx(0.5)


def loss_by_gudhi(cloud, mask, criterion):
    """What a subset loses, from SciPy's distances and GUDHI's diagrams and distances alone."""
    if criterion in ("hausdorff", "cover"):
        nearest = cdist(cloud, cloud[mask]).min(axis=1)
        return nearest.max() if criterion == "hausdorff" else nearest.mean()
    diagrams = []
    for points in (cloud, cloud[mask]):
        tree = gudhi.RipsComplex(points=points).create_simplex_tree(max_dimension=2)
        tree.compute_persistence()
        diagrams.append([tree.persistence_intervals_in_dimension(degree) for degree in (0, 1)])
    finite = [[bars[np.isfinite(bars).all(axis=1)] if len(bars) else bars for bars in each] for each in diagrams]
    if criterion != "wasserstein":
        combined = max if criterion == "bottleneck" else sum
        return combined(gudhi.bottleneck_distance(*pair) for pair in zip(*finite, strict=True))
    return sum(wasserstein_distance(*pair, order=2, internal_p=np.inf) for pair in zip(*finite, strict=True))


@pytest.mark.parametrize("criterion", topology.CRITERIA)
def test_what_is_kept_is_the_search_best(criterion):
    model = toy_model()
    pruner = TopologicalPruner(
        model, HALF, criterion=criterion, homology_dimensions=(0, 1), solver=GeneticSearch(generations=4)
    )
    _, masks = pruner.compress()
    cloud = topology.with_origin(toy_model().hidden.weight.detach().double().numpy())
    loss = loss_by_gudhi(cloud, np.append(kept(masks, "hidden"), True), criterion)
    assert loss == pytest.approx(pruner.trace["hidden.weight"][-1].best, abs=1e-9)


def test_a_group_is_one_joint_cloud():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 12))
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5, "dependency_group_id": "g"}]
    joint = torch.cat([model[0].weight, model[1].weight], dim=1).tolist()
    _, masks = TopologicalPruner(model, config).compress()
    assert kept(masks, "0").tolist() == kept(masks, "1").tolist() == pruned(joint, 0.5)


def test_the_parts_of_a_grouped_convolution_are_clouds_of_their_own():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(4, 12, 1, groups=2))
    config = [{"op_names": ["0"], "sparse_ratio": 0.5, "internal_metric_block": 2}]
    weight = model[0].weight.detach().flatten(1).tolist()
    pruner = TopologicalPruner(model, config, solver="genetic")
    _, masks = pruner.compress()
    assert kept(masks, "0").tolist() == pruned(weight[:6], 0.5, solver="genetic") + pruned(
        weight[6:], 0.5, solver="genetic"
    )
    assert list(pruner.trace) == ["0.weight[0]", "0.weight[1]"]


@pytest.mark.parametrize(("knobs", "cloud"), [({}, "weight"), ({"calibration": [toy_images(16)]}, "functional")])
def test_the_default_covers_what_neurons_do_where_there_are_images(knobs, cloud):
    named = {"cloud": cloud, "criterion": "hausdorff", "solver": "greedy"}
    pair = [TopologicalPruner(toy_model(), HALF, **knobs, **given) for given in ({}, named)]
    masks = [kept(pruner.compress()[1], "hidden").tolist() for pruner in pair]
    assert masks[0] == masks[1]
    assert pair[0].trace == {}


@pytest.mark.parametrize(
    ("criterion", "searched"), list(zip(topology.CRITERIA, (False, False, True, True, True), strict=True))
)
def test_by_default_covers_are_greedy_and_diagrams_are_searched(criterion, searched):
    pruner = TopologicalPruner(toy_model(), HALF, criterion=criterion)
    pruner.compress()
    assert bool(pruner.trace) == searched


@pytest.mark.parametrize("combine", ["max", "sum"])
def test_perera2022_compares_diagrams_of_the_weights_without_the_origin(combine):
    points = np.random.default_rng(3).normal(size=(12, 2)).astype(np.float32)
    pruner = TopologicalPruner.perera2022(
        layer_of(points.tolist()), [{"op_names": ["0"], "sparse_ratio": 0.5}], combine=combine, search=SMALL
    )
    _, masks = pruner.compress()
    distances = topology.pairwise_distances(points.astype(np.float64))
    criterion = "bottleneck" if combine == "max" else "bottleneck_sum"
    fitness = topology.SubsetFitness(distances, criterion, homology_dimensions=(0, 1))
    assert float(fitness(kept(masks, "0")[None])[0]) == pytest.approx(pruner.trace["0.weight"][-1].best, abs=1e-12)


def test_perera2022_searches_by_default_and_a_flat_fitness_is_told(caplog):
    """By the larger distance, which is H0's, all subsets are equal; the sum tells them apart."""
    points = np.random.default_rng(3).normal(size=(24, 27)).astype(np.float32)
    config_list = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    found = {}
    for combine in ("sum", "max"):
        caplog.clear()
        pruner = TopologicalPruner.perera2022(layer_of(points.tolist()), config_list, combine=combine)
        _, masks = pruner.compress()
        told = [each.getMessage() for each in caplog.records if "chosen at random" in each.getMessage()]
        found[combine] = pruner.trace["0.weight"], told, kept(masks, "0")
    first, last = found["sum"][0][0], found["sum"][0][-1]
    assert last.best < first.best < first.mean
    assert found["sum"][1] == []
    assert len({(each.best, each.mean) for each in found["max"][0]}) == 1
    assert [told.endswith("(0.weight)") for told in found["max"][1]] == [True]
    default = TopologicalPruner.perera2022(layer_of(points.tolist()), config_list)
    assert kept(default.compress()[1], "0").tolist() == found["sum"][2].tolist()


def test_an_evaluator_beside_the_default_cloud_is_told_how_its_data_serve(caplog):
    model = toy_model()
    TopologicalPruner(model, HALF, toy_evaluator(model))
    assert "calibration=evaluator uses the evaluator's data" in caplog.text
    caplog.clear()
    _, weights = TopologicalPruner(toy_model(), HALF).compress()
    _, asked = TopologicalPruner(toy_model(), HALF, calibration=toy_evaluator(toy_model())).compress()
    _, expected = TopologicalPruner(toy_model(), HALF, calibration=[toy_images()]).compress()
    assert caplog.text == ""
    assert kept(asked, "hidden").tolist() == kept(expected, "hidden").tolist() != kept(weights, "hidden").tolist()


def test_a_collector_of_ones_own():
    class Doubled(WeightCollector):
        def collect(self, context):
            return {m: {t: 2 * v for t, v in targets.items()} for m, targets in super().collect(context).items()}

    _, own = TopologicalPruner(toy_model(), HALF, cloud=Doubled()).compress()
    _, plain = TopologicalPruner(toy_model(), HALF).compress()
    assert kept(own, "hidden").tolist() == kept(plain, "hidden").tolist()


def test_seeds_matter_and_repeat():
    points = np.random.default_rng(0).normal(size=(30, 4)).tolist()
    knobs = {"make": TopologicalPruner.perera2022, "search": {"generations": 2, "population_size": 4}}
    first, again, other = (pruned(points, 0.5, seed=seed, **knobs) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("points", [[[1.0]], [[0.0], [0.0]], [[1.0], [1.0], [1.0]], [[1.0], [2.0], [3.0], [4.0]]])
@pytest.mark.parametrize("make", [TopologicalPruner, TopologicalPruner.perera2022])
def test_degenerate_layers(points, make):
    assert sum(pruned(points, 0.5, make=make)) == len(points) - len(points) // 2


def test_a_functional_cloud_without_data_is_refused_before_the_model_is_wrapped():
    model = toy_model()
    with pytest.raises(ConfigError, match="'functional' needs calibration data"):
        TopologicalPruner(model, HALF, cloud="functional")
    assert not hasattr(model.hidden, "_nni_wrapper")


@pytest.mark.slow
def test_layers_searched_in_parallel_give_the_same_masks():
    config = [{"op_names": ["stem", "inner", "hidden"], "sparse_ratio": 0.5}]
    alone, pair = (TopologicalPruner(toy_model(), config, n_jobs=jobs, solver="genetic") for jobs in (1, 2))
    (_, first), (_, second) = alone.compress(), pair.compress()
    for name in first:
        assert kept(first, name).tolist() == kept(second, name).tolist()
    assert list(alone.trace) == list(pair.trace) == ["stem.weight", "inner.weight", "hidden.weight"]
