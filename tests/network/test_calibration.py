from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nni_topo
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.inputs import batch_size, calls, repeatable

CONFIG = [{"op_names": ["hidden"], "sparse_ratio": 0.5}]
KNOBS = {
    "topological": {},
    "topological, functional": {"criterion": "hausdorff", "solver": "greedy"},
    "topological, activation": {"cloud": "activation"},
    "reconstruction": {},
    "cluster": {},
    "subcluster": {},
    "energy": {"signal": "data", "example_inputs": torch.randn(2, 6)},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, inputs, scale=1.0):
        return self.last(torch.relu(self.hidden(inputs)) * scale)


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(1)))


def kept(row: str, model: nn.Module, calibration) -> list[int]:
    pruner = nni_topo.create_pruner(row.partition(",")[0], model, CONFIG, calibration=calibration, **KNOBS[row])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks["hidden"]["bias"].int().tolist()


@pytest.mark.parametrize("row", KNOBS)
def test_batches_may_come_in_any_container(row, model, batches):
    expected = kept(row, model, batches)
    assert 0 < sum(expected) < 12
    assert kept(row, model, [{"inputs": batch} for batch in batches]) == expected
    assert kept(row, model, [(batch, torch.zeros(40)) for batch in batches]) == expected
    assert kept(row, model, (batch for batch in batches)) == expected
    assert kept(row, model, DataLoader(TensorDataset(torch.cat(batches)), batch_size=40)) == expected


@pytest.mark.parametrize("row", KNOBS)
@pytest.mark.parametrize(
    ("calibration", "found"),
    [(torch.randn(40, 6), r"one tensor of shape \(40, 6\)"), ({"inputs": torch.randn(40, 6)}, "dict"), (5, "int")],
    ids=["tensor", "mapping", "number"],
)
def test_what_is_no_iterable_of_batches_is_refused_before_the_model_is_wrapped(row, calibration, found, model):
    with pytest.raises(ConfigError, match=f"iterable of batches.*{found}"):
        kept(row, model, calibration)
    assert not hasattr(model.hidden, "_nni_wrapper")


@pytest.mark.parametrize("row", ["topological", "reconstruction", "cluster", "subcluster"])
def test_batches_that_do_not_fit_are_named(row, model):
    with pytest.raises(DataError, match=r"calibration must fit the model, got RuntimeError.*\(batch 0\)"):
        kept(row, model, [torch.randn(40, 7)])


def test_compensation_takes_the_same(model, batches):
    masks = {"hidden": {"weight": torch.ones(12, 6), "bias": torch.ones(12)}}
    masks["hidden"]["weight"][3:] = masks["hidden"]["bias"][3:] = 0.0
    expected = nni_topo.compensate(model, masks, batches).last.weight
    for given in ((b for b in batches), [{"inputs": b} for b in batches]):
        torch.testing.assert_close(nni_topo.compensate(model, masks, given).last.weight, expected)
    with pytest.raises(ConfigError, match="iterable of batches"):
        nni_topo.compensate(model, masks, batches[0])


def test_calls_are_arguments():
    net, batch = Net(), torch.zeros(4, 6)
    for given in (batch, (batch, "label"), [batch], {"inputs": batch}, ((batch, 2.0), "label")):
        ((args, kwargs),) = calls(net, [given])
        assert net(*args, **kwargs).shape == (4, 3)
        assert batch_size((args, kwargs)) == 4
    with pytest.raises(DataError, match="empty one"):
        list(calls(net, [()]))
    with pytest.raises(DataError, match="at least one batch"):
        list(calls(net, []))


def test_what_can_be_read_again_is_left_as_it_is(batches):
    loader = DataLoader(TensorDataset(torch.cat(batches)))
    assert repeatable(loader) is loader
    assert repeatable(batches) is batches
    assert repeatable(iter(batches)) == batches
