"""An Analysis: what is found about a model is found once, and handed on only where it holds."""

import logging
import pickle

import pytest
import torch
from torch import nn

from nni_topo import Budget, RandomPruner, dependency_groups, shrink, to_dense
from nni_topo.errors import ConfigError
from nni_topo.network.cost.measure import count_params
from nni_topo.network.graph import tracing
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.pruners.testing.toys import toy_images, toy_model


@pytest.fixture
def traces(monkeypatch):
    """The models that were traced, by class name."""
    done = []
    record = tracing.record

    def counted(model, *args, **kwargs):
        done.append(type(model).__name__)
        return record(model, *args, **kwargs)

    monkeypatch.setattr(tracing, "record", counted)
    return done


def masks_of(model, groups):
    pruner = RandomPruner(model, groups, seed=0)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks


def test_groups_that_are_passed_on_save_the_trace(traces):
    model, images = toy_model().eval(), toy_images(2)
    groups = dependency_groups(model, images, [{"op_names": ["stem", "inner"], "sparse_ratio": 0.5}])
    masks = masks_of(model, groups)
    with torch.no_grad():
        for parameter in model.parameters():  # as training does
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    done = len(traces)
    given = to_dense(model, images, masks, groups=groups)
    assert len(traces) == done
    assert torch.equal(given(images), to_dense(model, images, masks)(images))
    found = len(traces)
    assert found > done
    to_dense(model, images, masks, groups=pickle.loads(pickle.dumps(groups)))  # of another process: these know nothing
    to_dense(model, toy_images(2)[..., :6], masks, groups=groups)  # nor do they of other sizes
    assert len(traces) == 3 * found - 2 * done
    with pytest.raises(
        ConfigError, match=r"groups must come from dependency_groups on this model, got .* stem.weight.* \(groups\)"
    ):
        to_dense(given, images, {}, groups=groups)


class Gated(nn.Module):
    """Runs its second layer as long as a weight says so."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.last = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 2)
        self.gate = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        hidden = self.one(x).relu()
        if self.gate > 0:
            hidden = hidden + self.other(x).relu()
        return self.last(hidden)


def test_a_pruner_sees_the_weights_that_were_trained_since_its_groups_were_made():
    model, rows = Gated().eval(), torch.randn(4, 8)
    groups = dependency_groups(model, rows, [{"op_names": ["one"]}])
    with torch.no_grad():
        model.gate.fill_(-1.0)
    pruner = RandomPruner(model, groups, budget=Budget(params=0.6), example_inputs=rows)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert pruner.planner.outcome.is_met
    before, after = (count_params(net) for net in (model, to_dense(model, rows, masks)))
    assert after / before == pytest.approx(pruner.planner.outcome.left, abs=1e-9)


class Telling(nn.Module):
    """Reads a value to say something, as Transformers' models do of padding without a mask."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        if (x == -1.0).any():
            logging.getLogger(__name__).warning("padding without a mask")
        return self.last(self.first(x).relu())


@pytest.mark.parametrize(("make", "pruner"), [(toy_model, "reconstruction"), (Telling, "l1")])
def test_shrink_traces_a_network_once(make, pruner, traces):
    images = toy_images(32) if make is toy_model else torch.rand(32, 4)
    shrink(make().eval(), [images], {"flops": 0.5}, pruner=pruner, distill=False)
    assert len(traces) == 1


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("given", "other", "is_known"),
    [
        ((IMAGES,), (IMAGES.double(),), False),
        ((IMAGES, True), (IMAGES, True), True),
        ((IMAGES, True), (IMAGES, False), False),
        (({"a": IMAGES},), ({"b": IMAGES},), False),
        (([IMAGES, IMAGES],), ([IMAGES],), False),
        ((IMAGES, object()), (IMAGES, object()), False),
    ],
)
def test_facts_fit_calls_of_the_same_shapes_and_settings(given, other, is_known):
    model = nn.Conv2d(3, 4, 3)
    facts = Analysis(model, (given, {})).facts
    assert (Analysis(model, (other, {}), facts).facts is facts) is is_known
