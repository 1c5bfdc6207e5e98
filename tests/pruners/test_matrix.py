from __future__ import annotations

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.pruners.matrix import MatrixPruner
from nni_topo.pruners.registry import create_pruner
from nni_topo.speedup import dependency_groups
from nni_topo.testing import STRUCTURED_CHECKS, toy_images, toy_model

IMAGES = toy_images(2)


@pytest.mark.parametrize("check", STRUCTURED_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.quick_every(2)
def test_promises_with_rows_and_columns(check):
    check(lambda *args, **kwargs: MatrixPruner(*args, **kwargs, example_inputs=IMAGES))


@pytest.mark.parametrize(("norm", "name"), [(1, "l1"), (2, "l2")])
def test_rows_alone_are_nnis_norm_pruners(norm, name):
    config = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["head"], "sparse_ratio": 0.5}]
    masks = [MatrixPruner(toy_model(), config, norm=norm).compress()[1]]
    masks.append(create_pruner(name, toy_model(), config).compress()[1])
    for layer in ("stem", "inner", "hidden"):
        assert torch.equal(*(found[layer]["weight"] for found in masks))


@pytest.mark.parametrize("norm", [1, 2])
def test_the_norm_is_over_all_that_goes(norm):
    model = toy_model().eval()
    config = nni_topo.dependency_groups(model, IMAGES, [{"op_names": ["stem", "inner"], "sparse_ratio": 0.5}])
    pruner = MatrixPruner(model, config, norm=norm, example_inputs=IMAGES)
    context = pruner.context
    found = pruner.calculator.calculate(pruner.collector.collect(context), context)["inner"]["weight"].flatten()
    pruner.unwrap_model()
    parts = [
        model.stem.weight.flatten(1),
        model.inner.weight.flatten(1),
        model.inner.weight.transpose(0, 1).flatten(1),
        model.hidden.weight.T,
    ]
    torch.testing.assert_close(found, torch.cat(parts, 1).double().norm(p=norm, dim=1))


def test_behind_a_flattening_a_channel_has_many_columns():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    model[0].weight.data.fill_(0.1)
    model[2].weight.data.zero_()
    model[2].weight.data[1, 5] = 1.0
    config = [{"op_names": ["0"], "sparse_ratio": 0.67}]
    _, masks = MatrixPruner(model, config, example_inputs=torch.zeros(1, 1, 4, 4)).compress()
    assert masks["0"]["bias"].tolist() == [0.0, 1.0, 0.0]


def test_inner_matrices_lose_the_square_and_stay_dense():
    model = nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 5))
    inputs = torch.randn(4, 20)
    pruner = MatrixPruner(model, [{"op_names": ["0", "2"], "sparse_ratio": 0.8}], example_inputs=inputs)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = nni_topo.to_dense(model, inputs, masks)
    assert [tuple(layer.weight.shape) for layer in dense[::2]] == [(20, 20), (20, 20), (5, 20)]
    assert all(bool(layer.weight.all()) for layer in dense[::2])


def test_a_layer_that_is_not_there_is_named():
    for call in (
        lambda config: MatrixPruner(toy_model(), config),
        lambda config: dependency_groups(toy_model(), IMAGES, config),
    ):
        with pytest.raises(ConfigError, match="a layer must be a known name, got 'hiden'; did you mean hidden"):
            call([{"op_names": ["hiden"], "sparse_ratio": 0.5}])
