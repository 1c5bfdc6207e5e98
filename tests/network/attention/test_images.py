"""Attention over images, with the channels first, that takes the width of its values from its input."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import nni_topo

WIDTH, HEADS, SIZE, KEYS = 16, 4, 4, 2
IMAGES = torch.rand(2, 3, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def normed(width: int, out: int, kernel: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(width, out, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class Joint(nn.Module):
    """One convolution makes queries, keys and values, head by head; another one finds places from the values."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.keys, self.size, self.scale = HEADS, KEYS, SIZE, KEYS**-0.5
        self.made = normed(WIDTH, HEADS * (2 * KEYS + SIZE))
        self.placed, self.mixed = normed(WIDTH, WIDTH, 3, WIDTH), normed(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        samples, channels, height, width = x.shape
        by_head = self.made(x).view(samples, self.count, self.keys * 2 + self.size, height * width)
        q, k, v = by_head.split([self.keys, self.keys, self.size], dim=2)
        shares = (q.transpose(2, 3) @ k * self.scale).softmax(-1)
        context = (v @ shares.transpose(2, 3)).view(samples, channels, height, width)
        return self.mixed(context + self.placed(v.reshape(samples, channels, height, width)))


class Apart(nn.Module):
    """Three convolutions make queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = HEADS
        self.ask, self.match, self.give, self.mixed = (normed(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        count, channels, places = self.count, x.size(1), x.shape[2] * x.shape[3]
        size = channels // count
        q = self.ask(x).view(x.shape[0], count, size, places)
        k = self.match(x).view(x.shape[0], count, size, places)
        v = self.give(x).view(x.shape[0], count, channels // count, places)
        context = functional.scaled_dot_product_attention(*(each.transpose(2, 3) for each in (q, k, v)))
        return self.mixed(context.transpose(2, 3).reshape(x.shape[0], channels, x.shape[2], x.shape[3]))


class Divided(Apart):
    """Divides by the root of a head's size, which it computes of the width of the input."""

    def forward(self, x: Tensor) -> Tensor:
        samples, channels, *sides = x.shape
        size, places = channels // self.count, sides[0] * sides[1]
        q, k, v = (layer(x).view(samples, self.count, size, places) for layer in (self.ask, self.match, self.give))
        shares = (q.transpose(2, 3) @ k * size**-0.5).softmax(-1)
        return self.mixed((v @ shares.transpose(2, 3)).reshape(samples, channels, *sides))


class Single(nn.Module):
    """One head of all channels, as in autoencoders of images: queries and keys lose channels, as values do."""

    def __init__(self) -> None:
        super().__init__()
        self.ask, self.match, self.give, self.mixed = (normed(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.ask(x), self.match(x), self.give(x)
        samples, channels, height, width = q.shape
        q, k = q.reshape(samples, channels, height * width), k.reshape(samples, channels, height * width)
        shares = (q.transpose(1, 2) @ k / 4).softmax(2)
        context = v.reshape(samples, channels, height * width) @ shares.transpose(1, 2)
        return self.mixed(context.reshape(samples, channels, height, width))


class Around(nn.Module):
    """A stream of channels to which attention and a feed-forward part add something."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.enter, self.attention = normed(3, WIDTH, 3), attention
        self.wide, self.narrow, self.leave = normed(WIDTH, 12), normed(12, WIDTH), nn.Conv2d(WIDTH, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        x = x + self.attention(x)
        x = x + self.narrow(self.wide(x).relu())
        return self.leave(x).mean((2, 3))


def make(attention: nn.Module) -> nn.Module:
    """Make a network in double precision, with batch norms that aren't trivial."""
    torch.manual_seed(0)
    model = Around(attention).double()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def pruned(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the dense model and the masked one: random masks of half of all but of the stream, which loses less."""
    stream = ["enter.0", "narrow.0", "attention.mixed.0"]
    asked = [
        {"op_types": ["Conv2d"], "exclude_op_names": stream, "sparse_ratio": 0.5},
        {"op_names": stream, "sparse_ratio": 0.25},
    ]
    groups = nni_topo.dependency_groups(model, IMAGES, asked)
    assert groups.skipped == {"leave": "it gives the model's output"}
    masks = nni_topo.create_pruner("random", copy.deepcopy(model), groups).compress()[1]
    return tuple(each(model, IMAGES, masks) for each in (nni_topo.to_dense, nni_topo.masked_model))


NETS = {
    "joint": Joint,
    "apart": Apart,
    "single": Single,
}


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
@pytest.mark.quick_every(2)
def test_heads_and_the_stream_lose_what_each_is_asked_for_and_the_same_is_computed(name: str) -> None:
    model = make(NETS[name]())
    dense, masked = pruned(model)
    torch.testing.assert_close(dense(3 * IMAGES), masked(3 * IMAGES), rtol=1e-12, atol=1e-12)
    for layer, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and layer != "leave":
            kept = 3 / 4 if layer in ("enter.0", "narrow.0", "attention.mixed.0") else 1 / 2
            assert dense.get_submodule(layer).out_channels == kept * module.out_channels, layer
    if name != "single":
        assert dense.attention.count == HEADS // 2
    assert type(model.attention) is type(NETS[name]())  # the user's model stays as it is


@torch.no_grad()
def test_where_the_width_of_the_input_is_used_otherwise_the_heads_go_with_the_stream() -> None:
    model = make(Divided())
    groups = nni_topo.dependency_groups(model, IMAGES, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert groups.skipped == {"leave": "it gives the model's output"}
    masks = nni_topo.create_pruner("random", copy.deepcopy(model), groups).compress()[1]
    dense, masked = (each(model, IMAGES, masks) for each in (nni_topo.to_dense, nni_topo.masked_model))
    torch.testing.assert_close(dense(3 * IMAGES), masked(3 * IMAGES), rtol=1e-12, atol=1e-12)
    assert type(dense.attention) is Divided
    assert (dense.attention.count, dense.enter[0].out_channels) == (HEADS // 2, WIDTH // 2)


@torch.no_grad()
def test_what_is_saved_pickled_or_copied_computes_the_same(tmp_path) -> None:
    model = make(Joint())
    dense, _ = pruned(model)
    expected = dense(IMAGES)
    nni_topo.save(dense, tmp_path / "dense.pt")
    loaded = nni_topo.load(tmp_path / "dense.pt", model)
    assert torch.equal(loaded(IMAGES), expected)
    assert type(loaded.attention) is type(dense.attention)
    for again in (pickle.loads(pickle.dumps(dense)), copy.deepcopy(dense)):
        assert torch.equal(again(IMAGES), expected)
        assert type(again.attention) is type(dense.attention)
