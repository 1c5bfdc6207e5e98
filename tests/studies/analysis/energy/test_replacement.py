"""Filters replaced instead of removed, and filters chosen by search."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nni_topo.errors import ConfigError
from nni_topo.maths.search.subsets import GeneticSearch
from nni_topo.studies.analysis.energy.alternatives import study_replacement, study_selection, taylor_terms
from nni_topo.studies.analysis.energy.study import Quality

KINDS = ["kept", "removed", "random", "copied", "evolved"]
IMAGES = torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 3


def net(inplace=False):
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()


def quality(model):
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(IMAGES)
    return Quality(float(cross_entropy(logits, LABELS)), float((logits.argmax(1) == LABELS).float().mean()))


@pytest.fixture(scope="module")
def replaced():
    seen = []

    def evaluate(model):
        seen.append(model[0].weight.detach().clone())
        return quality(model)

    model = net()
    found = study_replacement(model, "0", IMAGES[:1], evaluate, threshold=0.4, fitness=quality, seed=5)
    return model, found, dict(zip(KINDS, seen, strict=True))


def test_kept_and_removed_are_the_bounds(replaced):
    model, found, weights = replaced
    assert found["kept"].quality == quality(model)
    assert found["kept"].similarity == pytest.approx(1.0)
    assert found["kept"].energy <= 0.4
    assert found["removed"].energy == 0.0
    weak = ~weights["removed"].flatten(1).any(1)
    assert 0 < weak.sum() < 8
    for kind in KINDS:
        assert torch.equal(weights[kind][~weak], model[0].weight.detach()[~weak]), kind


def test_copied_filters_are_others_and_random_ones_are_new(replaced):
    model, found, weights = replaced
    weak = ~weights["removed"].flatten(1).any(1)
    originals = model[0].weight.detach()
    for filter_ in weights["copied"][weak]:
        assert any(torch.equal(filter_, other) for other in originals[~weak])
    assert not any(torch.equal(f, other) for f in weights["random"][weak] for other in originals)
    assert found["random"].similarity < 0.9


def test_evolution_finds_better_filters_than_those_that_are_kept(replaced):
    _, found, _ = replaced
    assert found["evolved"].quality.loss < min(found[kind].quality.loss for kind in KINDS if kind != "evolved")


def test_repair_is_evaluated_besides():
    def blank(model):
        return nn.Sequential(*model[:-1], nn.Linear(16, 3, bias=False).requires_grad_(False).apply(_zero))

    found = study_replacement(net(), "0", IMAGES[:1], quality, threshold=0.4, repair=blank)
    assert found["random"].repaired.loss == pytest.approx(np.log(3))
    assert found["random"].quality.loss != pytest.approx(np.log(3))


def _zero(module):
    with torch.no_grad():
        module.weight.zero_()


def test_replacement_refuses_what_it_cannot_do():
    with pytest.raises(ConfigError, match="got 0 \\(0\\)"):
        study_replacement(net(), "0", IMAGES[:1], quality, threshold=1e-9)


@pytest.mark.parametrize("inplace", [False, True])
def test_taylor_terms_are_derivatives_of_the_loss(inplace):
    model = net(inplace)
    terms = taylor_terms(model, model[1], [(IMAGES[:10], LABELS[:10]), (IMAGES[10:], LABELS[10:])])
    assert terms.shape == (24, 8)
    scale, step = torch.ones(8, dtype=torch.float64), 1e-5
    double = copy.deepcopy(model).double()
    double[1].register_forward_hook(lambda module, inputs, outputs: outputs * scale.view(1, -1, 1, 1))

    def losses():
        with torch.no_grad():
            return cross_entropy(double(IMAGES.double()), LABELS, reduction="none")

    for channel in (0, 5):
        scale[channel] = 1 + step
        above = losses()
        scale[channel] = 1 - step
        slope = (above - losses()) / (2 * step)
        scale[channel] = 1.0
        torch.testing.assert_close(terms[:, channel], slope, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def selected():
    settings = GeneticSearch(population_size=30, generations=15)
    return study_selection(net(), "0", IMAGES[:1], [(IMAGES, LABELS)], quality, keep=5, evolution=settings, seed=0)


def test_searches_find_the_best_subset_there_is(selected):
    """8 over 5 is 56 subsets: the search must meet an exhaustive one."""
    assert selected["energy, genetic"].kept == selected["energy"].kept
    assert selected["energy"].energy == min(chosen.energy for chosen in selected.values())
    model = net()
    terms = taylor_terms(model, model[1], [(IMAGES, LABELS)]).numpy()
    best = min(
        np.abs(terms[:, [c for c in range(8) if c not in kept]].sum(1)).mean()
        for kept in itertools.combinations(range(8), 5)
    )
    assert selected["taylor, genetic"].taylor == pytest.approx(best)
    assert selected["loss, genetic"].quality.loss == min(chosen.quality.loss for chosen in selected.values())


def test_selection_refuses_what_it_cannot_do():
    arguments = net(), "0", IMAGES[:1], [(IMAGES, LABELS)], quality
    with pytest.raises(ConfigError, match="in \\[1, 7\\], got 8"):
        study_selection(*arguments, keep=8)
