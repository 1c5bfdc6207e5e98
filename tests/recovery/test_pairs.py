"""Narrower heads where positions turn queries and keys, and where heads share keys and values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nni_topo import compensate, load, masked_model, narrow_heads, save, to_dense
from nni_topo.context import in_context
from nni_topo.errors import DataError
from nni_topo.recovery.pairs import PairLogits, pairs_that_stay
from nni_topo.zoo.transformers import _turned, gpt_small


def given(net, inputs):
    with torch.no_grad():
        return net(inputs)


def lost(net, other, inputs):
    return float((given(net, inputs) - given(other, inputs)).square().mean())


class Sharing(nn.Module):
    """Four heads over two of keys and values, without positions."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = 4, 2, 6
        self.q_proj, self.o_proj = nn.Linear(24, 24), nn.Linear(24, 24)
        self.k_proj, self.v_proj = nn.Linear(24, 12), nn.Linear(24, 12)

    def forward(self, states):
        layers = (self.q_proj, self.k_proj, self.v_proj)
        query, *others = (layer(states).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for layer in layers)
        shared = (each.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for each in others)
        return self.o_proj(nn.functional.scaled_dot_product_attention(query, *shared).transpose(1, 2).flatten(2))


def first_channels(mask, name):
    """Mask all but the first three channels of each head."""
    dim = 1 if name.endswith("o_proj") else 0
    kept = (torch.arange(mask.shape[dim]) % 6 < 3).float()
    return torch.ones_like(mask) * kept.view(-1, *[1] * (mask.dim() - 1 - dim))


def test_heads_that_share_keys_and_values_are_turned_alike():
    torch.manual_seed(0)
    net, inputs = nn.Sequential(nn.Linear(24, 24), Sharing(), nn.Linear(24, 3)).eval(), torch.randn(60, 7, 24)
    turned, masks = narrow_heads(net, inputs.split(20), 0.5)
    torch.testing.assert_close(given(turned, inputs), given(net, inputs), rtol=1e-4, atol=1e-4)
    dense, plain = to_dense(turned, inputs, masks), masked_model(turned, inputs, masks)
    assert [len(part.weight) for part in (dense[1].q_proj, dense[1].k_proj, dense[1].v_proj)] == [12, 6, 6]
    torch.testing.assert_close(given(dense, inputs), given(plain, inputs))
    first = {name: {key: first_channels(mask, name) for key, mask in own.items()} for name, own in masks.items()}
    assert lost(net, plain, inputs) < 0.8 * lost(net, masked_model(net, inputs, first), inputs)


def gpt(seed=0):
    """A decoder of which some pairs of channels do much more than others; tokens."""
    torch.manual_seed(seed)
    net = gpt_small(20).eval()
    with torch.no_grad():
        for block in net.blocks:
            block.attention.q_proj.weight *= 4.0 * torch.rand(96, 1)
            block.attention.k_proj.weight *= 4.0 * torch.rand(48, 1)
    return net, torch.randint(0, 20, (24, 16))


@pytest.mark.slow
def test_rotary_heads_lose_pairs_with_their_frequencies(tmp_path):
    net, tokens = gpt()
    turned, masks = narrow_heads(net, tokens.split(8), 0.5)
    torch.testing.assert_close(given(turned, tokens), given(net, tokens), rtol=1e-4, atol=1e-4)
    attention = turned.blocks[0].attention
    assert torch.equal(attention.q_proj.weight, net.blocks[0].attention.q_proj.weight)
    assert not torch.equal(attention.v_proj.weight, net.blocks[0].attention.v_proj.weight)
    dense = to_dense(turned, tokens, masks)
    others = torch.randint(0, 20, (3, 29))
    torch.testing.assert_close(given(dense, others), given(masked_model(turned, others, masks), others))
    for whole, block in zip(net.blocks, dense.blocks, strict=True):
        assert (block.attention.num_heads, block.attention.head_dim) == (12, 4)
        assert {*block.attention.inv_freq.tolist()} < {*whole.attention.inv_freq.tolist()}
    save(dense, tmp_path / "dense.safetensors")
    assert torch.equal(given(load(tmp_path / "dense.safetensors", net), others), given(dense, others))
    solved = to_dense(compensate(turned, masks, tokens.split(8)), tokens, masks)
    assert lost(net, solved, others) < lost(net, dense, others)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.quick_every(2)
def test_of_all_pairs_those_stay_with_which_logits_are_nearest(seed):
    """Against each head's logits of all queries up to themselves, for all choices there are."""
    net, tokens = gpt(seed)
    _, masks = narrow_heads(net, [tokens], {"blocks.0.attention": 0.75})
    attention = net.blocks[0].attention
    states = net.blocks[0].norm1(net.embedding(tokens))
    reached = torch.ones(16, 16).tril()

    def logits(kept):
        rows = [each(states).unflatten(2, (-1, 8)).transpose(1, 2) for each in (attention.q_proj, attention.k_proj)]
        queries, keys = (_turned(each * kept.repeat(2), attention.inv_freq) for each in rows)
        found = queries @ keys.repeat_interleave(2, 1).mT
        return (found - (found * reached).sum(3, keepdim=True) / reached.sum(1, keepdim=True)) * reached

    with torch.no_grad():
        whole, errors = logits(torch.ones(4)), []
        for kept in torch.eye(4):
            error = (logits(kept) - whole).square().sum((0, 2, 3)) / whole.square().sum((0, 2, 3))
            errors.append(float(error.mean()))
    stays = masks["blocks.0.attention.k_proj"]["weight"][:, 0].view(6, 2, 4)
    assert (stays == stays[0, 0]).all()
    (found,) = stays[0, 0].nonzero().flatten().tolist()
    assert errors[found] == min(errors)


def test_pairs_go_one_after_the_other_and_of_equal_ones_the_lowest():
    columns = np.random.default_rng(0).normal(size=(50, 6)) @ np.random.default_rng(1).normal(size=(6, 6))
    shares, gone = columns.T @ columns, []
    for kept in range(5, 0, -1):
        errors = {j: float(np.square(columns[:, [*gone, j]].sum(1)).sum()) for j in range(6) if j not in gone}
        gone.append(min(errors, key=errors.__getitem__))
        assert np.flatnonzero(~pairs_that_stay(shares, kept)).tolist() == sorted(gone)
    assert pairs_that_stay(np.eye(3) + 1e-9 * np.diag([1, 0, 0]), 1).tolist() == [False, False, True]


def test_padding_says_nothing_about_pairs():
    torch.manual_seed(0)
    frequencies, rows, states = torch.tensor([1.0, 0.1]), np.arange(8).reshape(2, 4), torch.randn(3, 9, 8)
    known = PairLogits(frequencies), PairLogits(frequencies)
    real = torch.arange(9) < torch.tensor([[9], [6], [7]])
    for look, values in zip(known, (states, torch.where(real.unsqueeze(2), states, 5.0)), strict=True):
        with in_context(real=real):
            look.see_queries(rows, values, values)
            look.see_keys(rows, values, values)
    assert known[0].products.shape == (2, 2, 2)
    torch.testing.assert_close(known[1].products, known[0].products)


def test_every_module_may_lose_as_many_pairs_as_it_is_asked_for_where_frequencies_are_its_own():
    net, tokens = gpt()
    turned, masks = narrow_heads(net, [tokens], {"blocks.0.attention": 0.5, "blocks.2.attention": 0.9})
    dense = to_dense(turned, tokens, masks)
    assert [block.attention.head_dim for block in dense.blocks] == [4, 8, 2, 8]
    torch.testing.assert_close(given(dense, tokens), given(masked_model(turned, tokens, masks), tokens))


def test_what_isnt_finite_is_refused():
    net, tokens = gpt()
    nn.init.constant_(net.blocks[1].attention.k_proj.weight, 3e38)
    with pytest.raises(DataError, match=r"finite, got NaN or infinity \(blocks.1.attention"):
        narrow_heads(net, [tokens], 0.5)


@pytest.mark.parametrize("has_samples", [True, False])
def test_pairs_of_heads_that_share_keys_add_to_logits_up_to_each_query(has_samples):
    """A pair adds the product of two numbers of a query and a key, after both were turned by their places."""
    torch.manual_seed(0)
    frequencies, samples = torch.tensor([1.0, 0.4, 0.1]), 2 if has_samples else 1
    queries, keys = torch.randn(samples, 5, 24).double(), torch.randn(samples, 5, 12).double()
    found = PairLogits(frequencies)
    shown = (queries, keys) if has_samples else (queries[0], keys[0])
    found.see_queries(np.arange(24).reshape(4, 6), shown[0], shown[0])
    found.see_keys(np.arange(12).reshape(2, 6), shown[1], shown[1])
    turned = [_turned(each.unflatten(2, (-1, 6)).transpose(1, 2), frequencies.double()) for each in (queries, keys)]
    expected = torch.zeros(4, 3, 3).double()
    for sample in range(samples):
        for head in range(4):
            for place in range(5):
                products = turned[0][sample, head, place] * turned[1][sample, head // 2, : place + 1]
                added = products[:, :3] + products[:, 3:]
                added = added - added.mean(0)
                expected[head] += added.T @ added
    torch.testing.assert_close(found.products, expected)
