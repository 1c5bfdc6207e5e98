from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_topo.errors import ConfigError
from nni_topo.maths.search.subsets import GeneticSearch, SubsetGeneticAlgorithm


def distance_to(best):
    """Fitness: how many blocks differ from the best mask."""
    return lambda population: (population ^ best).sum(1).astype(float)


def search(size, keep, fitness, seed=0, **knobs):
    algorithm = SubsetGeneticAlgorithm(size, keep, fitness, GeneticSearch(**knobs), seed=seed)
    algorithm.run()
    return algorithm


def test_finds_the_best_subset():
    best = np.isin(np.arange(20), [1, 4, 9, 16, 18])
    algorithm = search(20, 5, distance_to(best), generations=60)
    assert algorithm.best_individual()[0] == 0.0
    np.testing.assert_array_equal(algorithm.best_individual()[1], best)


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(2, 40),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**32),
    crossover=st.floats(0.0, 1.0),
    mutation=st.floats(0.0, 1.0),
    population=st.integers(2, 21),
)
def test_every_individual_ever_evaluated_keeps_the_same_number(size, share, seed, crossover, mutation, population):
    keep = min(size - 1, 1 + int(share * (size - 1)))
    seen = []

    def fitness(genes):
        seen.append(genes.sum(1))
        return genes @ np.arange(size, dtype=float)

    knobs = {
        "crossover_probability": crossover,
        "mutation_probability": mutation,
        "population_size": population,
    }
    algorithm = search(size, keep, fitness, seed=seed, generations=4, **knobs)
    assert set(np.concatenate(seen).tolist()) == {keep}
    assert len(algorithm.current_generation) == population


def test_same_seed_same_search():
    weights = np.random.default_rng(0).random(25)
    first, second, other = (search(25, 8, lambda genes: genes @ weights, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.best_individual()[1], second.best_individual()[1])
    assert first.trace == second.trace
    assert first.trace != other.trace


def test_initial_individuals_are_used():
    best = np.isin(np.arange(200), np.arange(0, 200, 2))
    algorithm = SubsetGeneticAlgorithm(
        200, 100, distance_to(best), GeneticSearch(generations=1), seed=0, initial=best[None]
    )
    algorithm.run()
    assert algorithm.best_individual()[0] == 0.0


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"population_size": 1}, "population_size must be an integer of at least 2, got 1"),
        ({"generations": 0}, "generations must be an integer of at least 1, got 0"),
        ({"generations": 2.5}, "generations must be an integer of at least 1, got 2.5"),
        ({"crossover_probability": 1.5}, r"crossover_probability must be in \[0, 1\], got 1.5"),
        ({"mutation_probability": float("nan")}, "mutation_probability"),
    ],
)
def test_bad_knobs_are_refused(knobs, words):
    with pytest.raises(ConfigError, match=words):
        GeneticSearch(**knobs)


@pytest.mark.parametrize("keep", [0, 5])
def test_a_subset_of_nothing_or_everything_is_no_search(keep):
    with pytest.raises(ConfigError, match=f"got {keep}"):
        SubsetGeneticAlgorithm(5, keep, distance_to(np.ones(5, bool)), GeneticSearch(), seed=0)


def test_a_first_generation_of_equals_is_told_from_a_run_of_equals():
    wanted = np.arange(12) < 6

    def one_in_many(population):
        return 1.0 - (population == wanted).all(1)

    flat = SubsetGeneticAlgorithm(12, 6, lambda population: np.ones(len(population)), GeneticSearch(), seed=0)
    flat.run()
    assert flat.is_flat
    found = SubsetGeneticAlgorithm(12, 6, one_in_many, GeneticSearch(generations=200), seed=0)
    found.run()
    assert not found.is_flat
    sloped = SubsetGeneticAlgorithm(12, 6, distance_to(wanted), GeneticSearch(), seed=0)
    sloped.run()
    assert not sloped.is_flat


def test_the_fittest_individual_stays():
    weights, changes = np.random.default_rng(0).random(30), 0
    for seed in range(5):
        algorithm = search(30, 15, lambda genes: genes @ weights, seed=seed, generations=20, mutation_probability=1.0)
        best = [generation.best for generation in algorithm.trace]
        assert best == sorted(best, reverse=True)
        changes += len(set(best)) - 1
    assert changes > 0
