"""The whole way on a network of real size: VGG-16 for 32x32 images, half of every layer gone, made dense by NNI."""

from __future__ import annotations

import copy

import pytest
import torch

import nni_topo
from nni_topo import zoo

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return zoo.create_model("vgg16", num_classes=10, in_channels=3, image_size=32, seed=0).eval()


@pytest.mark.parametrize(
    "name", ["l1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("topological", "l2", "fpgm"))]
)
@pytest.mark.slow
def test_half_of_every_layer_leaves_about_a_quarter_of_the_parameters(name, model):
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    victim = copy.deepcopy(model)
    pruner = nni_topo.create_pruner(name, victim, nni_topo.dependency_groups(victim, IMAGES, config))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = nni_topo.to_dense(victim, IMAGES, masks)
    assert 0.24 < zoo.count_params(dense) / zoo.count_params(model) < 0.26
    assert 0.24 < zoo.count_macs(dense, IMAGES) / zoo.count_macs(model, IMAGES) < 0.27
    reference = nni_topo.masked_model(model, IMAGES, masks)
    with torch.no_grad():
        torch.testing.assert_close(dense(IMAGES), reference(IMAGES), rtol=1e-4, atol=1e-5)
