from __future__ import annotations

import copy
import logging
import random

import pytest
import torch
import torchvision
from attention_nets import WIDTH, Fused
from nni.compression.speedup.dependency import auto_set_denpendency_group_ids
from speedup_nets import Concatenated, Grouped, Residual, chain
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError, SpeedupError
from nni_topo.network.graph.tracing import trace
from nni_topo.network.runtime.inputs import arguments_of
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dependency import DependencyGroups, unprunable_layers
from nni_topo.speedup import dependency_groups
from nni_topo.zoo.transformers import vit_small

IMAGES = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CONVOLUTIONS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def partition(config_list):
    """The groups of layer names, without their ids."""
    groups = {}
    for entry in config_list:
        if "dependency_group_id" in entry:
            groups.setdefault(entry["dependency_group_id"], set()).update(entry["op_names"])
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def names(config_list):
    return [entry["op_names"][0] for entry in config_list]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.quick_every(2)
def test_groups_are_those_of_nni(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    graph_module = trace(model, arguments_of(IMAGES)).graph_module
    expected = auto_set_denpendency_group_ids(graph_module, CONVOLUTIONS)
    assert partition(dependency_groups(model, IMAGES, CONVOLUTIONS)) == partition(expected)


def test_residual_layers_are_one_group_in_network_order():
    result = dependency_groups(Residual(), IMAGES, CONVOLUTIONS)
    assert result == [
        {"op_names": ["stem"], "sparse_ratio": 0.5, "dependency_group_id": "group_0"},
        {"op_names": ["depthwise"], "sparse_ratio": 0.5, "dependency_group_id": "group_0"},
        {"op_names": ["point"], "sparse_ratio": 0.5, "dependency_group_id": "group_0"},
    ]
    assert result.skipped == {"tail": "it gives the model's output"}


def test_a_follower_of_several_layers_is_left_out():
    result = dependency_groups(Concatenated(), IMAGES, CONVOLUTIONS)
    assert names(result) == ["left", "right"]
    assert partition(result) == set()


def test_blocks_are_stated_for_a_grouped_convolution_and_the_layer_before():
    result = {entry["op_names"][0]: entry for entry in dependency_groups(Grouped(), IMAGES, CONVOLUTIONS)}
    assert result["first"]["internal_metric_block"] == result["second"]["internal_metric_block"] == 2
    assert result["first"]["dependency_group_id"] != result["second"]["dependency_group_id"]
    named = dependency_groups(Grouped(), IMAGES, [{"op_names": ["tail"], "sparse_ratio": 0.5}])
    assert "internal_metric_block" not in named[0]


def test_a_partner_that_is_not_selected_is_named(caplog):
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "exclude_op_names": ["point", "tail"]}]
    with caplog.at_level(logging.WARNING, "nni_topo"):
        result = dependency_groups(Residual(), IMAGES, config)
    assert names(result) == ["stem", "depthwise"]
    assert "stem, depthwise: shared with point, which isn't among the layers to prune" in caplog.text
    why = "shared with point, which isn't among the layers to prune"
    assert result.skipped == {"stem": why, "depthwise": why}
    assert {reason.kind for reason in result.reasons["stem"]} == {"unselected"}


def test_neither_the_model_nor_the_config_list_is_changed():
    model, config = chain(), copy.deepcopy(CONVOLUTIONS)
    config[0]["target_settings"] = {"weight": {"granularity": "default"}}
    before, asked = copy.deepcopy(model.state_dict()), copy.deepcopy(config)
    random_state = torch.get_rng_state()
    result = dependency_groups(model, IMAGES, config)
    result[0]["target_settings"]["weight"]["granularity"] = "changed"
    assert config == asked
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert result[1]["target_settings"]["weight"]["granularity"] == "default"


def test_an_entry_that_selects_nothing_is_refused_and_an_empty_list_is_not():
    fits = {"op_types": ["Conv2d"], "sparse_ratio": 0.5}
    with pytest.raises(ConfigError, match=r"must select a layer.*'conv2d': did you mean Conv2d\? \(config_list\[1\]\)"):
        dependency_groups(chain(), IMAGES, [fits, {"op_types": ["conv2d"], "sparse_ratio": 0.5}])
    with pytest.raises(ConfigError, match=r"of op_types 'LSTM': known: .*\(config_list\[0\]\)"):
        dependency_groups(chain(), IMAGES, [{"op_types": ["LSTM"], "sparse_ratio": 0.5}])
    assert dependency_groups(chain(), IMAGES, []) == []


def test_output_projections_lose_rows_with_all_that_share_their_channels_and_heads_without():
    torch.manual_seed(0)
    model = vit_small(3, 1, 8).eval()
    images = torch.rand(2, 1, 8, 8)
    together = dependency_groups(model, images, [{"op_types": ["Linear", "Conv2d"], "sparse_ratio": 0.5}])
    projections = [entry for entry in together if entry["op_names"][0].endswith("o_proj")]
    assert len(projections) == len(model.blocks)
    assert all("granularity" not in entry for entry in projections)
    assert "blocks.0.mlp.fc2" not in together.skipped
    alone = dependency_groups(model, images, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    projections = [entry for entry in alone if entry["op_names"][0].endswith("o_proj")]
    assert {tuple(entry["granularity"]) for entry in projections} == {(-1, 16)}
    assert "which loses heads" in alone.skipped["blocks.0.mlp.fc2"]


class Beside(nn.Module):
    """A chain, and beside it layers of each kind that keeps channels: all, some, and for the output."""

    def __init__(self, *, mixes=False, picks=False, pairs=False):
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.mixes, self.picks, self.pairs = mixes, picks, pairs

    def forward(self, x):
        y = self.one(x)
        y = y.softmax(1) * y if self.mixes else y
        y = y * y[:, 1:2].mean() if self.picks else y
        z = self.two(y)
        return self.last(z + y if self.pairs else z)


def warnings_of(caplog, config_list, **knobs):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "nni_topo"):
        groups = dependency_groups(Beside(**knobs).eval(), torch.randn(2, 3, 5, 5), config_list)
    return [record.getMessage() for record in caplog.records], groups


BY_TYPE = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
BY_NAME = [{"op_names": ["one", "two", "last"], "sparse_ratio": 0.5}]
DEPENDS = "the result of an operation depends on removed channels (softmax)"


def test_what_is_as_it_was_asked_for_is_not_warned_of(caplog):
    told, groups = warnings_of(caplog, BY_TYPE)
    assert told == []
    assert groups.skipped == {"last": "it gives the model's output"}
    assert [entry["op_names"] for entry in groups] == [["one"], ["two"]]
    assert not any("dependency_group_id" in entry for entry in groups)
    assert warnings_of(caplog, BY_TYPE, pairs=True)[0] == []


def test_each_thing_that_turned_out_otherwise_is_warned_of_once(caplog):
    (told,), groups = warnings_of(caplog, BY_TYPE, mixes=True)
    assert told.endswith(f"one: {DEPENDS}")
    assert groups.skipped["one"] == DEPENDS
    (told,), groups = warnings_of(caplog, BY_TYPE, picks=True)
    assert f"one: {groups.skipped['one']}" in told
    assert groups.skipped["one"].startswith("2 of 8 channels are kept: ")
    assert [entry["op_names"] for entry in groups] == [["one"], ["two"]]
    (told,), groups = warnings_of(caplog, BY_NAME)
    assert "should be excluded, got last" in told
    assert groups.skipped == {}
    assert groups.named == {"one", "two", "last"}
    (told,), groups = warnings_of(caplog, [{"op_names_re": ["one"], "sparse_ratio": 0.5}], pairs=True)
    assert told.endswith(f"one: {groups.skipped['one']}")


@pytest.mark.parametrize("knobs", [{"mixes": True}, {"picks": True}])
def test_where_every_layer_must_lose_channels_another_one_is_an_error(knobs):
    model, images = Beside(**knobs).eval(), torch.randn(2, 3, 5, 5)
    if "mixes" in knobs:
        with pytest.raises(ConfigError, match=r"must be able to lose channels, got one: the result"):
            dependency_groups(model, images, BY_TYPE, strict=True)
    else:
        assert dependency_groups(model, images, BY_TYPE, strict=True).skipped.keys() == {"last", "one"}


class Untraceable(nn.Module):
    """Computes with NumPy and a random number, which no tracer follows."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        weight = self.one.weight.detach().mean((2, 3))
        return torch.from_numpy((x.mean((2, 3)) @ weight).numpy() * random.random()) * self.scale


def test_all_selected_layers_of_a_model_that_is_not_traced_are_left_out_with_the_error():
    groups = dependency_groups(Untraceable(), IMAGES, CONVOLUTIONS)
    assert list(groups) == []
    assert list(groups.skipped) == list(groups.reasons) == ["one", "two"]
    assert {each.kind for why in groups.reasons.values() for each in why} == {"untraced_model"}
    assert all("got Untraceable" in told for told in groups.skipped.values())
    for config in (
        [{"op_names": ["one"], "sparse_ratio": 0.5}],
        [*CONVOLUTIONS, {"op_names": ["one"], "sparse_ratio": 0.5}],
    ):
        with pytest.raises(SpeedupError):
            dependency_groups(Untraceable(), IMAGES, config)
    with pytest.raises(SpeedupError):
        dependency_groups(Untraceable(), IMAGES, CONVOLUTIONS, strict=True)


GROUPED = DependencyGroups(
    [
        {"op_names": ["a"], "dependency_group_id": "group_0"},
        {"op_names": ["b"], "dependency_group_id": "group_0"},
        {"op_names": ["c"]},
        {"op_names": ["d"], "dependency_group_id": "group_1"},
        {"op_names": ["e"]},
    ],
    skipped={"f": "it gives the model's output"},
    named=["a"],
    ties={"c": (0, 1)},
)


@pytest.mark.parametrize(("out", "left"), [(("c",), "abde"), (("b", "e"), "cd"), (("f",), "abcde")])
def test_layers_are_left_out_with_their_group(out, left):
    assert [entry["op_names"] for entry in GROUPED.without(out)] == [[name] for name in left]
    assert GROUPED.without(out).skipped == GROUPED.skipped
    assert GROUPED.without(out).named == {"a"}


class TwoStreams(nn.Module):
    """Two streams with attention and another layer each, that meet in the end."""

    def __init__(self):
        super().__init__()
        self.enter, self.attention, self.added = (
            nn.ModuleList(make() for _ in range(2))
            for make in (lambda: nn.Linear(5, WIDTH), Fused, lambda: nn.Linear(WIDTH, WIDTH))
        )
        self.head = nn.Linear(2 * WIDTH, 2)

    def forward(self, x):
        found = []
        for enter, attention, added in zip(self.enter, self.attention, self.added, strict=True):
            y = enter(x)
            y = y + attention(y)
            found.append(y + added(y))
        return self.head(torch.cat(found, -1))


def test_a_layer_that_shares_rows_with_an_output_projection_of_heads_stays_for_it():
    model, states = TwoStreams().eval(), torch.randn(2, 7, 5)
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5, "exclude_op_names": ["enter.0", "enter.1"]}]
    groups = dependency_groups(model, states, config)
    # The layers that make the streams aren't selected, so the projections lose the columns of heads.
    for at in range(2):
        assert groups.reasons[f"added.{at}"][0].kind == "head_by_head"
        assert f"attention.{at}.proj" in groups.skipped[f"added.{at}"]
    assert [entry["op_names"][0] for entry in groups] == [
        "attention.0.qkv", "attention.0.proj", "attention.1.qkv", "attention.1.proj",
    ]  # fmt: skip


class Kinds(nn.Module):
    """Layers of which each keeps its channels for a reason of its own, and a chain."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)
        self.alias = self.first
        self.unused, self.beside, self.last = nn.Linear(4, 4), nn.Linear(6, 3), nn.Linear(5, 2)
        self.single = nn.Linear(5, 1)
        self.picked = nn.Linear(5, 4)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        y = self.second(x).relu()
        picked = self.picked(y)
        found = self.last(y) * self.single(y) + picked.flip(1).sort(1).values.sum(1, keepdim=True)
        return (found, self.beside(x)) if self.training else found


def test_layers_that_keep_their_channels_say_why_in_the_order_asked_for():
    asked = ["last", "beside", "second", "unused", "norm", "alias", "first", "single", "picked"]
    found = unprunable_layers(Analysis.on(Kinds().eval(), torch.randn(3, 4)), asked)
    assert {name: [each.kind for each in why] for name, why in found.items()} == {
        "last": ["model_output"],
        "beside": ["not_run"],
        "unused": ["not_run"],
        "norm": ["training_reader"],
        "alias": ["another_name"],
        "first": ["training_reader"],
        "picked": ["result_depends"],
    }
    assert list(found) == ["last", "beside", "unused", "norm", "alias", "first", "picked"]


class Pairs(nn.Module):
    """Two pairs of layers that are added, and one layer between them that stands alone."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.alone = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 16, 1)
        self.three, self.four, self.last = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = nn.functional.pixel_shuffle(self.alone(self.one(x) + self.two(x)), 2)
        return self.last(self.three(x) + self.four(x))


def test_groups_are_numbered_as_they_are_selected_and_units_have_their_size():
    model, config = Pairs().eval(), {"op_types": ["Conv2d"], "sparse_ratio": 0.5}

    def told(**knobs):
        groups = dependency_groups(model, IMAGES, [{**config, **knobs}])
        return {entry["op_names"][0]: (entry.get("dependency_group_id"), entry.get("granularity")) for entry in groups}

    whole = told()
    assert whole == {
        "one": ("group_0", None), "two": ("group_0", None), "alone": (None, [4, -1, -1, -1]),
        "three": ("group_1", None), "four": ("group_1", None),
    }  # fmt: skip
    assert told(exclude_op_names=["one", "two"]) == {
        "alone": whole["alone"], "three": ("group_0", None), "four": ("group_0", None),
    }  # fmt: skip


@pytest.mark.parametrize("function", [nni_topo.dependency_groups, nni_topo.explain])
def test_a_model_that_is_still_wrapped_is_refused(function):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    entry = {"op_names": ["0"], "sparse_ratio": 0.5}
    nni_topo.RandomPruner(model, [entry])
    asked = "0" if function is nni_topo.explain else [entry]
    with pytest.raises(SpeedupError, match=r"must be unwrapped .*wrapped by NNI \(0\)"):
        function(model, torch.randn(3, 4), asked)
