"""Pruners that choose heads, what fewer heads cost, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from attention_nets import HEADS, SIZE, WIDTH, _states, head_masks, make, same
from nni.compression.pruning import L1NormPruner
from speedup_nets import masks_of
from torch import nn

from nni_topo import compensate, create_pruner, dependency_groups, masked_model, to_dense
from nni_topo.errors import SpeedupError
from nni_topo.network.attention.heads import find_attention
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.network.cost.measure import count_macs
from nni_topo.network.layers.kinds import weight_name, weight_of

PRUNERS = {
    "NNI's L1": lambda model, groups, data: L1NormPruner(model, groups),
    "l1": lambda model, groups, data: create_pruner("l1", model, groups),
    "topological": lambda model, groups, data: create_pruner("topological", model, groups, calibration=data),
    "reconstruction": lambda model, groups, data: create_pruner("reconstruction", model, groups, calibration=data),
}


def prune(model, config, kind, data):
    groups = list(dependency_groups(model, data[0], config))
    masks = masks_of(PRUNERS[kind](model, groups, data))
    return masks


@pytest.mark.parametrize("kind", PRUNERS)
@pytest.mark.parametrize("name", ["multihead", "fused", "apart", "shared keys", "one key", "one key fused"])
@pytest.mark.quick_every(8)
def test_pruners_choose_heads(name, kind):
    model, data = make(name), [_states(8, 7, 5)]
    (attention,) = find_attention(model).values()
    whole = isinstance(model.get_submodule(attention.name), nn.MultiheadAttention)
    asked = {"op_types": ["MultiheadAttention"]} if whole else {"op_types": ["Linear"], "granularity": "head"}
    masks = prune(model, [{**asked, "sparse_ratio": 0.5}], kind, data)
    kept = [
        masks[layer][weight_name(model.get_submodule(layer))].flatten(1).any(1).numpy()[channels]
        for layer, channels in attention.channels.items()
    ]
    stays = kept[0][:, 0]
    assert stays.sum() == attention.heads - attention.heads // 2
    assert all((each == stays[:, None]).all() for each in kept)
    if not whole:
        columns = masks[attention.out]["weight"].expand(WIDTH, -1).any(0)
        assert np.array_equal(columns, stays.repeat(attention.size))
    dense = to_dense(model, data[0], masks)
    same(dense, masked_model(model, data[0], masks), data[0])


@pytest.mark.parametrize("name", ["multihead", "apart"])
@pytest.mark.parametrize("kind", ["topological", "reconstruction"])
@pytest.mark.quick_every(2)
def test_of_two_equal_heads_one_goes_and_compensation_makes_up_for_it(name, kind):
    model, data = make(name), [_states(64, 7, 5)]
    (attention,) = find_attention(model).values()
    with torch.no_grad():
        for layer, channels in attention.channels.items():
            module = model.get_submodule(layer)
            bias = module.in_proj_bias if attention.is_fused else module.bias
            for each in (weight_of(module), bias):
                each[torch.from_numpy(channels[3])] = each[torch.from_numpy(channels[1])]
        mixer = model.get_submodule(attention.out).weight
        mixer[:, 9:] = mixer[:, 3:6]
    original = copy.deepcopy(model)
    kinds = (
        {"op_types": ["MultiheadAttention"]} if attention.is_fused else {"op_types": ["Linear"], "granularity": "head"}
    )
    masks = prune(model, [{**kinds, "sparse_ratio": 0.25}], kind, data)
    repaired = compensate(model, masks, data, ridge=0.0)
    dense = to_dense(repaired, data[0], masks)
    assert find_attention(dense)[attention.name].heads == 3
    with torch.no_grad():
        torch.testing.assert_close(dense(data[0]), original(data[0]), rtol=1e-3, atol=1e-3)


def test_the_point_of_a_head_is_what_it_adds_to_the_stream():
    from nni_topo.pruners import FunctionalCollector

    model, data = make("apart"), [_states(16, 7, 5)]
    (attention,) = find_attention(model).values()
    groups = dependency_groups(model, data[0], [{"op_types": ["Linear"], "granularity": "head", "sparse_ratio": 0.5}])
    entering = []
    with model.get_submodule(attention.out).register_forward_pre_hook(lambda _, args: entering.append(args[0])):
        model(data[0])
    weight = model.get_submodule(attention.out).weight
    added = [entering[0][..., h * SIZE : (h + 1) * SIZE] @ weight[:, h * SIZE : (h + 1) * SIZE].T for h in range(HEADS)]
    expected = torch.stack([(each - each.mean((0, 1))).flatten() for each in added]).detach().double()
    pruner = create_pruner("topological", model, list(groups), calibration=data)
    points = FunctionalCollector(data).collect(pruner.context)["1.attention.q_proj"]["weight"]
    torch.testing.assert_close(points @ points.T, expected @ expected.T / (16 * 7), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["multihead", "apart", "shared keys"])
@pytest.mark.quick_every(2)
def test_costs_of_fewer_heads_are_those_of_the_dense_model(name):
    model, inputs = make(name), _states(1, 7, 5)
    masks = head_masks(model, [0, 2])
    kept = {layer: next(iter(targets.values())).flatten(1).any(1).numpy() for layer, targets in masks.items()}
    cost = NetworkCost.on(model, inputs)(kept)
    dense = to_dense(model, inputs, masks)
    assert cost.params == sum(p.numel() for p in dense.parameters())
    whole = NetworkCost.on(model, inputs)({})
    assert (whole.macs, cost.macs) == (count_macs(model, inputs), count_macs(dense, inputs))


def test_one_head_of_a_layer_has_to_stay():
    model = make("apart")
    with pytest.raises(
        SpeedupError, match=r"must leave at least one channel of a layer, got only zeros \(1\.attention"
    ):
        to_dense(model, _states(3, 7, 5), head_masks(model, []))
    masks = prune(
        model, [{"op_types": ["Linear"], "granularity": "head", "sparse_ratio": 0.99}], "l1", [_states(3, 7, 5)]
    )
    assert masks["1.attention.q_proj"]["weight"].flatten(1).any(1).sum() == SIZE
