"""Conformance checks for every recovery method, third parties' included.

Each check takes a method as :func:`nni_topo.compensate` takes it, by name, by path or as an object, and raises
AssertionError where the method breaks a promise; from pytest::

    @pytest.mark.parametrize("check", nni_topo.testing.RECOVERY_CHECKS)
    def test_my_method(check):
        check(MyMethod(my_setting=3))
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nni_topo.network.runtime.comparison import SAME_CHANNELS, agree
from nni_topo.network.speedup.dense import dense_of
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.pruners.testing.checks import require
from nni_topo.pruners.testing.snapshots import require_unchanged, snapshot
from nni_topo.pruners.testing.toys import ToyModel, toy_images, toy_model
from nni_topo.recovery import Compensation, RecoveryMethod, compensation

Method = str | RecoveryMethod


def check_same_shapes(method: Method) -> None:
    """The network keeps its shapes and has finite weights."""
    model = _model()
    state = _recover(model, method).model.state_dict()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    require({name: value.shape for name, value in state.items()} == shapes, "weights have the shapes that they had")
    require(all(bool(torch.isfinite(value).all()) for value in state.values()), "weights are finite")


def check_nothing_else_changes(method: Method) -> None:
    """The model, the masks and the global generators stay as they were."""
    model, masks = _model(), _masks()
    before, masks_before = snapshot(model), copy.deepcopy(masks)
    _recover(model, method, masks)
    require_unchanged(before, model)
    same = all(
        torch.equal(masks[name][target], mask) for name in masks_before for target, mask in masks_before[name].items()
    )
    require(same, "masks stay as they were")


def check_repeatable(method: Method) -> None:
    """The same call gives the same network."""
    first, second = (_recover(_model(), method).model.state_dict() for _ in range(2))
    require(all(torch.equal(first[name], second[name]) for name in first), "same call, same weights")


def check_dense(method: Method) -> None:
    """The masked and the dense network compute the same."""
    masks, images = _masks(), toy_images(8)
    recovered = _recover(_model(), method, masks).model
    dense, masked = dense_of(recovered, images, masks), masked_model(recovered, images, masks)
    with torch.no_grad():
        same = agree([masked(images)], [dense(images)], SAME_CHANNELS)
    require(same, "the dense network computes what the masked one does")


def check_report(method: Method) -> None:
    """The report has a finite error for each layer that was solved."""
    for layer in _recover(_model(), method).report.layers:
        errors = (layer.error_before, layer.error_after)
        require(all(map(math.isfinite, errors)), f"{layer.layer}: finite errors, got {errors}")


def check_few_images(method: Method) -> None:
    """Fewer images than unknowns, none of them held out, give finite weights."""
    state = _recover(_model(), method, count=2).model.state_dict()
    require(all(bool(torch.isfinite(value).all()) for value in state.values()), "finite weights from two images")


def check_no_constant(method: Method) -> None:
    """A layer without a bias, and without a batch norm after it, gets no bias."""
    model = _model()
    model.hidden.register_parameter("bias", None)
    masks = _masks()
    del masks["hidden"]["bias"]
    hidden: Any = _recover(model, method, masks).model.get_submodule("hidden")
    require(hidden.bias is None, "a layer without a bias stays without one")


RECOVERY_CHECKS: tuple[Callable[[Method], None], ...] = (
    check_same_shapes,
    check_nothing_else_changes,
    check_repeatable,
    check_dense,
    check_report,
    check_few_images,
    check_no_constant,
)


def _model() -> ToyModel:
    return toy_model().eval()


def _masks() -> dict[str, dict[str, Tensor]]:
    """Return masks that remove half of the channels of each layer but the last."""
    model, masks = toy_model(), {}
    for name in ("stem", "inner", "hidden"):
        layer: Any = model.get_submodule(name)
        is_kept = (torch.arange(len(layer.weight)) % 2).to(layer.weight.dtype)
        view = [-1] + [1] * (layer.weight.dim() - 1)
        masks[name] = {"weight": is_kept.view(view).expand_as(layer.weight).clone(), "bias": is_kept.clone()}
    return masks


def _recover(model: ToyModel, method: Method, masks: Any = None, count: int = 64) -> Compensation:
    return compensation(model, _masks() if masks is None else masks, toy_images(count).split(16), method=method)
