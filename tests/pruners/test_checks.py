from __future__ import annotations

import pytest
import torch
from nni.compression.pruning import AGPPruner, LinearPruner
from torch import nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.pruners.checks import check_request
from nni_topo.pruners.random import RandomPruner
from nni_topo.pruners.registry import create_pruner
from nni_topo.testing import toy_evaluator, toy_images, toy_model


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([{"op_types": ["LSTM"], "sparse_ratio": 0.5}], "at least one module, got none"),
        ([{"op_types": ["Linear"], "sparse_ratio": 1.2}], r"in \[0, 1\), got 1\.2 \(config_list\[0\]\)"),
        (
            [{"op_types": ["Linear"], "sparse_ratio": 0.5}, {"op_types": ["Conv2d"], "sparsty": 0.5}],
            r"got 'sparsty'; .*\(config_list\[1\]\)",
        ),
        ([{"op_types": ["Linear"], 3: 0.5}], r"got '3'; known: "),
        (
            [{"op_types": ["Linear"], "target_settings": {"weight": {"Sparse_Ratio": 0.5}}}],
            r"got 'Sparse_Ratio'; did you mean sparse_ratio\? \(config_list\[0\]\.target_settings\.weight\)",
        ),
        ([{"op_types": ["Linear"], "sparse_ratio": 0}], r"schema.*sparse_ratio.*float"),
        ([{"op_types": ["Linear"], "sparse_ratio": 0.5, "sparse_threshold": 1.0}], "schema"),
        (["Linear"], r"must be a dict, got str \(config_list\[0\]\)"),
        ({"op_types": ["Linear"]}, r"must be a list of dicts, got \{"),
        ([], r"at least one entry, got none \(config_list\)"),
        (
            [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}, {"op_types": ["Linear"]}],
            r"sparse_ratio or a sparse_threshold, got neither \(config_list\[1\]\)",
        ),
        (
            [
                {"op_names": ["0"], "dependency_group_id": "a", "sparse_ratio": 0.5},
                {"op_names": ["2"], "dependency_group_id": "b"},
            ],
            r"got neither \(config_list\[1\]\)",
        ),
        ([{"op_types": ["Flatten"], "sparse_ratio": 0.5}], "PruningSetting, got Flatten"),
    ],
)
def test_bad_config_lists_are_refused_by_name(convnet, config, words):
    with pytest.raises(ConfigError, match=words):
        check_request(convnet, config)


GROUP = {"dependency_group_id": "a"}


@pytest.mark.parametrize(
    "config",
    [
        [{"op_types": ["Linear"], "sparse_ratio": 0.0}],
        [{"op_types": ["Linear"], "target_settings": {"weight": {"sparse_threshold": 0.5}}}],
        [{"op_names": ["0"], "sparse_ratio": 0.5, **GROUP}, {"op_names": ["2"], **GROUP}],
        [
            {"op_names": ["0"], "target_settings": {"weight": GROUP}},
            {"op_names": ["2"], "sparse_threshold": 0.5, **GROUP},
        ],
    ],
)
def test_a_rule_may_stand_in_a_target_or_another_member_of_the_group(convnet, config):
    check_request(convnet, config)


def test_pruners_that_find_the_number_need_no_rule_but_an_entry():
    images, entry = toy_images(8), [{"op_names": ["stem"]}]
    knobs = {
        "subcluster": {"calibration": [images]},
        "genetic_weight": {"evaluate": lambda model: 1.0},
        "topological": {"budget": {"flops": 0.5}, "example_inputs": images},
    }
    for name, given in knobs.items():
        create_pruner(name, toy_model(), entry, **given)
        with pytest.raises(ConfigError, match="at least one entry, got none"):
            create_pruner(name, toy_model(), [], **given)


def test_a_pruner_made_from_another_may_have_an_empty_config_list():
    first = RandomPruner(toy_model(), [{"op_names": ["stem"], "sparse_ratio": 0.5}])
    second = RandomPruner.from_compressor(first, [])
    assert list(second._module_wrappers) == ["stem"]
    with pytest.raises(ConfigError, match="got neither"):
        RandomPruner.from_compressor(second, [{"op_names": ["inner"]}])


@pytest.mark.parametrize("schedule", [LinearPruner, AGPPruner])
def test_schedules_which_have_an_empty_config_list_go_on_working(schedule):
    model = toy_model()
    inner = RandomPruner(model, [{"op_names": ["stem"], "sparse_ratio": 0.5}], toy_evaluator(model))
    _, masks = schedule(inner, interval_steps=1, total_times=2).compress(3, None)
    assert float(masks["stem"]["bias"].mean()) == 0.5


def test_one_entry_that_matches_nothing_only_warns(convnet, caplog):
    config = [{"op_types": ["LSTM"], "sparse_ratio": 0.5}, {"op_types": ["Linear"], "sparse_ratio": 0.5}]
    check_request(convnet, config)
    assert "config_list[0] matches no module" in caplog.text


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_cannot_be_ranked_are_refused(convnet, bad):
    with torch.no_grad():
        convnet[2].weight[0, 0, 0, 0] = bad
    with pytest.raises(DataError, match=r"got 1 NaN or infinite values \(2\.weight\)"):
        check_request(convnet, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])


def test_a_wrapped_model_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    pruner = RandomPruner(model, config)
    with pytest.raises(ConfigError, match=r"unwrap_model\(\)"):
        RandomPruner(model, config)
    pruner.unwrap_model()
    RandomPruner(model, config)
