"""Dropout at test time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.studies.analysis.energy.dropout import ActiveDropout, study_dropout, with_dropout
from nni_topo.studies.analysis.energy.study import Quality


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), nn.Linear(64, 3)).eval()


def test_values_are_dropped_at_the_rate_and_keep_their_mean():
    values = ActiveDropout(0.3, seed=1).eval()(torch.ones(100_000))
    assert float((values == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(values.mean()) == pytest.approx(1.0, abs=0.02)
    assert values.unique().tolist() == pytest.approx([0.0, 1 / 0.7])


def test_it_drops_in_evaluation_mode_by_its_seed_and_leaves_the_model_alone():
    model, inputs = net(), torch.randn(5, 8)
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    first, again, other = (with_dropout(model, 0.5, seed)(inputs) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(inputs), before(inputs))
    assert isinstance(model[1][1], nn.Dropout)


def test_dropout_adds_the_variance_of_dropped_values():
    inputs = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 3)).eval()

    def evaluate(net):
        with torch.no_grad():
            return Quality(float(net(inputs).pow(2).mean()), 0.0)

    found = study_dropout({"net": lambda: model}, evaluate, rates=(0.0, 0.3, 0.6))["net"]
    # Each value is kept with probability 1 - p and divided by it, so its variance is p / (1 - p) times its square.
    with torch.no_grad():
        hidden = model[0](inputs)
        clean = float(model[2](hidden).pow(2).mean())
        spread = float((hidden.pow(2) @ model[2].weight.pow(2).T).mean())
    for rate, quality in found.items():
        assert quality.loss == pytest.approx(clean + rate / (1 - rate) * spread, rel=0.05)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_bad_rates_are_refused(rate):
    with pytest.raises(ConfigError, match=r"rates must be .* in \[0, 1\)"):
        study_dropout({"net": net}, lambda model: Quality(0.0, 0.0), rates=[rate])


def test_a_model_without_dropout_is_refused():
    with pytest.raises(ConfigError, match=r"must have a torch\.nn\.Dropout, got none"):
        with_dropout(nn.Sequential(nn.Linear(2, 2)), 0.1, 0)
