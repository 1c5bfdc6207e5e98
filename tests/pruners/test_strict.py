"""The strict mode holds for every pruner of NNI: each test shows plain NNI first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nni.compression.base.compressor import Pruner
from nni.compression.pruning import (
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    MovementPruner,
    SlimPruner,
    TaylorPruner,
)
from torch import Tensor, nn

import nni_topo
from nni_topo.errors import ConfigError, DataError
from nni_topo.pruners.units import block_shape
from nni_topo.testing import toy_evaluator, toy_model

KINDS: dict[str, tuple[type[Pruner], dict[str, int]]] = {
    "level": (LevelPruner, {}),
    "l1": (L1NormPruner, {}),
    "l2": (L2NormPruner, {}),
    "fpgm": (FPGMPruner, {}),
    "taylor": (TaylorPruner, {"training_steps": 2}),
    "slim": (SlimPruner, {"training_steps": 2}),
    "movement": (MovementPruner, {"warmup_step": 1, "cooldown_begin_step": 3}),
}
STRUCTURED = [kind for kind in KINDS if kind != "level"]
TIED = {"op_names": ["stem", "inner"], "dependency_group_id": "residual"}

Config = list[dict[str, Any]]
Masks = dict[str, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _back_to_nni() -> Iterator[None]:
    yield
    nni_topo.disable_strict()


def build(kind: str, config: Config, model: nn.Module | None = None) -> Pruner:
    """Build NNI's pruner with its layers in alphabetical order: as it is, the order depends on the hash seed."""
    cls, knobs = KINDS[kind]
    model = model or toy_model()
    pruner = cls(model, config, toy_evaluator(model), **knobs)
    pruner._target_spaces = dict(sorted(pruner._target_spaces.items()))
    return pruner


def masks_of(kind: str, config: Config, model: nn.Module | None = None) -> Masks:
    pruner = build(kind, config, model)
    _, masks = pruner.compress(*((4, None) if kind == "movement" else ()))
    pruner.unwrap_model()
    return dict(masks)


def scores(pruner: Pruner, scales: dict[str, float]) -> dict[str, dict[str, Tensor]]:
    """Give metrics in [1, 2], times a scale per layer, in the shapes that the pruner's own have."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: block_shape(pruner._target_spaces[name]["weight"]) for name in scales}
    return {
        name: {"weight": scales[name] * (1 + torch.rand(shape, generator=generator))} for name, shape in shapes.items()
    }


def shares(masks: Masks) -> dict[str, float]:
    """Share of the weights that stay, by layer."""
    return {name: float(targets["weight"].mean()) for name, targets in masks.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_config_that_matches_nothing(kind: str) -> None:
    config = [{"op_types": ["LSTM"], "sparse_ratio": 0.5}]
    assert build(kind, config)._target_spaces == {}
    nni_topo.enable_strict()
    with pytest.raises(ConfigError, match="match at least one module, got none"):
        build(kind, config)


@pytest.mark.parametrize("kind", KINDS)
def test_config_that_asks_for_nothing(kind: str) -> None:
    assert build(kind, [])._target_spaces == {}
    first = build(kind, [{"op_names": ["stem"], "sparse_ratio": 0.5}])
    build(kind, [{"op_names": ["stem"]}])
    nni_topo.enable_strict()
    for config, words in (([], "at least one entry, got none"), ([{"op_names": ["stem"]}], "got neither")):
        with pytest.raises(ConfigError, match=words):
            build(kind, config)
    cls, knobs = KINDS[kind]
    assert list(cls.from_compressor(first, [], **knobs)._module_wrappers) == ["stem"]


@pytest.mark.parametrize("kind", KINDS)
def test_nan_weights_and_metrics(kind: str) -> None:
    config = [{"op_names": ["stem"], "sparse_ratio": 0.5}]
    broken = toy_model()
    nn.init.constant_(broken.stem.weight, float("nan"))
    build(kind, config, broken).unwrap_model()

    pruner = build(kind, config)
    metrics = scores(pruner, {"stem": float("nan")})
    assert shares(pruner._generate_sparsity(metrics)) == {"stem": 0.5}  # an arbitrary half
    nni_topo.enable_strict()
    with pytest.raises(DataError, match=r"NaN or infinite.*stem\.weight"):
        build(kind, config, broken)
    with pytest.raises(DataError, match=r"NaN or infinite.*stem\.weight"):
        pruner._generate_sparsity(metrics)


@pytest.mark.parametrize("kind", KINDS)
def test_threshold_that_empties_a_layer(kind: str) -> None:
    config = [{"op_names": ["stem"], "sparse_threshold": 1.0 if kind == "movement" else 1e6}]
    assert shares(masks_of(kind, config)) == {"stem": 0.0}
    nni_topo.enable_strict()
    masks = masks_of(kind, config)
    assert int(masks["stem"]["weight"].flatten(1).any(1).sum()) == 1 or kind == "level"
    assert masks["stem"]["weight"].any()


@pytest.mark.parametrize("kind", STRUCTURED)
def test_threshold_with_a_dependency_group(kind: str) -> None:
    pruner = build(kind, [{**TIED, "sparse_threshold": 1.5}])
    metrics = scores(pruner, {"stem": 1.0, "inner": 1.0})
    with pytest.raises(AssertionError) as caught:
        pruner._generate_sparsity(metrics)
    assert str(caught.value) == ""
    nni_topo.enable_strict()
    masks = pruner._generate_sparsity(metrics)
    expected = (metrics["stem"]["weight"] + metrics["inner"]["weight"]) / 2 >= 1.5
    for name in ("stem", "inner"):
        assert torch.equal(masks[name]["weight"][:, :1, :1, :1].bool(), expected)
        assert torch.equal(masks[name]["bias"].bool(), expected.flatten())


@pytest.mark.parametrize("kind", STRUCTURED)
def test_bounds_in_a_dependency_group(kind: str) -> None:
    bounds = [({"sparse_ratio": 0.75, "max_sparse_ratio": 0.25}, 0.25, 0.75)]
    bounds += [({"sparse_ratio": 0.25, "min_sparse_ratio": 0.5}, 0.75, 0.5)]
    for keys, ignored, meant in bounds:
        pruner = build(kind, [{**TIED, **keys}])
        metrics = scores(pruner, {"stem": 1.0, "inner": 1.0})
        assert shares(pruner._generate_sparsity(metrics)) == {"stem": ignored, "inner": ignored}
        nni_topo.enable_strict()
        assert shares(pruner._generate_sparsity(metrics)) == {"stem": meant, "inner": meant}
        nni_topo.disable_strict()


@pytest.mark.parametrize("kind", STRUCTURED)
def test_global_group_with_a_dependency_group(kind: str) -> None:
    extra = {"global_group_id": 1, "sparse_ratio": 0.5}
    pruner = build(kind, [{**TIED, **extra}, {"op_names": ["hidden"], **extra}])
    metrics = scores(pruner, {"stem": 1.0, "inner": 1.0, "hidden": 100.0})
    assert shares(pruner._generate_sparsity(metrics))["hidden"] == 0.5  # hidden is ranked alone
    nni_topo.enable_strict()
    # of 920 elements 460 may go: four of the pair's rows of 99, which rank below all of hidden's
    assert shares(pruner._generate_sparsity(metrics)) == {"stem": 0.5, "inner": 0.5, "hidden": 1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_global_group_of_layers_of_different_scale(kind: str) -> None:
    pruner = build(kind, [{"op_names": ["stem", "hidden"], "sparse_ratio": 0.65, "global_group_id": 1}])
    metrics = scores(pruner, {"stem": 1.0, "hidden": 100.0})
    assert shares(pruner._generate_sparsity(metrics))["stem"] == 0.0  # a dead layer
    nni_topo.enable_strict()
    floor = shares(pruner._generate_sparsity(metrics))["stem"]
    assert 0.0 < floor <= 1 / 8
    nni_topo.enable_strict(normalization="mean")
    assert shares(pruner._generate_sparsity(metrics))["stem"] > floor


@pytest.mark.parametrize("kind", KINDS)
def test_update_masks_with_an_unknown_module(kind: str) -> None:
    pruner = build(kind, [{"op_names": ["stem"], "sparse_ratio": 0.5}])
    masks = {"nowhere": {"weight": torch.ones(1)}, "stem": {"weight": torch.zeros(8, 3, 3, 3)}}
    with pytest.raises(KeyError, match="nowhere"):
        pruner.update_masks(masks)
    nni_topo.enable_strict()
    pruner.update_masks(masks)
    assert not pruner.get_masks()["stem"]["weight"].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rule",
    [
        {"sparse_ratio": 0.5},
        {"sparse_ratio": 0.5, "max_sparse_ratio": 0.25},
        {"sparse_threshold": 1.6},
        {"sparse_threshold": 1.6, "min_sparse_ratio": 0.75},
        {"sparse_ratio": 0.5, "dependency_group_id": "residual"},
    ],
)
def test_good_requests_have_the_masks_that_nni_makes(kind: str, rule: dict[str, Any]) -> None:
    layers = ["inner"] if "dependency_group_id" in rule else ["inner", "stem", "hidden"]
    pruner = build(kind, [{"op_names": layers, **rule}])
    metrics = scores(pruner, dict.fromkeys(layers, 1.0))
    plain = pruner._generate_sparsity(metrics)
    nni_topo.enable_strict()
    strict = pruner._generate_sparsity(metrics)
    assert plain.keys() == strict.keys() == set(layers)
    for name in layers:
        assert plain[name].keys() == strict[name].keys()
        assert all(torch.equal(plain[name][target], strict[name][target]) for target in plain[name])


@pytest.mark.parametrize("kind", KINDS)
def test_good_requests_keep_as_much_as_nni_keeps(kind: str) -> None:
    config = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["head"], "sparse_ratio": 0.5}]
    plain = shares(masks_of(kind, config))
    nni_topo.enable_strict()
    assert shares(masks_of(kind, config)) == plain == {"stem": 0.5, "inner": 0.5, "hidden": 0.5}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("movement", "slim")])
def test_schedules_run_under_the_strict_mode(kind: str) -> None:
    nni_topo.enable_strict()
    pruner = AGPPruner(build(kind, [{"op_names": ["stem", "inner"], "sparse_ratio": 0.5}]), 2, 3)
    _, masks = pruner.compress(8, None)
    pruner.unwrap_model()
    assert shares(masks) == {"stem": 0.5, "inner": 0.5}


def test_slim_of_batch_norms_under_the_strict_mode() -> None:
    config = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]
    plain = masks_of("slim", config)
    nni_topo.enable_strict()
    strict = masks_of("slim", config)
    assert torch.equal(plain["norm"]["weight"], strict["norm"]["weight"])
    assert int(strict["norm"]["weight"].sum()) == 4


@pytest.mark.parametrize("threshold", [0.45, 0.5])
def test_movement_by_threshold_under_the_strict_mode(threshold: float) -> None:
    config = [{"op_names": ["hidden"], "sparse_threshold": threshold, "granularity": "default"}]
    plain = masks_of("movement", config)["hidden"]["weight"]
    nni_topo.enable_strict()
    assert torch.equal(masks_of("movement", config)["hidden"]["weight"], plain)
    assert float(plain.mean()) > 0


def test_layers_are_looked_at_in_network_order() -> None:
    """Plain NNI's order is a set's, which one of 12! orders it has by chance."""
    names = [f"layer{12 - index}" for index in range(12)]
    model = nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in names))
    nni_topo.enable_strict()
    pruner = L1NormPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert list(pruner._target_spaces) == names


def test_a_layer_with_two_names_is_pruned_under_the_strict_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.append(model[0])
    nni_topo.enable_strict()
    for name in ("0", "2"):
        pruner = L1NormPruner(model, [{"op_names": [name], "sparse_ratio": 0.5}])
        assert list(pruner._target_spaces) == [name]
        pruner.unwrap_model()
