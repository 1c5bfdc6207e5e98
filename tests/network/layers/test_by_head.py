"""Tables by head that a forward computes: heads go with their rows of these."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import nni_topo
from nni_topo.network.layers.by_head import HEADS_TAKEN

HEADS, SIZE = 4, 4
ASKED = [{"op_names_re": [r".*\.(asked|known|told)"], "sparse_ratio": 0.5}]
IDS = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0))


def slopes_of(heads: int) -> Tensor:
    return torch.tensor([2.0 ** (-8 / heads * (head + 1)) for head in range(heads)])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = HEADS, SIZE
        self.asked, self.known, self.told = (nn.Linear(16, 16) for _ in range(3))
        self.mixed = nn.Linear(16, 16)

    def by_head(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], self.heads, self.size).transpose(1, 2)

    def forward(self, states: Tensor, bias: Tensor) -> Tensor:
        asked, known, told = (self.by_head(layer(states)) for layer in (self.asked, self.known, self.told))
        shares = (asked @ known.transpose(2, 3) / self.size**0.5 + bias).softmax(-1)
        return self.mixed((shares @ told).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """As MPT: a method makes the biases of a number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.embed, self.blocks = nn.Embedding(20, 16), nn.ModuleList([Attending() for _ in range(2)])

    def biases(self, heads: int, places: int) -> Tensor:
        return slopes_of(heads).view(-1, 1, 1) * torch.arange(1 - places, 1)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.embed(ids)
        bias = self.biases(self.num_heads, ids.shape[1])
        for block in self.blocks:
            states = states + block(states, bias)
        return states.mean(1)


class BySample(Stack):
    """As BLOOM: the biases of all samples, one after the other, made by a function of the file."""

    def forward(self, ids: Tensor) -> Tensor:
        states = self.embed(ids)
        bias = biases_by_sample(ids, self.num_heads)
        for block in self.blocks:
            states = states + block(states, bias.unflatten(0, (len(ids), -1)))
        return states.mean(1)


def biases_by_sample(ids: Tensor, heads: int) -> Tensor:
    places = torch.ones(ids.shape).cumsum(-1)[:, None, :] - ids.shape[1]
    return (slopes_of(heads)[:, None] * places).reshape(-1, 1, ids.shape[1])


class Slopes(Stack):
    """As BLOOM of Transformers 5.24: a function makes the slopes alone, and the forward multiplies with the places."""

    def forward(self, ids: Tensor) -> Tensor:
        states = self.embed(ids)
        slopes = slopes_of(self.num_heads)
        bias = slopes[:, None, None] * torch.arange(1 - ids.shape[1], 1)
        for block in self.blocks:
            states = states + block(states, bias)
        return states.mean(1)


class Classified(nn.Module):
    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.stack, self.head = stack, nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.stack(ids))


def drawn(stack: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return Classified(stack()).eval()


def test_heads_go_with_their_biases() -> None:
    for kind in (Stack, BySample, Slopes):
        plain = drawn(kind)
        model = nni_topo.as_torch_layers(plain)
        assert torch.equal(model(IDS), plain(IDS))
        groups = nni_topo.dependency_groups(model, IDS, ASKED)
        assert not groups.skipped
        masks = nni_topo.RandomPruner(copy.deepcopy(model), groups, seed=0).compress()[1]
        dense, reference = nni_topo.to_dense(model, IDS, masks), nni_topo.masked_model(model, IDS, masks)
        assert dense.stack.blocks[0].asked.out_features == 8
        assert dense.stack.blocks[0].heads == 2
        kept = masks["stack.blocks.0.told"]["weight"].view(HEADS, SIZE, -1).flatten(1).any(1).nonzero().flatten()
        assert getattr(dense.stack, HEADS_TAKEN).tolist() == kept.tolist()
        assert model.state_dict().keys() == plain.state_dict().keys()  # so that files of the model fit
        others = IDS[:2, :5]
        torch.testing.assert_close(dense(others), reference(others), rtol=1e-5, atol=1e-6)
    # Without the buffer they stay, for the forward computes biases for all.
    assert "stack.blocks.0.told" in nni_topo.dependency_groups(drawn(Stack), IDS, ASKED).skipped
