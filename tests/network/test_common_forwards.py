"""What forwards of other packages do beside computing: mask by minus infinity, cache what they compute from sizes."""

from __future__ import annotations

import functools
import gc
import math
from dataclasses import dataclass

import pytest
import torch
from einops import einsum, pack, parse_shape, rearrange, reduce, repeat, unpack
from einops.layers.torch import Rearrange, Reduce
from speedup_nets import l1_masks, same_output
from torch import nn

import nni_topo
from nni_topo.network.graph.traced_int import TracedInt

IDS = torch.randint(0, 50, (64, 12), generator=torch.Generator().manual_seed(0))


class Language(nn.Module):
    """A causal language model, whose mask is a buffer, a plain attribute, or an input with the padding."""

    def __init__(self, place, value):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.place, self.value = nn.Embedding(50, 32), place, value
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(2))
        self.head = nn.Linear(32, 50)
        mask = torch.full((12, 12), value).triu(1)
        if place == "buffer":
            self.register_buffer("mask", mask, persistent=False)
        elif place == "attribute":
            self.mask = mask

    def forward(self, ids, padding=None):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding) if self.place == "input" else layer(x, src_mask=self.mask)
        return self.head(x)

    def inputs(self):
        if self.place != "input":
            return {"ids": IDS}
        padding = torch.zeros(64, 12)
        padding[::3, 9:] = self.value
        return {"ids": IDS, "padding": padding}


@pytest.mark.parametrize("place", ["buffer", "attribute", "input"])
def test_a_mask_of_minus_infinity_gives_the_network_that_a_large_negative_one_gives(place):
    shrunk = {}
    for value in (-math.inf, -1e9):
        model = Language(place, value).eval()
        inputs = model.inputs()
        batches = [{name: part[at : at + 16] for name, part in inputs.items()} for at in range(0, 64, 16)]
        shrunk[value] = nni_topo.shrink(model, batches, {"flops": 0.7}, distill=False, progress=False)
    hidden = [layer.linear1.out_features for layer in shrunk[-math.inf].layers]
    assert max(hidden) < 64
    assert hidden == [layer.linear1.out_features for layer in shrunk[-1e9].layers]
    few = {name: part[:3] for name, part in model.inputs().items()}
    same_output(shrunk[-math.inf], shrunk[-1e9], *few.values())


def test_an_infinite_input_of_a_layer_is_an_error_that_names_the_layer():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    images = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    images[20, 0] = -math.inf
    with pytest.raises(nni_topo.errors.DataError, match=r"must be finite, .*\(0\.weight\)"):
        nni_topo.shrink(model, images.split(16), {"flops": 0.5}, distill=False, progress=False)


class Convolved(nn.Module):
    """Two convolutions with 16 channels, whose output a function averages over the pixels."""

    def __init__(self, function, **parts):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head, self.function, self.heads = nn.Linear(16, 4), function, 4
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.head(self.function(self, self.two(self.one(x).relu()).relu()))


def halved(model, images, others):
    """Remove half of the channels of all convolutions, and compare with the masked network on other images, too."""
    groups = nni_topo.dependency_groups(model, images, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    masks = l1_masks(model, groups)
    dense = nni_topo.to_dense(model, images, masks)
    masked = nni_topo.masked_model(model, images, masks)
    for each in (images, others):
        same_output(dense, masked, each)
    return dense


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def packed(x):
    both, shapes = pack([x, 2 * x], "b c *")
    return unpack(both, shapes, "b c *")[1]


EINOPS = {
    "reduce": lambda _, x: reduce(x, "b c h w -> b c", "mean"),
    "tokens": lambda _, x: rearrange(x, "b c h w -> b (h w) c").mean(1),
    "heads of an attribute": lambda net, x: rearrange(
        rearrange(x, "b (h d) y x -> b h (y x) d", h=net.heads), "b h n d -> b n (h d)"
    ).mean(1),
    "parts": lambda _, x: reduce(reduce(x, "b c (h p) (w q) -> b c h w", "max", p=2, q=2), "b c h w -> b c", "mean"),
    "parsed": lambda _, x: rearrange(
        rearrange(x, "b c h w -> (b h w) c"), "(b h w) c -> b c h w", **parse_shape(x, "b _ h w")
    ).mean((2, 3)),
    "repeat": lambda _, x: (x * repeat(x.mean((2, 3)).sigmoid(), "b c -> b c h w", h=x.shape[2], w=x.shape[3])).mean(
        (2, 3)
    ),
    "einsum": lambda _, x: einsum(x, x.sigmoid(), "b c h w, b c h w -> b c") / 64,
    "pack": lambda _, x: packed(x).mean((2, 3)),
    "layer": lambda net, x: net.average(net.flat(net.split(x))),
}
LAYERS = {
    "split": Rearrange("b (h d) y x -> b h y x d", h=4), "flat": Rearrange("b h y x d -> b (y x) (h d)"),
    "average": Reduce("b n c -> b c", "mean"),
}  # fmt: skip


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("name", EINOPS)
@pytest.mark.quick_every(3)
def test_networks_with_einops_lose_half_of_their_channels(name, has_run):
    model, given = Convolved(EINOPS[name], **LAYERS).eval(), images(2, 3, 8, 8)
    if has_run:  # which fills the caches of einops
        model(given)
    dense = halved(model, given, images(3, 3, 12, 16))
    assert (dense.one.out_channels, dense.two.out_channels) == (8, 8)


@functools.lru_cache
def sizes_of(samples, channels, pixels):
    return samples, channels * 1, pixels


@functools.cache
def doubled(size):
    return 2 * size


@dataclass(frozen=True)
class Sizes:
    channels: int
    pixels: int


@functools.cache
def both(sizes):
    return sizes.channels, sizes.pixels


def behind_another(function):
    cached = functools.cache(function)

    @functools.wraps(function)
    def call(*args):
        return cached(*args)

    return call


@behind_another
def in_closure(channels, pixels):
    return channels, pixels


class Cached:
    @staticmethod
    @functools.cache
    def static(channels, pixels):
        return channels, pixels

    @functools.lru_cache(8)  # noqa: B019
    def method(self, channels, pixels):
        return channels, pixels


CACHED, LISTED, KEPT, SEEN = Cached(), [functools.cache(lambda *sizes: sizes)], {}, []


def kept(channels, pixels):
    if (channels, pixels) not in KEPT:
        KEPT[channels, pixels] = channels * 1, pixels * 1
    SEEN.append((channels, {"pixels": pixels}))
    return KEPT[channels, pixels]


def caught(channels, pixels):
    try:
        return doubled(channels) // 2, pixels
    except BaseException:
        return 16, pixels


def applied(function, *sizes):
    return function(*sizes)


def chosen(name):
    return {"sizes": sizes_of}[name]


SIZED = {
    "one for both": lambda channels, pixels: (doubled(channels) // 2, doubled(pixels) // 2),
    "several arguments": lambda channels, pixels: sizes_of(1, channels, pixels)[1:],
    "an object": lambda channels, pixels: both(Sizes(channels, pixels)),
    "in a closure": in_closure,
    "static": Cached.static,
    "a method": lambda *sizes: CACHED.method(*sizes),
    "in a list": lambda *sizes: LISTED[0](*sizes),
    "all errors are caught": caught,
    "passed on": lambda *sizes: applied(Cached.static, *sizes),
    "in a partial": lambda *sizes: functools.partial(sizes_of, 1)(*sizes)[1:],
    "returned": lambda *sizes: chosen("sizes")(1, *sizes)[1:],
}


@pytest.mark.parametrize("name", SIZED)
def test_functions_of_sizes_that_cache_their_results_are_traced(name):
    """There are as many pixels as channels, 16, and neither may stand for the other."""

    def averaged(_, x):
        channels, pixels = SIZED[name](x.shape[1], x.shape[2] * x.shape[3])
        return x.view(x.shape[0], channels, pixels).mean(2)

    SIZED[name](16, 16)  # plain numbers of an earlier run
    model, given = Convolved(averaged).eval(), images(2, 3, 4, 4)
    dense = halved(model, given, images(3, 3, 4, 8))
    assert (dense.one.out_channels, dense.two.out_channels) == (8, 8)


@pytest.mark.slow
def test_objects_that_the_collector_leaves_out_stay_left_out():
    model = Convolved(lambda _, x: kept(*x.shape[1:3]) and rearrange(x, "b c h w -> b c (h w)").mean(2)).eval()
    model(images(2, 3, 4, 4))
    gc.freeze()
    before = gc.get_freeze_count()
    groups = nni_topo.dependency_groups(model, images(2, 3, 4, 4), [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert "one" in groups[0]["op_names"]
    assert gc.get_freeze_count() > before - 100  # a frozen object that is freed counts no longer
    assert {type(size) for sizes in (*KEPT, *KEPT.values()) for size in sizes} == {int}


@pytest.mark.slow
def test_caches_and_containers_hold_plain_numbers_afterwards():
    KEPT.clear()
    SEEN.clear()
    LISTED[0].cache_clear()
    looked_up = {16: 0.5, 8: 2.0}

    def averaged(net, x):
        kept(*x.shape[1:3])
        LISTED[0](*x.shape)
        net.last = x.shape
        return x.mean((2, 3)) * looked_up[x.shape[1]]

    model, given = Convolved(averaged).eval(), images(2, 3, 4, 4)
    expected = model(given)
    before = LISTED[0].cache_info().currsize
    groups = nni_topo.dependency_groups(model, given, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert before == 1
    assert LISTED[0].cache_info().currsize <= 3  # that of the samples that it ran on
    assert type(LISTED[0]) is type(functools.cache(len))
    assert "one" in groups[0]["op_names"]
    del groups  # whose analysis holds a graph
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is TracedInt]
    assert {type(size) for sizes in (*KEPT, *KEPT.values()) for size in sizes} == {int}
    assert {type(channels) for channels, _ in SEEN} == {type(size["pixels"]) for _, size in SEEN} == {int}
    assert torch.equal(model(given), expected)
