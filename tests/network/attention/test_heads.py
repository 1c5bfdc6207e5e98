"""Heads of attention: found, tied, removed and made up for."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_nets import HEADS, NETS, SIZE, WIDTH, _states, head_masks, make, same
from torch import nn

from nni_topo import dependency_groups, load, masked_model, save, to_dense
from nni_topo.network.attention.config import accepted_heads
from nni_topo.network.attention.heads import find_attention, find_heads
from nni_topo.network.attention.unfused.multihead import multihead


@pytest.mark.parametrize("name", NETS)
@pytest.mark.quick_every(3)
def test_heads_that_are_masked_go(name):
    model, inputs = make(name), _states(3, 7, 5)
    (attention,) = find_attention(model).values()
    masks = head_masks(model, [0, 2])
    dense = to_dense(model, inputs, masks)
    masked = masked_model(model, inputs, masks)
    same(dense, masked, inputs)
    same(dense, masked, _states(2, 4, 5))
    (left,) = find_attention(dense).values()
    assert (left.heads, left.size) == (2, attention.size)
    projection = dense.get_submodule(attention.out)
    assert projection.in_features == 2 * attention.size
    gone = attention.heads - 2
    rows = sum(channels.shape[1] for channels in attention.channels.values())
    biased = getattr(model.get_submodule(attention.out), "bias", None) is not None
    expected = gone * (rows * (WIDTH + biased) + WIDTH * attention.size)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in dense.parameters()) == expected


def test_a_head_of_which_any_block_is_left_stays_and_the_rest_of_it_stays_masked():
    model, inputs = make("apart"), _states(3, 7, 5)
    masks = head_masks(model, [0, 2])
    name = "1.attention.v_proj"
    masks[name]["weight"][3] = 1  # one channel of head 1
    masks[name]["weight"][0] = 0  # one of head 0
    dense = to_dense(model, inputs, masks)
    assert dense.get_submodule(name).out_features == 3 * SIZE
    weight = dense.get_submodule(name).weight
    assert torch.equal(weight[3], model.get_submodule(name).weight[3])
    assert not weight[[0, 4, 5]].any()
    same(dense, masked_model(model, inputs, masks), inputs)


def test_round_to_brings_whole_heads_back_with_their_weights():
    model, inputs = make("apart"), _states(3, 7, 5)
    dense = to_dense(model, inputs, head_masks(model, [0, 1]), round_to=9)
    assert dense.get_submodule("1.attention.q_proj").out_features == 9
    assert dense.get_submodule("1.attention.v_proj").weight.flatten(1).any(1).all()


@pytest.mark.parametrize(("batch_first", "bias"), [(True, False), (False, True)])
def test_multihead_computes_what_torch_does(batch_first, bias):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, bias=bias).eval()
    shape = (2, 5, WIDTH) if batch_first else (5, 2, WIDTH)
    query, key = _states(*shape), _states(2, 6, WIDTH) if batch_first else _states(6, 2, WIDTH)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    by_head = _states(2 * HEADS, 5, 6) > 2
    for knobs in (
        {},
        {"need_weights": False, "attn_mask": _states(5, 6)},
        {"key_padding_mask": padding, "attn_mask": torch.ones(5, 6).triu(3).bool(), "average_attn_weights": False},
        {"attn_mask": by_head},
    ):
        expected, found = attention(query, key, key, **knobs), multihead(attention, query, key, key, **knobs)
        for one, other in zip(expected, found, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    single = query[0] if batch_first else query[:, 0]
    for one, other in zip(attention(single, single, single), multihead(attention, single, single, single), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_drops_shares_of_attention_in_training_alone(need_weights):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=1.0, batch_first=True)
    nn.init.normal_(attention.out_proj.bias)
    states = _states(2, 5, WIDTH)
    for mode in (attention.train(), attention.eval()):
        (expected, _), (found, _) = (
            call(states, states, states, need_weights=need_weights) for call in (mode, partial(multihead, mode))
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        # Without any shares all that is left is the bias.
        assert torch.equal(found, attention.out_proj.bias.expand(2, 5, WIDTH)) is mode.training


def test_attention_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=WIDTH, num_heads=HEADS, qk_norm=True
    )
    images = _states(2, 3, 32, 32)
    masks = head_masks(model.eval(), [0, 3])
    dense = to_dense(model, images, masks)
    assert [each.heads for each in find_attention(dense).values()] == [2, 2]
    same(dense, masked_model(model, images, masks), images)


def test_groups_tie_queries_keys_values_and_what_mixes_them():
    model = make("shared keys")
    asked = [{"op_types": ["Linear"], "exclude_op_names": ["0"], "sparse_ratio": 0.4}]
    groups = dependency_groups(model, _states(2, 7, 5), asked)
    found = {e["op_names"][0]: (e.get("dependency_group_id"), e.get("granularity")) for e in groups}
    assert found == {
        "1.attention.q_proj": ("group_0", [4, -1]),
        "1.attention.k_proj": ("group_0", [2, -1]),
        "1.attention.v_proj": ("group_0", [2, -1]),
        "1.attention.o_proj": ("group_0", [-1, 4]),
        "1.mlp.gate_proj": ("group_1", None),
        "1.mlp.up_proj": ("group_1", None),
    }


@pytest.mark.parametrize("asked", [{"op_names": ["1.attention"]}, {"op_names_re": [r"1\.attention\..*"]}])
def test_heads_may_be_asked_for_by_name_and_of_a_module_that_holds_them(asked):
    groups = dependency_groups(make("apart"), _states(2, 7, 5), [{**asked, "granularity": "head", "sparse_ratio": 0.5}])
    assert [e["op_names"][0].rpartition(".")[2] for e in groups] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert {e["dependency_group_id"] for e in groups} == {"group_0"}


def test_layers_without_heads_are_left_out_and_named():
    config = [{"op_types": ["Linear"], "granularity": "head", "sparse_ratio": 0.5}]
    groups = dependency_groups(make("apart"), _states(2, 7, 5), config)
    assert groups.skipped.keys() == {"0", "1.mlp.fc1", "1.mlp.fc2", "2"}
    assert all("no heads" in reason for reason in groups.skipped.values())


@pytest.mark.parametrize("name", ["multihead", "shared keys"])
def test_a_model_with_fewer_heads_is_saved_and_loaded(name, tmp_path):
    model, inputs = make(name), _states(3, 7, 5)
    dense = to_dense(model, inputs, head_masks(model, [0, 2]))
    save(dense, tmp_path / "dense.pt")
    loaded = load(tmp_path / "dense.pt", model)
    assert [each.heads for each in find_attention(loaded).values()] == [2]
    same(loaded, dense, inputs)


class Config:
    """Settings of a model whose width has to be divided by its number of heads, which may share keys and values."""

    def __init__(self, width, heads, shared):
        self.hidden_size, self.num_attention_heads, self.num_key_value_heads = width, heads, shared

    def validate(self):
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("heads")


LAYERS = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize(
    ("name", "settings", "expected", "layers"),
    [
        ("apart", (10, 4, 4), [1, 2], LAYERS),
        ("apart", (12, 4, 4), None, LAYERS),
        ("shared keys", (8, 6, 3), [1, 2], LAYERS),
        ("one key", (10, 6, 1), [1, 2, 5], LAYERS[:1]),
    ],
)
def test_numbers_of_heads_that_a_config_accepts(name, settings, expected, layers):
    model = make(name)
    assert accepted_heads(model) == {}
    model.config = Config(*settings)
    wanted = {} if expected is None else {f"1.attention.{layer}": expected for layer in layers}
    assert accepted_heads(model) == wanted
    assert vars(model.config) == vars(Config(*settings))
    model[1].attention.config = {}  # its own comes first, and can't be asked
    assert accepted_heads(model) == {}


def module_of(layers: dict[str, nn.Module], **attributes: Any) -> nn.Module:
    """Make a module with layers and attributes of given names."""
    module = nn.Module()
    for name, layer in layers.items():
        path, _, last = name.rpartition(".")
        if path:
            module.add_module(path, nn.Module())
        module.get_submodule(path).add_module(last, layer)
    vars(module).update(attributes)
    return module


def linears(**widths: int) -> dict[str, nn.Module]:
    return {name: nn.Linear(10, width) for name, width in widths.items()}


def only(module: nn.Module):
    return find_attention(module).get("")


def rows_of(attention) -> dict[str, list[list[int]]]:
    return {name: rows.tolist() for name, rows in attention.channels.items()}


@pytest.mark.parametrize(
    ("names", "out"),
    [
        (("q_proj", "k_proj", "v_proj"), "o_proj"),
        (("q_proj", "k_proj", "v_proj"), "dense"),
        (("query", "key", "value"), None),
        (("q_lin", "k_lin", "v_lin"), "out_lin"),
        (("q", "k", "v"), "o"),
        (("query_proj", "key_proj", "value_proj"), None),
    ],
)
def test_queries_keys_and_values_in_layers_of_their_own(names, out):
    layers = linears(**dict.fromkeys(names, 6)) | ({} if out is None else {out: nn.Linear(6, 10)})
    attention = only(module_of(layers, num_heads=3))
    assert rows_of(attention) == {name: [[0, 1], [2, 3], [4, 5]] for name in names}
    assert (attention.context[0], attention.context[1].tolist()) == (names[2], [0, 1, 2, 3, 4, 5])
    assert (attention.out, attention.heads, attention.size, attention.width) == (out, 3, 2, 10)


@pytest.mark.parametrize("size", ["head_dim", "attention_head_size", "key_value_proj_dim", "head_size"])
def test_heads_that_share_keys_and_values(size):
    layers = linears(q_proj=12, k_proj=4, v_proj=4, o_proj=10)
    attention = only(module_of(layers, num_heads=6, **{size: 2}))
    assert (attention.heads, attention.size, attention.query_heads, attention.head_size) == (2, 6, 6, 2)
    assert attention.channels["q_proj"].tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert attention.channels["k_proj"].tolist() == [[0, 1], [2, 3]]
    assert attention.context[1].tolist() == [0, 1] * 3 + [2, 3] * 3
    assert (attention.granularity("q_proj"), attention.granularity("v_proj")) == ([6, -1], [2, -1])


@pytest.mark.parametrize(
    ("name", "out"), [("qkv", "proj"), ("qkv", "project.0"), ("c_attn", "c_proj"), ("to_qkv", "merge"), ("Wqkv", "Wo")]
)
def test_one_layer_for_all(name, out):
    attention = only(module_of({name: nn.Linear(10, 12), out: nn.Linear(4, 10)}, num_heads=2))
    assert rows_of(attention) == {name: [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]}
    assert (attention.context[1].tolist(), attention.out, attention.granularity(name)) == ([8, 9, 10, 11], out, [2, -1])
    assert [part.tolist() for _, part in attention.parts] == [
        [[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]],
    ]  # fmt: skip


def test_one_layer_with_the_rows_head_by_head():
    by_head = [list(range(6)), list(range(6, 12))]
    attention = only(module_of({"query_key_value": nn.Linear(10, 12), "dense": nn.Linear(4, 10)}, num_heads=2))
    assert (rows_of(attention), attention.context[1].tolist()) == ({"query_key_value": by_head}, [4, 5, 10, 11])
    # GPT-BigCode's are ordered so where a head has keys and values of its own.
    layers = {"c_attn": nn.Linear(10, 12), "c_proj": nn.Linear(4, 10)}
    attention = only(module_of(layers, num_heads=2, multi_query=False))
    assert (rows_of(attention), attention.context[1].tolist()) == ({"c_attn": by_head}, [4, 5, 10, 11])


def test_one_layer_with_fewer_keys_and_values():
    layers = {"qkv_proj": nn.Linear(10, 16), "o_proj": nn.Linear(8, 10)}
    attention = only(module_of(layers, num_heads=4, num_key_value_heads=2, head_dim=2))
    assert rows_of(attention) == {"qkv_proj": [[0, 1, 2, 3, 8, 9, 12, 13], [4, 5, 6, 7, 10, 11, 14, 15]]}
    assert attention.context[1].tolist() == [12, 13, 12, 13, 14, 15, 14, 15]
    assert (attention.heads, attention.size, attention.head_size, attention.query_heads) == (2, 4, 2, 4)
    assert only(module_of(layers, num_heads=4, num_key_value_heads=3, head_dim=2)) is None


def test_one_key_and_one_value_that_all_heads_share():
    attention = only(module_of(linears(q_proj=12, k_proj=2, v_proj=2, o_proj=10), num_heads=6, head_dim=2))
    assert rows_of(attention) == {"q_proj": [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]}
    assert {name: [rows.tolist() for rows in parts] for name, parts in attention.shared.items()} == {
        "k_proj": [[[0, 1]]], "v_proj": [[[0, 1]]],
    }  # fmt: skip
    assert (attention.heads, attention.size, attention.query_heads, attention.head_size) == (6, 2, 6, 2)
    assert (attention.context[0], attention.context[1].tolist()) == ("v_proj", [0, 1] * 6)
    assert (attention.outputs[0], attention.outputs[1].tolist()) == ("q_proj", list(range(12)))


def test_the_number_of_heads_may_stand_in_a_config():
    config = SimpleNamespace(num_attention_heads=2)
    assert only(module_of({"qkv": nn.Linear(10, 12)}, config=config)).heads == 2
    # With a size of its own, a module counts its heads by its layer: the config may be the whole model's.
    assert only(module_of({"qkv": nn.Linear(10, 24)}, config=config, head_dim=2)).heads == 4
    assert only(module_of({"qkv": nn.Linear(10, 24)}, num_heads=2, head_dim=2)) is None
    assert only(module_of({"qkv": nn.Linear(10, 12)})) is None
    assert only(module_of({"qkv": nn.Linear(10, 13)}, num_heads=2)) is None


def test_what_does_not_fit_together_is_no_attention_that_is_known():
    for widths in ((6, 6, 4), (6, 4, 4), (8, 6, 6), (7, 6, 6), (8, 4, 2)):
        layers = linears(**dict(zip(LAYERS, widths, strict=True)))
        assert only(module_of(layers, num_heads=3, head_dim=2)) is None, widths
    three = linears(q_proj=6, k_proj=6, v_proj=6)
    # A norm of the size of a head is shared by all of them; any other parameter isn't.
    assert only(module_of(three | {"norm": nn.LayerNorm(2)}, num_heads=3)) is not None
    assert only(module_of(three | {"norm": nn.LayerNorm(6)}, num_heads=3)) is None
    for other in (
        nn.MultiheadAttention(6, 3, kdim=4), nn.MultiheadAttention(6, 3, add_bias_kv=True),
        nn.MultiheadAttention(6, 3, add_zero_attn=True),
    ):  # fmt: skip
        assert only(other) is None


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("relative_position_bias_table", 1), ("relative_attention_bias.weight", 1),
        ("relative_position_bias.relative_position_bias_table", 1), ("logit_scale", 0),
    ],
)  # fmt: skip
def test_parameters_with_an_entry_for_each_head(name, dim):
    path, _, last = name.rpartition(".")
    module = module_of({"qkv": nn.Linear(10, 12)} | ({path: nn.Module()} if path else {}), num_heads=2)
    for heads in (2, 3):
        setattr(module.get_submodule(path), last, nn.Parameter(torch.zeros([7, heads] if dim else [heads, 7])))
        attention = only(module)
        assert (None if attention is None else attention.by_head) == ({name: dim} if heads == 2 else None)
    # Those of queries that share keys don't say whose an entry is.
    apart = module_of(linears(q_proj=8, k_proj=4, v_proj=4), num_heads=4, head_dim=2)
    apart.logit_scale = nn.Parameter(torch.zeros(4, 1))
    assert only(apart) is None


def test_multihead_attention_and_units_of_recurrent_layers():
    attention = only(nn.MultiheadAttention(6, 3))
    assert rows_of(attention) == {"": [[0, 1, 6, 7, 12, 13], [2, 3, 8, 9, 14, 15], [4, 5, 10, 11, 16, 17]]}
    assert (attention.context[1].tolist(), attention.out) == ([12, 13, 14, 15, 16, 17], "out_proj")
    units = find_heads(nn.GRU(5, 2))[""]
    assert (rows_of(units), units.width, units.recurrent) == ({"": [[0, 2, 4], [1, 3, 5]]}, 5, True)
    assert find_attention(nn.GRU(5, 2)) == {}
