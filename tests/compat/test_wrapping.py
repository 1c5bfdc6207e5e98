"""Models in NNI's wrappers: what is shared stays shared, and what failed leaves nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch
from nni.compression.base.compressor import Pruner
from nni.compression.base.setting import PruningSetting
from nni.compression.pruning import L1NormPruner, LevelPruner, LinearPruner
from nni.compression.speedup import ModelSpeedup
from speedup_nets import filter_mask
from tied_nets import TiedConvolutions, TwoBlocks, TwoNames, zeroed
from torch import nn

from nni_topo import RandomPruner, StructuredPruner
from nni_topo.compat import wrapping
from nni_topo.errors import ConfigError
from nni_topo.sharing import find_ties

PRUNERS = [L1NormPruner, LevelPruner, RandomPruner]
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))
SELECTIONS = [["one"], ["two"], ["one", "two"]]


TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks")


def request(names):
    return [{"op_names": list(names), "sparse_ratio": 0.5}]


def state(model):
    """Everything by which two models could differ, but for the values of tensors."""
    return {
        name: (
            type(module),
            [(own, id(value)) for kind in TABLES for own, value in vars(module)[kind].items()],
            module.training,
            vars(module).get("forward"),
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


@pytest.mark.parametrize("kind", PRUNERS)
@pytest.mark.parametrize("names", SELECTIONS[1:])
def test_unwrapping_leaves_convolutions_of_one_weight(kind, names):
    model = TiedConvolutions()
    ties, expected = find_ties(model), model(IMAGES)
    pruner = kind(model, request(names))
    masks = pruner.compress()[1]
    assert sorted(masks) == sorted(names)
    pruner.unwrap_model()
    assert find_ties(model) == ties
    assert torch.equal(model(IMAGES), expected)
    assert all(type(layer.weight) is nn.Parameter for layer in (model.one, model.two))


def test_wrapped_layers_of_one_weight_are_trained_together():
    model, wrapped = TiedConvolutions(), TiedConvolutions()
    pruner = L1NormPruner(wrapped, request(["two"]))
    for each in (model, wrapped):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            each(IMAGES).square().sum().backward()
            optimizer.step()
    pruner.unwrap_model()
    assert wrapped.one.weight is wrapped.two.weight
    assert torch.allclose(wrapped.one.weight, model.one.weight, atol=1e-6)
    assert not torch.equal(model.one.weight, TiedConvolutions().one.weight)


@pytest.mark.parametrize("names", SELECTIONS)
def test_nnis_speedup_of_layers_of_one_weight(names):
    model = TiedConvolutions()
    masks = {name: filter_mask(model.get_submodule(name), [1, 4]) for name in names}
    for name, targets in masks.items():
        targets["bias"] = targets["weight"][:, 0, 0, 0].clone()
        assert name in dict(model.named_modules())
    expected = zeroed(TiedConvolutions(), masks)(IMAGES)
    assert ModelSpeedup(model, IMAGES, copy.deepcopy(masks)).speedup_model() is model
    assert torch.allclose(model.eval()(IMAGES), expected, atol=1e-6)
    assert [model.get_submodule(name).out_channels for name in names] == [4] * len(names)


def test_nnis_speedup_of_a_layer_with_two_names():
    model = TwoNames().eval()
    masks = {name: filter_mask(model.get_submodule(name), [1, 4]) for name in ("stem", "first")}
    for targets in masks.values():
        targets["bias"] = targets["weight"][:, 0, 0, 0].clone()
    expected = zeroed(TwoNames(), masks)(IMAGES)
    ModelSpeedup(model, IMAGES, masks).speedup_model()
    assert model.first is model.second
    assert model.second.out_channels == 4
    assert torch.allclose(model(IMAGES), expected, atol=1e-6)


@pytest.mark.parametrize("kind", PRUNERS)
@pytest.mark.parametrize("make", [TwoNames, TwoBlocks])
def test_a_module_with_two_names_is_pruned_once(kind, make):
    model = make()
    before = state(model)
    config = {"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5, "exclude_op_names": ["tail"]}
    pruner = kind(model, [config])
    masks = pruner.compress()[1]
    assert sorted(masks) == (["first", "stem"] if make is TwoNames else ["first.0", "first.2"])
    pruner.unwrap_model()
    assert state(model).keys() == before.keys()
    assert model.first is model.second
    kind(model, [config])


class OwnConvolution(nn.Conv2d):
    """A class of a user's, derived from one that NNI prunes."""


class OwnDropout(nn.Dropout):
    """A class of a user's, derived from one that NNI doesn't prune."""


@pytest.mark.parametrize(
    ("types", "found"),
    [(["Conv2d", "Dropout"], {"OwnConvolution"}), (["Linear"], {"NonDynamicallyQuantizableLinear"})],
)
def test_derived_classes_get_the_settings_of_their_base(types, found, monkeypatch):
    before = {name: kind for name, kind in PruningSetting.registry.items() if name not in found}
    monkeypatch.setattr(PruningSetting, "registry", dict(before))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), OwnConvolution(4, 4, 1), OwnDropout(), nn.Linear(4, 4))
    model.append(nn.MultiheadAttention(4, 1))
    assert wrapping.derived_types(model, types) == found
    assert PruningSetting.registry == {**before, **dict.fromkeys(found, before[types[0]])}


class Failing(StructuredPruner):
    """Raises after NNI has wrapped the model."""

    def __init__(self, model, config_list):
        super().__init__(model, config_list, collector=None, calculator=None)
        assert self._is_wrapped
        raise ValueError("at the end")


class NniFailing(Pruner):
    """A pruner that knows nothing of this package."""

    def __init__(self, model, config_list):
        super().__init__(model, config_list)
        raise KeyboardInterrupt


FAILURES = {
    "unknown type": lambda model: L1NormPruner(model, [{"op_names": ["stem", "drop"], "sparse_ratio": 0.5}]),
    "end of a constructor": lambda model: Failing(model, request(["stem", "one"])),
    "interrupt": lambda model: NniFailing(model, request(["stem", "one"])),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_constructor_that_raises_leaves_the_model_as_it_was(failure):
    model = TiedConvolutions().eval()
    model.drop = nn.Dropout()
    before, expected = state(model), model(IMAGES)
    with pytest.raises(BaseException):  # noqa: B017, PT011
        FAILURES[failure](model)
    assert state(model) == before
    assert torch.equal(model(IMAGES), expected)
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())
    RandomPruner(model, request(["stem"])).compress()


def test_a_second_wrapping_that_fails_leaves_the_first():
    model = TiedConvolutions()
    pruner = L1NormPruner(model, request(["stem"]))
    pruner.compress()
    expected = model(IMAGES)
    before = state(model)
    with pytest.raises(AssertionError):
        L1NormPruner(model, request(["one", "stem"]))
    with pytest.raises(ConfigError):
        RandomPruner(model, request(["one"]))
    with pytest.raises(AssertionError):
        LinearPruner(pruner, 1, 2)
    assert pruner._is_wrapped
    assert state(model) == before
    assert torch.equal(model(IMAGES), expected)
    pruner.unwrap_model()
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())
