"""The weight-pruning genetic algorithm on packed genes, in pyeasyga's loop.

A gene of an individual tells whether a weight of the target layers is used. Eight genes take a byte; one individual
at a time is unpacked to be bred or evaluated, so a population of 50 on two million weights takes 13 MB.

Source: Janjic, "Exploring Redundancy in Neural Networks: Pruning by Genetic Algorithm & Filter Energy", MSc thesis,
University of Manitoba, 2018, section 4.1, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pyeasyga.pyeasyga import Chromosome, GeneticAlgorithm

from nni_topo.errors import ConfigError
from nni_topo.rules import Rule, all_of, check_knobs, number, whole

Bytes = NDArray[np.uint8]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
_SHARE = number(0, 1)
_RULES = {
    "alpha": number(0),
    "beta": number(0),
    "damage_rate": _SHARE
    | Rule("a rising pair of such", lambda v: all_of(_SHARE, Sequence).holds(v) and len(v) == 2 and v[0] <= v[1]),
    "population_size": whole(2),
    "generations": whole(1),
    "tournament_size": whole(1),
    "crossover_probability": _SHARE,
    "weakest_probability": _SHARE,
    "random_probability": _SHARE,
    "weakest_rate": _SHARE,
    "random_rate": _SHARE,
}


@dataclass(frozen=True)
class WeightSearch:
    """Settings of the genetic algorithm over single weights.

    Parameters
    ----------
    alpha, beta : float, default=100.0, 1.0
        Fitness is ``alpha * (accuracy - accuracy at the start) + beta * share of removed weights``; at least 0, one of
        them above it. With the defaults a percentage point of accuracy is worth all weights.
    damage_rate : float or pair of float, default=0.1
        Share of the weights that individuals of generation 0 except the first lose at random, in [0, 1]; for a pair, it
        is drawn between the two for each individual.
    population_size, generations : int, default=50, 20
        Individuals, at least 2, and generations after generation 0, at least 1.
    tournament_size : int, default=5
        Number of others drawn, at least 1 and at most all; the fittest becomes the individual's partner.
    crossover_probability : float, default=0.8
        Chance of a two-point crossover, in [0, 1].
    weakest_probability, random_probability : float, default=0.5
        Chances of the two mutations, in [0, 1].
    weakest_rate, random_rate : float, default=0.1
        How much the mutations remove, in [0, 1]: weights within this share of the layer's range of magnitudes above the
        weakest remaining one; and this share of the remaining weights, at least one.

    Examples
    --------
    >>> WeightSearch(damage_rate=(0.1, 0.5)).damage_range
    (0.1, 0.5)
    """

    alpha: float = 100.0
    beta: float = 1.0
    damage_rate: float | tuple[float, float] = 0.1
    population_size: int = 50
    generations: int = 20
    tournament_size: int = 5
    crossover_probability: float = 0.8
    weakest_probability: float = 0.5
    random_probability: float = 0.5
    weakest_rate: float = 0.1
    random_rate: float = 0.1

    def __post_init__(self) -> None:
        check_knobs("genetic algorithm", vars(self), _RULES)
        if self.alpha == self.beta == 0.0:
            raise ConfigError("alpha or beta must be above 0, got 0 for both (genetic algorithm)")

    @property
    def damage_range(self) -> tuple[float, float]:
        """Lowest and highest damage rate."""
        if isinstance(self.damage_rate, Sequence):
            low, high = self.damage_rate
            return low, high
        return self.damage_rate, self.damage_rate


class HistoryRow(NamedTuple):
    """One individual in one generation; a child takes the number ``individual`` of its parent."""

    generation: int
    individual: int
    fitness: float
    accuracy: float
    compression: float
    born: int  # generation it was bred in
    partner: int  # individual it was crossed with, -1 for none


class Individual(Chromosome):
    """Packed genes with their history."""

    def __init__(self, genes: Bytes, number: int, born: int, partner: int) -> None:
        super().__init__(genes)
        self.number, self.born, self.partner = number, born, partner
        self.accuracy = 0.0
        self.compression = 0.0


class GeneLayer:
    """One target's magnitudes, shape (weights,), at least 0, and how many of its weights must stay."""

    def __init__(self, magnitudes: NDArray[np.floating[Any]], cap: float = 1.0) -> None:
        self.magnitudes = magnitudes
        self.span = float(magnitudes.max() - magnitudes.min())
        self.size = len(magnitudes)
        # `cap`: the largest share that may be removed; one weight always stays.
        self.least = max(1, self.size - int(self.size * cap))

    def drop_weakest(self, alive: BoolArray, rate: float) -> None:
        """Remove the weakest remaining weight and those within ``rate`` of the range above it."""
        weakest = self.magnitudes[alive].min()
        bound = self.magnitudes.dtype.type(weakest + rate * self.span)
        weak = np.flatnonzero(alive & (self.magnitudes < bound))
        if not len(weak):
            weak = np.flatnonzero(alive & (self.magnitudes == weakest))[:1]
        allowed = np.count_nonzero(alive) - self.least
        if len(weak) > allowed:
            weak = weak[self.magnitudes[weak].argsort(kind="stable")[:allowed]]
        alive[weak] = False

    def drop_random(self, alive: BoolArray, rate: float, rng: np.random.Generator) -> None:
        """Remove a share of the remaining weights at random."""
        remaining = int(np.count_nonzero(alive))
        count = min(max(1, int(rate * remaining)), remaining - self.least)
        alive[random_subset(alive, remaining, count, rng)] = False

    def revive(self, alive: BoolArray) -> None:
        """Restore the strongest removed weights until enough weights stay."""
        missing = self.least - np.count_nonzero(alive)
        if missing > 0:
            removed = np.flatnonzero(~alive)
            alive[removed[self.magnitudes[removed].argsort(kind="stable")[-missing:]]] = True


def random_subset(alive: BoolArray, remaining: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw ``count`` of the ``remaining`` set positions, all subsets equally likely; indices of shape (count,)."""
    if 4 * count > remaining:
        return rng.choice(np.flatnonzero(alive), count, replace=False, shuffle=False)
    # Small shares are drawn by rejection, which doesn't look at every gene.
    positions = np.zeros(0, dtype=np.int64)
    while len(positions) < count:
        draws = rng.integers(len(alive), size=16 + (count - len(positions)) * len(alive) // remaining)
        positions = np.concatenate((positions, draws[alive[draws]]))
        positions.sort()
        # NumPy's own ``unique``, which hashes, takes several times as long.
        positions = positions[np.diff(positions, prepend=-1) > 0]
    if len(positions) > count:
        positions = rng.permutation(positions)[:count]
    return positions


class WeightGeneticAlgorithm(GeneticAlgorithm):
    """Maximise ``alpha * (accuracy - accuracy at the start) + beta * share of removed weights``."""

    # `accuracies` maps an iterator of boolean individuals (genes,) to their accuracies (individuals,), in [0, 1]; the
    # genes are the layers' genes, concatenated.

    def __init__(
        self,
        layers: Sequence[GeneLayer],
        accuracies: Callable[[Iterator[BoolArray]], FloatArray],
        settings: WeightSearch,
        *,
        seed: int,
    ) -> None:
        self.size = sum(layer.size for layer in layers)
        super().__init__(range(self.size), settings.population_size, settings.generations)
        self.layers = list(layers)
        self.settings = settings
        self.seed = seed
        self.tournament_size = min(settings.tournament_size, settings.population_size - 1)
        self.fitness_function = accuracies
        self.rng = np.random.default_rng(seed)
        self.history: list[HistoryRow] = []  # every individual in every generation
        self.generation = -1  # of the current individuals; -1 before the first
        self.start_accuracy = 0.0  # of the undamaged individual
        self.children: list[Individual] = []

    def evolve(self) -> Iterator[int]:
        """Evolve up to the last generation; yield the number of each, from 0, once it is evaluated."""
        self.create_first_generation()
        yield self.generation
        while self.generation < self.generations:
            self.create_next_generation()
            yield self.generation

    def run(self) -> None:
        """Evolve up to the last generation."""
        for _ in self.evolve():
            pass

    def create_initial_population(self) -> None:
        """Make generation 0: all weights, then individuals that lost some at random."""
        low, high = self.settings.damage_range
        self.children = []
        for index in range(self.population_size):
            alive = np.ones(self.size, dtype=np.bool_)
            rate = float(self.rng.uniform(low, high)) if index else 0.0
            for layer, part in self._parts(alive):
                count = min(int(rate * layer.size), layer.size - layer.least)
                part[self.rng.choice(layer.size, count, replace=False, shuffle=False)] = False
            self.children.append(self._born(alive, index, -1))
        self.current_generation: list[Individual] = []

    def create_new_population(self) -> None:
        """Breed one child for every individual: a crossover, then the two mutations, each by chance."""
        self.children = []
        for place, parent in enumerate(self.current_generation):
            alive, partner = self.genes(parent), -1
            if self.rng.random() < self.settings.crossover_probability:
                # Individuals are ranked: of those drawn for the tournament, the one with the lowest place is the
                # fittest.
                drawn = self.rng.choice(self.population_size - 1, self.tournament_size, replace=False)
                nearest = int(drawn.min())
                mate = self.current_generation[nearest + (nearest >= place)]
                partner = mate.number
                self._cross(alive, mate)
            for layer, part in self._parts(alive):
                layer.revive(part)
            if self.rng.random() < self.settings.weakest_probability:
                for layer, part in self._parts(alive):
                    layer.drop_weakest(part, self.settings.weakest_rate)
            if self.rng.random() < self.settings.random_probability:
                for layer, part in self._parts(alive):
                    layer.drop_random(part, self.settings.random_rate, self.rng)
            self.children.append(self._born(alive, parent.number, partner))

    def calculate_population_fitness(self) -> None:
        """Evaluate the children; each replaces its parent if the parent is less fit."""
        self.generation += 1
        accuracies = self.fitness_function(self.genes(child) for child in self.children)
        if not self.current_generation:
            self.start_accuracy = float(accuracies[0])
            self.current_generation = list(self.children)
        for place, child in enumerate(self.children):
            child.accuracy = float(accuracies[place])
            gain = self.settings.alpha * (child.accuracy - self.start_accuracy)
            child.fitness = gain + self.settings.beta * child.compression
            # Only a fitter child replaces its parent, so no place ever gets worse: this is the elitism. The undamaged
            # individual may be replaced, too.
            if child.fitness > self.current_generation[place].fitness:
                self.current_generation[place] = child
        self.children = []
        for member in sorted(self.current_generation, key=lambda member: member.number):
            measured = (member.fitness, member.accuracy, member.compression)
            self.history.append(HistoryRow(self.generation, member.number, *measured, member.born, member.partner))

    def genes(self, individual: Individual) -> BoolArray:
        """Return an individual's genes, shape ``(genes,)``."""
        return np.unpackbits(individual.genes, count=self.size).view(np.bool_)

    def best(self) -> Individual:
        """Return the fittest individual."""
        return self.current_generation[0]

    def _born(self, alive: BoolArray, number: int, partner: int) -> Individual:
        child = Individual(np.packbits(alive), number, self.generation + 1, partner)
        child.compression = 1.0 - np.count_nonzero(alive) / self.size
        return child

    def _cross(self, alive: BoolArray, mate: Individual) -> None:
        """Copy the mate's genes between two random cuts into an individual's genes."""
        first, second = np.sort(self.rng.choice(self.size + 1, 2, replace=False)).tolist()
        start = first // 8
        chunk = np.unpackbits(mate.genes[start : -(-second // 8)]).view(np.bool_)
        alive[first:second] = chunk[first - 8 * start : second - 8 * start]

    def _parts(self, alive: BoolArray) -> Iterator[tuple[GeneLayer, BoolArray]]:
        start = 0
        for layer in self.layers:
            yield layer, alive[start : start + layer.size]
            start += layer.size
