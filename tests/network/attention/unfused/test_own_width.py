"""Attention that gives its heads the width of its input, and that adds positions to what it reads."""

from __future__ import annotations

import copy
import inspect
import pickle

import torch
from torch import nn

import nni_topo

WIDTH, HEADS, SIZE = 16, 2, 8
ASKED = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
PLACES = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(0))


class Attending(nn.Module):
    """As DETR's: positions are added to queries and keys, and the context gets the input's width."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.embed_dim = HEADS, SIZE, WIDTH
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def by_head(self, states):
        return states.view(*states.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, states, positions, others=None, places=None):
        batch, count, width = states.size()
        queries = self.by_head(self.q_proj(states + positions))
        keys = self.by_head(self.k_proj(states + positions if others is None else others + places))
        values = self.by_head(self.v_proj(states if others is None else others))
        shares = (queries @ keys.transpose(2, 3) / self.head_dim**0.5).softmax(-1)
        return self.out_proj((shares @ values).transpose(1, 2).reshape(batch, count, width))


class Blocks(nn.Module):
    """Learned queries that attend to one another, then to an image's places."""

    def __init__(self):
        super().__init__()
        self.queries, self.positions = (nn.Parameter(torch.randn(1, 4, WIDTH)) for _ in range(2))
        self.spots = nn.Parameter(torch.randn(1, PLACES.shape[1], WIDTH))
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.own, self.other = Attending(), Attending()

    def forward(self, places):
        states, positions, spots = (
            each.expand(places.shape[0], -1, -1) for each in (self.queries, self.positions, self.spots)
        )
        states = states + self.own(states, positions)
        states = states + self.other(states, positions, self.enter(places), spots)
        return self.leave(states)


def test_heads_and_the_width_of_what_enters_are_removed(tmp_path):
    torch.manual_seed(0)
    net = Blocks().eval()
    groups = nni_topo.dependency_groups(net, PLACES, ASKED)
    assert groups.skipped == {"leave": "it gives the model's output"}
    masks = nni_topo.create_pruner("l1", copy.deepcopy(net), groups).compress()[1]
    dense, masked = (make(net, PLACES, masks) for make in (nni_topo.to_dense, nni_topo.masked_model))
    for attention in (dense.own, dense.other):
        assert (attention.num_heads, attention.head_dim, attention.embed_dim) == (1, SIZE, SIZE)
        assert tuple(attention.q_proj.weight.shape) == (SIZE, WIDTH // 2)
    torch.testing.assert_close(dense(PLACES), masked(PLACES), rtol=1e-5, atol=1e-6)
    nni_topo.save(dense, tmp_path / "dense.safetensors")
    loaded = nni_topo.load(tmp_path / "dense.safetensors", net)
    assert torch.equal(loaded(PLACES), dense(PLACES))
    again = pickle.loads(pickle.dumps(dense.own))
    assert type(again) is type(dense.own) is not Attending
    before = dense.own.q_proj.weight.detach().clone()
    dense.train()(PLACES).square().mean().backward()
    torch.optim.SGD(dense.parameters(), 0.1).step()
    assert not torch.equal(dense.own.q_proj.weight, before)
    assert type(net.own) is type(net.other) is Attending  # the user's model stays as it is


def test_a_forward_whose_source_cannot_be_read_is_named_as_such():
    namespace = dict(globals())
    exec(inspect.getsource(Attending), namespace)  # as a class that is typed in
    net, inputs = namespace["Attending"]().eval(), (PLACES, PLACES)
    groups = nni_topo.dependency_groups(net, inputs, ASKED)
    assert not groups
    assert "the source of its forward can't be read" in groups.skipped["q_proj"]
    removable = nni_topo.dependency_groups(Attending().eval(), inputs, ASKED)
    assert {name for group in removable for name in group["op_names"]} == {"q_proj", "k_proj", "v_proj"}
