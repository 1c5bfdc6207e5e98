from __future__ import annotations

import copy

import pytest
import torch

from nni_topo import zoo
from nni_topo.errors import ConfigError
from nni_topo.runs.plan import Target
from nni_topo.runs.rivals import cut, is_rival, rival_masks
from nni_topo.runs.widths import layer_ratios
from nni_topo.speedup import to_dense


@pytest.mark.parametrize("name", ["torch-pruning", "torch-pruning-l1", "torch-pruning-fpgm"])
def test_torch_pruning_meets_the_macs_of_the_other_rows(name):
    model = zoo.create_model("resnet20", num_classes=10, in_channels=1, image_size=16, width=0.5, seed=0)
    images = torch.randn(2, 1, 16, 16)
    before = copy.deepcopy(model.state_dict())
    ratios = layer_ratios(model, images, Target("flops", 0.4))
    masks, seconds = rival_masks(name, model, images, ratios)
    dense = to_dense(model.eval(), images, masks)
    assert zoo.count_macs(dense, images) / zoo.count_macs(model, images) == pytest.approx(0.4, abs=0.01)
    assert dense(images).shape == (2, 10)
    assert seconds > 0
    theirs, _ = cut(name, model, images, ratios)
    assert torch.allclose(dense(images), theirs.eval()(images), atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_names():
    assert not is_rival("l1")
    with pytest.raises(ConfigError, match="did you mean torch-pruning-fpgm"):
        is_rival("torch-pruning-fpg")
