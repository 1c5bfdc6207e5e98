"""Which channels belong to a head, by hand, for every way that layers of attention are named; and what is set after."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nni_topo import dependency_groups, masked_model, to_dense
from nni_topo.network.attention.heads import (
    find_attention,
    find_heads,
    is_attention,
)


class Named(nn.Module):
    """A module with layers and attributes of given names."""

    def __init__(self, layers: dict[str, nn.Module], **attributes: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(last, layer)
        vars(self).update(attributes)


def linears(**widths: int) -> dict[str, nn.Module]:
    return {name: nn.Linear(10, width) for name, width in widths.items()}


def only(module: nn.Module):
    """Find the attention of a module, within another and by itself."""
    found = find_attention(nn.ModuleDict({"inner": module}))
    assert list(find_attention(module)) == ([""] if found else [])
    for alone in find_attention(module).values():
        within = found["inner"]
        assert [f"inner.{name}".rstrip(".") for name in alone.layers] == within.layers
        assert (within.out is None) if alone.out is None else (within.out == f"inner.{alone.out}")
    assert is_attention(module) == bool(found)
    assert find_heads(module).keys() == find_attention(module).keys()
    return found.get("inner")


@pytest.mark.parametrize(
    ("names", "out"),
    [
        (("q_proj", "k_proj", "v_proj"), "o_proj"),
        (("q_proj", "k_proj", "v_proj"), "out_proj"),
        (("q_proj", "k_proj", "v_proj"), "dense"),
        (("query", "key", "value"), "out_proj"),
        (("query", "key", "value"), None),
        (("q_lin", "k_lin", "v_lin"), "out_lin"),
        (("q", "k", "v"), "o"),
        (("query_proj", "key_proj", "value_proj"), None),
    ],
)
def test_queries_keys_and_values_in_layers_of_their_own(names: tuple[str, ...], out: str | None) -> None:
    layers = linears(**dict.fromkeys(names, 6)) | ({} if out is None else {out: nn.Linear(6, 10)})
    attention = only(Named(layers, num_heads=3))
    heads = [[0, 1], [2, 3], [4, 5]]
    assert {name: rows.tolist() for name, rows in attention.channels.items()} == {f"inner.{n}": heads for n in names}
    assert attention.context[0] == f"inner.{names[2]}"
    assert attention.context[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert attention.out == (None if out is None else f"inner.{out}")
    found = (attention.name, attention.heads, attention.size, attention.width, attention.head_size)
    assert found == ("inner", 3, 2, 10, 2)
    assert (attention.query_heads, attention.is_fused, attention.also, attention.shifted) == (3, False, (), False)
    assert attention.granularity(f"inner.{names[0]}") == [2, -1]


@pytest.mark.parametrize("size", ["head_dim", "attention_head_size", "key_value_proj_dim", "head_size"])
def test_heads_that_share_keys_and_values(size: str) -> None:
    layers = linears(q_proj=12, k_proj=4, v_proj=4, o_proj=10)
    attention = only(Named(layers, num_heads=6, **{size: 2}))
    assert (attention.heads, attention.size, attention.query_heads, attention.head_size) == (2, 6, 6, 2)
    assert attention.channels["inner.q_proj"].tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert attention.channels["inner.k_proj"].tolist() == [[0, 1], [2, 3]]
    assert attention.context[1].tolist() == [0, 1] * 3 + [2, 3] * 3
    assert attention.granularity("inner.q_proj") == [6, -1]
    assert attention.granularity("inner.v_proj") == [2, -1]


@pytest.mark.parametrize(
    ("name", "out"),
    [("qkv", "proj"), ("qkv", "project.0"), ("c_attn", "c_proj"), ("to_qkv", "merge"), ("Wqkv", "Wo"), ("qkv", None)],
)
def test_one_layer_for_all(name: str, out: str | None) -> None:
    layers: dict[str, nn.Module] = {name: nn.Linear(10, 12)}
    if out is not None:
        layers[out] = nn.Linear(4, 10)
    attention = only(Named(layers, num_heads=2))
    assert attention.channels[f"inner.{name}"].tolist() == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
    assert (attention.context[0], attention.context[1].tolist()) == (f"inner.{name}", [8, 9, 10, 11])
    assert attention.out == (None if out is None else f"inner.{out}")
    assert (attention.heads, attention.size, attention.head_size, attention.query_heads) == (2, 2, 2, 2)
    assert (attention.is_fused, attention.width, attention.granularity(f"inner.{name}")) == (True, 10, [2, -1])
    assert [part.tolist() for _, part in attention.parts] == [
        [[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]],
    ]  # fmt: skip


def test_one_layer_with_the_rows_head_by_head() -> None:
    attention = only(Named({"query_key_value": nn.Linear(10, 12), "dense": nn.Linear(4, 10)}, num_heads=2))
    assert attention.channels["inner.query_key_value"].tolist() == [list(range(6)), list(range(6, 12))]
    assert attention.context[1].tolist() == [4, 5, 10, 11]
    assert attention.out == "inner.dense"
    # GPT-BigCode's are ordered so where a head has keys and values of its own.
    for many, rows, values in (
        (False, [list(range(6)), list(range(6, 12))], [4, 5, 10, 11]),
        (True, [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]], [8, 9, 10, 11]),
    ):
        layers = {"c_attn": nn.Linear(10, 12), "c_proj": nn.Linear(4, 10)}
        attention = only(Named(layers, num_heads=2, multi_query=many))
        assert attention.channels["inner.c_attn"].tolist() == rows
        assert attention.context[1].tolist() == values


def test_one_layer_with_fewer_keys_and_values() -> None:
    layers = {"qkv_proj": nn.Linear(10, 16), "o_proj": nn.Linear(8, 10)}
    attention = only(Named(layers, num_heads=4, num_key_value_heads=2, head_dim=2))
    assert attention.channels["inner.qkv_proj"].tolist() == [
        [0, 1, 2, 3, 8, 9, 12, 13], [4, 5, 6, 7, 10, 11, 14, 15],
    ]  # fmt: skip
    assert attention.context[1].tolist() == [12, 13, 12, 13, 14, 15, 14, 15]
    found = (attention.name, attention.heads, attention.size, attention.width, attention.out, attention.head_size)
    assert found == ("inner", 2, 4, 10, "inner.o_proj", 2)
    assert attention.query_heads == 4
    assert only(Named(layers, num_heads=4, num_key_value_heads=3, head_dim=2)) is None


def test_one_key_and_one_value_that_all_heads_share() -> None:
    attention = only(Named(linears(q_proj=12, k_proj=2, v_proj=2, o_proj=10), num_heads=6, head_dim=2))
    assert {name: rows.tolist() for name, rows in attention.channels.items()} == {
        "inner.q_proj": [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    }
    assert {name: [rows.tolist() for rows in parts] for name, parts in attention.shared.items()} == {
        "inner.k_proj": [[[0, 1]]], "inner.v_proj": [[[0, 1]]],
    }  # fmt: skip
    assert attention.layers == ["inner.q_proj", "inner.k_proj", "inner.v_proj"]
    found = (attention.heads, attention.size, attention.query_heads, attention.head_size, attention.is_fused)
    assert found == (6, 2, 6, 2, False)
    assert (attention.context[0], attention.context[1].tolist()) == ("inner.v_proj", [0, 1] * 6)
    assert (attention.outputs[0], attention.outputs[1].tolist()) == ("inner.q_proj", list(range(12)))
    assert attention.granularity("inner.q_proj") == [2, -1]
    assert attention.acts_without_rows


@pytest.mark.parametrize(
    ("name", "out"),
    [("qkv", "proj"), ("c_attn", "c_proj"), ("Wqkv", "Wo"), ("query_key_value", "dense"), ("qkv_proj", "o_proj")],
)
def test_one_layer_with_the_queries_of_all_heads_and_one_key_and_value(name: str, out: str) -> None:
    layers = {name: nn.Linear(10, 10), out: nn.Linear(6, 10)}
    attention = only(Named(layers, num_heads=3, num_key_value_heads=1, head_dim=2))
    assert attention.channels[f"inner.{name}"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert [rows.tolist() for rows in attention.shared[f"inner.{name}"]] == [[[6, 7]], [[8, 9]]]
    assert [rows.tolist() for _, rows in attention.parts] == [[[0, 1], [2, 3], [4, 5]], [[6, 7]], [[8, 9]]]
    assert (attention.context[1].tolist(), attention.outputs[1].tolist()) == ([8, 9] * 3, [0, 1, 2, 3, 4, 5])
    found = (attention.name, attention.heads, attention.size, attention.width, attention.out, attention.is_fused)
    assert found == ("inner", 3, 2, 10, f"inner.{out}", True)


def test_the_number_of_heads_may_stand_in_a_config() -> None:
    config = SimpleNamespace(num_attention_heads=2)
    attention = only(Named({"qkv": nn.Linear(10, 12)}, config=config))
    assert (attention.heads, attention.size) == (2, 2)
    # With a size of its own, a module counts its heads by its layer: the config may be the whole model's.
    attention = only(Named({"qkv": nn.Linear(10, 24)}, config=config, head_dim=2))
    assert (attention.heads, attention.size) == (4, 2)
    assert only(Named({"qkv": nn.Linear(10, 24)}, num_heads=2, head_dim=2)) is None
    assert only(Named({"qkv": nn.Linear(10, 12)})) is None
    assert only(Named({"qkv": nn.Linear(10, 12)}, num_heads="2")) is None
    assert only(Named({"qkv": nn.Linear(10, 13)}, num_heads=2)) is None


def test_what_does_not_fit_together_is_no_attention_that_is_known() -> None:
    qkv = ("q_proj", "k_proj", "v_proj")
    for widths in ((6, 6, 4), (6, 4, 4), (8, 6, 6), (7, 6, 6), (8, 4, 2)):
        assert only(Named(linears(**dict(zip(qkv, widths, strict=True))), num_heads=3, head_dim=2)) is None, widths
    assert only(Named(linears(q_proj=6, k_proj=6), num_heads=3)) is None
    assert only(Named(linears(q_proj=6, k_proj=6) | {"v_proj": nn.Conv1d(10, 6, 1)}, num_heads=3)) is None
    three = linears(q_proj=6, k_proj=6, v_proj=6)
    # A norm of the size of a head is shared by all of them; any other parameter isn't.
    assert only(Named(three | {"norm": nn.LayerNorm(2)}, num_heads=3)) is not None
    assert only(Named(three | {"norm": nn.LayerNorm(6)}, num_heads=3)) is None
    assert only(Named(three | {"dropout": nn.Dropout()}, num_heads=3)) is not None
    own = Named(three, num_heads=3)
    own.scale = nn.Parameter(torch.ones(3))
    assert only(own) is None
    own.scale = nn.Parameter(torch.ones(2))
    assert only(own) is not None


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("relative_position_bias_table", 1), ("relative_attention_bias.weight", 1),
        ("relative_position_bias.relative_position_bias_table", 1), ("logit_scale", 0), ("cpb_mlp.2.weight", 0),
    ],
)  # fmt: skip
def test_parameters_with_an_entry_for_each_head(name: str, dim: int) -> None:
    *path, last = name.split(".")
    module = Named({"qkv": nn.Linear(10, 12)} | ({".".join(path): nn.Module()} if path else {}), num_heads=2)
    owner = module.get_submodule(".".join(path))
    for heads in (2, 3):
        shape = [7, heads] if dim else [heads, 7]
        setattr(owner, last, nn.Parameter(torch.zeros(shape)))
        attention = only(module)
        assert (attention is not None) == (heads == 2)
        assert attention is None or attention.by_head == {name: dim}
    # Those of queries that share keys don't say whose an entry is.
    apart = Named(linears(q_proj=8, k_proj=4, v_proj=4), num_heads=4, head_dim=2)
    apart.logit_scale = nn.Parameter(torch.zeros(4, 1))
    assert only(apart) is None
    even = Named(linears(q_proj=8, k_proj=8, v_proj=8), num_heads=4, head_dim=2)
    even.logit_scale = nn.Parameter(torch.zeros(4, 1))
    assert only(even).by_head == {"logit_scale": 0}


def test_layers_of_queries_may_read_positions_too() -> None:
    layers = linears(query_proj=6, key_proj=6, value_proj=6)
    assert only(Named(layers, num_heads=3, relative_attention=True)).also == ("rel_embeddings",)
    assert only(Named(layers, num_heads=3, relative_attention=False)).also == ()
    assert only(Named(linears(query=6, key=6, value=6), num_heads=3, relative_attention=True)).also == ()


def test_multihead_attention_of_pytorch() -> None:
    attention = only(nn.MultiheadAttention(6, 3))
    assert attention.channels["inner"].tolist() == [[0, 1, 6, 7, 12, 13], [2, 3, 8, 9, 14, 15], [4, 5, 10, 11, 16, 17]]
    assert (attention.context[0], attention.context[1].tolist()) == ("inner", [12, 13, 14, 15, 16, 17])
    assert (attention.out, attention.width, attention.heads, attention.size) == ("inner.out_proj", 6, 3, 2)
    for other in (
        nn.MultiheadAttention(6, 3, kdim=4), nn.MultiheadAttention(6, 3, add_bias_kv=True),
        nn.MultiheadAttention(6, 3, add_zero_attn=True),
    ):  # fmt: skip
        assert only(other) is None


def test_units_of_recurrent_layers_are_heads() -> None:
    found = find_heads(nn.ModuleDict({"gru": nn.GRU(5, 2), "other": nn.Linear(2, 2)}))
    assert list(found) == ["gru"]
    units = found["gru"]
    assert units.channels["gru"].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert (units.context[0], units.context[1].tolist()) == ("gru", [0, 1])
    found_sizes = (units.heads, units.size, units.width, units.out, units.recurrent)
    assert found_sizes == (2, 1, 5, None, True)
    assert find_attention(nn.GRU(5, 2)) == {}


class Counting(nn.Module):
    """Attention whose forward reads its numbers of heads by given names."""

    def __init__(self, heads: str, shared: str, per_shared: str, counts: tuple[int, int], **others: int) -> None:
        super().__init__()
        vars(self).update({heads: counts[0], shared: counts[1], per_shared: counts[0] // counts[1]}, **others)
        self.read, self.head_dim = (heads, shared, per_shared), 2
        for name, count in zip(("q_proj", "k_proj", "v_proj"), (counts[0], counts[1], counts[1]), strict=True):
            self.add_module(name, nn.Linear(10, 2 * count))
        self.o_proj = nn.Linear(2 * counts[0], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads, shared, per_shared = (getattr(self, name) for name in self.read)
        q, k, v = (
            layer(x).view(*x.shape[:2], count, self.head_dim).transpose(1, 2)
            for layer, count in ((self.q_proj, heads), (self.k_proj, shared), (self.v_proj, shared))
        )
        k, v = (each.repeat_interleave(per_shared, 1) for each in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.o_proj(mixed.reshape(*x.shape[:2], heads * self.head_dim))


NAMES_OF_COUNTS = [
    ("num_attention_heads", "num_key_value_heads", "num_key_value_groups"),
    ("n_heads", "n_kv_heads", "n_rep"),
    ("num_heads", "num_local_kv_heads", "num_kv_groups"),
]


@pytest.mark.parametrize(
    ("names", "shared"), [*((names, 3) for names in NAMES_OF_COUNTS), (NAMES_OF_COUNTS[0], 6), (NAMES_OF_COUNTS[0], 1)]
)
@pytest.mark.quick_every(3)
def test_heads_go_whatever_their_numbers_are_called(names: tuple[str, str, str], shared: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 10), Counting(*names, (6, shared)), nn.Linear(10, 3)).eval()
    x = torch.randn(2, 4, 5)
    groups = dependency_groups(model, x, [{"op_names": ["1.q_proj"], "sparse_ratio": 0.5}])
    assert not groups.skipped
    (attention,) = find_attention(model).values()
    masks = {}
    for name, rows in attention.channels.items():
        mask = torch.ones_like(model.get_submodule(name).weight)
        mask[rows[1:].ravel() if shared == 3 else rows[::2].ravel()] = 0
        masks[name] = {"weight": mask}
    dense = to_dense(model, x, masks)
    counts = {6: [3, 3, 1], 3: [2, 1, 2], 1: [3, 1, 3]}
    assert [getattr(dense[1], name) for name in names] == counts[shared]
    torch.testing.assert_close(dense(x), masked_model(model, x, masks)(x))


def test_heads_that_a_module_counts_twice_are_fewer_in_both_numbers() -> None:
    torch.manual_seed(0)
    attention = Counting("n_local_heads", "n_local_kv_heads", "n_rep", (6, 3), n_heads=6, n_kv_heads=3)
    model, x = nn.Sequential(nn.Linear(5, 10), attention, nn.Linear(10, 3)).eval(), torch.randn(2, 4, 5)
    assert not dependency_groups(model, x, [{"op_names": ["1.q_proj"], "sparse_ratio": 0.5}]).skipped
    mask = torch.ones(12, 10)
    mask[4:8] = 0
    shared = torch.ones(6, 10)
    shared[2:4] = 0
    masks = {"1.q_proj": {"weight": mask}, "1.k_proj": {"weight": shared}, "1.v_proj": {"weight": shared}}
    dense = to_dense(model, x, masks)
    counts = [
        getattr(dense[1], name) for name in ("n_local_heads", "n_heads", "n_local_kv_heads", "n_kv_heads", "n_rep")
    ]
    assert counts == [4, 4, 2, 2, 2]
    torch.testing.assert_close(dense(x), masked_model(model, x, masks)(x))
