"""Multiply-accumulates that no layer makes: products of activations, and weights that a forward uses by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from speedup_nets import masks_of
from torch import Tensor, nn
from torch.nn import functional

import nni_topo
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.network.cost.measure import count_macs

WIDTH, HEADS, SIZE, PLACES = 12, 3, 4, 5


class Attending(nn.Module):
    """Attention that is written in the forward; ``how`` says by which operations."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.heads, self.size = how, HEADS, SIZE
        self.enter, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 2)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def by_head(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.heads, self.size).transpose(1, 2)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.how == "fused":
            return functional.scaled_dot_product_attention(q, k, value=v, scale=0.5)
        if self.how == "letters":
            weights = torch.einsum("bhqc,bhkc->bhqk", q, k).softmax(-1)
            return torch.einsum("...qk,...kc->...qc", [weights, v])
        if self.how == "added":
            q, k, v = (each.flatten(0, 1) for each in (q, k, v))
            weights = torch.baddbmm(torch.zeros(1, 1, 1), q, k.transpose(1, 2), beta=0.0)
            return torch.bmm(weights.softmax(-1), mat2=v).unflatten(0, (-1, self.heads))
        return torch.matmul(torch.matmul(q, other=k.transpose(-2, -1)).softmax(-1), v)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        context = self.mixed(*(self.by_head(layer(x)) for layer in (self.q, self.k, self.v)))
        return self.head(self.out(context.transpose(1, 2).flatten(2)) + x)


class OwnWeights(nn.Module):
    """Weights that are parameters of the model: of a product, of a linear function and of a convolution."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.enter, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 2)
        self.weight = nn.Parameter(torch.randn(7, WIDTH))
        self.kernel = nn.Parameter(torch.randn(4, 1, 3))
        self.after = nn.Linear(7, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.enter(x)
        if self.how == "linear":
            return self.head(self.after(functional.linear(inner, self.weight)))
        scales = functional.conv1d(x.mean(-1)[:, None], self.kernel).mean((1, 2))
        return self.head(inner.relu() * scales[:, None, None])


class Normed(nn.Module):
    """A layer whose weight is computed at each call, beside a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.utils.parametrizations.weight_norm(nn.Linear(6, WIDTH))
        self.inner, self.head = nn.Linear(WIDTH, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.enter(x).relu()).relu())


class Folded(nn.Module):
    """A recurrent layer that reads the places of each row as sequences, and a table that no input changes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.rows = nn.Linear(6, WIDTH), nn.GRU(WIDTH, 7, batch_first=True, bidirectional=True)
        self.head, self.table = nn.Linear(14, 2), nn.Linear(3, 14)
        self.register_buffer("places", torch.randn(PLACES, 3))

    def forward(self, x: Tensor) -> Tensor:
        samples = x.shape[0]
        rows, _ = self.rows(self.enter(x).reshape(samples * PLACES, 1, -1))
        return self.head(rows.reshape(samples, PLACES, -1) + self.table(self.places))


def rows(samples: int = 4) -> Tensor:
    return torch.randn(samples, PLACES, 6, generator=torch.Generator().manual_seed(0))


def made(kind: type[nn.Module], *arguments: str) -> nn.Module:
    torch.manual_seed(0)
    return kind(*arguments).eval()


KINDS = {
    **{f"attention, {how}": (Attending, how) for how in ("fused", "letters", "added", "multiplied")},
    **{f"own weights, {how}": (OwnWeights, how) for how in ("linear", "convolution")},
    "computed weight": (Normed,),
    "folded": (Folded,),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick_every(2)
def test_products_that_no_layer_makes_are_those_of_the_dense_model(kind):
    model, x = made(*KINDS[kind]), rows()
    groups = nni_topo.dependency_groups(model, x, [{"op_types": ["Linear", "GRU"], "sparse_ratio": 0.4}])
    assert groups
    masks = masks_of(nni_topo.RandomPruner(model, groups, seed=1))
    dense = nni_topo.to_dense(model, x, masks)
    kept = {name: each["weight"].flatten(1).any(1).numpy() for name, each in masks.items() if "weight" in each}
    if kind == "folded":
        units = masks["rows"]["weight_hh_l0"].any(1).numpy()
        kept["rows"] = units[: len(units) // 3]
    cost = NetworkCost.on(model, x)
    assert cost({}).macs == count_macs(model, x)
    assert cost(kept).macs == count_macs(dense, x) < cost({}).macs


LETTERS = {"b": None, "m": PLACES, "n": 6, "k": 7, "r": 3, "c": 10, "d": 9, "e": 8}


class Letters(nn.Module):
    """An Einstein sum: operands with the letter b, or with dots, come from layers, all others are the model's own."""

    def __init__(self, equation: str, sizes: dict[str, int]) -> None:
        super().__init__()
        self.equation, sizes = equation, LETTERS | sizes
        operands, output = equation.split("->")
        self.of_samples = [letters[0] in "b." for letters in operands.split(",")]
        self.own, self.layers = nn.ParameterList(), nn.ModuleList()
        for letters, of_samples in zip(operands.split(","), self.of_samples, strict=True):
            if of_samples:
                self.layers.append(nn.Linear(6, sizes[letters[-1]]))
            else:
                own = torch.rand([sizes[letter] for letter in letters])
                self.own.append(nn.Parameter(own, requires_grad=bool(set(letters) & set("cde"))))
        self.after, self.head = nn.Linear(sizes[output[-1]], WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        layers, own = iter(self.layers), iter(self.own)
        tensors = [next(layers)(x).relu() if of_samples else next(own) for of_samples in self.of_samples]
        return self.head(self.after(torch.einsum(self.equation, *tensors)).relu())


def test_an_einstein_sum_is_counted_by_hand():
    cost = NetworkCost.on(made(Letters, "bmc,cd->bmd", {}), rows())
    layers = PLACES * 6 * 10 + PLACES * (9 * WIDTH + WIDTH * 2)
    assert cost({}).macs == layers + PLACES * 10 * 9
    assert cost({"layers.0": np.arange(10) < 7}).macs == cost({}).macs - 3 * PLACES * (6 + 9)


def test_a_model_that_a_pruner_has_wrapped_costs_what_it_did():
    model, x = made(*KINDS["attention, fused"]), rows()
    macs = count_macs(model, x)
    pruner = nni_topo.RandomPruner(model, [{"op_types": ["Linear", "GRU"], "sparse_ratio": 0.4}])
    assert NetworkCost.on(model, x)({}).macs == count_macs(model, x) == macs
    pruner.compress()
    assert NetworkCost.on(model, x)({}).macs == count_macs(model, x) == macs


def test_a_fixed_number_of_samples_is_divided_by():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(PLACES, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.view(4, PLACES, 6)
            return self.head(self.one(x) @ self.two(x).mT)

    model, kept = Fixed().eval(), np.arange(8) < 5
    cost = NetworkCost.on(model, rows(4))
    layers, product, head = 2 * PLACES * 6, PLACES * PLACES, PLACES * PLACES * 2
    assert cost({}).macs == 8 * (layers + product) + head
    assert cost({"one": kept, "two": kept}).macs == 5 * (layers + product) + head
    # Of one sample the first layer's input and output are largest: five places of six and eight numbers.
    assert cost({}).memory == 4 * (cost({}).params + PLACES * (6 + 8))


class Pictures(nn.Module):
    """A list of pictures, as detectors take it, and a product between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Linear(16, 2)

    def forward(self, pictures: list[Tensor]) -> Tensor:
        x = torch.stack(pictures)
        return self.head(self.one(x).flatten(2).mT @ self.two(x).flatten(2))


@pytest.mark.parametrize("count", [1, 4])
def test_of_a_list_of_pictures_each_is_a_sample(count):
    model, pictures = Pictures().eval(), ([torch.rand(3, 4, 4) for _ in range(count)],)
    macs = count_macs(model, pictures)
    assert macs == NetworkCost.on(model, pictures)({}).macs == 8 * 16 * (3 + 3 + 16) + 16 * 16 * 2
