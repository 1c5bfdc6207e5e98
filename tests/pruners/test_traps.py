"""NNI's traps: each test shows what plain NNI does, then what the package's pruners do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compat_pruners import kept, nnis, ours
from nni.compression.pruning.tools import generate_sparsity
from torch import Tensor

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.testing import toy_model


def global_metrics() -> dict[str, dict[str, Tensor]]:
    """A tied pair that matters little, and a layer that matters much."""
    low, high = torch.arange(1.0, 9.0).reshape(8, 1, 1, 1), torch.arange(101.0, 117.0).reshape(16, 1)
    return {"stem": {"weight": low}, "inner": {"weight": low.clone()}, "hidden": {"weight": high}}


def filters(masks: dict[str, dict[str, Tensor]]) -> dict[str, int]:
    return {name: int(targets["bias"].sum()) for name, targets in masks.items()}


def test_maximum_ratio_in_a_global_group() -> None:
    entry = {"global_group_id": 1, "sparse_ratio": 0.5}
    config = [{"op_names": ["stem"], "max_sparse_ratio": 0.25, **entry}, {"op_names": ["hidden"], **entry}]
    metrics = {name: score for name, score in global_metrics().items() if name != "inner"}
    assert filters(generate_sparsity(metrics, nnis(config)._target_spaces))["stem"] < 6
    assert filters(ours(config)._generate_sparsity(metrics))["stem"] == 6


LEGACY = [
    ([{"op_types": ["Conv2d"], "sparsity": 0.5}], {"stem": 4, "inner": 4}),
    ([{"op_types": ["Conv2d"], "sparsity_per_layer": 0.5, "max_sparsity_per_layer": 0.25}], {"stem": 6, "inner": 6}),
    (
        [{"op_types": ["Linear"], "sparse_ratio": 0.5}, {"op_names": ["head"], "exclude": True}],
        {"hidden": 8},
    ),
    ([{"op_types": ["Conv2d"], "op_partial_names": ["inn"], "sparse_ratio": 0.5}], {"inner": 4}),
]


@pytest.mark.parametrize(("config", "expected"), LEGACY)
def test_legacy_keys_are_accepted_with_a_note(config: list[dict[str, Any]], expected: dict[str, int]) -> None:
    with pytest.warns(FutureWarning, match=r"is a key of NNI 2, write \w+ \(config_list\[\d\]\)"):
        assert kept(ours(config)) == expected


def test_total_sparsity_becomes_a_global_group() -> None:
    config = [{"op_types": ["Conv2d"], "total_sparsity": 0.5}]
    with pytest.warns(FutureWarning, match="'total_sparsity' is a key of NNI 2, write sparse_ratio with"):
        pruner = ours(config)
    assert pruner._target_spaces["stem"]["weight"].global_group_id == "total_sparsity_0"
    assert 0 < kept(pruner)["stem"] <= 8


def test_two_keys_for_one_thing_are_refused() -> None:
    config = [{"op_types": ["Conv2d"], "sparsity": 0.5, "sparse_ratio": 0.25}]
    with pytest.warns(FutureWarning), pytest.raises(ConfigError, match="got 'sparsity' and 'sparse_ratio'"):
        ours(config)


def test_the_registry_passes_the_new_keys_on_to_nnis_pruners() -> None:
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}, {"op_names": ["head"], "exclude": True}]
    with pytest.warns(FutureWarning, match="exclude_op_names"):
        assert kept(nni_topo.create_pruner("l1", toy_model(), config)) == {"hidden": 8}
    assert "exclude_op_names" not in config[0]
