from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.pruners.random import RandomPruner
from nni_topo.pruners.reconstruction.problems import ReconstructionProblem, ReconstructionProblems
from nni_topo.pruners.reconstruction.sequential import SequentialProblems
from nni_topo.pruners.topological.pruner import TopologicalPruner
from nni_topo.speedup import dependency_groups
from nni_topo.testing import toy_images, toy_model

IMAGES = toy_images(48, seed=2)
BATCHES = list(IMAGES.split(16))


def config(*names, ratio=0.5):
    return [{"op_names": list(names), "sparse_ratio": ratio}]


def problem_of(model, names, *, kind=ReconstructionProblems, kept=None, batches=BATCHES):
    pruner = RandomPruner(model, config(*names))
    found = {u.members[0][0]: p for u, p in kind(batches).each(pruner._context(), {} if kept is None else kept)}
    pruner.unwrap_model()
    return found


def chain():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)).eval()


def residual_share(columns, targets, kept):
    """What least squares with a constant leaves of the targets' variance."""
    rows = np.c_[columns.reshape(len(columns), 6, -1)[:, kept].reshape(len(columns), -1), np.ones(len(columns))]
    solution, *_ = np.linalg.lstsq(rows, targets, rcond=None)
    return ((rows @ solution - targets) ** 2).sum() / ((targets - targets.mean(0)) ** 2).sum()


def test_the_error_is_what_least_squares_leaves():
    model = chain()
    problem = problem_of(model, ["0"])["0"]
    with torch.no_grad():
        features = model[:2](IMAGES)
        columns = nn.functional.unfold(features, 3, padding=1).transpose(1, 2).flatten(0, 1).double().numpy()
        targets = model(IMAGES).movedim(1, -1).flatten(0, 2).double().numpy()
    subsets = list(itertools.combinations(range(6), 3))
    population = np.array([[j in subset for j in range(6)] for subset in subsets])
    found = problem.error(population)
    expected = [residual_share(columns, targets, list(subset)) for subset in subsets]
    np.testing.assert_allclose(found, expected, atol=2e-3)
    chosen = problem.choose(3)
    greedy = problem.error(np.isin(np.arange(6), chosen)[None])[0]
    assert greedy <= np.sort(expected)[len(expected) // 4]


def test_the_error_is_the_mean_over_the_layers_that_read(monkeypatch):
    model = toy_model().eval()
    pruner = RandomPruner(model, dependency_groups(model, IMAGES[:2], config("stem", "inner")))
    (problem,) = (found for _, found in ReconstructionProblems(BATCHES).each(pruner._context(), {}))
    pruner.unwrap_model()
    parts = [
        ReconstructionProblem((gram,), (cross,), (columns,))
        for gram, cross, columns in zip(problem.grams, problem.crosses, problem.columns, strict=True)
    ]
    population = np.array([np.isin(np.arange(8), subset) for subset in itertools.combinations(range(8), 3)])
    single = [part.error(population) for part in parts]
    assert not np.allclose(single[0], single[1], rtol=0.1)
    whole = problem.error(population)
    np.testing.assert_allclose(whole, np.mean(single, axis=0), rtol=1e-9)
    # In pieces of a few individuals instead of all at once.
    monkeypatch.setattr(
        "nni_topo.pruners.reconstruction.problems._CHUNK_BYTES", 8 * 5 * (3 * max(problem.columns)) ** 2
    )
    np.testing.assert_allclose(problem.error(population), whole, rtol=1e-9)


def test_everything_kept_loses_nothing():
    problem = problem_of(chain(), ["0"])["0"]
    assert problem.error(np.ones((1, 6), dtype=bool))[0] == pytest.approx(0.0, abs=1e-3)


def test_a_channel_that_is_the_sum_of_two_others_goes_first():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)).eval()
    with torch.no_grad():
        model[0].weight[2] = model[0].weight[0] + model[0].weight[1]
    batches = [torch.randn(200, 4, generator=torch.Generator().manual_seed(0))]
    problem = problem_of(model, ["0"], batches=batches)["0"]
    assert problem.error(~np.eye(3, dtype=bool)).max() < 1e-3


def test_a_flattened_map_has_a_column_for_each_place():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 7))
    assert problem_of(model.eval(), ["0"])["0"].columns == (4,)


def test_a_grouped_convolution_behind_is_read_group_by_group():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1, groups=2)).eval()
    problem = problem_of(model, ["0"])["0"]
    crosses = np.abs(problem.crosses[0])
    with torch.no_grad():
        features = model[0](IMAGES).movedim(1, -1).flatten(0, 2).double()
        outputs = model(IMAGES).movedim(1, -1).flatten(0, 2).double()
    centred = features - features.mean(0)
    cross = centred.T @ (outputs - outputs.mean(0)) / len(outputs)
    cross /= (outputs - outputs.mean(0)).square().mean(0).sum().sqrt()
    np.testing.assert_allclose(crosses, cross.abs().numpy(), atol=1e-6)


def test_all_readers_of_a_group_count():
    model = toy_model().eval()
    grouped = dependency_groups(model, IMAGES[:2], config("stem", "inner", "hidden"))
    pruner = RandomPruner(model, grouped)
    found = {unit.name: p for unit, p in ReconstructionProblems(BATCHES).each(pruner._context(), {})}
    assert [len(problem.grams) for problem in found.values()] == [2, 1]  # inner and hidden read the stem's channels


def test_the_first_of_sequence_is_the_same_and_later_ones_see_what_went():
    model = toy_model().eval()
    grouped = dependency_groups(model, IMAGES[:2], config("stem", "inner", "hidden"))
    pruner = RandomPruner(model, grouped)
    plain = {u.name: p for u, p in ReconstructionProblems(BATCHES).each(pruner._context(), {})}
    kept = {}
    found = {}
    for unit, problem in SequentialProblems(BATCHES).each(pruner._context(), kept):
        found[unit.name] = problem
        kept[unit.name] = np.arange(unit.blocks) < unit.blocks // 2
    pruner.unwrap_model()
    first, second = plain
    for mine, other in zip(found[first].grams, plain[first].grams, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)
    assert not np.allclose(found[second].grams[0], plain[second].grams[0], rtol=1e-2)


@pytest.mark.parametrize("solver", ["greedy", "genetic"])
@pytest.mark.parametrize("order", ["parallel", "sequential"])
def test_the_pruner_keeps_what_the_criterion_says(solver, order):
    model = toy_model().eval()
    grouped = dependency_groups(model, IMAGES[:2], config("stem", "inner", "hidden"))
    pruner = TopologicalPruner(
        model, grouped, calibration=BATCHES, criterion="reconstruction", solver=solver, order=order, generations=5
    )
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert torch.equal(masks["stem"]["bias"], masks["inner"]["bias"])
    assert [int(masks[name]["bias"].sum()) for name in ("stem", "hidden")] == [4, 8]
    problem = next(iter(problem_of(model, ["hidden"]).values()))
    if order == "parallel":
        error = problem.error(masks["hidden"]["bias"].bool().numpy()[None])[0]
        greedy = problem.error(np.isin(np.arange(16), problem.choose(8))[None])[0]
        assert error <= greedy + 1e-12
        assert (solver == "genetic") == bool(pruner.trace)


def test_groups_of_a_grouped_convolution_lose_the_same_number():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 4, 1)).eval()
    grouped = dependency_groups(model, IMAGES[:2], config("0", "1"))
    pruner = TopologicalPruner(model, grouped, calibration=BATCHES, criterion="reconstruction", solver="greedy")
    _, masks = pruner.compress()
    kept = masks["0"]["bias"].reshape(2, 4).sum(1)
    assert kept.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"criterion": "reconstruction"}, ConfigError, "criterion 'reconstruction' needs calibration data"),
        ({"order": "sequential", "criterion": "cover"}, ConfigError, "order 'sequential' needs criterion"),
        ({"order": "sequential"}, ConfigError, "criterion 'reconstruction' needs calibration data"),
        ({"order": "backwards"}, ConfigError, "order.*backwards"),
    ],
)
def test_bad_knobs_are_refused(knobs, error, message):
    with pytest.raises(error, match=message):
        TopologicalPruner(toy_model(), config("stem"), **knobs)


def test_activations_that_are_not_finite_are_named():
    model = chain()
    with torch.no_grad():
        model[0].weight.sign_().mul_(3e38)
    with pytest.raises(DataError, match=r"activations must be finite.*0\.weight"):
        problem_of(model, ["0"])
