"""Heads that share one key and one value: they go with their queries and the columns that read them."""

from __future__ import annotations

import copy

import pytest
import torch
from attention_nets import _states, head_masks, make, same

from nni_topo import (
    create_pruner,
    dependency_groups,
    explain,
    masked_model,
    to_dense,
)
from nni_topo.network.attention.heads import find_attention

KINDS = ["one key", "one key fused"]
EVERYTHING = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]


def _parts(name):
    """A model, its inputs, its attention, and the layers that make queries and read the heads."""
    model = make(name)
    (attention,) = find_attention(model).values()
    return model, _states(3, 7, 5), attention, next(iter(attention.channels)), attention.out


@pytest.mark.parametrize("name", KINDS)
def test_a_head_without_queries_has_no_output_in_the_dense_model_nor_in_the_masked_one(name):
    model, inputs, attention, _, out = _parts(name)
    masks = head_masks(model, [0, 2])
    # By hand: what reads the other heads is zero, whatever their queries are.
    expected = copy.deepcopy(model)
    expected.get_submodule(out).weight.data.unflatten(1, (-1, attention.size))[:, [1, *range(3, attention.heads)]] = 0
    same(masked_model(model, inputs, masks), expected, inputs)
    same(masked_model(model, inputs, masks, reconcile=True), expected, inputs)
    dense = to_dense(model, inputs, masks)
    same(dense, expected, inputs)
    same(dense, expected, _states(2, 4, 5))
    (left,) = find_attention(dense).values()
    assert (left.heads, left.size) == (2, attention.size)
    # Masks on the columns alone say nothing of the queries, so the heads stay.
    columns = torch.ones_like(model.get_submodule(out).weight)
    columns.unflatten(1, (-1, attention.size))[:, 1] = 0
    whole = to_dense(model, inputs, {out: {"weight": columns}})
    assert [each.heads for each in find_attention(whole).values()] == [attention.heads]


@pytest.mark.parametrize("name", KINDS)
def test_heads_the_stream_and_neurons_go_at_once_and_layers_of_key_and_value_read_less(name):
    model, inputs, attention, queries, out = _parts(name)
    groups = dependency_groups(model, inputs, EVERYTHING)
    _, masks = create_pruner("random", copy.deepcopy(model), groups, seed=0).compress()
    dense = to_dense(model, inputs, masks)
    same(dense, masked_model(model, inputs, masks), inputs)
    width = dense.get_submodule(out).out_features
    assert width == model.get_submodule(out).out_features // 2
    assert {dense.get_submodule(layer).in_features for layer in attention.layers} == {width}
    kept = attention.heads - attention.heads // 2
    assert dense.get_submodule(out).in_features == kept * attention.size
    shared = sum(rows.size for rows in attention.shared.get(queries, ()))
    assert dense.get_submodule(queries).out_features == kept * attention.size + shared


def test_what_stays_has_a_reason_and_says_what_can_be_done():
    model, inputs, _, _, _ = _parts("one key")
    skipped = dependency_groups(model, inputs, EVERYTHING).skipped
    told = "all heads of {} share these keys and values, which stay as long as one of them does"
    assert skipped["1.attention.k_proj"] == skipped["1.attention.v_proj"] == told.format("1.attention")
    assert "1.attention.q_proj" not in skipped
    found = explain(model, inputs, "1.attention.k_proj")
    assert (found.kept, [reason.kind for reason in found.reasons]) == (2, ["shared_by_heads"])
    by_head = [{"op_names": ["1.attention.q_proj", "1.attention.k_proj"], "granularity": "head", "sparse_ratio": 0.5}]
    assert dependency_groups(model, inputs, by_head).skipped == {"1.attention.k_proj": told.format("1.attention")}
    model, inputs, _, _, _ = _parts("one key fused")
    skipped = dependency_groups(model, inputs, EVERYTHING).skipped
    assert skipped["attention.qkv"] == f"6 of 18 channels are kept: {told.format('attention')}"
    found = explain(model, inputs, "attention.qkv")
    assert (found.kept, found.channels, found.heads) == (6, 18, "attention")
