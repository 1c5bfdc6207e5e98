from __future__ import annotations

import pytest
import torch
from torch import nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.pruners.checks import check_request
from nni_topo.pruners.random import RandomPruner


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            [{"op_types": ["LSTM"], "sparse_ratio": 0.5}],
            "at least one module, got none; layer types in this model",
        ),
        ([{"op_types": ["Linear"], "sparse_ratio": 1.2}], r"in \[0, 1\), got 1\.2 \(config_list\[0\]\)"),
        (
            [{"op_types": ["Linear"], "target_settings": {"weight": {"sparse_ratio": -0.5}}}],
            r"got -0\.5 \(config_list\[0\]\.target_settings\.weight\)",
        ),
        ([{"op_types": ["Linear"], "sparse_ratoi": 0.5}], "Wrong key 'sparse_ratoi'"),
        ([{"op_types": ["Linear"], "sparse_ratio": 1}], r"schema.*sparse_ratio.*float"),
        ([{"op_types": ["Linear"], "sparse_ratio": 0.5, "sparse_threshold": 1.0}], "schema"),
        (["Linear"], r"must be a dict, got str \(config_list\[0\]\)"),
        ({"op_types": ["Linear"]}, "must be a list of dicts, got dict"),
        (
            [{"op_types": ["Flatten"], "sparse_ratio": 0.5}],
            "registered with NNI's PruningSetting, got Flatten",
        ),
    ],
)
def test_bad_config_lists_are_refused_by_name(convnet, config, words):
    with pytest.raises(ConfigError, match=words):
        check_request(convnet, config)


def test_an_empty_config_list_is_legal(convnet):
    check_request(convnet, [])


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
