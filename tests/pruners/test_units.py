from __future__ import annotations

import pytest
import torch
from speedup_nets import shuffled
from torch import nn

from nni_topo import create_pruner, dependency_groups
from nni_topo.errors import ConfigError
from nni_topo.hooks import pruning_units
from nni_topo.pruners.random import RandomPruner


def units_of(model, config_list):
    return pruning_units(RandomPruner(model, config_list).context.target_spaces)


def test_each_weight_is_a_unit_in_network_order(convnet):
    units = units_of(convnet, [{"op_types": ["Linear", "Conv2d"], "sparse_ratio": 0.5}])
    assert [unit.name for unit in units] == ["0.weight", "2.weight", "6.weight"]
    assert [unit.blocks for unit in units] == [8, 12, 5]
    assert [unit.elements for unit in units] == [27, 72, 12]


def test_a_dependency_group_is_one_unit():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
    config = [
        {"op_names": ["0", "1"], "sparse_ratio": 0.5, "dependency_group_id": "g"},
        {"op_names": ["2"], "sparse_ratio": 0.25},
    ]
    first, second = units_of(model, config)
    assert first.members == (("0", "weight"), ("1", "weight"))
    assert first.elements == 27 + 8
    assert second.sparse_ratio == 0.25


def test_what_makes_the_channels_comes_before_what_reads_them_whatever_is_defined_first():
    model = nn.ModuleDict({"reads": nn.Linear(6, 4), "makes": nn.Linear(4, 6)})
    config = [
        {"op_names": ["reads"], "sparse_ratio": 0.5, "dependency_group_id": "g", "granularity": [-1, 2]},
        {"op_names": ["makes"], "sparse_ratio": 0.5, "dependency_group_id": "g", "granularity": [2, -1]},
    ]
    (unit,) = units_of(model, config)
    assert (unit.name, unit.blocks) == ("makes.weight+reads.weight", 3)
    assert unit.members == (("makes", "weight"), ("reads", "weight"))


def test_blocks_follow_granularity():
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": [2, 4]}]
    (unit,) = units_of(nn.Sequential(nn.Linear(8, 6)), config)
    assert (unit.blocks, unit.elements) == (6, 8)


def test_bounds_of_a_group_are_the_tightest():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    shared = {"sparse_ratio": 0.5, "dependency_group_id": 1}
    config = [
        {"op_names": ["0"], "max_sparse_ratio": 0.8, "min_sparse_ratio": 0.1, **shared},
        {"op_names": ["1"], "max_sparse_ratio": 0.4, "min_sparse_ratio": 0.3, **shared},
    ]
    (unit,) = units_of(model, config)
    assert (unit.min_sparse_ratio, unit.max_sparse_ratio) == (0.3, 0.4)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"sparse_ratio": 0.5}, {"sparse_ratio": 0.6}, "share one sparse_ratio, got 0.5, 0.6"),
        ({"sparse_ratio": 0.5}, {"sparse_threshold": 0.6}, "a ratio or a threshold"),
        (
            {"sparse_ratio": 0.5, "global_group_id": 1},
            {"sparse_ratio": 0.5, "global_group_id": 2},
            "global_group_id",
        ),
        (
            {"sparse_ratio": 0.5, "internal_metric_block": 3},
            {"sparse_ratio": 0.5},
            "divide the 8 blocks, got 3",
        ),
        (
            {"sparse_ratio": 0.5, "min_sparse_ratio": 0.9, "max_sparse_ratio": 0.2},
            {"sparse_ratio": 0.5},
            "0.9 > 0.2",
        ),
    ],
)
def test_a_group_whose_members_disagree_is_refused(first, second, words):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    config = [
        {"op_names": ["0"], "dependency_group_id": "g", **first},
        {"op_names": ["1"], "dependency_group_id": "g", **second},
    ]
    with pytest.raises(ConfigError, match=words):
        units_of(model, config)


class Reduced(nn.Module):
    """A convolution whose channels a linear layer's outputs are added to, as in attention with fewer keys."""

    def __init__(self):
        super().__init__()
        self.conv, self.proj = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x):
        found = self.conv(x).flatten(2).transpose(1, 2)
        return found + self.proj(found)


@pytest.mark.parametrize("name", ["l1", "l2", "fpgm", "random"])
def test_blocks_of_rows_of_convolutions_and_linear_layers_go_together(name):
    torch.manual_seed(0)
    model = Reduced()
    common = {"sparse_ratio": 0.5, "dependency_group_id": "g"}
    config = [
        {"op_names": ["conv"], "granularity": [2, -1, -1, -1], **common},
        {"op_names": ["proj"], "granularity": [2, -1], **common},
    ]
    masks = create_pruner(name, model, config).compress()[1]
    kept = masks["conv"]["weight"].flatten(1).any(1)
    assert torch.equal(kept, masks["proj"]["weight"].any(1))
    assert kept.sum() == 4
    assert all(len(set(pair)) == 1 for pair in kept.view(-1, 2).tolist())


class Fused(nn.Module):
    """Attention whose queries, keys and values one linear layer makes."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("granularity", "blocks"), [({}, 24), ({"granularity": "out_channel"}, 24), ({"granularity": [4, -1]}, 2)]
)
def test_a_layer_of_queries_keys_and_values_loses_heads_only_where_they_are_asked_for(granularity, blocks):
    (unit,) = units_of(nn.Sequential(Fused()), [{"op_names": ["0.qkv"], "sparse_ratio": 0.5, **granularity}])
    assert unit.blocks == blocks


def test_each_segment_of_shuffled_channels_loses_its_share_unless_widths_are_rounded():
    model, images = shuffled(14, 3), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    config = dependency_groups(model, images, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    for round_to in (None, 2):
        pruner = RandomPruner(model, config, round_to=round_to)
        shares = {unit.members[0][0]: (unit.segments, unit.shares) for unit in pruner.context.units}
        pruner.unwrap_model()
        segments, counts = shares["1.branch.5"]
        assert (len(segments), sum(counts)) == ((0, 0) if round_to else (14, 7))
