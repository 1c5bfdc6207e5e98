from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from torch import nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.pruners.clouds.features import FeatureCollector
from nni_topo.pruners.clouds.moments import embedding
from nni_topo.pruners.cluster import ClusterPruner
from nni_topo.pruners.random import RandomPruner
from nni_topo.testing import toy_images, toy_model


def collected(model, images, names):
    """Points of the named layers, and the collector."""
    config = [{"op_names": list(names), "sparse_ratio": 0.5}]
    pruner = RandomPruner(model, config)
    collector = FeatureCollector(images)
    data = collector.collect(pruner.context)
    pruner.unwrap_model()
    return {name: data[name]["weight"].numpy() for name in names}, collector


def check_geometry(points: np.ndarray, features: np.ndarray) -> None:
    """Distances and covariances of points are those of features (neurons, samples), per sample."""
    np.testing.assert_allclose(points[:, 0], features.mean(1), atol=1e-6)
    np.testing.assert_allclose(pdist(points), pdist(features) / np.sqrt(features.shape[1]), atol=1e-5)
    np.testing.assert_allclose(points[:, 1:] @ points[:, 1:].T, np.cov(features, bias=True), atol=1e-5)


@pytest.mark.parametrize("samples", [6, 40])
def test_linear_features_are_outputs_behind_the_activation(samples):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    images = torch.randn(samples, 4)
    points, _ = collected(model, [images[:5], images[5:]], ["0"])
    check_geometry(points["0"], torch.relu(model[0](images)).detach().numpy().T)


def test_feature_maps_are_taken_position_by_position_behind_norm_and_activation():
    model = toy_model().eval()
    images = toy_images(8)
    points, collector = collected(model, list(images.split(3)), ["stem"])
    maps = torch.relu(model.norm(model.stem(images))).detach()
    check_geometry(points["stem"], maps.movedim(1, 0).flatten(1).numpy())
    assert collector.network.taps["stem"].norms == ("norm",)


def test_what_is_added_up_is_taken_before_the_addition():
    model = toy_model().eval()
    images = toy_images(8)
    points, _ = collected(model, [images], ["inner"])
    maps = model.inner(torch.relu(model.norm(model.stem(images)))).detach()
    check_geometry(points["inner"], maps.movedim(1, 0).flatten(1).numpy())


def test_dead_neurons_are_exactly_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[0].bias[2] = -1.0
    points, _ = collected(model, [torch.randn(50, 4)], ["0"])
    assert (~points["0"].any(1)).nonzero()[0].tolist() == [2]


@given(st.integers(0, 100), st.integers(1, 8), st.integers(1, 12))
def test_embedding_has_the_inner_products(seed, points, dimensions):
    rows = torch.randn(points, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = rows @ rows.T
    found = embedding(gram)
    assert found.shape[1] <= min(points, dimensions) or found.shape[1] == 1
    torch.testing.assert_close(found @ found.T, gram)


def test_bad_requests_are_refused():
    model = toy_model()
    with pytest.raises(DataError, match="at least two samples to be clustered by, got 1"):
        collected(model, [toy_images(1)], ["hidden"])
    with pytest.raises(DataError, match="at least one batch, got none"):
        collected(toy_model(), [], ["hidden"])
    bad = toy_images(4)
    bad[0] = torch.nan
    with pytest.raises(DataError, match=r"inputs must be finite.*batch 0"):
        collected(toy_model(), [bad], ["hidden"])
    with pytest.raises(ConfigError, match="neither"):
        ClusterPruner(toy_model(), [{"op_names": ["hidden"], "sparse_ratio": 0.5}])


@pytest.mark.parametrize("change", [lambda y: y.mul_(100.0), lambda y: y.clamp_(min=2.0)])
def test_operations_in_place_behind_a_layer_leave_its_features(change):
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2)

        def forward(self, inputs):
            return self.b(change(self.a(inputs)))

    torch.manual_seed(0)
    model, images = Changes(), torch.randn(10, 4)
    points, _ = collected(model, [images], ["a"])
    check_geometry(points["a"], model.a(images).detach().numpy().T)


class Attended(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.mix, self.head = (
            nn.Embedding(9, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 3),
        )

    def forward(self, words):
        rows = self.words(words)
        return self.head(self.mix(rows, rows, rows, need_weights=False)[0])


@pytest.mark.parametrize("name", ["words", "mix"])
def test_embeddings_and_attention_have_no_features(name):
    words = torch.arange(6).view(2, 3)
    with pytest.raises(ConfigError, match=rf"must be those of a linear layer or a convolution.*\({name}\)"):
        ClusterPruner(Attended(), [{"op_names": [name], "sparse_ratio": 0.5}], calibration=[words])


def test_attention_by_itself_loses_whole_heads():
    config = [{"op_names": ["mix"], "sparse_ratio": 0.5}]
    torch.manual_seed(0)
    _, masks = RandomPruner(Attended(), config, seed=0).compress()
    kept = masks["mix"]["in_proj_weight"].reshape(3, 2, 4, 8).amax((2, 3))  # queries, keys and values by head
    assert kept.sum() == 3
    assert torch.equal(kept, kept[:1].expand_as(kept))
    assert masks["mix"]["in_proj_weight"].sum() == 3 * 4 * 8
