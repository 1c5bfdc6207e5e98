from __future__ import annotations

import copy

import pytest
import torch

from nni_topo import to_dense, zoo
from nni_topo.errors import ConfigError
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.runs.choices import Target
from nni_topo.runs.widths import layer_ratios
from nni_topo.studies.baselines import baseline_masks, cut, is_baseline


@pytest.mark.parametrize(
    "name", ["torch-pruning", "torch-pruning-l1", pytest.param("torch-pruning-fpgm", marks=pytest.mark.slow)]
)
@pytest.mark.quick_every(2)
def test_torch_pruning_meets_the_macs_of_the_other_rows(name):
    model = zoo.create_model("resnet20", num_classes=10, in_channels=1, image_size=16, width=0.5, seed=0)
    images = torch.randn(2, 1, 16, 16)
    before = copy.deepcopy(model.state_dict())
    ratios = layer_ratios(model, images, Target("flops", 0.4))
    masks, seconds = baseline_masks(name, Analysis.on(model, images), ratios)
    dense = to_dense(model.eval(), images, masks)
    assert zoo.count_macs(dense, images) / zoo.count_macs(model, images) == pytest.approx(0.4, abs=0.01)
    assert dense(images).shape == (2, 10)
    assert seconds > 0
    theirs, _ = cut(name, model, images, ratios)
    assert torch.allclose(dense(images), theirs.eval()(images), atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_torch_pruning_takes_whole_heads_of_queries_keys_and_values_together():
    model = zoo.create_model("vit_small", num_classes=10, in_channels=1, image_size=16, seed=0).eval()
    images = torch.randn(2, 1, 16, 16)
    heads = [f"blocks.{block}.attention.{each}_proj" for block in range(5) for each in "qkv"]
    ratios = dict.fromkeys(heads, 1 - 1 / 3) | {f"blocks.{block}.mlp.fc1": 0.75 for block in range(5)}
    masks, _ = baseline_masks("torch-pruning", Analysis.on(model, images), ratios)
    assert masks.keys() == ratios.keys()
    for block in range(5):
        query, key, value = (masks[f"blocks.{block}.attention.{each}_proj"]["bias"] for each in "qkv")
        assert torch.equal(query, key)
        assert torch.equal(query, value)
        assert sorted(query.reshape(6, 16).mean(1).tolist()) == [0.0] * 4 + [1.0] * 2
        assert int(masks[f"blocks.{block}.mlp.fc1"]["bias"].sum()) == 48
    dense = to_dense(model, images, masks)
    assert {block.attention.q_proj.out_features for block in dense.blocks} == {32}


def test_names():
    assert not is_baseline("l1")
    with pytest.raises(ConfigError, match="did you mean torch-pruning-fpgm"):
        is_baseline("torch-pruning-fpg")
