"""Layers, norms and modules of somebody else's making."""

from __future__ import annotations

import copy

import pytest
import torch
from nni.compression.speedup.replacer import Replacer
from speedup_nets import filter_mask
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import nni_topo
from nni_topo.network import register_module
from nni_topo.network.layers import kinds
from nni_topo.network.layers.kinds import RULES, norm_scale, through_norms, weights_left
from nni_topo.network.layers.original_width import OriginalWidthLayerNorm, channel_dim

CONVOLUTIONS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


class SameConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(functional.pad(x, (1, 1, 1, 1)))


class DividingConv(nn.Conv2d):
    """It divides by a mean over all inputs, removed ones too."""

    def forward(self, x):
        return super().forward(x) / (1 + x.mean(1, keepdim=True).abs())


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class NormAndMore(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


class Gain(nn.Module):
    """One number a channel, applied in a loop over values that no tracer follows."""

    def __init__(self, channels):
        super().__init__()
        self.gains = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, images):
        return torch.stack([image * self.gains[:, None, None] for image in images if float(image.abs().sum()) >= 0])


def zeroed_outputs(model, layer, gone, images):
    def hook(_, __, output):
        return output.index_fill(1, torch.tensor(gone), 0)

    with torch.no_grad(), layer.register_forward_hook(hook):
        return model(images)


def random_images():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("conv", [SameConv, nn.Conv2d])
def test_layers_of_derived_classes_are_pruned_as_theirs(conv):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8, 3), ChannelsFirst(8, elementwise_affine=True), conv(8, 4, 3)).double()
    groups = nni_topo.dependency_groups(model, random_images(), CONVOLUTIONS)
    assert [entry["op_names"] for entry in groups] == [["0"]]
    assert nni_topo.RandomPruner(model, groups).compress()[1]["0"]["weight"].mean() == 0.5


def test_a_norm_of_channels_first_counts_what_is_gone():
    torch.manual_seed(0)
    model = nn.Sequential(SameConv(3, 8, 3), ChannelsFirst(8), nn.Conv2d(8, 4, 1)).double()
    dense = nni_topo.to_dense(model, random_images(), {"0": filter_mask(model[0], [1, 4, 5])})
    assert isinstance(dense[1], OriginalWidthLayerNorm)
    assert dense[1].dim == 1
    # The norm's shift is zero, but what it makes of a zero isn't: the channel goes with all that is made of it.
    model[2].weight.data[:, [1, 4, 5]] = 0
    torch.testing.assert_close(dense(random_images()), zeroed_outputs(model, model[0], [1, 4, 5], random_images()))


def test_where_a_norm_has_its_channels_is_tried_out():
    assert channel_dim(ChannelsFirst(5)) == 1
    assert channel_dim(nn.LayerNorm(5)) == -1
    assert channel_dim(NormAndMore(5)) is None
    assert channel_dim(nn.LayerNorm((5, 2))) is None


def test_a_layer_that_needs_all_inputs_keeps_those_before_it_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), DividingConv(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    groups = nni_topo.dependency_groups(model, random_images().float(), CONVOLUTIONS)
    assert [entry["op_names"] for entry in groups] == [["2"]]
    assert groups.skipped["0"] == "the result of an operation depends on removed channels (2: DividingConv)"


def test_a_module_with_a_rule_is_cut_by_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Gain(8), nn.Conv2d(8, 2, 1)).double()
    assert not nni_topo.dependency_groups(model, random_images(), CONVOLUTIONS)

    def shorten(module, kept):
        module.gains = nn.Parameter(module.gains.detach()[kept])

    register_module(Gain, shorten)
    try:
        again = nn.Sequential(*model)
        assert nni_topo.dependency_groups(again, random_images(), CONVOLUTIONS).skipped.keys() == {"2"}
        dense = nni_topo.to_dense(again, random_images(), {"0": filter_mask(again[0], [0, 3])})
        assert len(dense[1].gains) == 6
        torch.testing.assert_close(dense(random_images()), zeroed_outputs(again, again[0], [0, 3], random_images()))
    finally:
        del RULES[Gain]


def test_replacers_of_nni_run_before_the_cut():
    class ToSilu(Replacer):
        def replace_modules(self, speedup):
            self.kept = [each.tolist() for each in speedup.kept("2")]
            speedup.bound_model[1] = nn.SiLU()

    torch.manual_seed(0)
    model, replacer = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)), ToSilu()
    masks = {"0": filter_mask(model[0], [0, 3])}
    dense = nni_topo.to_dense(model, random_images().float(), masks, customized_replacers=[replacer], check=False)
    assert isinstance(dense[1], nn.SiLU)
    assert replacer.kept == [[1, 2, 4, 5, 6, 7], [0, 1]]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_takes_fewer_channels_in(kind, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body = nn.Linear(4, 8), kind(8, 6, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x):
            return self.body(self.embed(x))[0]

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(2, 5, 4, dtype=torch.float64)
    dense = nni_topo.to_dense(model, x, {"embed": filter_mask(model.embed, [1, 6])})
    assert dense.body.input_size == 6

    def hook(_, __, output):
        return output.index_fill(-1, torch.tensor([1, 6]), 0)

    with torch.no_grad(), model.embed.register_forward_hook(hook):
        torch.testing.assert_close(dense(x), model(x))
    nni_topo.save(dense, tmp_path / "dense.pt")
    assert torch.equal(nni_topo.load(tmp_path / "dense.pt", Net)(x), dense(x))


class Shuffle(nn.Module):
    """A unit of ShuffleNet: two halves, of which one goes by, and a shuffle."""

    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(nn.Conv2d(half, half, 1), nn.BatchNorm2d(half), nn.ReLU())

    def forward(self, x):
        one, other = x.chunk(2, 1)
        x = torch.cat([one, self.branch(other)], 1)
        batch, channels, height, width = x.size()
        halves = x.view(batch, 2, channels // 2, height, width)
        return halves.transpose(1, 2).contiguous().view(batch, -1, height, width)


def test_channels_are_shuffled_in_the_dense_models_own_order():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), Shuffle(16), Shuffle(16), nn.Conv2d(16, 4, 1)).double().eval()
    groups = nni_topo.dependency_groups(model, random_images(), CONVOLUTIONS)
    assert groups.skipped.keys() == {"3"}
    _, masks = (pruner := nni_topo.RandomPruner(model, groups, seed=3)).compress()
    pruner.unwrap_model()
    dense = nni_topo.to_dense(model, random_images(), masks)
    # Compared by `to_dense` itself; halves that lost different channels bring some back, never most.
    assert all(dense.get_submodule(name).out_channels <= model.get_submodule(name).out_channels - 2 for name in masks)


def drawn(channels: int, **knobs: bool) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(channels)
    norm = nn.BatchNorm2d(channels, **knobs).double().eval()
    if norm.running_var is not None:
        norm.running_mean.copy_(torch.randn(channels, generator=generator))
        norm.running_var.copy_(torch.rand(channels, generator=generator))
    for parameter in norm.parameters():
        parameter.data.copy_(torch.randn(channels, generator=generator))
    return norm


@pytest.mark.parametrize("affine", [True, False])
def test_norms_do_to_constants_what_they_do_to_images(affine):
    norms = [drawn(4, affine=affine), drawn(4, affine=True)]
    constants = torch.tensor([0.5, -1.0, 100.0, 0.0])
    with torch.no_grad():
        expected = nn.Sequential(*norms)(constants.double().view(1, -1, 1, 1)).flatten()
        steeper = nn.Sequential(*norms)(constants.double().add(1.0).view(1, -1, 1, 1)).flatten()
    scale, offset = through_norms(norms, constants)
    torch.testing.assert_close(offset, expected)
    torch.testing.assert_close(scale, steeper - expected)


def test_norm_without_running_statistics_has_no_scale():
    norm = drawn(3, track_running_stats=False)
    assert norm_scale(norm) is None
    scale, offset = through_norms([norm], torch.arange(3.0))
    assert scale.tolist() == [1.0, 1.0, 1.0]
    assert offset.tolist() == [0.0, 1.0, 2.0]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[1:, :, 0] = 0.0
        model[3].weight[0, 1:3] = 0.0
        model[3].bias.zero_()
    return model


def train(model: nn.Module, optimizer: type[torch.optim.Optimizer], **knobs: float) -> None:
    steps = optimizer(model.parameters(), lr=0.1, weight_decay=0.1, **knobs)
    for _ in range(5):
        steps.zero_grad()
        model(torch.randn(8, 1, 3, 3)).square().sum().backward()
        steps.step()


@pytest.mark.parametrize(("optimizer", "knobs"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
def test_zeros_stay_and_everything_else_learns(optimizer, knobs):
    model, before = net(), net()
    with nni_topo.zeros_held(model):
        train(model, optimizer, **knobs)
    for index in (0, 3):
        was, now = before[index].weight, model[index].weight
        assert torch.equal(was == 0, now == 0)
        assert not (was == now)[was != 0].any()
    assert model[3].bias.ne(0).all()
    assert weights_left(model) == sum(p.numel() for p in model.parameters()) - 9 - 2


def test_afterwards_zeros_learn_again():
    model = net()
    with nni_topo.zeros_held(model):
        pass
    train(model, torch.optim.SGD)
    assert bool(model[0].weight.all())
    assert bool(model[3].weight.all())


def test_copies_and_frozen_weights_are_left_as_they_are():
    model = net()
    model[0].weight.requires_grad_(False)
    with nni_topo.zeros_held(model):
        copied = copy.deepcopy(model)
        train(copied, torch.optim.SGD)
    assert torch.equal(copied[0].weight, model[0].weight)


def test_an_optimizer_of_whole_matrices_moves_no_zero():
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        layer.weight[torch.rand(8, 8) < 0.5] = 0.0
    kept = layer.weight != 0
    steps = torch.optim.Muon(layer.parameters(), lr=0.1)

    def step() -> None:
        steps.zero_grad()
        layer(torch.randn(16, 8)).square().sum().backward()
        steps.step()

    with nni_topo.zeros_held(layer):
        step()
    assert torch.equal(layer.weight != 0, kept)
    step()
    assert not torch.equal(layer.weight != 0, kept)


LSTM_ROWS = ("weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
# By layer: its output channels, the parameter that is masked, those with a row for each channel, whether it has a bias,
# the dimension of output channels in the weight, that of channels in what enters and leaves, and whether it can be cut.
FACTS = {
    "convolution": (nn.Conv2d(3, 4, 1), (4, "weight", ("bias",), True, 0, 1, True)),
    "depth-wise": (nn.Conv1d(4, 8, 1, groups=4, bias=False), (8, "weight", ("bias",), False, 0, 1, True)),
    "transposed": (nn.ConvTranspose2d(3, 4, 1), (4, "weight", ("bias",), True, 1, 1, True)),
    "linear": (nn.Linear(3, 5, bias=False), (5, "weight", ("bias",), False, 0, -1, True)),
    "embedding": (nn.Embedding(3, 6), (6, "weight", ("bias",), False, 1, -1, True)),
    "attention": (nn.MultiheadAttention(6, 2), (18, "in_proj_weight", ("in_proj_bias",), True, 0, -1, False)),
    "attention of others": (
        nn.MultiheadAttention(6, 2, kdim=3, bias=False),
        (None, "in_proj_weight", ("in_proj_bias",), False, 0, -1, False),
    ),
    "LSTM": (nn.LSTM(3, 5), (20, "weight_ih_l0", LSTM_ROWS, True, 0, -1, False)),
    "GRU": (nn.GRU(3, 5, bias=False), (15, "weight_ih_l0", ("weight_hh_l0",), False, 0, -1, False)),
    "LSTM with a projection": (
        nn.LSTM(3, 5, proj_size=2),
        (None, "weight_ih_l0", ("weight_hh_l0", "weight_hr_l0", *LSTM_ROWS[1:]), True, 0, -1, False),
    ),
    "activation": (nn.ReLU(), (None, "weight", ("bias",), False, 0, 1, True)),
    "norm": (nn.BatchNorm2d(4), (None, "weight", ("bias",), True, 0, 1, True)),
    "response norm": (nn.LocalResponseNorm(2), (None, "weight", ("bias",), False, 0, 1, True)),
    "distances": (nn.Bilinear(2, 2, 3), (None, "weight", ("bias",), True, 0, 1, False)),
    "computed weight": (
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)),
        (5, "weight", ("bias",), True, 0, -1, False),
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_layers_by_their_kind(name):
    layer, facts = FACTS[name]
    assert facts == (
        kinds.output_channels(layer),
        kinds.weight_name(layer),
        kinds.row_names(layer),
        kinds.has_bias(layer),
        kinds.channel_dimension(layer),
        kinds.feature_dimension(layer),
        kinds.can_be_cut(layer),
    )
    is_plain = "weight" in dict(layer.named_parameters()) or not list(layer.parameters())
    assert kinds.weight_is_computed(layer) is not is_plain
    assert kinds.is_depthwise(layer) is (name == "depth-wise")
    assert kinds.is_recurrent(layer) is (name in ("LSTM", "GRU"))
    assert kinds.has_channels(layer) is (
        facts[0] is not None or name in ("attention of others", "LSTM with a projection")
    )


@pytest.mark.parametrize(
    ("layer", "is_depthwise"),
    [
        (nn.Conv2d(1, 4, 1), False),  # of one channel
        (nn.Conv2d(4, 4, 1, groups=2), False),
        (nn.Conv2d(2, 2, 1, groups=2), True),
        (nn.ConvTranspose1d(4, 4, 1, groups=4), True),
        (nn.Linear(1, 1), False),
    ],
)
def test_a_depthwise_convolution_filters_each_of_several_channels(layer, is_depthwise):
    assert kinds.is_depthwise(layer) is is_depthwise


@pytest.mark.parametrize(
    ("norm", "has_no_width", "is_plain", "names"),
    [
        (nn.BatchNorm2d(4), False, True, {"weight", "bias"}),
        (nn.BatchNorm2d(4, affine=False), False, True, set()),
        (nn.BatchNorm2d(4, affine=False, track_running_stats=False), True, True, set()),
        (nn.InstanceNorm2d(4), True, False, set()),
        (nn.InstanceNorm2d(4, affine=True), False, False, {"weight", "bias"}),
        (nn.InstanceNorm2d(4, track_running_stats=True), False, False, set()),
        (nn.LayerNorm(4, bias=False), False, False, {"weight"}),
        (nn.GroupNorm(2, 4, affine=False), False, False, set()),
        (nn.RMSNorm(4), False, False, {"weight"}),
        (type("Own", (nn.BatchNorm2d,), {})(4), False, False, {"weight", "bias"}),
    ],
)
def test_facts_of_norms(norm, has_no_width, is_plain, names):
    assert kinds.has_no_width(norm) is has_no_width
    assert kinds.is_plain_norm(norm) is is_plain
    assert set(kinds.per_channel_names(norm)) == names
    assert kinds.is_normalizing(norm)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 2),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.ConvTranspose2d(3, 4, 2),
        nn.ConvTranspose1d(6, 4, 1, groups=2),
        nn.Linear(3, 4),
        nn.Embedding(3, 4),
    ],
)
def test_masks_of_channels_are_spread_over_the_weight_and_read_from_it(layer):
    kept = torch.tensor([True, False, False, True])
    mask = kinds.spread(layer, kept)
    assert (mask.shape, mask.dtype) == (layer.weight.shape, torch.float32)
    assert kinds.spread(layer, kept, torch.bool).dtype == torch.bool
    with torch.no_grad():
        layer.weight.fill_(1.0).mul_(mask)
        if not isinstance(layer, nn.Embedding):
            layer.bias.zero_()
    shape = {
        nn.Linear: (2, 3),
        nn.Embedding: (2,),
        nn.Conv2d: (2, layer.weight.shape[1] * getattr(layer, "groups", 1), 5, 5),
    }
    shape |= {nn.ConvTranspose2d: (2, 3, 5, 5), nn.ConvTranspose1d: (2, 6, 5)}
    entering = torch.ones(shape[type(layer)], dtype=torch.int64 if isinstance(layer, nn.Embedding) else torch.float32)
    leaving = layer(entering).movedim(kinds.feature_dimension(layer), 0).flatten(1)
    assert leaving.ne(0).any(1).tolist() == kept.tolist()
    assert kinds.kept_channels(layer, {"weight": mask}).tolist() == kept.tolist()
    assert kinds.kept_channels(layer, {"bias": kept}) is None
    assert kinds.kept_channels(nn.ReLU(), {"weight": mask}) is None
    rows = kinds.by_output(mask, layer)
    assert rows.flatten(1).ne(0).all(1).tolist() == kept.tolist()
    assert torch.equal(kinds.of_output(rows, layer), mask)


def test_products_of_a_recurrent_layer_are_those_of_its_weights():
    assert kinds.recurrent_products(nn.LSTM(3, 5)) == 20 * 3 + 20 * 5
    assert kinds.recurrent_products(nn.GRUCell(3, 5)) == 15 * 3 + 15 * 5


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("a.b", torch.ones(2), True),
        ("a.b", torch.ones(1), False),
        ("a.b", torch.ones(2, dtype=torch.int64), False),
        (f"a.{kinds.HEADS_TAKEN}", torch.ones(2, dtype=torch.int64), True),
        ("a.b", None, False),
        ("a.b", [1.0, 2.0], False),
    ],
)
def test_tensors_of_several_floats_can_follow_channels(name, value, told):
    assert kinds.can_follow(name, value) is told


def test_channels_that_enter_are_those_of_inputs():
    assert (kinds.entering_channels(nn.MultiheadAttention(6, 2)), kinds.entering_channels(nn.Linear(3, 5))) == (6, 3)


class Own1D(Conv1D):
    """One of somebody else's."""


class Root(nn.Module):
    """The norm of LLaMA."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width)), 1e-6

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = Conv1D(8, 4), Root(8), Conv1D(3, 8)
        self.other, self.root = Own1D(3, 3), Root(3)
        self.tied, self.again = self.norm, nn.ModuleList([self.last])

    def forward(self, x):
        return self.root(self.other(self.again[0](self.tied(self.norm(self.first(x)).relu()))))


def test_plain_layers_stand_in_place_of_those_of_transformers():
    model, x = Blocks().eval(), torch.randn(2, 5, 4)
    model.first.weight.requires_grad_(False)
    model.norm.train()
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    assert kinds.is_transposed_linear(model.first)
    assert kinds.has_channels(model.first)
    assert not kinds.is_transposed_linear(model.other)
    plain = nni_topo.as_torch_layers(model)
    kinds_found = {name: type(getattr(plain, name)) for name in ("first", "norm", "last", "other", "root")}
    assert list(kinds_found.values()) == [nn.Linear, nn.RMSNorm, nn.Linear, Own1D, nn.RMSNorm]
    assert plain.tied is plain.norm
    assert plain.again[0] is plain.last
    assert sum(each.numel() for each in plain.parameters()) == sum(each.numel() for each in model.parameters())
    assert (plain.first.in_features, plain.first.out_features) == (4, 8)
    assert [each.weight.requires_grad for each in (plain.first, plain.last)] == [False, True]
    assert plain.last.weight.is_contiguous()
    assert [each.training for each in (plain.first, plain.norm, plain.last, plain.root)] == [False, True, False, False]
    torch.testing.assert_close(plain(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.first) is Conv1D


def test_a_model_that_is_such_a_layer_itself_stays():
    for model in (Conv1D(3, 4), Root(4)):
        assert type(nni_topo.as_torch_layers(model)) is type(model)
