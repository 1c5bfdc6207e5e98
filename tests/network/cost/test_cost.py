from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torchvision
from attention_nets import WIDTH, Fused
from speedup_nets import l1_masks
from tied_nets import Mirrored, TiedConvolutions, TiedNorms

from nni_topo import to_dense, zoo
from nni_topo.network.cost.cost import Cost, NetworkCost
from nni_topo.network.layers.kinds import WEIGHTED, channel_dimension
from nni_topo.runs.widths import inner_layers, pruning_config


def kept_of(model, masks):
    kept = {}
    for name, targets in masks.items():
        dim = channel_dimension(model.get_submodule(name))
        kept[name] = targets["weight"].transpose(0, dim).flatten(1).any(1).numpy()
    return kept


def real_cost(model, images):
    sizes = [0]

    def note(module, inputs, output):
        sizes.append((inputs[0].numel() + output.numel()) // len(output))

    handles = [each.register_forward_hook(note) for each in model.modules() if isinstance(each, WEIGHTED)]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    params = zoo.count_params(model)
    return Cost(zoo.count_macs(model, images), params, 4 * (params + max(sizes)))


def short_mobilenet():
    """Three of a MobileNet's blocks: without an expansion, with one and a shortcut, with one and a stride."""
    torch.manual_seed(0)
    blocks = [[1, 16, 1, 1], [6, 16, 1, 1], [6, 24, 1, 2]]
    return torchvision.models.MobileNetV2(10, inverted_residual_setting=blocks)


NETS = {
    "small_cnn": (
        lambda: zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0),
        (1, 8, 8),
    ),
    "resnet20": (
        lambda: zoo.create_model("resnet20", num_classes=10, in_channels=3, image_size=16, seed=0, width=0.5),
        (3, 16, 16),
    ),
    "mobilenet": (
        short_mobilenet,
        (3, 32, 32),
    ),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.quick_every(2)
def test_the_cost_is_that_of_the_dense_model(name):
    make, shape = NETS[name]
    model, images = make().eval(), torch.randn(2, *shape)
    config = pruning_config(model, images, dict.fromkeys(inner_layers(model, images), 0.3))
    masks = l1_masks(model, config)
    dense = to_dense(model, images, masks, check=False)
    assert NetworkCost.on(model, images)(kept_of(model, masks)) == real_cost(dense, images)


def test_a_channel_that_another_layer_still_puts_out_stays():
    make, shape = NETS["resnet20"]
    model, images = make(), torch.randn(1, *shape)
    cost = NetworkCost.on(model, images)
    half = np.arange(8) % 2 == 0
    stem = next(name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d))
    assert cost({stem: half}) == cost({})


def test_transposed_convolutions_compute_at_their_inputs():
    model = torch.nn.Sequential(torch.nn.ConvTranspose2d(2, 4, 2, stride=2), torch.nn.Conv2d(4, 3, 1))
    images = torch.randn(1, 2, 5, 5)
    assert NetworkCost.on(model, images)({}) == real_cost(model, images)


GROUPED = {
    "two groups, pruned": (torch.nn.Conv2d(8, 12, 3, groups=2), [True, True, True, False] * 2, [True, False] * 6),
    "two outputs a channel, pruned": (
        torch.nn.Conv2d(4, 8, 3, groups=4),
        [True, False, True, True],
        [True, True, False, False, True, True, True, True],
    ),
    "one input channel": (torch.nn.Conv2d(1, 8, 3), [True], [True, False] * 4),
}


@pytest.mark.parametrize("name", GROUPED)
def test_a_grouped_convolution_reads_one_groups_channels(name):
    """Products per output: kernel times the input channels of one group; the counts are torch's, not the class's."""
    layer, entering, leaving = GROUPED[name]
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, layer.in_channels, 1), layer, torch.nn.Conv2d(layer.out_channels, 2, 1)
    )
    images = torch.randn(1, 3, 6, 6)
    masks = {
        index: {"weight": torch.tensor(kept)[:, None, None, None].expand_as(model[int(index)].weight).float()}
        for index, kept in (("0", entering), ("1", leaving))
    }
    dense = to_dense(model, images, masks)
    kept = {"0": np.array(entering), "1": np.array(leaving)}
    found = NetworkCost.on(model, images)
    assert found(kept) == real_cost(dense, images)
    assert found({}) == real_cost(model, images)
    assert found.widths(kept)["1"] == (dense[1].in_channels, dense[1].out_channels)


@pytest.mark.parametrize(
    ("make", "removed"),
    [
        (TiedConvolutions, {"stem": [1, 4], "one": [1, 4], "two": [1, 4]}),
        (TiedNorms, {"one": [0, 5], "two": [0, 5]}),
        (Mirrored, {"outer": [2], "opening": [2], "inner": [0, 7]}),
    ],
)
def test_a_weight_that_several_modules_share_counts_once(make, removed):
    model, images = make().eval(), torch.rand(2, 3, 8, 8)
    unpruned, kept = real_cost(model, images), {}
    for name, channels in removed.items():
        kept[name] = ~np.isin(np.arange(model.get_submodule(name).out_channels), channels)
    dense = to_dense(model, images, NetworkCost.on(model, images).masks(kept))
    cost = NetworkCost.on(model, images)
    assert cost({}) == unpruned
    assert cost(kept) == real_cost(dense, images)


def test_costs_are_of_the_dense_network_where_groups_would_keep_unequally_many_channels():
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.Conv2d(4, 6, 1, groups=2), torch.nn.Conv2d(6, 2, 1))
    cost = NetworkCost.on(model, torch.randn(1, 4, 2, 2))({"0": np.array([True, True, True, False])})
    # The group with a removed channel gets it back: at four places 4 * 4, 6 * 2 and 6 * 2; biases are 4, 6 and 2.
    assert dataclasses.astuple(cost) == (4 * 40, 40 + 12, 4 * (52 + 4 * 10))
    assert {type(each) for each in dataclasses.astuple(cost)} == {int}


class Windows(torch.nn.Module):
    """Attention within each of three windows of two tokens, which are samples to its layers."""

    def __init__(self):
        super().__init__()
        self.enter, self.attention, self.head = torch.nn.Linear(5, WIDTH), Fused(), torch.nn.Linear(WIDTH, 2)

    def forward(self, x):
        x = self.enter(x)
        return self.head(x + self.attention(x.reshape(-1, 2, WIDTH)).reshape(x.shape))


def test_a_query_is_multiplied_with_the_keys_of_its_window():
    model, rows = Windows().eval(), torch.randn(4, 6, 5)
    products = 6 * 5 * WIDTH + 6 * 3 * WIDTH * WIDTH + 2 * 6 * 2 * WIDTH + 6 * WIDTH * WIDTH + 6 * WIDTH * 2
    assert NetworkCost.on(model, rows)({}).macs == zoo.count_macs(model, rows) == products


class Cells(torch.nn.Module):
    """Two recurrent cells, which keep all units."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.GRUCell(6, 4), torch.nn.RNNCell(4, 5)

    def forward(self, x):
        return self.two(self.one(x))


def test_what_keeps_all_units_costs_its_products_and_its_parameters():
    params = 3 * 4 * (6 + 4 + 2) + 5 * (4 + 5 + 2)
    cost = NetworkCost.on(Cells().double(), torch.randn(2, 6, dtype=torch.float64))({})
    assert cost == Cost(3 * 4 * (6 + 4) + 5 * (4 + 5), params, 8 * params)


def test_masks_are_of_the_layers_that_lose_channels_and_of_all_of_their_rows():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 5, 1, bias=False), torch.nn.Conv2d(5, 2, 1)
    )
    cost = NetworkCost.on(model, torch.randn(1, 3, 2, 2))
    masks = cost.masks({"0": np.array([True, False, True, True]), "1": np.ones(5, dtype=bool)})
    assert {name: list(targets) for name, targets in masks.items()} == {"0": ["weight", "bias"]}
    assert masks["0"]["bias"].tolist() == [1, 0, 1, 1]
    assert torch.equal(masks["0"]["weight"], torch.tensor([1.0, 0, 1, 1]).view(4, 1, 1, 1).expand(4, 3, 1, 1))
    assert cost.widths({"0": np.array([True, False, True, True])}) == {"0": (3, 3), "1": (3, 5), "2": (5, 2)}
