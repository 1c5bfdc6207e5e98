"""What each pruner makes of each key of a config_list, against NNI's pruners and against the page that says it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from config_keys import CASES, OWN, kept, outcome, plain, table, written

import nni_topo


@pytest.mark.slow
def test_the_page_says_what_every_pruner_makes_of_every_key() -> None:
    assert written() == table()


def test_the_table_can_tell_pruners_apart() -> None:
    """NNI's own pruner differs from key to key, or an equal count would say nothing."""
    counts = {case: kept("l1", CASES[case][0]) for case in ("`sparse_ratio`", "a bias with a ratio of its own")}
    assert counts["a bias with a ratio of its own"] == {"first.weight": 8 * 27, "first.bias": 12}
    assert counts["`sparse_ratio`"]["first.bias"] == 12
    assert len(OWN) == 10


def test_a_bias_with_a_threshold_loses_what_its_weight_loses_too() -> None:
    weight = {"sparse_ratio": 0.5}
    bias: dict[str, Any] = {"sparse_threshold": 0.1}
    config_list = [{"op_names": ["first"], "target_settings": {"weight": weight, "bias": bias}}]
    model = plain()
    _, masks = nni_topo.MatrixPruner(model, config_list).compress()
    kept_rows = masks["first"]["weight"].expand_as(plain().first.weight).flatten(1).any(1)
    assert kept_rows.sum() == 8
    assert torch.equal(masks["first"]["bias"].bool(), kept_rows & (plain().first.bias.abs() >= 0.1))


def test_a_ratio_that_is_a_limit_is_no_yes() -> None:
    """At one ratio the clusters of the one network happen to need as many neurons as L1 keeps."""
    assert outcome("subcluster", "`sparse_ratio`") == ("own", "")
    assert outcome("cluster", "`sparse_ratio`") == ("yes", "")


def test_an_error_names_the_first_layer_of_the_network() -> None:
    """NNI's order of layers changes with the hash seed."""
    for column in ("genetic_weight", "matrix"):
        said, message = outcome(column, '`granularity` `"per_channel"`')
        assert (said, message[-14:]) == ("no", "(first.weight)")
