"""Values that happen to be zero or constant mask nothing: only masks do."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from speedup_nets import filter_mask, l1_masks, parameters
from torch import nn

from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.constant_channels import (
    ConstantChannels,
    ConstantContribution,
    Reader,
    _choose_constant_channels,
    _zeroed,
    absorb,
    add_to_constant_channels,
    can_absorb,
    constant_contribution,
    constants_read,
    dropped,
    is_bordered,
    norms_of_constants,
    reads_plainly,
)
from nni_topo.speedup import dependency_groups, masked_model, to_dense


def same_output(dense, reference, inputs, tolerance=1e-5):
    with torch.no_grad():
        expected, actual = (copy.deepcopy(model).eval()(*inputs) for model in (reference, dense))
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


class Words(nn.Module):
    """Word, position and segment embeddings, a mask of padding, and an inner layer of twelve."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 10, padding_idx=0)
        self.positions = nn.Embedding(7, 10)
        self.segments = nn.Embedding(2, 10)
        self.norm = nn.LayerNorm(10)
        self.inner = nn.Linear(10, 12)
        self.outer = nn.Linear(12, 10)
        self.head = nn.Linear(10, 3)
        self.register_buffer("order", torch.arange(7)[None])

    def forward(self, ids, segments=None, padding=None):
        segments = torch.zeros_like(ids) if segments is None else segments
        x = self.words(ids) + self.positions(self.order[:, : ids.shape[1]]) + self.segments(segments)
        x = self.norm(x)
        if padding is not None:
            x = x * padding.unsqueeze(-1)
        return self.head((x + self.outer(torch.relu(self.inner(x)))).mean(1))


IDS = torch.randint(1, 11, (2, 7), generator=torch.Generator().manual_seed(0))
ZEROS = torch.zeros_like(IDS)
CALLS = {
    "left out": (IDS,),
    "zero": (IDS, ZEROS),
    "one": (IDS, ZEROS + 1),
    "padded": (IDS * (torch.arange(7) < 4), ZEROS, (torch.arange(7) < 4).float().repeat(2, 1)),
    "only padding": (ZEROS, ZEROS, torch.zeros(2, 7)),
    "one word": (ZEROS + 3, ZEROS, torch.ones(2, 7)),
}


@pytest.mark.parametrize("name", CALLS)
def test_constant_ids_mask_nothing(name):
    model, inputs = Words().eval(), CALLS[name]
    masks = {"inner": filter_mask(model.inner, range(0, 12, 2))}
    dense = to_dense(model, inputs, masks)
    assert dense.inner.out_features == dense.outer.in_features == 6
    assert dense.segments.weight.shape == (2, 10)
    others = CALLS["padded"][: len(inputs)]
    same_output(dense, masked_model(model, others, masks), others)


@pytest.mark.parametrize("name", ["left out", "zero", "one word"])
def test_masked_embeddings_shrink_with_constant_ids(name):
    model, inputs = Words().eval(), CALLS[name]
    model.norm = nn.Identity()
    masks = {
        layer: filter_mask(model.get_submodule(layer), []) for layer in ("words", "positions", "segments", "outer")
    }
    for layer, targets in masks.items():
        targets["weight"].transpose(0, int(layer != "outer"))[[1, 4]] = 0
    dense = to_dense(model, inputs, masks)
    assert [dense.words.embedding_dim, dense.positions.embedding_dim, dense.segments.embedding_dim] == [8, 8, 8]
    assert dense.inner.in_features == dense.head.in_features == 8
    others = CALLS["padded"][: len(inputs)]
    same_output(dense, masked_model(model, others, masks), others)


class Scaled(nn.Module):
    """Branches that start at zero: a layer scale, a norm's weight, a whole layer, and a gate that is closed."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.inner = nn.Conv2d(10, 8, 1)
        self.outer = nn.Conv2d(8, 10, 1)
        self.norm = nn.BatchNorm2d(10)
        self.scale = nn.Parameter(torch.ones(10, 1, 1))
        self.gate = nn.Parameter(torch.ones(()))
        self.register_buffer("constant", torch.zeros(1, 10, 1, 1))
        self.drop = nn.Dropout(1.0)
        self.head = nn.Linear(10, 4)
        for zeroed in {
            "scale": [self.scale],
            "gate": [self.gate],
            "norm": [self.norm.weight, self.norm.bias],
            "layer": [self.outer.weight, self.outer.bias],
            "inner": [self.inner.weight, self.inner.bias],
        }.get(kind, []):
            nn.init.zeros_(zeroed)
        if kind == "dead":
            nn.init.constant_(self.inner.bias, -1e3)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.outer(torch.relu(self.inner(x)))) * self.scale * self.gate
        if self.kind == "dropout":
            y = y + self.drop(x)
        if self.kind == "times zero":
            y = y * 0.0
        if self.kind == "clamped":
            y = y.clamp(max=0.0)
        if self.kind == "compared":
            y = y + (y > 1e6).float()
        if self.kind == "buffer":
            y = y * self.constant
        if self.kind == "full":
            y = y + torch.zeros(x.shape[0], 10, 1, 1)
        return self.head((x + y).mean((2, 3)))


KINDS = [
    "scale",
    "gate",
    "norm",
    "layer",
    "inner",
    "dead",
    "dropout",
    "times zero",
    "clamped",
    "compared",
    "buffer",
    "full",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick_every(3)
def test_zero_branches_mask_nothing(kind):
    model, inputs = Scaled(kind).eval(), (torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)
    masks = {"inner": filter_mask(model.inner, [0, 3, 5])}
    dense = to_dense(model, inputs, masks)
    assert dense.inner.out_channels == dense.outer.in_channels == 5
    assert dense.stem.out_channels == dense.outer.out_channels == dense.head.in_features == 10
    same_output(dense, masked_model(model, inputs, masks), inputs)
    # trained on, the branch counts again: nothing of it may be lost
    for module in (model, dense):
        with torch.no_grad():
            for parameter in (module.scale, module.gate, module.norm.weight):
                parameter.add_(1.0)
    same_output(dense, masked_model(model, inputs, masks), inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick_every(3)
def test_channels_over_zero_branches_shrink(kind):
    model, inputs = Scaled(kind).eval(), (torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)
    masks = {"stem": filter_mask(model.stem, [1, 2]), "outer": filter_mask(model.outer, [1, 2])}
    if kind == "full":
        # a constant of the forward isn't cut, so that its channels stay
        dense = to_dense(model, inputs, masks)
        assert dense.stem.out_channels == 10
        return
    dense = to_dense(model, inputs, masks)
    assert dense.stem.out_channels == dense.outer.out_channels == dense.head.in_features == 8
    same_output(dense, masked_model(model, inputs, masks), inputs)


class Joined(nn.Module):
    """A constant that is joined to pruned channels, and one that nothing else depends on but a comparison."""

    def __init__(self, value):
        super().__init__()
        torch.manual_seed(0)
        self.value = value
        self.first = nn.Linear(5, 8)
        self.second = nn.Linear(10, 4)

    def forward(self, x):
        ones = torch.full((x.shape[0], 2), self.value)
        return self.second(torch.cat([torch.relu(self.first(x)), ones], dim=1))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_joined_constants_stay(value):
    model, inputs = Joined(value).eval(), (torch.rand(2, 5, generator=torch.Generator().manual_seed(0)),)
    masks = {"first": filter_mask(model.first, [0, 3])}
    dense = to_dense(model, inputs, masks)
    assert dense.second.in_features == 8
    same_output(dense, masked_model(model, inputs, masks), inputs)


class Chosen(nn.Module):
    """The first layer counts through the index of its largest channel alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(5, 6)
        self.first = nn.Linear(5, 8)
        self.second = nn.Linear(8, 4)
        self.weights = nn.Embedding(6, 4)

    def forward(self, x):
        expert = self.router(x).argmax(1)
        return self.second(torch.relu(self.first(x))) * self.weights(expert)


def test_a_layer_that_counts_by_an_index_alone_stays():
    model, inputs = Chosen().eval(), (torch.rand(9, 5, generator=torch.Generator().manual_seed(0)),)
    masks = {"first": filter_mask(model.first, [0, 3])}
    dense = to_dense(model, inputs, masks)
    assert dense.router.weight.shape == (6, 5)
    same_output(dense, masked_model(model, inputs, masks), inputs)


def tiny_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=10, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("given", ["ids", "zero segments", "padding"])
@pytest.mark.quick_every(2)
def test_bert_with_segments_zero_or_left_out(given):
    model = tiny_bert()
    ids = torch.randint(1, 30, (2, 8), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}
    if given != "ids":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if given == "padding":
        inputs["input_ids"], inputs["attention_mask"] = (
            ids * (torch.arange(8) < 5),
            (torch.arange(8) < 5).long().repeat(2, 1),
        )
    config = {"op_names_re": [r".*intermediate\.dense"], "sparse_ratio": 0.5}
    masks = l1_masks(model, dependency_groups(model, inputs, [config]))
    dense = to_dense(model, inputs, masks)
    layer = dense.bert.encoder.layer[0]
    assert layer.intermediate.dense.out_features == layer.output.dense.in_features == 6
    assert parameters(dense) == parameters(model) - 6 * (10 + 1 + 10)


class _Bordered(nn.Module):
    """Removed channels are constants, which a border of zeros keeps from being one number to the layer behind."""

    def __init__(self, between, padding, bias):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 6, 3, padding=padding, bias=bias)
        self.head, self.between = nn.Linear(6, 5), between

    def forward(self, x):
        return self.head(torch.relu(self.b(self.between(self.a(x)))).mean((2, 3)))


@pytest.mark.parametrize("between", [torch.sigmoid, torch.cos, lambda z: z + 0.5], ids=["sigmoid", "cos", "shift"])
@pytest.mark.parametrize(("padding", "bias"), [(0, False), (1, True)])
@pytest.mark.parametrize(("gone", "round_to", "kept"), [(2, 3, 9), (5, 3, 6), (7, 4, 4), (5, 4, 8), (3, 10, 10)])
@pytest.mark.quick_every(3)
def test_constant_channels_and_rounding_go_together(between, padding, bias, gone, round_to, kept):
    torch.manual_seed(0)
    model, x = _Bordered(between, padding, bias).eval(), torch.randn(2, 3, 8, 8)
    mask = torch.ones(10)
    mask[:gone] = 0
    masks = {"a": {"weight": mask.view(-1, 1, 1, 1).expand(10, 3, 3, 3).clone(), "bias": mask}}
    assert to_dense(model, x, masks, round_to=round_to).a.out_channels == kept


class Doubling(nn.Linear):
    def forward(self, rows):
        return super().forward(rows) * 2


class DoublingImages(nn.Conv2d):
    def forward(self, images):
        return super().forward(images) * 2


class Halving(nn.Linear):
    """Reads what enters with another weight than its own."""

    def forward(self, rows):
        return nn.functional.linear(rows, self.weight / 2, self.bias)


PADDED = {"kernel_size": 3, "padding": 1}
NORM = nn.BatchNorm2d(4)
READERS = {
    "convolution": (lambda: nn.Conv2d(4, 6, 3), None, True, True),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), None, True, True),
    "zeros beyond the border": (lambda: nn.Conv2d(4, 6, **PADDED), None, False, True),
    "zeros beyond the border, and a norm": (lambda: nn.Conv2d(4, 6, **PADDED, bias=False), NORM, False, True),
    "reflected border": (lambda: nn.Conv2d(4, 6, **PADDED, padding_mode="reflect"), None, True, True),
    "no bias": (lambda: nn.Conv1d(4, 6, 3, bias=False), None, False, False),
    "no bias, but a norm": (lambda: nn.Conv1d(4, 6, 3, bias=False), NORM, True, True),
    "linear": (lambda: nn.Linear(4, 6), None, True, True),
    "linear without a bias": (lambda: nn.Linear(4, 6, bias=False), None, False, False),
    "depth-wise": (lambda: nn.Conv2d(4, 4, 3, groups=4), NORM, False, False),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), NORM, False, False),
    "embedding": (lambda: nn.Embedding(4, 6), NORM, False, False),
    "attention": (lambda: nn.MultiheadAttention(4, 2), NORM, False, False),
    "with operations after it": (lambda: Doubling(4, 6), None, True, True),
    "operations after images": (lambda: DoublingImages(4, 6, 3), None, True, True),
    "operations after a border of zeros": (lambda: DoublingImages(4, 6, **PADDED), None, False, True),
    "of a computed weight": (lambda: Halving(4, 6), NORM, False, False),
}


@pytest.mark.parametrize("name", READERS)
def test_biases_and_norms_take_constants_of_plain_layers_and_exactly_where_no_border_differs(name):
    make, norm, exactly, roughly = READERS[name]
    assert can_absorb(make(), norm, exactly=True) is exactly
    assert can_absorb(make(), norm, exactly=False) is roughly


def test_a_layer_reads_plainly_with_its_own_weight():
    assert all(map(reads_plainly, (nn.Conv2d(4, 6, 3), nn.Linear(4, 6), nn.ConvTranspose2d(4, 6, 3), Doubling(4, 6))))
    assert not reads_plainly(Halving(4, 6))


PRUNED = torch.tensor([True, False, True, True])


@pytest.mark.parametrize(
    ("calls", "constants"),
    [
        ([[0.5, -2.0, 0.0]], [0.5, 0.0, -2.0, 0.0]),
        ([[0.5, -2.0, 0.0], [0.5, -2.0, 0.0]], [0.5, 0.0, -2.0, 0.0]),
        ([[0.5, -2.0, 0.0], [0.5, -1.0, 0.0]], [0.5, 0.0, 0.0, 0.0]),
        ([[0.5, -2.0, 3.0], [0.0, -2.0, 3.0 + 3e-6]], [0.0, 0.0, -2.0, 3.0 + 3e-6]),
        ([[0.5, -2.0, 3.0], [0.5, -2.0, 3.0 + 3e-4]], [0.5, 0.0, -2.0, 0.0]),
        ([[0.5, -2.0 - 2e-4, 100.0], [0.5, -2.0, 100.0 + 1e-4]], [0.5, 0.0, 0.0, 100.0 + 1e-4]),
    ],
)
def test_a_channel_is_constant_if_it_has_one_value_in_all_calls(calls, constants):
    reader = Reader(nn.Conv2d(4, 6, 1).double(), PRUNED)
    for values in calls:
        entered = torch.randn(2, 4, 3, 3, dtype=torch.float64)
        entered[:, PRUNED] = torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        reader.look(entered)
    assert reader.constants().tolist() == constants
    assert reader.rows is None


def test_a_channel_is_no_constant_that_differs_by_place_by_sample_or_is_missing_in_a_call():
    by_place, by_sample = torch.full((2, 4, 3, 3), 0.5), torch.full((2, 4, 3, 3), 0.5)
    by_place[:, 2, 0, 0] = by_sample[1, 2] = 0.25
    for entered in by_place, by_sample:
        reader = Reader(nn.Conv2d(4, 6, 1), PRUNED, [])
        reader.look(entered)
        assert reader.constants().tolist() == [0.5, 0.0, 0.0, 0.5]
        assert [tuple(each.shape) for each in reader.rows] == [(3, 18)]
    reader.look(torch.full((2, 3, 3, 3), 0.5))  # another number of channels
    assert reader.constants().tolist() == [0.0] * 4
    zeros = Reader(nn.Conv2d(4, 6, 1), PRUNED, [])
    zeros.look(torch.zeros(2, 4, 3, 3))
    assert (zeros.rows, len(zeros.ends), zeros.constants().tolist()) == ([], 1, [0.0] * 4)


UP, DOWN = torch.linspace(0.5, 2.0, 6, dtype=torch.float64), torch.linspace(2.0, 0.5, 6, dtype=torch.float64)
ONE_HOT = torch.eye(6, dtype=torch.float64)
CHOICES = {
    "one is the multiple of another": ([[UP, 3 * UP]], {1: [1 / 3, 1.0]}),
    "of either sign": ([[-4 * UP, UP]], {0: [1.0, -0.25]}),
    "two patterns": ([[UP, 2 * DOWN, 5 * UP]], {2: [0.2, 0.0, 1.0], 1: [0.0, 1.0, 0.0]}),
    "small numbers that are no multiples": ([[100 * UP, 1e-4 * DOWN]], {0: [1.0, 0.0], 1: [0.0, 1.0]}),
    "large numbers with rounding": ([[100 * UP, 50 * UP + 1e-5]], {0: [1.0, 0.5]}),
    "zeros": ([[UP, 0 * UP]], {0: [1.0, 0.0]}),
    "the same in all calls": ([[UP, 2 * UP], [UP, 2 * UP]], {1: [0.5, 1.0]}),
    "another one in a call": ([[UP, 2 * UP], [UP, 2 * DOWN]], {0: [1.0, 0.0]}),
    "rounding between calls": ([[1e3 * UP, UP], [1e3 * UP + 1e-4, UP + 1e-3]], {0: [1.0, 0.0]}),
    "others in each call": ([[UP, 2 * UP], [DOWN, 2 * DOWN]], None),
    "calls of other sizes": ([[UP, 2 * UP], [UP[:5], 2 * UP[:5]]], None),
    "four patterns of six": ([[(6 - at) * ONE_HOT[at] for at in range(6)]], {
        0: [1.0, 0, 0, 0, 0, 0], 1: [0, 1.0, 0, 0, 0, 0], 2: [0, 0, 1.0, 0, 0, 0], 3: [0, 0, 0, 1.0, 0, 0],
    }),
}  # fmt: skip


def reader_of(calls):
    """Return a reader that a channel which stays and then pruned channels entered, with these values."""
    reader = Reader(nn.Linear(len(calls[0]) + 1, 2), torch.tensor([False] + [True] * len(calls[0])), [])
    for rows in calls:
        reader.rows.append(torch.stack(rows))
        reader.ends.append(torch.stack([reader.rows[-1].amin(1), reader.rows[-1].amax(1)]))
    return reader


@pytest.mark.parametrize("name", CHOICES)
def test_the_largest_channel_is_chosen_for_all_that_are_its_multiples_in_every_call(name):
    calls, expected = CHOICES[name]
    count = len(calls[0])
    found = _choose_constant_channels(
        reader_of(calls), torch.zeros(count + 1, dtype=torch.bool), np.zeros(count + 1) > 0
    )
    if expected is None:
        assert found is None
        return
    assert found.places == [place + 1 for place in expected]
    assert found.factors[0].tolist() == [0.0] * len(expected)
    torch.testing.assert_close(found.factors[1:], torch.tensor([*expected.values()], dtype=torch.float64).T)


def test_channels_that_need_none_are_left_out_and_those_of_other_layers_come_first():
    calls = [[UP, 3 * UP, 2 * DOWN]]
    settled, preferred = torch.tensor([False, False, True, True]), np.array([False, True, False, False])
    found = _choose_constant_channels(reader_of(calls), settled, np.zeros(4) > 0)
    assert (found.places, found.factors.tolist()) == ([1], [[0.0], [1.0], [0.0], [0.0]])
    found = _choose_constant_channels(reader_of(calls), torch.zeros(4, dtype=torch.bool), preferred)
    assert found.places == [1, 3]
    torch.testing.assert_close(found.factors[:, 0], torch.tensor([0.0, 1.0, 3.0, 0.0], dtype=torch.float64))
    assert _choose_constant_channels(reader_of(calls), torch.ones(4, dtype=torch.bool), preferred) is None
    without = reader_of(calls)
    without.ends.append(torch.zeros(2, 3))  # a call in which all were zero
    assert _choose_constant_channels(without, torch.zeros(4, dtype=torch.bool), preferred) is None


def test_a_contribution_supplies_the_channels_with_a_constant_or_a_factor():
    factors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, -2.0], [0.0, 0.0]])
    found = ConstantContribution(
        {"both": torch.tensor([0.5, 0.0, 0.0, 0.0]), "bias": torch.tensor([0.0, 0.0, -1.0])},
        {"both": ConstantChannels([1, 2], factors), "channel": ConstantChannels([1], factors[:, :1])},
    )
    assert found.supplied("both").tolist() == [True, True, True, False]
    assert found.supplied("bias").tolist() == [False, False, True]
    assert found.supplied("channel").tolist() == [False, True, False, False]
    assert found.supplied("none") is None


def masked(*layers):
    """Return a chain whose first layer is masked at the odd ones of its four channels, how they flow and what stays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *layers).double().eval()
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    flow = Analysis.on(model, images).flow
    is_kept = np.ones(flow.size, dtype=bool)
    is_kept[flow.group_ids_of("0")[[1, 3]]] = False
    with torch.no_grad():
        model[0].weight[[1, 3]] = model[0].bias[[1, 3]] = 0
    return model, flow, is_kept, ((images,), {})


HALVES = [0.0, 0.5, 0.0, 0.5]
CONTRIBUTIONS = {
    "bias": (lambda: [nn.Conv2d(4, 2, 3)], HALVES, None, False),
    "groups": (lambda: [nn.Conv2d(4, 2, 3, groups=2)], HALVES, None, False),
    "norm": (lambda: [nn.Conv2d(4, 2, 3, bias=False), nn.BatchNorm2d(2)], HALVES, None, False),
    "border": (lambda: [nn.Conv2d(4, 2, 3, padding=1)], None, [1], True),
    "no bias": (lambda: [nn.Conv2d(4, 2, 3, bias=False)], None, [1], False),
    "transposed": (lambda: [nn.ConvTranspose2d(4, 2, 3)], None, [1], False),
    "groups and a border": (lambda: [nn.Conv2d(4, 2, 3, padding=1, groups=2)], None, None, True),
    "no weights for them": (lambda: [unread(nn.Conv2d(4, 2, 3, bias=False))], None, None, False),
}


def unread(layer):
    with torch.no_grad():
        layer.weight[:, [1, 3]] = 0
    return layer


@pytest.mark.parametrize("name", CONTRIBUTIONS)
@torch.no_grad()
def test_constants_go_into_biases_or_one_channel_or_nowhere(name):
    make, constants, places, bordered = CONTRIBUTIONS[name]
    model, flow, is_kept, call = masked(nn.Sigmoid(), *make())
    expected = model(*call[0])
    found = constant_contribution(model, flow, is_kept, call)
    assert {key: each.tolist() for key, each in found.constants.items()} == ({"2": constants} if constants else {})
    assert {key: each.places for key, each in found.constant_channels.items()} == ({"2": places} if places else {})
    assert is_bordered(model, flow, "2") is bordered
    assert constants_read(model, flow, is_kept, call)["2"].tolist() == HALVES
    absorb(model, flow, is_kept, found.constants, exactly=True)
    add_to_constant_channels(model, flow, is_kept, found.constant_channels)
    # The channels that are supplied otherwise may go now: nothing reads them.
    weight = model[2].weight if isinstance(model[2], nn.ConvTranspose2d) else model[2].weight.transpose(0, 1)
    if constants and "groups" not in name:
        assert not weight[[1, 3]].any()
        assert weight[[0, 2]].all()
    if places:
        assert weight[1].any()
        assert found.constant_channels["2"].factors.flatten().tolist() == [0.0, 1.0, 0.0, 1.0]
        assert set(found.kept_for_others(flow)) == {int(flow.group_ids_of("0")[1])}
        without = copy.deepcopy(model)
        (without[2].weight if isinstance(model[2], nn.ConvTranspose2d) else without[2].weight.transpose(0, 1))[3] = 0
        model = without
    torch.testing.assert_close(model(*call[0]), expected)


@torch.no_grad()
def test_what_is_no_constant_or_that_no_bias_takes_is_dropped():
    positions = nn.Sequential(nn.Sigmoid(), nn.ZeroPad2d(1))
    for layers, told in (
        ([nn.Sigmoid(), nn.Conv2d(4, 2, 3)], []),
        ([nn.Sigmoid(), nn.Conv2d(4, 2, 3, padding=1)], []),  # goes on beyond the border
        ([nn.Sigmoid(), nn.Conv2d(4, 2, 3, bias=False)], ["2"]),
        ([nn.Sigmoid(), nn.ConvTranspose2d(4, 2, 3)], ["2"]),
        ([positions, nn.Conv2d(4, 2, 3)], ["2"]),
        ([nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False)], []),
    ):
        assert dropped(*masked(*layers)) == told


@torch.no_grad()
def test_norms_are_named_that_make_other_values_than_zero_of_removed_channels():
    for shift, told in (([0.0, 0.0, 0.0, 0.0], []), ([1.0, 0.0, 1.0, 0.0], []), ([0.0, 0.0, 0.0, 1.0], ["1"])):
        model, flow, is_kept, call = masked(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
        model[1].bias.copy_(torch.tensor(shift))
        assert norms_of_constants(model, flow, is_kept, call) == told


@pytest.mark.parametrize(
    ("layer", "shape", "dim"), [(nn.Linear(2, 3), (4, 5, 3), -1), (nn.Conv1d(2, 3, 1), (4, 3, 5), 1)]
)
def test_outputs_of_removed_channels_are_zero(layer, shape, dim):
    found = _zeroed(layer, torch.tensor([True, False, True]), torch.empty(0), torch.ones(shape))
    assert found.transpose(0, dim).flatten(1).any(1).tolist() == [True, False, True]
    assert found.sum() == 4 * 5 * 2
