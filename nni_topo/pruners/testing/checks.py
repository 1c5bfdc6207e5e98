"""Conformance checks for every pruner of whole channels or of single weights, third parties' included.

Each check takes ``create``, a function ``create(model, config_list, evaluator=None, existed_wrappers=None)`` that
returns the pruner under test, and raises AssertionError where the pruner breaks a promise; from pytest::

    @pytest.mark.parametrize("check", nni_topo.testing.STRUCTURED_CHECKS)
    def test_my_pruner(check):
        check(functools.partial(MyPruner, my_knob=3))
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from nni.compression.base.compressor import Pruner
from nni.compression.pruning import AGPPruner, LinearPruner
from torch import nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.pruners.testing.snapshots import require_unchanged, snapshot
from nni_topo.pruners.testing.toys import ToyModel, toy_evaluator, toy_model

Create = Callable[..., Pruner]
_HALF = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["head"], "sparse_ratio": 0.5}]
_KEPT = {"stem": 4, "inner": 4, "hidden": 8}


def check_masks(create: Create) -> None:
    """Masks are 0 and 1, exist for the configured layers only, and empty no layer."""
    _require_masks(_masks(create, _HALF))


def check_ratio(create: Create) -> None:
    """Half of the filters and neurons are pruned, with their biases."""
    masks = _masks(create, _HALF)
    _require_masks(masks)
    for name, n_kept in _KEPT.items():
        rows = masks[name]["weight"].flatten(1)
        require(bool((rows == rows[:, :1]).all()), f"{name}: whole filters")
        require(int(rows[:, 0].sum()) == n_kept, f"{name}: {n_kept} kept, got {int(rows[:, 0].sum())}")
        require(torch.equal(masks[name]["bias"].flatten(), rows[:, 0]), f"{name}: bias mask follows the weight's")


def check_zero_ratio(create: Create) -> None:
    """A ratio of 0 prunes nothing."""
    masks = _masks(create, [{"op_types": ["Conv2d"], "sparse_ratio": 0.0}])
    require(all(m is None or bool(m.all()) for targets in masks.values() for m in targets.values()), "nothing pruned")


def check_half_precision(create: Create) -> None:
    """A network in half precision gets the same masks as its copy in single precision."""
    for dtype in (torch.float16, torch.bfloat16):
        model = _AnyPrecision(toy_model()).to(dtype)
        half, single = (_masks(create, _HALF, net) for net in (model, copy.deepcopy(model).float()))
        require(_same(half, single), f"{dtype} is ranked as float32 is")


def check_equal_channels(create: Create) -> None:
    """Equal or zero filters give valid masks; a layer with one channel gives valid masks or a ConfigError."""
    for factor in (1.0, 0.0):
        model = toy_model()
        with torch.no_grad():
            for value in _values(model):
                value[:] = factor * value[:1].clone()
        _require_masks(_masks(create, _HALF, model))
    _require_masks_or(ConfigError, create, ToyModel(channels=1))


def check_scales(create: Create) -> None:
    """Weights scaled by 1e-30 and 1e30 give valid masks, or a DataError that leaves the model as it was."""
    for factor in (1e-30, 1e30):
        model = toy_model()
        with torch.no_grad():
            for value in _values(model):
                value *= factor
        _require_masks_or(DataError, create, model)


def check_dependency_group(create: Create) -> None:
    """The members of a dependency group lose the same filters."""
    config = [{"op_names": ["stem", "inner"], "sparse_ratio": 0.5, "dependency_group_id": "residual"}]
    masks = _masks(create, config)
    stem, inner = masks["stem"]["weight"], masks["inner"]["weight"]
    require(torch.equal(stem.flatten(1)[:, 0], inner.flatten(1)[:, 0]), "equal masks in a dependency group")


def check_global_group(create: Create) -> None:
    """A global group loses about the requested share of its elements, and no layer loses all of its filters."""
    masks = _masks(create, [{**_HALF[0], "global_group_id": 1}])
    model: Any = toy_model()
    weights = [targets["weight"].expand_as(model.get_submodule(name).weight) for name, targets in masks.items()]
    kept_share = sum(float(mask.sum()) for mask in weights) / sum(mask.numel() for mask in weights)
    require(0.5 <= kept_share <= 0.7, f"a share in [0.3, 0.5] lost, got {1.0 - kept_share:.3f}")
    require(all(bool(mask.any()) for mask in weights), "every layer keeps something")


def check_repeatable(create: Create) -> None:
    """The same request gives the same masks."""
    require(_same(_masks(create, _HALF), _masks(create, _HALF)), "same request, same masks")


def check_unwrap(create: Create) -> None:
    """``compress`` and ``unwrap_model`` leave the model and the global generators as they were."""
    model = toy_model()
    before = snapshot(model)
    _masks(create, _HALF, model)
    require_unchanged(before, model)


def check_masked_forward(create: Create) -> None:
    """In the wrapped model the output of a pruned neuron is zero."""
    model = toy_model()
    pruner = create(model, _HALF)
    _, masks = pruner.compress()
    hidden = model.hidden(torch.ones(2, 8))
    require(bool((hidden[:, masks["hidden"]["bias"] == 0] == 0).all()), "pruned neurons put out zero")


def check_from_compressor(create: Create) -> None:
    """A pruner that inherits another's wrappers prunes its own layer and keeps the inherited mask."""
    model = toy_model()
    first = create(model, [{"op_names": ["stem"], "sparse_ratio": 0.5}])
    first.compress()
    first.unwrap_model()
    second = create(model, [{"op_names": ["inner"], "sparse_ratio": 0.5}], None, first._module_wrappers)
    second.update_masks(second.generate_masks())
    masks = second.get_masks()
    require(int(masks["inner"]["weight"].flatten(1)[:, 0].sum()) == 4, "the new layer is pruned")
    require(int(masks["stem"]["weight"].flatten(1)[:, 0].sum()) == 4, "the inherited mask stays")
    second.unwrap_model()


def check_scheduled(create: Create) -> None:
    """NNI's LinearPruner and AGPPruner reach the ratio in steps."""
    for scheduler in (LinearPruner, AGPPruner):
        model = toy_model()
        evaluator = toy_evaluator(model)
        scheduled = scheduler(create(model, _HALF, evaluator), interval_steps=2, total_times=3)
        _, masks = scheduled.compress(max_steps=8, max_epochs=None)
        scheduled.unwrap_model()
        counts = {name: int(masks[name]["weight"].flatten(1)[:, 0].sum()) for name in masks}
        require(counts == _KEPT, f"{scheduler.__name__}: half kept, got {counts}")


def check_bad_requests(create: Create) -> None:
    """Invalid input raises ConfigError or DataError and leaves the model as it was."""
    for config, error in (
        ([{"op_types": ["LSTM"], "sparse_ratio": 0.5}], ConfigError),
        ([{"op_types": ["Conv2d"], "sparse_ratio": 1.0}], ConfigError),
        ([{"op_types": ["Conv2d"], "sparse_ratio": -0.1}], ConfigError),
        ([{"op_types": ["Conv2d"], "sparse_ratoi": 0.5}], ConfigError),
    ):
        _require_refused(create, toy_model(), config, error)
    broken = toy_model()
    with torch.no_grad():
        broken.inner.weight[0, 0, 0, 0] = float("nan")
    _require_refused(create, broken, _HALF, DataError)


SINGLE_WEIGHT_CHECKS: tuple[Callable[[Create], None], ...] = (
    check_masks,
    check_zero_ratio,
    check_repeatable,
    check_half_precision,
    check_equal_channels,
    check_scales,
    check_unwrap,
    check_bad_requests,
)
"""Checks of pruners of single weights."""

STRUCTURED_CHECKS: tuple[Callable[[Create], None], ...] = (
    check_masks,
    check_ratio,
    check_zero_ratio,
    check_dependency_group,
    check_global_group,
    check_repeatable,
    check_half_precision,
    check_equal_channels,
    check_scales,
    check_unwrap,
    check_masked_forward,
    check_from_compressor,
    check_scheduled,
    check_bad_requests,
)


class _AnyPrecision(ToyModel):
    """The toy network, which converts images to its own precision."""

    def __init__(self, model: ToyModel) -> None:
        super().__init__(len(model.stem.weight))
        self.load_state_dict(model.state_dict())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.to(self.head.weight.dtype))


def _values(model: ToyModel) -> list[torch.Tensor]:
    return [value for layer in (model.stem, model.inner, model.hidden) for value in layer.parameters()]


def _masks(create: Create, config_list: list[dict[str, Any]], model: ToyModel | None = None) -> Any:
    pruner = create(toy_model() if model is None else model, config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks


def _same(masks: Any, expected: Any) -> bool:
    return all(torch.equal(masks[m][t].float(), expected[m][t].float()) for m in expected for t in expected[m])


def require(condition: bool, promise: str) -> None:
    """Raise AssertionError, with the promise, unless a condition holds."""
    if not condition:
        raise AssertionError(f"broken promise: {promise}")


def _require_masks(masks: Any) -> None:
    require(set(masks) == set(_KEPT), f"masks for the configured layers only, got {sorted(masks)}")
    for name, targets in masks.items():
        for target, mask in targets.items():
            require(mask is None or set(mask.unique().tolist()) <= {0.0, 1.0}, f"{name}.{target}: masks of 0 and 1")
        require(bool(targets["weight"].any()), f"{name}: something stays")


def _require_masks_or(refused: type[Exception], create: Create, model: ToyModel) -> None:
    before = snapshot(model)
    try:
        _require_masks(_masks(create, _HALF, model))
    except refused:
        require_unchanged(before, model)


def _require_refused(create: Create, model: nn.Module, config: list[dict[str, Any]], error: type[Exception]) -> None:
    before = snapshot(model)
    try:
        create(model, config)
    except error:
        require_unchanged(before, model)
    else:
        raise AssertionError(f"broken promise: {config} is refused with {error.__name__}")
