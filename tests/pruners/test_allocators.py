from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nni.compression.pruning.tools.sparse_gen import generate_sparsity
from torch import nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.hooks import ConfigAllocator, Planner
from nni_topo.pruners.random import RandomPruner


def context_of(config_list, *layers):
    return RandomPruner(nn.Sequential(*layers), config_list).context


def metrics_of(context, *scores):
    """Give each module the listed scores, in network order."""
    names = [(m, t) for unit in context.units for m, t in unit.members]
    shaped = {}
    for (module, target), values in zip(names, scores, strict=True):
        shape = context.metric_shape(module, target)
        shaped.setdefault(module, {})[target] = torch.tensor(values, dtype=torch.float64).reshape(shape)
    return shaped


def kept(masks, module):
    return masks[module]["weight"].flatten().bool().tolist()


def test_ratio_truncates_like_nni():
    context = context_of([{"op_types": ["Linear"], "sparse_ratio": 0.4}], nn.Linear(3, 2), nn.Linear(2, 5))
    masks = ConfigAllocator().allocate(metrics_of(context, [2, 1], [1, 5, 4, 2, 3]), context)
    assert kept(masks, "0") == [True, True]
    assert kept(masks, "1") == [False, True, True, False, True]


def test_of_equal_scores_the_lower_index_stays():
    context = context_of([{"op_types": ["Linear"], "sparse_ratio": 0.5}], nn.Linear(3, 4))
    masks = ConfigAllocator().allocate(metrics_of(context, [1, 1, 1, 1]), context)
    assert kept(masks, "0") == [True, True, False, False]


def test_minimum_and_maximum_ratio_bound_the_ratio():
    config = [
        {"op_names": ["0"], "sparse_ratio": 0.9, "max_sparse_ratio": 0.25},
        {"op_names": ["1"], "sparse_ratio": 0.1, "min_sparse_ratio": 0.5},
    ]
    context = context_of(config, nn.Linear(3, 4), nn.Linear(4, 4))
    masks = ConfigAllocator().allocate(metrics_of(context, [4, 1, 3, 2], [4, 1, 3, 2]), context)
    assert kept(masks, "0") == [True, False, True, True]
    assert kept(masks, "1") == [True, False, True, False]


def test_internal_metric_block_takes_as_many_from_each_part():
    config = [{"op_names": ["0"], "sparse_ratio": 0.5, "internal_metric_block": 2}]
    context = context_of(config, nn.Conv2d(4, 4, 1, groups=2))
    masks = ConfigAllocator().allocate(metrics_of(context, [9, 8, 1, 2]), context)
    assert kept(masks, "0") == [True, False, False, True]


def test_threshold_keeps_what_reaches_it():
    context = context_of([{"op_types": ["Linear"], "sparse_threshold": 2.0}], nn.Linear(3, 4))
    scores = metrics_of(context, [2, 1, 3, 0.5])
    assert kept(ConfigAllocator().allocate(scores, context), "0") == [True, False, True, False]
    strict = replace(context, planner=Planner(strict=True))
    assert kept(ConfigAllocator().allocate(scores, strict), "0") == [False, False, True, False]


def test_threshold_in_a_dependency_group():
    config = [{"op_types": ["Linear"], "sparse_threshold": 2.0, "dependency_group_id": "g"}]
    context = context_of(config, nn.Linear(4, 4), nn.Linear(4, 4))
    masks = ConfigAllocator().allocate(metrics_of(context, [4, 0, 1, 4], [0, 3, 4, 1]), context)
    assert kept(masks, "0") == kept(masks, "1") == [True, False, True, True]


def test_a_threshold_above_all_scores_keeps_the_best_and_says_so(caplog):
    context = context_of([{"op_types": ["Linear"], "sparse_threshold": 9.0}], nn.Linear(3, 4))
    scores = metrics_of(context, [2, 1, 3, 0.5])
    assert kept(ConfigAllocator().allocate(scores, context), "0") == [False, False, True, False]
    assert "sparse_threshold 9 exceeds all 4 scores, the highest 3: one block is kept (0.weight)" in caplog.text


def test_global_ranking_weighs_blocks_by_their_elements():
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5, "global_group_id": 1}]
    context = context_of(config, nn.Linear(10, 4), nn.Linear(4, 10))  # 4 blocks of 10, 10 blocks of 4: budget 40
    masks = ConfigAllocator().allocate(metrics_of(context, [1, 2, 30, 40], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]), context)
    assert kept(masks, "0") == [False, False, True, True]
    assert kept(masks, "1") == [False] * 5 + [True] * 5


def test_global_ranking_never_empties_a_layer_and_keeps_each_maximum():
    config = [
        {"op_names": ["0"], "sparse_ratio": 0.5, "global_group_id": 1},
        {"op_names": ["1"], "sparse_ratio": 0.5, "global_group_id": 1, "max_sparse_ratio": 0.5},
        {"op_names": ["2"], "sparse_ratio": 0.5, "global_group_id": 1},
    ]
    context = context_of(config, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    masks = ConfigAllocator().allocate(metrics_of(context, [1, 2, 3, 4], [5, 6, 7, 8], [90, 91, 92, 93]), context)
    assert kept(masks, "0") == [False, False, False, True]
    assert kept(masks, "1") == [False, False, True, True]
    assert kept(masks, "2") == [False, True, True, True]


def test_global_ranking_of_dependency_groups():
    config = [
        {"op_names": ["0", "1"], "sparse_ratio": 0.5, "global_group_id": 1, "dependency_group_id": "g"},
        {"op_names": ["2"], "sparse_ratio": 0.5, "global_group_id": 1},
    ]
    context = context_of(config, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8))
    masks = ConfigAllocator().allocate(metrics_of(context, [1, 2, 3, 4], [1, 2, 3, 4], [9] * 8), context)
    assert kept(masks, "0") == kept(masks, "1") == [False, False, False, True]
    assert sum(kept(masks, "2")) == 8 - 2  # 64 elements, budget 32, the group gave 24


def test_global_group_with_two_ratios_is_refused():
    config = [
        {"op_names": ["0"], "sparse_ratio": 0.5, "global_group_id": 7},
        {"op_names": ["1"], "sparse_ratio": 0.6, "global_group_id": 7},
    ]
    context = context_of(config, nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="global_group_id 7"):
        ConfigAllocator().allocate(metrics_of(context, [1, 2, 3, 4], [1, 2, 3, 4]), context)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_cannot_be_ranked_are_refused(bad):
    context = context_of([{"op_types": ["Linear"], "sparse_ratio": 0.5}], nn.Linear(3, 4))
    with pytest.raises(DataError, match=r"got 1 of 4 NaN or infinite \(0\.weight\)"):
        ConfigAllocator().allocate(metrics_of(context, [1, bad, 2, 3]), context)


CONFIGS = [
    [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.3}],
    [
        {
            "op_types": ["Conv2d", "Linear"],
            "sparse_ratio": 0.7,
            "min_sparse_ratio": 0.1,
            "max_sparse_ratio": 0.5,
        }
    ],
    [{"op_types": ["Conv2d", "Linear"], "sparse_threshold": 0.2}],
    [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5, "dependency_group_id": "g"}],
    [
        {
            "op_types": ["Conv2d", "Linear"],
            "sparse_ratio": 0.5,
            "internal_metric_block": 2,
            "dependency_group_id": "g",
        }
    ],
]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), config=st.sampled_from(CONFIGS))
def test_where_nni_is_right_both_allocators_agree(seed, config):
    grouped = "dependency_group_id" in config[0]
    layers = (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)) if grouped else (nn.Conv2d(3, 8, 3), nn.Linear(8, 10))
    context = context_of(config, *layers)
    generator = torch.Generator().manual_seed(seed)
    metrics = {
        module: {t: torch.rand(context.metric_shape(module, t), generator=generator, dtype=torch.float64)}
        for unit in context.units
        for module, t in unit.members
    }
    for unit in context.units:
        losses = torch.stack([metrics[module][target].flatten() for module, target in unit.members]).sum(0)
        assume(bool((losses.sort()[0].diff() > 1e-5).all()))  # nearly equal ones are equal to ours and not to NNI's
    ours, theirs = ConfigAllocator().allocate(metrics, context), generate_sparsity(metrics, context.target_spaces)
    assert {m: set(t) for m, t in ours.items()} == {m: set(t) for m, t in theirs.items()}
    for module, targets in ours.items():
        for target, mask in targets.items():
            assert torch.equal(mask.double(), theirs[module][target].double()), (module, target)
