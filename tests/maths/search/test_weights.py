from __future__ import annotations

import numpy as np
import pytest

from nni_topo.errors import ConfigError
from nni_topo.maths.search.weights import GeneLayer, WeightGeneticAlgorithm, WeightSearch, random_subset

SIZE = 60


def worth(population):
    """An accuracy that the twelve last genes make; the others are redundant."""
    return np.array([0.5 + genes[-12:].mean() / 2 for genes in population])


def search(fitness=worth, caps=(1.0,), seed=0, **knobs):
    rng = np.random.default_rng(7)
    layers = [GeneLayer(np.sort(rng.random(SIZE // len(caps))), cap) for cap in caps]
    knobs = {"population_size": 10, "generations": 30, "alpha": 10.0, **knobs}
    return WeightGeneticAlgorithm(layers, fitness, WeightSearch(**knobs), seed=seed)


def test_weakest_termination_by_hand():
    layer = GeneLayer(np.array([0.5, 0.1, 0.9, 0.15, 0.3]))
    alive = np.ones(5, dtype=np.bool_)
    # Range 0.8, a tenth of it above 0.1: below 0.18.
    layer.drop_weakest(alive, 0.1)
    assert alive.tolist() == [True, False, True, False, True]
    layer.drop_weakest(alive, 0.0)
    assert alive.tolist() == [True, False, True, False, False]
    layer.drop_weakest(alive, 1.0)
    assert alive.tolist() == [False, False, True, False, False]
    layer.drop_weakest(alive, 1.0)
    assert alive.sum() == 1


def test_a_cap_stops_both_terminations_and_revival_takes_the_strongest():
    layer = GeneLayer(np.arange(1.0, 11.0), cap=0.3)
    alive = np.ones(10, dtype=np.bool_)
    layer.drop_weakest(alive, 0.9)
    assert np.flatnonzero(~alive).tolist() == [0, 1, 2]
    layer.drop_random(alive, 0.5, np.random.default_rng(0))
    assert alive.sum() == 7
    layer.drop_weakest(alive, 0.9)
    assert alive.sum() == 7
    alive[:] = False
    layer.revive(alive)
    assert np.flatnonzero(alive).tolist() == [3, 4, 5, 6, 7, 8, 9]


def test_a_share_of_the_remaining_weights_is_removed_at_random():
    layer = GeneLayer(np.arange(1.0, 101.0))
    for seed in range(5):
        alive = np.ones(100, dtype=np.bool_)
        alive[::4] = False
        before = alive.copy()
        layer.drop_random(alive, 0.2, np.random.default_rng(seed))
        assert before.sum() - alive.sum() == 15
        assert not (alive & ~before).any()
        layer.drop_random(alive, 0.0, np.random.default_rng(seed))
        assert alive.sum() == 59  # one goes in any case


def test_random_subsets_are_uniform():
    rng = np.random.default_rng(0)
    alive = np.zeros(40, dtype=np.bool_)
    alive[5:25] = True
    counts = np.zeros(40)
    for _ in range(4000):
        counts[random_subset(alive, 20, 4, rng)] += 1
    assert counts[5:25].sum() == counts.sum() == 16000
    assert np.abs(counts[5:25] - 800).max() < 5 * np.sqrt(800 * 0.8)


def test_generation_0_has_the_undamaged_individual_and_the_damage_asked_for():
    algorithm = search(damage_rate=0.3)
    algorithm.create_first_generation()
    compression = {row.individual: row.compression for row in algorithm.history}
    assert compression.pop(0) == 0.0
    assert set(compression.values()) == {1 - 42 / 60}
    assert algorithm.start_accuracy == 1.0
    spread = search(damage_rate=(0.1, 0.9))
    spread.create_first_generation()
    shares = [row.compression for row in spread.history[1:]]
    assert 0.1 <= min(shares) < 0.4 < 0.6 < max(shares) <= 0.9


def test_fitness_is_the_weighted_sum():
    algorithm = search(damage_rate=0.5, beta=0.25)
    algorithm.run()
    for row in algorithm.history:
        assert row.fitness == pytest.approx(10.0 * (row.accuracy - 1.0) + 0.25 * row.compression)


def test_no_place_ever_gets_worse_and_redundant_weights_go():
    algorithm = search()
    algorithm.run()
    table = np.array([row.fitness for row in algorithm.history]).reshape(31, 10)
    assert (np.diff(table, axis=0) >= 0).all()
    best = algorithm.best()
    assert best.fitness == table[-1].max()
    assert best.accuracy == 1.0
    assert best.compression > 0.7
    assert algorithm.genes(best)[-12:].all()
    changed = np.diff(table, axis=0) > 0
    born = np.array([row.born for row in algorithm.history]).reshape(31, 10)
    assert ((born[1:] == np.arange(1, 31)[:, None]) == changed).all()


def test_a_child_is_between_its_parents_where_nothing_mutates():
    algorithm = search(damage_rate=(0.0, 0.9), weakest_probability=0.0, random_probability=0.0, crossover_probability=1)
    algorithm.create_first_generation()
    parents = {member.number: algorithm.genes(member) for member in algorithm.current_generation}
    algorithm.create_new_population()
    swapped = 0
    for child in algorithm.children:
        genes, own, other = algorithm.genes(child), parents[child.number], parents[child.partner]
        assert child.number != child.partner
        foreign = np.flatnonzero(genes != own)
        if len(foreign):
            swapped += 1
            stretch = slice(foreign[0], foreign[-1] + 1)
            assert (genes[stretch] == other[stretch]).all()
    assert swapped >= 8


def test_partners_are_the_fittest_of_the_tournament():
    algorithm = search(tournament_size=9, crossover_probability=1.0)
    algorithm.create_first_generation()
    first, second = algorithm.current_generation[:2]
    algorithm.create_new_population()
    partners = [child.partner for child in algorithm.children]
    assert partners == [second.number] + [first.number] * 9


@pytest.mark.parametrize("caps", [(0.25, 1.0), (1.0, 0.25), (1.0, 1.0, 0.25), (0.25, 0.5, 1.0)])
def test_caps_hold_layer_by_layer(caps):
    algorithm = search(caps=caps, damage_rate=0.9, alpha=0.0)
    algorithm.run()
    size, fewest = SIZE // len(caps), []
    for member in algorithm.current_generation:
        left = algorithm.genes(member).reshape(len(caps), size).sum(1)
        assert all(count >= max(1, size - int(cap * size)) for count, cap in zip(left, caps, strict=True))
        fewest.append(left)
    # and each layer loses as much as its own cap lets it
    assert all(least < size * (1.25 - cap) for least, cap in zip(np.min(fewest, 0), caps, strict=True))


def test_same_seed_same_search():
    first, second, other = search(seed=3), search(seed=3), search(seed=4)
    for algorithm in (first, second, other):
        algorithm.run()
    assert first.history == second.history != other.history


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"alpha": -1.0}, "alpha must be at least 0 and finite, got -1.0"),
        ({"beta": -0.1}, "beta must be at least 0"),
        ({"beta": float("nan")}, "got nan"),
        ({"population_size": 1}, "population_size must be an integer of at least 2, got 1"),
        ({"generations": 0}, "generations must be an integer of at least 1, got 0"),
        ({"damage_rate": 1.5}, "damage_rate must be .*got 1.5"),
        ({"damage_rate": (0.9, 0.1)}, "a rising pair"),
    ],
)
def test_bad_settings_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        WeightSearch(**knobs)
