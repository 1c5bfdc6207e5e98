from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from attention_nets import _states, find_attention, head_masks, make
from nni.compression.pruning import L1NormPruner
from speedup_nets import Chunked, Concatenated, Grouped, Residual, chain, filter_mask, l1_masks
from torch import nn

from nni_topo.errors import ConfigError, DataError, SpeedupError
from nni_topo.network.channels.ids import Blocks
from nni_topo.network.layers.kinds import kept_channels, spread
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.reconcile import (
    _bring_back,
    _even_out,
    _scores,
    check_masks,
    find_narrow,
    keys_of_queries,
    resolve,
    warn_of_kept,
    widths_multiple,
)
from nni_topo.speedup import dependency_groups, masked_model, to_dense
from nni_topo.zoo.transformers import SelfAttention

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_unselected_partner_keeps_the_channels_and_is_named(caplog):
    model = Residual()
    with caplog.at_level(logging.WARNING, "nni_topo"):
        dense = to_dense(model, IMAGES, {"stem": filter_mask(model.stem, [0, 1])})
    assert dense.stem.out_channels == 8
    assert "stem 2 of 8" in caplog.text
    assert "point" in caplog.text


def test_a_depthwise_convolution_without_a_mask_follows():
    model = Residual()
    masks = {name: filter_mask(getattr(model, name), [0, 5]) for name in ("stem", "point")}
    dense = to_dense(model, IMAGES, masks)
    assert (dense.depthwise.groups, dense.depthwise.in_channels, dense.norm.num_features) == (6, 6, 6)


def test_masks_that_differ_are_united():
    model = Residual()
    masks = {"stem": filter_mask(model.stem, [0, 1, 2]), "point": filter_mask(model.point, [1, 2, 3])}
    dense = to_dense(model, IMAGES, masks)
    assert torch.equal(dense.stem.weight, model.stem.weight[[0, 3, 4, 5, 6, 7]])


def test_the_masked_model_of_the_comparison_has_masks_that_agree():
    model = Residual().eval()
    masks = {"stem": filter_mask(model.stem, [0, 1, 2]), "point": filter_mask(model.point, [1, 2, 3])}
    with torch.no_grad():
        expected = masked_model(model, IMAGES, masks, reconcile=True).eval()(IMAGES)
        actual = to_dense(model, IMAGES, masks).eval()(IMAGES)
        by_itself = masked_model(model, IMAGES, masks).eval()(IMAGES)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(actual, by_itself, rtol=1e-2)


class Added(nn.Module):
    """Adds up the outputs of many layers."""

    def __init__(self):
        super().__init__()
        self.many = nn.ModuleList([nn.Conv2d(3, 8, 1) for _ in range(40)])
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.last(sum(each(x) for each in self.many))


def test_a_warning_names_a_few_of_many_layers_and_the_report_all(caplog):
    model = Added().eval()
    masks = {f"many.{at}": filter_mask(each, [at % 8]) for at, each in enumerate(model.many)}
    with caplog.at_level(logging.WARNING, "nni_topo"):
        dense = to_dense(model, IMAGES, masks)
    assert "many.0 1 of 8, many.1 1 of 8" in caplog.text
    assert "and 36 more (shared by many.0, many.1" in caplog.text
    assert "dense.report lists all layers" in caplog.text
    assert len(caplog.messages[0]) < 400
    assert len(dense.report.kept) == 40


class Multiplied(nn.Module):
    """Depth-wise convolutions that make two channels of each, and a layer whose outputs are multiplied with theirs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.small, self.large = nn.Conv2d(8, 16, 1, groups=8), nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.beside, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        first = self.first(x)
        return self.last((self.small(first) + self.large(first)) * self.beside(x))


def test_masks_of_another_pruner_agree_where_channels_are_multiplied(caplog):
    torch.manual_seed(0)
    model = Multiplied().eval()
    groups = dependency_groups(model, IMAGES, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    pruner = L1NormPruner(model, groups)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    with caplog.at_level(logging.WARNING, "nni_topo"):
        dense = to_dense(model, IMAGES, masks)
    assert not caplog.messages
    assert (dense.first.out_channels, dense.small.out_channels, dense.beside.out_channels) == (4, 8, 8)


def test_groups_of_a_convolution_stay_equal():
    model = Grouped()
    masks = {"first": filter_mask(model.first, [0, 1, 4]), "second": filter_mask(model.second, [0, 1, 6])}
    dense = to_dense(model, IMAGES, masks)
    second = dense.second
    assert (second.groups, second.in_channels, second.out_channels) == (2, 6, 10)
    norms = model.second.weight.flatten(1).abs().sum(1)
    back = 0 if norms[0] > norms[1] else 1
    assert torch.equal(dense.norm.running_mean, model.norm.running_mean[[back, 2, 3, 4, 5, *range(7, 12)]])


def test_whole_groups_of_a_convolution_can_go():
    model = Grouped()
    masks = {"first": filter_mask(model.first, range(4)), "second": filter_mask(model.second, range(6))}
    dense = to_dense(model, IMAGES, masks)
    assert (dense.second.groups, dense.second.in_channels, dense.second.out_channels) == (1, 4, 6)


def test_halves_of_a_chunk_lose_the_same_channels():
    model = Chunked()
    masks = {"first": filter_mask(model.first, [0, 1, 3, 5, 7])}
    dense = to_dense(model, IMAGES, masks)
    assert torch.equal(dense.first.weight, model.first.weight[[0, 2, 4, 6]])
    assert torch.equal(dense.second.weight, model.second.weight[:, [0, 2]])


@pytest.mark.parametrize(("round_to", "kept"), [(None, 5), (1, 5), (2, 6), (4, 8), (3, 6), (100, 8)])
def test_rounding_brings_channels_back(round_to, kept):
    model = chain()
    dense = to_dense(model, IMAGES, {"0": filter_mask(model[0], [1, 4, 5])}, round_to=round_to)
    assert dense[0].out_channels == kept
    assert dense[3].out_channels == 6


@pytest.mark.parametrize("layer", ["stem", "point"])
def test_rounding_brings_back_the_largest_weights_of_all_tied_layers(layer):
    model = Residual()
    with torch.no_grad():
        getattr(model, layer).weight[5] += 10
    masks = {name: filter_mask(getattr(model, name), [1, 4, 5]) for name in ("stem", "point")}
    dense = to_dense(model, IMAGES, masks, round_to=3)
    assert torch.equal(dense.stem.weight, model.stem.weight[[0, 2, 3, 5, 6, 7]])


def test_rounding_goes_by_the_sum_of_absolute_weights():
    model = chain()
    with torch.no_grad():
        model[0].weight[1] = 0.1
        model[0].weight[4] = 0.5 * (-1.0) ** torch.arange(27).reshape(3, 3, 3)  # the largest sum, but of both signs
        model[0].weight[5] = 0.0
        model[0].weight[5, 0, 0, 0] = 3.0  # the largest weight, and the largest square
    dense = to_dense(model, IMAGES, {"0": filter_mask(model[0], [1, 4, 5])}, round_to=6)
    assert torch.equal(dense[0].weight, model[0].weight[[0, 2, 3, 4, 6, 7]])


def test_rounding_goes_by_the_output_channels_of_a_transposed_convolution():
    model = torch.nn.Sequential(torch.nn.ConvTranspose2d(3, 4, 2), torch.nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight.fill_(0.1)
        model[0].weight[:, 3] = 0.2  # one strong output channel, ...
        model[0].weight[1] += 0.1  # ... and one strong input channel, which isn't asked
    mask = torch.ones_like(model[0].weight)
    mask[:, [1, 2, 3]] = 0
    dense = to_dense(model, IMAGES, {"0": {"weight": mask}}, round_to=2)
    assert torch.equal(dense[0].weight, model[0].weight[:, [0, 3]])


def test_rounding_is_no_conflict_to_warn_of(caplog):
    model = Residual()
    masks = {name: filter_mask(getattr(model, name), [1, 4, 5]) for name in ("stem", "point")}
    with caplog.at_level(logging.WARNING, "nni_topo"):
        to_dense(model, IMAGES, masks, round_to=4)
    assert not caplog.records


@pytest.mark.parametrize("round_to", [0, -4, 2.0, True, "8"])
def test_round_to_must_be_a_positive_integer(round_to):
    with pytest.raises(ConfigError, match=r"round_to must be (an integer of at least 1|a known name)"):
        to_dense(chain(), IMAGES, {"0": filter_mask(chain()[0], [1])}, round_to=round_to)


@pytest.mark.parametrize("net", [Residual, Concatenated])
def test_groups_leave_nothing_to_reconcile(net, caplog):
    model = net()
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "exclude_op_names": ["tail"]}]
    masks = l1_masks(model, dependency_groups(model, IMAGES, config))
    with caplog.at_level(logging.WARNING, "nni_topo"):
        to_dense(model, IMAGES, masks)
    assert not caplog.records


@pytest.mark.parametrize("function", [to_dense, masked_model])
@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"conv": {"weight": torch.ones(8, 1, 1, 1)}}, ConfigError, "module of a mask .* got 'conv'"),
        ({"0": {"gamma": torch.ones(8)}}, ConfigError, r"must be a parameter .* got 'gamma' \(0.gamma\)"),
        ({"3": {"bias": torch.ones(6)}}, ConfigError, r"must be a parameter .* \(weight\), got 'bias'"),
        ({"0": {"weight": torch.ones(7, 1, 1, 1)}}, ConfigError, r"shape \(8, 3, 3, 3\).*got \(7, 1, 1, 1\) \(0.w"),
        ({"0": {"weight": torch.full((8, 3, 3, 3), 0.5)}}, ConfigError, r"zeros and ones, .* \(0.weight\)"),
        ({"0": {"bias": torch.full((8,), float("nan"))}}, ConfigError, r"zeros and ones, .* NaN \(0.bias\)"),
        ({"3": {"weight": torch.zeros(6, 1, 1, 1)}}, SpeedupError, r"at least one channel.*\(3.weight\)"),
        ({"0": {"weight": [1, 0]}}, ConfigError, r"must be a tensor, got list \(0.weight\)"),
    ],
)
def test_bad_masks_are_refused_with_their_place(function, masks, error, message):
    with pytest.raises(error, match=message):
        function(chain(), IMAGES, masks)


@pytest.mark.parametrize("function", [to_dense, masked_model])
def test_a_wrapped_model_is_refused(function):
    model = chain()
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    with pytest.raises(SpeedupError, match=r"must be unwrapped .* \(0\)"):
        function(model, IMAGES, masks)
    pruner.unwrap_model()
    function(model, IMAGES, masks)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    model = chain()
    model[1].running_mean[3] = value
    with pytest.raises(DataError, match=r"must be finite.*\(1.running_mean\)"):
        to_dense(model, IMAGES, {})


def test_masks_of_blocks_are_expanded_and_take_the_bias_along():
    model = chain()
    block = torch.ones(8, 1, 1, 1)
    block[[2, 5]] = 0
    masks = check_masks(model, {"0": {"weight": block, "bias": None}})
    assert masks["0"]["weight"].shape == model[0].weight.shape
    assert masks["0"]["bias"].tolist() == [1, 1, 0, 1, 1, 0, 1, 1]
    assert block.shape == (8, 1, 1, 1)


def test_one_module_with_two_names_has_one_mask():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    one, other = filter_mask(shared, [0]), filter_mask(shared, [1])
    assert list(check_masks(model, {"2": one})) == ["0"]
    with pytest.raises(ConfigError, match=r"two names must have one mask.*\(2\)"):
        check_masks(model, {"0": one, "2": other})


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(4, 6, 1), nn.Linear(4, 6), nn.Embedding(5, 6),
        nn.ConvTranspose2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3, groups=2),
    ],
    ids=repr,
)  # fmt: skip
def test_a_mask_spread_from_channels_keeps_these_channels_and_zeroes_the_output_of_the_others(module):
    kept = torch.tensor([True, False, True, True, False, False])
    mask = spread(module, kept)
    assert torch.equal(kept_channels(module, {"weight": mask}), kept)
    with torch.no_grad():
        module.weight.copy_(mask)
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
        spatial = {"1d": 1, "2d": 2, "3d": 3}.get(type(module).__name__[-2:], 0)
        inputs = torch.tensor([1, 2]) if isinstance(module, nn.Embedding) else torch.ones(1, 4, *[5] * spatial)
        output = module(inputs)
    dim = 1 if spatial else -1
    assert torch.equal(output.transpose(0, dim).flatten(1).ne(0).any(1), kept)


def warned(caplog, kept):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "nni_topo"):
        warn_of_kept(kept)
    return [record.getMessage() for record in caplog.records]


def test_a_warning_names_layers_by_reason_and_counts_what_it_leaves_out(caplog):
    start = "masks must agree where layers share channels; channels kept although masked: "
    assert warned(caplog, {}) == []
    kept = {"a": "1 of 8 (one)"}
    assert warned(caplog, kept) == [f"{start}a 1 of 8 (one)"]
    kept |= {"b": "2 of 8 (two)", "c": "3 of 8 (three)"}
    three = f"{start}a 1 of 8 (one); b 2 of 8 (two); c 3 of 8 (three)"
    assert warned(caplog, kept) == [three]
    # Two layers for one reason take one place: the report has a line for each.
    assert warned(caplog, {**kept, "d": "4 of 8 (two)"}) == [
        f"{start}a 1 of 8 (one); b 2 of 8, d 4 of 8 (two); c 3 of 8 (three); dense.report lists all layers"
    ]
    others = {"d": "4 of 8 (four)", "e": "5 of 8 (four)", "f": "6 of 8 (six)"}
    assert warned(caplog, kept | others) == [f"{three}; 3 more layers for other reasons; dense.report lists all layers"]
    many = {f"layer{at}": "1 of 8 (one)" for at in range(6)}
    assert warned(caplog, many) == [
        f"{start}layer0 1 of 8, layer1 1 of 8, layer2 1 of 8, layer3 1 of 8 and 2 more (one); "
        "dense.report lists all layers"
    ]


def test_widths_are_rounded_to_what_is_said_or_to_what_a_device_takes_at_once():
    cpu = torch.device("cpu")
    assert [widths_multiple(each, cpu) for each in (None, 1, 12)] == [None, 1, 12]
    assert widths_multiple("auto", torch.device("meta")) == 8
    assert widths_multiple("auto", cpu) == {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
    for wrong in (0, -1, True, 1.5, "all"):
        with pytest.raises(ConfigError, match='round_to must be a positive integer, "auto" or None'):
            widths_multiple(wrong, cpu)


def resolved(model, masks, inputs=IMAGES, **knobs):
    flow = Analysis.on(model.eval(), inputs).flow
    return resolve(model, flow, check_masks(model, masks), **knobs)


def rows(mask):
    return mask.flatten(1).any(1).tolist()


def test_masks_that_agree_stay_as_they_are():
    model = Residual()
    assert resolved(model, {}).masks == {}
    masks = {name: filter_mask(getattr(model, name), [1, 4]) for name in ("stem", "depthwise", "point")}
    masks["stem"]["weight"][0, 0, 0, 0] = 0  # a single weight
    given = check_masks(model, masks)
    flow = Analysis.on(model.eval(), IMAGES).flow
    found = resolve(model, flow, given)
    assert {name: set(targets) for name, targets in found.masks.items()} == {key: {"weight", "bias"} for key in masks}
    for name, targets in given.items():
        assert all(torch.equal(found.masks[name][target], mask) for target, mask in targets.items())
    assert (found.reasons, found.kept) == ({}, {})


def test_channels_that_come_back_have_all_of_their_weights_and_others_those_of_their_masks():
    model, is_kept = Residual(), [True, False, False, True, True, True, True, True]
    masks = {"stem": filter_mask(model.stem, [0, 1, 2]), "point": filter_mask(model.point, [1, 2, 3])}
    masks["stem"]["weight"][5, 1] = 0
    found = resolved(model, masks)
    assert found.masks.keys() == {"stem", "point", "depthwise"}  # which follows
    for name, back in (("stem", 0), ("point", 3), ("depthwise", 4)):
        weight, bias = found.masks[name]["weight"], found.masks[name]["bias"]
        assert rows(weight) == bias.bool().tolist() == [True, *is_kept[1:]]
        assert bool(weight[back].all())
    assert not found.masks["stem"]["weight"][5, 1].any()
    assert found.masks["stem"]["weight"][5, [0, 2]].all()
    assert found.kept["stem"].startswith("1 of 8 (")
    assert found.kept.keys() == found.reasons.keys() == {"stem", "point"}


def test_a_depthwise_convolution_that_loses_nothing_has_no_mask():
    model = Residual()
    assert resolved(model, {"stem": filter_mask(model.stem, [1])}).masks.keys() == {"stem"}


class Parts(nn.Module):
    """A layer of which two others read a part each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 1)
        self.one, self.two, self.last = nn.Conv2d(3, 2, 1), nn.Conv2d(5, 2, 1), nn.Conv2d(2, 2, 1)
        self.parts = [3, 5]

    def forward(self, x):
        one, two = self.first(x).split(self.parts, 1)
        return self.last(self.one(one) + self.two(two))


def test_what_would_read_no_channel_gets_the_one_with_the_largest_weights_back(caplog):
    model = Parts()
    with torch.no_grad():
        model.first.weight[1] += 10
    with caplog.at_level(logging.WARNING, "nni_topo"):
        dense = to_dense(model, IMAGES, {"first": filter_mask(model.first, [0, 1, 2, 4])})
    assert torch.equal(dense.first.weight, model.first.weight[[1, 3, 5, 6, 7]])
    assert (dense.one.in_channels, dense.two.in_channels, dense.parts) == (1, 4, [1, 4])
    (row,) = dense.report.kept
    assert (row.name, row.kept, row.reason) == ("first", 1, "one needs at least one of the channels that it reads")
    assert f"first 1 of 8 ({row.reason})" in caplog.text


def test_a_head_that_comes_back_whole_is_told_and_no_narrower(caplog):
    model = make("one key fused")
    masks = head_masks(model, [])  # all queries, but no key or value
    with caplog.at_level(logging.WARNING, "nni_topo"):
        dense = to_dense(model, _states(2, 7, 5), masks)
    assert find_attention(dense)["attention"].heads == 1
    told = "attention.qkv 3 of 18 (attention.proj needs at least one of the channels that it reads)"
    assert told in caplog.text


@pytest.mark.parametrize(
    ("queries", "keys", "values", "narrow"),
    [
        ([0, 1, 2], [0, 1, 2], [0, 1, 2], None),
        ([0, 2], [0, 2], [0, 1], 2),
        ([0, 2], [0, 1], [0, 1], None),
        ([0, 2], [0, 2], [0, 1, 2], None),
        ([0, 1, 2], [0, 1, 2], [0, 2], None),
    ],
)
def test_heads_are_narrower_where_keys_and_values_keep_equally_many_channels(queries, keys, values, narrow):
    model, inputs = make("apart"), _states(2, 7, 5)
    masks = {}
    for name, places in (("q_proj", queries), ("k_proj", keys), ("v_proj", values)):
        layer = model.get_submodule(f"1.attention.{name}")
        masks[f"1.attention.{name}"] = filter_mask(layer, [at for at in range(12) if at % 3 not in places])
    flow = Analysis.on(model, inputs).flow
    given = check_masks(model, masks)
    found = find_narrow(model, flow, given, resolve(model, flow, given).is_kept)
    if narrow is None:
        assert found == {}
    else:
        assert [each.tolist() for each in found["1.attention"]] == [
            [[at in places for at in range(3)]] * 4 for places in (keys, values)
        ]
        dense = to_dense(model, inputs, masks)
        (attention,) = find_attention(dense).values()
        assert (attention.heads, attention.head_size) == (4, narrow)
        torch.testing.assert_close(dense(inputs), masked_model(model, inputs, masks)(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_masks_get_the_type_and_the_shape_of_their_parameter(dtype):
    model, mask = chain(), torch.ones(8, 1, 3, 1, dtype=dtype)
    mask[[2, 5]] = 0
    found = check_masks(model, {"0": {"weight": mask}})["0"]["weight"]
    assert (found.dtype, found.shape) == (torch.float32, (8, 3, 3, 3))
    assert found.flatten(1).any(1).tolist() == [at not in (2, 5) for at in range(8)]
    assert check_masks(model, {"0": {"weight": torch.ones((), dtype=dtype)}})["0"]["weight"].sum() == 8 * 27
    if dtype != torch.bool:
        with pytest.raises(ConfigError, match="must hold zeros and ones"):
            check_masks(model, {"0": {"weight": 2 * mask}})


@pytest.mark.parametrize(
    "shape", [(8,), (3, 3), (3, 3, 3), (8, 3, 3), (8, 2, 3, 3), (2, 3, 3, 3), (1, 8, 3, 3, 3), (0, 1, 1, 1)]
)
def test_masks_of_other_shapes_are_refused(shape):
    with pytest.raises(ConfigError, match=r"must have its parameter's shape \(8, 3, 3, 3\), or 1 in place"):
        check_masks(chain(), {"0": {"weight": torch.ones(shape)}})


def test_a_bias_may_be_masked_by_itself_and_modules_without_a_mask_are_left_out():
    model = chain()
    masks = check_masks(model, {"0": {"bias": torch.zeros(8)}, "3": {"weight": None}, "8": {}})
    assert {name: list(targets) for name, targets in masks.items()} == {"0": ["bias"]}
    assert not masks["0"]["bias"].any()
    both = check_masks(model, {"0": {**filter_mask(model[0], [1]), "bias": torch.tensor([0.0] + [1] * 7)}})
    assert both["0"]["bias"].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


class Tabled(nn.Module):
    """Adds a table of its own to what a layer puts out."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 6, 8))
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last((self.first(x) + self.table).relu())


def test_parameters_of_the_models_own_are_masked_with_the_channels_that_they_meet():
    model = Tabled()
    found = resolved(model, {"first": filter_mask(model.first, [1, 6])}, torch.randn(2, 6, 5))
    assert found.masks.keys() == {"first", ""}
    kept = torch.tensor([at not in (1, 6) for at in range(8)]).float()
    assert torch.equal(found.masks[""]["table"], kept.expand(1, 6, 8))
    assert found.masks["first"]["bias"].tolist() == kept.tolist()
    assert resolved(model, {"first": filter_mask(model.first, [])}, torch.randn(2, 6, 5)).masks.keys() == {"first"}


@pytest.mark.parametrize(
    ("round_to", "width", "reason"), [(None, 5, ""), (1, 5, ""), (2, 6, "round_to=2"), (3, 6, "round_to=3")]
)
def test_what_comes_back_for_a_multiple_is_said_and_not_warned_of(round_to, width, reason):
    model = chain()
    found = resolved(model, {"0": filter_mask(model[0], [1, 4, 5])}, round_to=round_to)
    assert sum(rows(found.masks["0"]["weight"])) == width
    assert [str(each) for each in found.reasons.get("0", ())] == ([reason] if reason else [])
    assert found.kept == {}


class Skipped(nn.Module):
    """A layer that is added to the network's input."""

    def __init__(self):
        super().__init__()
        self.one, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.last(x + self.one(x))


@pytest.mark.parametrize(
    ("make", "gone", "kinds", "told"),
    [
        (Residual, {"stem": [0, 1]}, ["shared"], "2 of 8 (shared by stem, depthwise, point"),
        (Residual, {"stem": [0, 1], "point": [1, 2]}, ["shared"], "1 of 8 ("),
        (
            Chunked,
            {"first": [0]},
            ["coupled_with_itself"],
            "1 of 8 (some of its channels are coupled with one another)",
        ),
        (Grouped, {"first": [0]}, ["blocks_equal"], "1 of 8 (blocks of channels keep equally many"),
        (Parts, {"first": [0, 1, 2]}, ["last_read"], "1 of 8 (one needs at least one of the channels"),
        (Skipped, {"one": [1]}, ["joins_constant"], "1 of 3 (an operation joins them to the network's input"),
    ],
)
def test_what_comes_back_has_the_reason_of_the_step_that_brings_it(make, gone, kinds, told):
    model = make()
    found = resolved(model, {name: filter_mask(model.get_submodule(name), places) for name, places in gone.items()})
    name = next(iter(gone))
    assert [each.kind for each in found.reasons[name]] == kinds
    assert found.kept[name].startswith(told)


WORTH = np.array([0.0, 3.0, 1.0, 2.0, 9.0, 4.0])


@pytest.mark.parametrize(
    ("group_ids", "before", "wanted", "after"),
    [
        ([0, 1, 2, 3], [0, 4], 1, [0, 4]),
        ([0, 1, 2, 3], [0, 4], 2, [0, 1, 4]),
        ([0, 1, 2, 3], [0, 4], 3, [0, 1, 3, 4]),
        ([0, 1, 2, 3], [0, 4], 9, [0, 1, 2, 3, 4]),
        ([0, 1, 2, 3], [], 0, []),
        ([1, 1, 2, 3], [], 2, [1]),  # one channel in two places
        ([2, 2, 3, 3, 5], [], 2, [3, 5]),
        ([4, 5], [0], 1, [0, 4]),
    ],
)
def test_the_best_of_the_pruned_channels_come_back_until_there_are_as_many_as_wanted(group_ids, before, wanted, after):
    kept = np.isin(np.arange(6), before)
    _bring_back(np.array(group_ids), kept, lambda: WORTH, wanted)
    assert np.flatnonzero(kept).tolist() == after


@pytest.mark.parametrize(
    ("sides", "may_vanish", "before", "after"),
    [
        ([[[0, 1, 2], [3, 4, 5]]], False, [0, 1, 3], [0, 1, 3, 4]),
        ([[[0, 1, 2], [3, 4, 5]]], False, [0, 1], [0, 1, 4, 5]),
        ([[[0, 1, 2], [3, 4, 5]]], True, [0, 1], [0, 1]),  # a block as a whole
        ([[[0, 1, 2], [3, 4, 5]]], True, [0, 1, 3], [0, 1, 3, 4]),
        ([[[0, 1], [2, 3]], [[4], [5]]], True, [0, 1, 4], [0, 1, 4]),
        ([[[0, 1], [2, 3]], [[4], [5]]], True, [0, 4, 5], [0, 3, 4, 5]),  # it goes on all sides or on none
        ([[[0, 1], [2, 3]], [[4], [5]]], False, [0, 4], [0, 3, 4, 5]),
    ],
)
def test_blocks_that_remain_keep_as_many_channels_as_the_fullest(sides, may_vanish, before, after):
    kept, arrays = np.isin(np.arange(6), before), [[np.array(block) for block in side] for side in sides]
    _even_out(Blocks(arrays, may_vanish), arrays, kept, lambda: WORTH)
    assert np.flatnonzero(kept).tolist() == after


def test_the_score_of_a_channel_is_the_sum_over_all_layers_that_share_it():
    model = Residual().eval()
    flow = Analysis.on(model, IMAGES).flow
    scores = _scores(model, flow)
    expected = sum(
        getattr(model, name).weight.detach().abs().double().flatten(1).sum(1) for name in ("stem", "depthwise", "point")
    )
    assert scores[flow.group_ids_of("stem")] == pytest.approx(expected.numpy())
    up = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 2, 1)).eval()
    flow = Analysis.on(up, torch.randn(1, 4, 3, 3)).flow
    columns = up[0].weight.detach().abs().double().sum((0, 2, 3))  # three, each of which makes a channel of both groups
    assert _scores(up, flow)[flow.group_ids_of("0")].tolist() == pytest.approx([*columns.tolist(), *columns.tolist()])


def test_the_channels_of_keys_are_those_of_every_query_that_shares_them():
    keys = np.array([[True, False], [False, True]])
    assert np.array_equal(keys_of_queries(keys, np.ones((2, 2), dtype=bool)), keys)
    assert keys_of_queries(keys, np.ones((6, 2), dtype=bool)).tolist() == [[True, False]] * 3 + [[False, True]] * 3


@pytest.mark.parametrize(("places", "left"), [([1, 3], [1]), ([0, 2], [0]), ([0, 1], None)])
def test_pairs_of_channels_that_turn_go_with_their_frequency(places, left):
    torch.manual_seed(0)
    attention = SelfAttention(12, 3, bias=True, causal=True)  # heads of two pairs: 0 with 2, 1 with 3
    model, inputs = nn.Sequential(nn.Linear(5, 12), attention, nn.Linear(12, 2)).eval(), _states(2, 7, 5)
    masks = {}
    for name, kept in (("q_proj", places), ("k_proj", places), ("v_proj", [0, 3])):
        masks[f"1.{name}"] = filter_mask(getattr(attention, name), [at for at in range(12) if at % 4 not in kept])
    dense = to_dense(model, inputs, masks)
    assert len(dense[1].q_proj.weight) == (12 if left is None else 6)
    assert torch.equal(dense[1].inv_freq, attention.inv_freq if left is None else attention.inv_freq[left])
    torch.testing.assert_close(dense(inputs), masked_model(model, inputs, masks)(inputs), rtol=1e-4, atol=1e-5)


def test_heads_get_narrower_also_where_attention_divides_by_a_number_of_its_own(caplog):
    model, inputs = make("one key fused"), _states(2, 7, 5)
    # Queries, the key and the value lose the first of their three channels.
    masks = {"attention.qkv": filter_mask(model.attention.qkv, range(0, 18, 3))}
    dense = to_dense(model, inputs, masks)
    assert find_attention(dense)["attention"].head_size == 2
    torch.testing.assert_close(dense(inputs), masked_model(model, inputs, masks)(inputs), rtol=1e-4, atol=1e-5)
    assert "head size unchanged" not in caplog.text


class Crossing(nn.Module):
    """Splits the channels of two layers into pieces, one of which holds channels of both, and turns their order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        pieces = torch.cat([self.one(x), self.two(x)], 1).chunk(4, 1)
        return self.last(torch.cat(pieces[::-1], 1))


def test_pieces_that_cannot_be_of_one_size_stay_whole_and_equal_ones_lose_as_many():
    model = Crossing().eval()
    # Of each piece one: of the channels 0 to 2, of 3 to 5, which are the last of one layer and two of the other, ...
    even = to_dense(model, IMAGES, {"one": filter_mask(model.one, [1]), "two": filter_mask(model.two, [0, 3, 7])})
    assert (even.one.out_channels, even.two.out_channels, even.last.in_channels) == (3, 5, 8)
    uneven = to_dense(model, IMAGES, {"one": filter_mask(model.one, [1]), "two": filter_mask(model.two, [0])})
    assert (uneven.one.out_channels, uneven.two.out_channels, uneven.last.in_channels) == (4, 8, 12)


class Shuffled(nn.Module):
    """Halves the channels of two layers behind a shuffle of another one's: one half holds all of one, some of both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.zero, self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1)
        self.last, self.also = nn.Conv2d(6, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        also = self.zero(x)
        also = also.view(len(x), 2, -1, *also.shape[2:]).transpose(1, 2).flatten(1, 2)
        one, two = torch.cat([self.one(x), self.two(x)], 1).chunk(2, 1)
        return self.last(one * two) + self.also(also)


def test_halves_of_which_no_smaller_number_fits_stay_whole_behind_a_shuffle():
    model = Shuffled().eval()
    dense = to_dense(model, IMAGES, {"one": filter_mask(model.one, [1]), "two": filter_mask(model.two, [0])})
    assert (dense.one.out_channels, dense.two.out_channels) == (4, 8)
