from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from attention_nets import _states, find_attention, head_masks, make
from nni.compression.pruning import L1NormPruner
from speedup_nets import Chunked, Grouped, Residual, chain, filter_mask
from torch import nn

from nni_topo import to_dense
from nni_topo.errors import ConfigError, DataError, SpeedupError
from nni_topo.network.layers.kinds import weight_name, weight_of
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.reconcile import check_masks, resolve
from nni_topo.speedup import masked_model

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


def test_a_group_stays_while_one_side_keeps_a_channel_of_it():
    model = Grouped()
    dense = to_dense(
        model, IMAGES, {"first": filter_mask(model.first, [0, 4]), "second": filter_mask(model.second, range(6))}
    )
    assert (dense.second.groups, dense.second.in_channels, dense.second.out_channels) == (2, 6, 12)


def test_halves_of_a_chunk_lose_the_same_channels():
    model = Chunked()
    masks = {"first": filter_mask(model.first, [0, 1, 3, 5, 7])}
    dense = to_dense(model, IMAGES, masks)
    assert torch.equal(dense.first.weight, model.first.weight[[0, 2, 4, 6]])
    assert torch.equal(dense.second.weight, model.second.weight[:, [0, 2]])


@pytest.mark.parametrize(("round_to", "kept"), [(None, 5), (1, 5), (3, 6), (100, 8)])
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


def test_coupled_channels_of_one_layer_come_back_by_the_sum_of_their_weights():
    model = Chunked()  # channels 0 and 4 meet in a product, 1 and 5 do, ...
    with torch.no_grad():
        model.first.weight[0] += 10
        model.first.weight[5] += 1
    dense = to_dense(model, IMAGES, {"first": filter_mask(model.first, [0, 1, 2, 4, 5, 6])}, round_to=4)
    assert torch.equal(dense.first.weight, model.first.weight[[0, 3, 4, 7]])


def test_a_channel_that_comes_back_for_equal_groups_has_its_weights_and_its_bias():
    model = Grouped()
    with torch.no_grad():
        model.first.weight[4] += 10
    dense = to_dense(model, IMAGES, {"first": filter_mask(model.first, [0, 4, 5])})
    kept = [1, 2, 3, 4, 6, 7]
    assert torch.equal(dense.first.weight, model.first.weight[kept])
    assert torch.equal(dense.first.bias, model.first.bias[kept])


@pytest.mark.parametrize("round_to", [0, 2.0, True, "8"])
def test_round_to_must_be_a_positive_integer(round_to):
    with pytest.raises(ConfigError, match="round_to must be an integer of at least 1"):
        to_dense(chain(), IMAGES, {"0": filter_mask(chain()[0], [1])}, round_to=round_to)


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
def test_bad_masks_are_refused_with_their_place(masks, error, message):
    with pytest.raises(error, match=message):
        to_dense(chain(), IMAGES, masks)


@pytest.mark.parametrize("function", [to_dense, masked_model])
def test_a_wrapped_model_is_refused(function):
    model = chain()
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    with pytest.raises(SpeedupError, match=r"must be unwrapped .* \(0\)"):
        function(model, IMAGES, masks)
    pruner.unwrap_model()
    function(model, IMAGES, masks)


def test_values_that_are_not_finite_are_refused():
    model = chain()
    model[1].running_mean[3] = float("nan")
    with pytest.raises(DataError, match=r"must hold no NaN.*\(1.running_mean\)"):
        to_dense(model, IMAGES, {})


def test_masks_of_blocks_are_expanded_and_take_the_bias_along():
    model = chain()
    block = torch.ones(8, 1, 1, 1)
    block[[2, 5]] = 0
    masks = check_masks(model, {"0": {"weight": block, "bias": None}})
    assert masks["0"]["weight"].shape == model[0].weight.shape
    assert masks["0"]["bias"].tolist() == [1, 1, 0, 1, 1, 0, 1, 1]
    assert block.shape == (8, 1, 1, 1)


class Twice(nn.Module):
    """A layer under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = self.other = nn.Conv2d(3, 3, 1)
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.last(self.other(self.one(x)))


def test_a_layer_with_two_names_has_one_mask_under_its_first():
    model = Twice()
    mask = filter_mask(model.one, [1])
    masks = check_masks(model, {"other": mask, "one": mask, "last": {"weight": None}})
    assert masks.keys() == {"one"}
    assert masks["one"]["weight"].flatten(1).any(1).tolist() == [True, False, True]
    with pytest.raises(ConfigError, match=r"must have one mask, got two that differ \(other\)"):
        to_dense(model, IMAGES, {"one": mask, "other": filter_mask(model.one, [2])})


def resolved(model, masks, inputs=IMAGES, **knobs):
    flow = Analysis.on(model.eval(), inputs).flow
    return resolve(model, flow, check_masks(model, masks), **knobs)


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


def test_a_head_that_comes_back_whole_is_told(caplog):
    model = make("one key fused")
    masks = head_masks(model, [])  # all queries, but no key or value
    with caplog.at_level(logging.WARNING, "nni_topo"):
        dense = to_dense(model, _states(2, 7, 5), masks)
    assert find_attention(dense)["attention"].heads == 1
    told = "attention.qkv 3 of 18 (attention.proj needs at least one of the channels that it reads)"
    assert told in caplog.text


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
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
        (Grouped, {"first": [0]}, ["blocks_equal"], "1 of 8 (all blocks keep the same number of channels"),
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


def test_a_partner_without_a_mask_is_named_but_not_a_depthwise_convolution_which_follows():
    model = Residual()
    (reason,) = resolved(model, {"stem": filter_mask(model.stem, [0, 1])}).reasons["stem"]
    assert str(reason).endswith("of these without a mask: point")


def test_channels_that_rounding_brings_back_are_no_disagreement(caplog):
    model = chain()
    masks = {"0": filter_mask(model[0], [1, 4, 5])}
    with caplog.at_level(logging.WARNING, "nni_topo"):
        rounded = to_dense(model, IMAGES, masks, round_to=3)
    assert "channels kept although masked" not in caplog.text
    (row,) = rounded.report.kept
    assert (row.name, row.kept, row.reason) == ("0", 1, "round_to=3")
    found = resolved(model, masks, round_to=3)
    assert (found.kept, [reason.kind for reason in found.reasons["0"]]) == ({}, ["rounding"])
    assert resolved(model, masks, round_to=5).reasons == {}


class Parallel(nn.Module):
    """Five networks in which layers share channels."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(Residual() for _ in range(5))

    def forward(self, x):
        return torch.stack([part(x) for part in self.parts])


def test_a_warning_names_three_layers_and_counts_the_others(caplog):
    model = Parallel()
    names = [f"parts.{at}.stem" for at in range(5)]
    with caplog.at_level(logging.WARNING, "nni_topo"):
        to_dense(model, IMAGES, {name: filter_mask(model.get_submodule(name), [0]) for name in names})
    assert all(f"{name} 1 of 8" in caplog.text for name in names[:3])
    assert names[3] not in caplog.text.partition("although masked")[2]
    assert "and 2 more layers" in caplog.text


@pytest.mark.parametrize("name", ["apart", "fused", "multihead", "one key", "one key fused"])
def test_channels_that_masks_remove_within_heads_stay_with_zero_weights(name, caplog):
    model, inputs = make(name), _states(2, 7, 5)
    (before,) = find_attention(model).values()
    masks: dict[str, Any] = {}
    for layer, rows in before.parts:  # the first of the three channels of each head
        module = model.get_submodule(layer)
        mask = masks.setdefault(layer, {weight_name(module): torch.ones_like(weight_of(module))})
        mask[weight_name(module)][torch.from_numpy(rows[:, 0])] = 0
    dense = to_dense(model, inputs, masks)
    (after,) = find_attention(dense).values()
    assert (after.heads, after.head_size) == (before.heads, before.head_size)
    torch.testing.assert_close(dense(inputs), masked_model(model, inputs, masks)(inputs), rtol=1e-4, atol=1e-5)
    assert {row.name for row in dense.report.kept} == masks.keys()
    assert before.parts[0][0] in caplog.text


class Following(nn.Module):
    """A depth-wise convolution of what isn't zero in a masked channel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.depthwise = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=4)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(self.depthwise(self.stem(x).sigmoid()))


def test_a_depthwise_convolution_without_a_mask_gets_the_mask_of_the_layer_before():
    model = Following().eval()
    masks = resolved(model, {"stem": filter_mask(model.stem, [1])}).masks["depthwise"]
    assert masks["weight"].flatten().tolist() == masks["bias"].tolist() == [1, 0, 1, 1]
    dense = to_dense(model, IMAGES, {"stem": filter_mask(model.stem, [1])})
    kept = [0, 2, 3]
    assert torch.equal(dense.depthwise.weight, model.depthwise.weight[kept])
    with torch.no_grad():
        x = nn.functional.conv2d(IMAGES, model.stem.weight, model.stem.bias).sigmoid()
        x = nn.functional.conv2d(x, model.depthwise.weight, model.depthwise.bias, groups=4)[:, kept]
        expected = nn.functional.conv2d(x, model.last.weight[:, kept], model.last.bias)
        torch.testing.assert_close(dense(IMAGES), expected)
        masked = masked_model(model, IMAGES, {"stem": filter_mask(model.stem, [1])}, reconcile=True)
        torch.testing.assert_close(masked(IMAGES), expected)
