"""Attention of the user's own in which several heads share keys and values, repeated in the forward by a quotient."""

from __future__ import annotations

import pytest
import torch
from speedup_nets import masks_of
from torch import Tensor, nn

import nni_topo
from nni_topo.speedup import masked_model

TOKENS = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(0))


def interleaved(self, keys: Tensor) -> Tensor:
    """Each head of keys several times, one after the other."""
    return keys.repeat_interleave(self.heads // self.groups, 1)


def with_more(more):
    """Attention of PyTorch's on keys and values that are as many as queries."""

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, more(self, key), more(self, value))

    return mixed


def grouped(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def grouped_with_bias(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    bias = self.bias[:, : query.shape[2], : query.shape[2]]
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)


class Model(nn.Module):
    """One block of attention under names of its own."""

    def __init__(self, heads: int = 4, groups: int = 2, size: int = 8) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, size
        self.embedding, self.a, self.out = nn.Embedding(20, 32), nn.Linear(32, heads * size), nn.Linear(32, 20)
        self.b, self.c, self.mixed = nn.Linear(32, groups * size), nn.Linear(32, groups * size), nn.Linear(32, 32)
        self.bias = nn.Parameter(torch.randn(heads, 7, 7))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        samples, places, _ = x.shape
        query = self.a(x).view(samples, places, self.heads, self.size).transpose(1, 2)
        key = self.b(x).view(samples, places, self.groups, self.size).transpose(1, 2)
        value = self.c(x).view(samples, places, self.groups, self.size).transpose(1, 2)
        mixed = self.mix(query, key, value)
        return self.out(self.mixed(mixed.transpose(1, 2).reshape(samples, places, self.heads * self.size)))


def pruned(model: nn.Module) -> tuple[nni_topo.DependencyGroups, nn.Module, nn.Module]:
    groups = nni_topo.dependency_groups(model, TOKENS, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    masks = masks_of(nni_topo.RandomPruner(model, groups, seed=1))
    return groups, nni_topo.to_dense(model, TOKENS, masks), masked_model(model, TOKENS, masks)


WAYS = {"interleaved": with_more(interleaved), "grouped": grouped, "grouped with bias": grouped_with_bias}


@pytest.mark.parametrize("mix", WAYS.values(), ids=WAYS)
@pytest.mark.quick_every(2)
def test_heads_go_with_the_keys_that_they_share(mix) -> None:
    torch.manual_seed(0)
    model = type("Kind", (Model,), {"mix": mix})().eval()
    groups, dense, masked = pruned(model)
    assert groups.skipped.keys() == {"out"}
    assert (dense.heads, dense.groups, dense.size) == (2, 1, 8)
    assert [layer.out_features for layer in (dense.a, dense.b, dense.c)] == [16, 8, 8]
    others = torch.flip(TOKENS, (0, 1))[:3, :5]
    torch.testing.assert_close(dense(others), masked(others))
    assert not torch.allclose(dense(others), model(others), atol=1e-3)
