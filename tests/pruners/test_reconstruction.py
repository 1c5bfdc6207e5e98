from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from nni_topo.errors import DataError
from nni_topo.maths.least_squares.greedy import Products, SampleMatrix
from nni_topo.pruners.random import RandomPruner
from nni_topo.pruners.reconstruction import ReconstructionPruner
from nni_topo.pruners.reconstruction.problems import ReconstructionProblem, ReconstructionProblems
from nni_topo.speedup import dependency_groups
from nni_topo.testing import toy_images, toy_model

IMAGES = toy_images(48, seed=2)
BATCHES = list(IMAGES.split(16))


def config(*names, ratio=0.5):
    return [{"op_names": list(names), "sparse_ratio": ratio}]


def problem_of(model, names, *, batches=BATCHES):
    pruner = RandomPruner(model, config(*names))
    found = {u.members[0][0]: p for u, p in ReconstructionProblems(batches).unit_problems(pruner.context, {})}
    pruner.unwrap_model()
    return found


def chain():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)).eval()


def lost(problem, population):
    """The share of the readers' variance that each set of kept channels loses."""
    shares = []
    for kept in population:
        explained = []
        for layer in problem.layers:
            own = np.repeat(kept, layer.block)
            solution, *_ = np.linalg.lstsq(layer.gram[np.ix_(own, own)], layer.cross[own], rcond=1e-12)
            explained.append((solution * layer.cross[own]).sum())
        shares.append(1.0 - np.mean(explained))
    return np.array(shares)


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
    found = lost(problem, population)
    expected = [residual_share(columns, targets, list(subset)) for subset in subsets]
    np.testing.assert_allclose(found, expected, atol=2e-3)
    chosen = problem.choose(3)
    greedy = lost(problem, np.isin(np.arange(6), chosen)[None])[0]
    assert greedy <= np.sort(expected)[len(expected) // 4]


def test_the_choice_weighs_the_layers_that_read_alike():
    model = toy_model().eval()
    pruner = RandomPruner(model, dependency_groups(model, IMAGES[:2], config("stem", "inner")))
    (problem,) = (found for _, found in ReconstructionProblems(BATCHES).unit_problems(pruner.context, {}))
    pruner.unwrap_model()
    single = [lost(ReconstructionProblem((layer,)), np.eye(8, dtype=bool)) for layer in problem.layers]
    assert not np.allclose(single[0], single[1], rtol=0.1)
    assert problem.choose(1)[0] == np.mean(single, axis=0).argmin()


def test_a_channel_that_is_the_sum_of_two_others_goes_first():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)).eval()
    with torch.no_grad():
        model[0].weight[2] = model[0].weight[0] + model[0].weight[1]
    batches = [torch.randn(200, 4, generator=torch.Generator().manual_seed(0))]
    problem = problem_of(model, ["0"], batches=batches)["0"]
    assert lost(problem, ~np.eye(3, dtype=bool)).max() < 1e-3


def test_a_grouped_convolution_behind_is_read_group_by_group():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1, groups=2)).eval()
    images = IMAGES[:16]  # so few that every position counts
    problem = problem_of(model, ["0"], batches=[images])["0"]
    crosses = np.abs(problem.layers[0].cross)
    with torch.no_grad():
        features = model[0](images).movedim(1, -1).flatten(0, 2).double()
        outputs = model(images).movedim(1, -1).flatten(0, 2).double()
    centred = features - features.mean(0)
    cross = centred.T @ (outputs - outputs.mean(0)) / len(outputs)
    cross /= (outputs - outputs.mean(0)).square().mean(0).sum().sqrt()
    np.testing.assert_allclose(crosses, cross.abs().numpy(), atol=1e-6)


@pytest.mark.parametrize(("images", "kind"), [(2, SampleMatrix), (48, Products)])
def test_few_samples_are_not_multiplied_with_each_other(images, kind):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Conv2d(16, 8, 3)).eval()
    problem = problem_of(model, ["0"], batches=[IMAGES[:images]])["0"]
    (layer,) = problem.layers
    assert isinstance(layer, kind)
    assert np.square(layer.cross).sum() > 0.0
    again = ReconstructionProblem((Products(layer.gram, layer.cross, layer.block),))
    np.testing.assert_array_equal(problem.choose(8), again.choose(8))


def test_the_first_of_sequence_is_the_same_and_later_ones_see_what_went():
    model = toy_model().eval()
    grouped = dependency_groups(model, IMAGES[:2], config("stem", "inner", "hidden"))
    pruner = RandomPruner(model, grouped)
    plain = {u.name: p for u, p in ReconstructionProblems(BATCHES).unit_problems(pruner.context, {})}
    kept = {}
    found = {}
    for unit, problem in ReconstructionProblems(BATCHES, sequential=True).unit_problems(pruner.context, kept):
        found[unit.name] = problem
        kept[unit.name] = np.arange(unit.blocks) < unit.blocks // 2
    pruner.unwrap_model()
    first, second = plain
    for mine, other in zip(found[first].layers, plain[first].layers, strict=True):
        np.testing.assert_allclose(mine.gram, other.gram, rtol=1e-4, atol=1e-6)
    assert not np.allclose(found[second].layers[0].gram, plain[second].layers[0].gram, rtol=1e-2)


@pytest.mark.parametrize("sequential", [False, True])
def test_the_pruner_keeps_what_least_squares_chooses(sequential):
    model = toy_model().eval()
    grouped = dependency_groups(model, IMAGES[:2], config("stem", "inner", "hidden"))
    pruner = ReconstructionPruner(model, grouped, calibration=BATCHES, sequential=sequential)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert torch.equal(masks["stem"]["bias"], masks["inner"]["bias"])
    assert [int(masks[name]["bias"].sum()) for name in ("stem", "hidden")] == [4, 8]
    problem = next(iter(problem_of(model, ["hidden"]).values()))
    if not sequential:
        assert masks["hidden"]["bias"].nonzero().flatten().tolist() == sorted(problem.choose(8))


def branches():
    torch.manual_seed(4)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4)),
    )


HALF, BELOW = {"sparse_ratio": 0.5}, {"sparse_threshold": 0.4}
RANKED = {"sparse_ratio": 0.4, "global_group_id": "all"}
DEALT = {"budget": {"flops": 0.4, "allocation": "topological"}}


@pytest.mark.parametrize(
    ("build", "names", "rule", "knobs", "expected"),
    [
        (toy_model, "stem inner hidden", HALF, {"sequential": True}, "01101100 01101100 1010100100011101"),
        (branches, "0 2 5", HALF, {}, "01011001 10011001 000111"),
        (branches, "0 2 5", HALF, {"sequential": True}, "01011001 01010101 000111"),
        (branches, "0 2 5", BELOW, {}, "01111011 10111101 111111"),
        (branches, "0 2 5", RANKED, {}, "01011001 10011001 010111"),
        (branches, "0 2 5", RANKED, {"sequential": True}, "01011001 01010101 100111"),
        # 0.4058 of the MACs; a step less of the coarsest layer and the others as before keep 0.3841
        (branches, "0 2 5", {}, DEALT, "01111011 10000001 000001"),
    ],
)
@pytest.mark.quick_every(3)
def test_masks_stay_as_they_were(build, names, rule, knobs, expected):
    model = build().eval()
    entry = {"op_names": names.split(), **rule}
    pruner = ReconstructionPruner(model, dependency_groups(model, IMAGES[:2], [entry]), calibration=BATCHES, **knobs)
    _, masks = pruner.compress()
    assert " ".join("".join(str(int(bit)) for bit in masks[name]["bias"]) for name in names.split()) == expected


def test_activations_that_are_not_finite_are_named():
    model = chain()
    with torch.no_grad():
        model[0].weight.sign_().mul_(3e38)
    with pytest.raises(DataError, match=r"activations must be finite.*0\.weight"):
        problem_of(model, ["0"])


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.two = nn.Linear(5, 8), nn.Linear(4, 3), nn.Linear(8, 3)
        with torch.no_grad():  # channels 1 and 4 do all
            self.one.weight[:, [0, 2, 3]] = 0
            self.two.weight[:, [1, 2, 3, 5, 6, 7]] = 0

    def forward(self, x):
        one, two = self.first(x).chunk(2, 1)
        return self.one(one) + self.two(torch.cat([two, two.relu()], 1))


@pytest.mark.parametrize("samples", [4, 64])  # few are kept as they are, of many the products
@pytest.mark.parametrize("sequential", [False, True])
def test_channels_are_chosen_by_all_layers_that_read_a_part_of_them(samples, sequential):
    model, data = Halves().eval(), [torch.randn(samples, 5)]
    groups = dependency_groups(model, data[0], config("first", ratio=0.75))
    pruner = ReconstructionPruner(model, groups, calibration=data, sequential=sequential)
    mask = pruner.compress()[1]["first"]["bias"]
    pruner.unwrap_model()
    assert mask.nonzero().flatten().tolist() == [1, 4]
