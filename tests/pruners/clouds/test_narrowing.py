from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.hooks import WeightCollector
from nni_topo.pruners.clouds.narrowing import chunks
from nni_topo.pruners.random import RandomPruner
from nni_topo.pruners.topological.pruner import TopologicalPruner
from nni_topo.topology import pairwise_distances, projected_features, projection_error, with_origin

CONFIG = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]


def layer(points, features):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(features, points))


def cloud_of(model, **knobs):
    pruner = RandomPruner(model, CONFIG)
    try:
        return WeightCollector(**knobs).collect(pruner.context)["0"]["weight"]
    finally:
        pruner.unwrap_model()


def distances(points):
    return pairwise_distances(with_origin(points.numpy()))


@pytest.mark.parametrize("preprocess", ["none", "center", "standardize", "unit"])
def test_projected_distances_stay_within_the_error(preprocess):
    model = layer(24, 3000)
    exact, narrow = (
        distances(cloud_of(model, preprocess=preprocess, projection_error=error)) for error in (None, 0.15)
    )
    upper = np.triu_indices(25, 1)
    moved = np.abs(narrow[upper] / exact[upper] - 1).max()
    assert 0.0 < moved <= 0.15
    assert cloud_of(model, projection_error=0.15).shape == (24, projected_features(25, 0.15))


def test_most_features_are_a_bound_and_narrow_clouds_are_left_alone():
    model = layer(24, 300)
    narrow, exact = cloud_of(model, max_features=50), cloud_of(model)
    assert narrow.shape == (24, 50)
    upper = np.triu_indices(25, 1)
    assert np.abs(distances(narrow)[upper] / distances(exact)[upper] - 1).max() <= projection_error(25, 50)
    assert torch.equal(cloud_of(model, max_features=300), exact)
    assert torch.equal(cloud_of(model, projection_error=0.15), exact)
    assert torch.equal(exact, model[0].weight.detach().double())
    assert torch.equal(cloud_of(model, max_features=50), narrow)
    assert not torch.equal(cloud_of(model, max_features=50, seed=1), narrow)


@pytest.mark.parametrize("preprocess", ["none", "center", "standardize", "unit"])
def test_clouds_above_the_size_keep_their_inner_products(preprocess):
    model = layer(24, 3000)
    exact = cloud_of(model, preprocess=preprocess)
    narrow = cloud_of(model, preprocess=preprocess, max_bytes=8 * 24 * 3000 - 1)
    assert narrow.shape == (24, 24)
    np.testing.assert_allclose(distances(narrow), distances(exact), atol=1e-7)
    assert torch.equal(cloud_of(model, max_bytes=8 * 24 * 3000), cloud_of(model))
    assert cloud_of(layer(24, 20), max_bytes=1).shape == (24, 20)


def test_a_wide_weight_is_read_in_chunks_of_bounded_size():
    weight = torch.arange(64.0)[:, None].expand(64, 2**19)  # 256 MiB as float64
    sizes = [part.numel() for part in chunks(weight)]
    assert sum(sizes) == weight.numel()
    assert 8 * max(sizes) == 2**26


def test_the_pruner_takes_such_a_collector():
    model = layer(24, 3000)
    with torch.no_grad():
        model[0].weight[:12] *= 1e-3
    _, masks = TopologicalPruner(model, CONFIG, cloud=WeightCollector(projection_error=0.2)).compress()
    assert masks["0"]["bias"].tolist() == [0.0] * 12 + [1.0] * 12


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"max_features": 0}, "max_features must be an integer of at least 1 or None, got 0"),
        ({"max_features": 2.0}, "max_features must be an integer"),
        ({"max_bytes": 0}, "max_bytes must be an integer"),
        ({"projection_error": 1.0}, r"projection_error must be in \(0, 1\) or None, got 1.0"),
        ({"projection_error": 0.1, "max_features": 5}, "got both"),
    ],
)
def test_bad_knobs_are_refused(knobs, words):
    with pytest.raises(ConfigError, match=words):
        WeightCollector(**knobs)
