"""Heads narrowed: nothing changes before masks do, the directions are the best, and the dense heads are smaller."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nni_topo import Calibration, compensate, load, masked_model, narrow_heads, save, to_dense
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.attention.heads import find_attention
from nni_topo.recovery.narrowing import directions, narrow_instead
from nni_topo.zoo.transformers import SelfAttention, bert_small, vit_small


def images(count=60, seed=0):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def words(count=60, seed=0):
    return torch.randn(count, 7, 24, generator=torch.Generator().manual_seed(seed))


def encoder(**knobs):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 32, **knobs), 2, enable_nested_tensor=False)


NETS = {
    "norms first": (lambda: vit_small(3, 1, 8), images),
    "norms behind": (lambda: bert_small(3, 1, 8), images),
    "PyTorch's": (lambda: encoder(batch_first=True), words),
    "PyTorch's, places first": (encoder, words),
}
ONE_OF_THE_ZOO = [pytest.param(name, marks=[pytest.mark.slow] * (name == "norms behind")) for name in NETS]


def make(name):
    torch.manual_seed(0)
    net = NETS[name][0]().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(len(parameter))
    return net


def given(net, inputs):
    with torch.no_grad():
        return net(inputs)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.quick_every(2)
def test_turned_heads_compute_the_same_and_lose_the_channels_asked_for(name):
    net, inputs = make(name), NETS[name][1]
    before = copy.deepcopy(net.state_dict())
    turned, masks = narrow_heads(net, inputs().split(20), 0.5)
    others = inputs(20, seed=1)
    torch.testing.assert_close(given(turned, others), given(net, others), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    dense = to_dense(turned, others, masks)
    torch.testing.assert_close(given(dense, others), given(masked_model(turned, others, masks), others))
    whole, small = find_attention(net), find_attention(dense)
    sizes = {key: (each.heads, each.head_size) for key, each in small.items()}
    assert sizes == {key: (each.heads, each.head_size // 2) for key, each in whole.items()}


def test_a_head_that_keeps_some_channels_is_read_by_the_layer_that_is_solved():
    net, inputs = make("norms first"), images(100).split(50)
    turned, masks = narrow_heads(net, inputs, {"blocks.1.attention": 0.5})
    assert set(masks) == {f"blocks.1.attention.{part}_proj" for part in "qkvo"}
    solved = compensate(turned, masks, inputs).blocks[1].attention.o_proj.weight
    columns = masks["blocks.1.attention.o_proj"]["weight"][0] > 0
    assert columns.sum() == 48
    assert not torch.equal(solved[:, columns], turned.blocks[1].attention.o_proj.weight[:, columns])


@pytest.mark.parametrize("name", ONE_OF_THE_ZOO)
@pytest.mark.quick_every(2)
def test_heads_go_beside_channels_of_those_that_stay(name, tmp_path):
    net, inputs = make(name), NETS[name][1](20)
    turned, masks = narrow_heads(net, [inputs], 0.5)
    for attention in find_attention(net).values():
        for layer, rows in attention.parts:
            for mask in masks[layer].values():
                mask[rows[1]] = 0
    dense = to_dense(turned, inputs, masks)
    torch.testing.assert_close(given(dense, inputs), given(masked_model(turned, inputs, masks), inputs))
    small = find_attention(dense)
    for key, each in find_attention(net).items():
        assert (small[key].heads, small[key].head_size) == (each.heads - 1, each.head_size // 2)
    save(dense, tmp_path / "dense.safetensors")
    loaded = load(tmp_path / "dense.safetensors", net)
    assert torch.equal(given(loaded, inputs), given(dense, inputs))
    assert {key: each.heads for key, each in find_attention(loaded).items()} == {k: e.heads for k, e in small.items()}


class Normed(nn.Module):
    """Attention with norms of queries and keys, by whose channels they are more than multiplied."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 2, 4
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(4)

    def forward(self, states):
        query, key, value = (
            layer(states).unflatten(2, (-1, 4)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = 5 * self.norm(query), 5 * self.norm(key)
        context = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.o_proj(context.transpose(1, 2).flatten(2))


def test_activations_that_arent_finite_are_refused():
    net = make("norms first")
    nn.init.constant_(net.blocks[1].attention.k_proj.weight, 3e38)
    with pytest.raises(DataError, match=r"finite, got NaN or infinity \(blocks.1.attention\)"):
        narrow_heads(net, [images()], 0.5)


def test_queries_that_are_more_than_multiplied_are_left_as_they_were(caplog):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), Normed(), nn.Linear(8, 2)).eval()
    inputs = torch.randn(30, 5, 8)
    turned, masks = narrow_heads(net, [inputs], 0.5)
    assert masks == {}
    assert "1 (this attention uses the head size in a way that can't be adapted)" in caplog.text
    assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in turned.state_dict().items())


@pytest.mark.parametrize(
    ("knobs", "error", "words"),
    [
        ({"sparse_ratio": 1}, ConfigError, r"sparse_ratio must be in \(0, 1\), got 1"),
        ({"sparse_ratio": {"blocks.0.attention": 2}}, ConfigError, r"blocks.0.attention must be in \(0, 1\), got 2"),
        ({"sparse_ratio": {"blocks.0.attentoin": 0.5}}, ConfigError, "did you mean blocks.0.attention"),
        ({"sparse_ratio": {"blocks.0.mlp": 0.5}}, ConfigError, "attention whose heads are known, got 'blocks.0.mlp'"),
        ({"calibration": [torch.full((4, 1, 8, 8), torch.nan)]}, DataError, "finite"),
    ],
)
@pytest.mark.quick_every(2)
def test_bad_requests_are_refused(knobs, error, words):
    with pytest.raises(error, match=words):
        narrow_heads(make("norms first"), **{"calibration": [images()], "sparse_ratio": 0.5, **knobs})


@pytest.mark.parametrize(("rank", "kept"), [(4, 2), (2, 3), (4, 4), (1, 1)])
def test_directions_lose_no_more_than_the_smallest_singular_values(rank, kept):
    generator = torch.Generator().manual_seed(rank)
    x, y = (
        torch.randn(50, rank, generator=generator).double() @ torch.randn(rank, 4, generator=generator).double()
        for _ in range(2)
    )
    a, b = (each[0] for each in directions((x.T @ x / 50)[None], (y.T @ y / 50)[None], kept))
    assert a.shape == b.shape == (4, 4)
    torch.testing.assert_close(a @ b.T, torch.eye(4).double(), rtol=1e-5, atol=1e-5)
    lost = x @ (torch.eye(4) - a[:, :kept] @ b[:, :kept].T) @ y.T / 50
    values = torch.linalg.svdvals(x @ y.T / 50)
    assert float(lost.square().sum()) == pytest.approx(float(values[kept:].square().sum()), rel=1e-4, abs=1e-6)


class Pytorchs(nn.Module):
    """PyTorch's attention, of which the layers after it get a tensor."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, states):
        return self.inner(states, states, states, need_weights=False)[0]


ATTENTION = {
    "own keys and values": lambda: SelfAttention(16, 4, bias=True, causal=False),
    "shared keys and values": lambda: SelfAttention(16, 4, 2, bias=True, causal=False),
    "PyTorch's": Pytorchs,
}


def between(first, *attention):
    """Return attention after a layer and before one; all biases are large, so that means are far from zero."""
    net = nn.Sequential(nn.Linear(6, first), *attention, nn.Linear(first, 3)).double().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter += torch.randn(len(parameter))
    return net


def factors(attention, states):
    """Return queries, keys, columns that mix heads, and what these mix: each (heads, 4, samples)."""
    if isinstance(attention, Pytorchs):
        weights, biases = attention.inner.in_proj_weight.chunk(3), attention.inner.in_proj_bias.chunk(3)
        made = [nn.functional.linear(states, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        mixing = attention.inner.out_proj.weight
    else:
        made = [layer(states) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        mixing = attention.o_proj.weight
    queries, keys, values = (each.unflatten(2, (-1, 4)).transpose(1, 2) for each in made)
    repeated = (each.repeat_interleave(queries.shape[1] // keys.shape[1], 1) for each in (keys, values))
    context = nn.functional.scaled_dot_product_attention(queries, *repeated)
    queries, keys, context = (each.transpose(0, 1).flatten(1, 2).mT for each in (queries, keys, context))
    return queries, keys, mixing.unflatten(1, (-1, 4)).movedim(1, 0).mT, context


def products(ones, others, groups):
    """Return the products of two factors' channels, of the heads of each group: (groups, 4, 4)."""
    centred = others - others.mean(2, keepdim=True)
    return [(each @ each.mT).unflatten(0, (groups, -1)).sum(1) for each in (ones, centred)]


@pytest.mark.parametrize("name", ATTENTION)
def test_the_first_channels_of_turned_heads_lose_the_least_that_is_possible(name):
    """Singular values say how little that is: of logits without the mean of the keys, and of what heads add."""
    torch.manual_seed(0)
    net, inputs = between(16, ATTENTION[name]()), torch.randn(30, 5, 6).double()
    turned, masks = narrow_heads(net, [inputs[:20], inputs[20:]], 0.5)
    with torch.no_grad():
        torch.testing.assert_close(turned(inputs), net(inputs))
        before, after = (factors(each[1], each[0](inputs)) for each in (net, turned))
    groups = len(before[1])
    for one, other in ((0, 1), (2, 3)):
        roots = [torch.linalg.cholesky(each) for each in products(before[one], before[other], groups)]
        least = torch.linalg.svdvals(roots[0].mT @ roots[1])[:, 2:].square().sum(1)
        ones, others = products(after[one], after[other], groups)
        torch.testing.assert_close((ones[:, 2:, 2:] * others[:, 2:, 2:]).sum((1, 2)), least)
    mixed = masks["1.inner.out_proj" if name == "PyTorch's" else "1.o_proj"]["weight"]
    assert mixed.tolist() == [[1.0, 1.0, 0.0, 0.0] * 4] * 16
    if name != "PyTorch's":
        for part in "qkv":
            own = masks[f"1.{part}_proj"]
            assert own["bias"].view(-1, 4).unique(dim=0).tolist() == [[1.0, 1.0, 0.0, 0.0]]
            assert torch.equal(own["weight"], own["bias"][:, None].expand(-1, 16))


def heads_masked(net, gone):
    """Return masks of the layers of queries, keys and values without the first heads, so many of each module."""
    masks = {}
    for name, count in gone.items():
        attention = net.get_submodule(name)
        for part in "qkv":
            layer = attention.get_submodule(f"{part}_proj")
            is_kept = torch.ones_like(layer.bias).detach()
            is_kept[: count * attention.head_dim] = 0
            masks[f"{name}.{part}_proj"] = {"weight": is_kept[:, None].expand_as(layer.weight).clone(), "bias": is_kept}
    return masks


def test_heads_lose_channels_in_the_place_of_pruned_heads():
    """Three quarters of six channels are 4.5: 4, then 5 with what was left over, then 4; other rows stay masked."""
    torch.manual_seed(0)
    net = between(24, *(SelfAttention(24, 4, bias=True, causal=False) for _ in range(4)))
    inputs = [torch.randn(20, 5, 6).double()]
    masks = heads_masked(net, {"1": 1, "2": 1, "3": 1})
    rows, columns = torch.arange(24) >= 5, torch.arange(24) >= 6
    masks["2.o_proj"] = {"weight": (rows[:, None] & columns).double(), "bias": rows.double()}
    masks["5"] = {"weight": torch.tensor([1.0, 0.0, 1.0]).double()[:, None].expand(3, 24).clone()}
    turned, found = narrow_instead(net, inputs, masks)
    torch.testing.assert_close(given(turned, inputs[0]), given(net, inputs[0]))
    assert set(found) == {f"{name}.{part}_proj" for name in "123" for part in "qkvo"} | {"5"}
    assert torch.equal(found["5"]["weight"], masks["5"]["weight"])
    for name, kept in (("1", 4), ("2", 5), ("3", 4)):
        stays = (torch.arange(24) % 6 < kept).double()
        for part in "qkv":
            assert torch.equal(found[f"{name}.{part}_proj"]["bias"], stays)
            assert torch.equal(found[f"{name}.{part}_proj"]["weight"], stays[:, None].expand(24, 24))
        left = (rows if name == "2" else rows | True).double()
        assert torch.equal(found[f"{name}.o_proj"]["weight"], left[:, None] * stays)
    assert torch.equal(found["2.o_proj"]["bias"], rows.double())


@pytest.mark.parametrize(("heads", "gone", "kept"), [(8, {"1": 7}, {"1": 1, "2": 2}), (16, {"1": 1}, {})])
def test_a_head_keeps_a_channel_and_modules_without_pruned_heads_keep_all(heads, gone, kept):
    """A sixteenth of two channels is none."""
    torch.manual_seed(0)
    net = between(2 * heads, *(SelfAttention(2 * heads, heads, bias=True, causal=False) for _ in range(2)))
    inputs, masks = [torch.randn(20, 5, 6).double()], heads_masked(net, gone)
    turned, found = narrow_instead(net, inputs, masks)
    if not kept:
        assert turned is net
        assert found is masks
        return
    for name, count in kept.items():
        is_kept = found.get(f"{name}.k_proj", {"bias": torch.ones(2 * heads)})["bias"]
        assert is_kept.tolist() == [1.0, float(count > 1)] * heads


def test_rotary_heads_keep_their_channels_and_are_pruned_as_they_were_chosen(caplog):
    torch.manual_seed(0)
    net, inputs = between(16, SelfAttention(16, 4, bias=True, causal=True)), [torch.randn(20, 5, 6).double()]
    masks = heads_masked(net, {"1": 2})
    assert narrow_instead(net, inputs, masks) == (net, masks)
    turned, narrower = narrow_heads(net, inputs, 0.5)
    assert narrower == {}
    assert "head size unchanged: 1 (its queries and keys have rotary positions)" in caplog.text
    assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in turned.state_dict().items())


def test_heads_are_turned_alike_on_another_device(device):
    """Directions are the same up to their sign, and so is what the first channels give."""
    torch.manual_seed(0)
    net, inputs = between(16, Pytorchs()), torch.randn(30, 5, 6).double()
    found = []
    for place in (torch.device("cpu"), device):
        turned, masks = narrow_heads(copy.deepcopy(net).to(place), [inputs.to(place)], 0.5)
        assert {each.device.type for each in turned.parameters()} == {place.type}
        found.append(given(masked_model(turned.cpu(), inputs, masks), inputs))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


def test_processes_that_share_batches_turn_heads_together(one_process):
    torch.manual_seed(0)
    net = between(16, SelfAttention(16, 4, bias=True, causal=False))
    inputs = [torch.randn(20, 5, 6).double()]
    shared = Calibration(inputs)
    shared.processes = one_process
    masks = heads_masked(net, {"1": 1})
    for turn in (lambda batches: narrow_heads(net, batches, 0.5), lambda batches: narrow_instead(net, batches, masks)):
        (expected, known), (found, others) = turn(inputs), turn(shared)
        torch.testing.assert_close(found.state_dict(), expected.state_dict())
        assert str(others) == str(known)
