"""A genetic algorithm over subsets of fixed size, in pyeasyga's loop.

pyeasyga evaluates one list of genes at a time, changes how many genes are set, draws from the global generator and
evaluates its elite again in every generation. Here an individual is a boolean mask with exactly ``keep`` entries set,
the operators keep that number, a whole population is bred and evaluated at once, and every draw comes from one seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pyeasyga.pyeasyga import Chromosome, GeneticAlgorithm

from nni_topo.errors import ConfigError
from nni_topo.maths.ties import Levels
from nni_topo.rules import check_fields, number, whole

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class GeneticSearch:
    """Settings of the genetic algorithm over subsets of a cloud.

    Parameters
    ----------
    population_size : int, default=50
        Individuals per generation, at least 2.
    generations : int, default=20
        Generations, at least 1.
    crossover_probability, mutation_probability : float, default=0.8 and 0.2
        In [0, 1].
    elitism : bool, default=True
        Whether the best individual is carried over unchanged.
    greedy_start : bool, default=True
        Whether the first generation holds the greedy solution.

    Examples
    --------
    >>> GeneticSearch(generations=5).population_size
    50
    """

    population_size: int = 50
    generations: int = 20
    crossover_probability: float = 0.8
    mutation_probability: float = 0.2
    elitism: bool = True
    greedy_start: bool = True

    def __post_init__(self) -> None:
        check_fields(
            self,
            population_size=whole(2),
            generations=whole(1),
            crossover_probability=number(0, 1),
            mutation_probability=number(0, 1),
        )


@dataclass(frozen=True)
class Generation:
    """The best and the mean fitness of one generation (smaller = better)."""

    best: float
    mean: float


class SubsetGeneticAlgorithm(GeneticAlgorithm):
    """Minimise ``fitness``, of bool (individuals, size) to (individuals,), over the subsets of ``keep`` entries."""

    # Our reconstruction of the evolutionary module that the table of contents of Perera, "Topological Pruner", MSc
    # thesis, University of Moratuwa, 2022, lists. Breeding a generation costs O(population * size * log size).

    def __init__(
        self,
        size: int,
        keep: int,
        fitness: Callable[[BoolArray], FloatArray],
        settings: GeneticSearch,
        *,
        seed: int | list[int],
        initial: BoolArray | None = None,  # (n, size) with `keep` entries set in each row, to start with
    ) -> None:
        if not 1 <= keep < size:
            raise ConfigError(f"keep must be in [1, {size - 1}], got {keep} (genetic algorithm)")
        super().__init__(
            seed_data=range(size),
            population_size=settings.population_size,
            generations=settings.generations,
            crossover_probability=settings.crossover_probability,
            mutation_probability=settings.mutation_probability,
            elitism=settings.elitism,
            maximise_fitness=False,
        )
        self.keep = keep
        self.fitness_function = fitness
        self.tournament_size = max(2, self.population_size // 10)
        self.trace: list[Generation] = []  # best and mean fitness per generation
        self.is_flat = True  # whether the individuals of each generation so far were equally fit
        self._size = size
        self._initial = initial
        # Fitnesses that are equal to 1e-6 count as equal, so that rounding decides no tournament.
        self._levels = Levels()
        self._rng = np.random.default_rng(seed)

    def create_initial_population(self) -> None:
        """Fill the first generation with the initial individuals and random subsets."""
        # each row keeps the entries with its smallest keys
        keys = self._rng.random((self.population_size, self._size))
        chosen = np.argpartition(keys, self.keep - 1, axis=1)[:, : self.keep]
        genes = np.zeros(keys.shape, dtype=np.bool_)
        np.put_along_axis(genes, chosen, True, axis=1)
        if self._initial is not None:
            genes[: len(self._initial)] = self._initial[: self.population_size]
        self.current_generation = [_newborn(row) for row in genes]

    def calculate_population_fitness(self) -> None:
        """Evaluate, in one call, the individuals that have no fitness yet."""
        fresh = [member for member in self.current_generation if member.fitness is None]
        if fresh:
            values = self.fitness_function(np.stack([member.genes for member in fresh]))
            for member, value in zip(fresh, self._levels(values), strict=True):
                member.fitness = value
        fitness = [member.fitness for member in self.current_generation]
        self.is_flat = self.is_flat and min(fitness) == max(fitness)
        self.trace.append(Generation(min(fitness), float(np.mean(fitness))))

    def create_new_population(self) -> None:
        """Breed the next generation by tournament, crossover and mutation."""
        genes = np.stack([member.genes for member in self.current_generation])
        fitness = np.array([member.fitness for member in self.current_generation])
        couples = (self.population_size + 1) // 2
        rivals = self._rng.integers(len(genes), size=(2 * couples, self.tournament_size))
        winners = rivals[np.arange(2 * couples), fitness[rivals].argmin(1)]
        mothers, fathers = genes[winners[:couples]], genes[winners[couples:]]
        # Crossover: entries that only one parent keeps are divided between two children, as many each as a parent had.
        differing = mothers ^ fathers
        keys = np.where(differing, self._rng.random(differing.shape), np.inf)
        ranks = keys.argsort(axis=1).argsort(axis=1)
        first = differing & (ranks < differing.sum(1, keepdims=True) // 2)
        crossed = self._rng.random((couples, 1)) < self.crossover_probability
        both = mothers & fathers
        daughters = np.where(crossed, both | first, mothers)
        sons = np.where(crossed, both | (differing & ~first), fathers)
        children = np.concatenate([daughters, sons])
        # Mutation: a kept entry is swapped for a removed one.
        chosen = np.flatnonzero(self._rng.random(len(children)) < self.mutation_probability)
        keys = self._rng.random((len(chosen), self._size))
        removed = np.where(children[chosen], keys, -1.0).argmax(1)
        added = np.where(children[chosen], -1.0, keys).argmax(1)
        children[chosen, removed] = False
        children[chosen, added] = True
        population = [_newborn(row) for row in children[: self.population_size]]
        if self.elitism:
            population[0] = self.current_generation[0]
        self.current_generation = population


def _newborn(genes: BoolArray) -> Chromosome:
    member = Chromosome(genes)
    member.fitness = None
    return member
