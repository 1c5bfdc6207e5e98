"""The genetic algorithm that one would write first: pyeasyga on lists, a Rips complex per individual.

Its operators are list operators that keep the number of points, which pyeasyga's own don't: so every one of its
subsets has half the points, as in the search it is compared with.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import gudhi
import numpy as np
from pyeasyga.pyeasyga import GeneticAlgorithm

Genes = list[int]


def naive_fitness(cloud: dict[str, np.ndarray], whole: np.ndarray, degree: int) -> float:
    """Score one subset, a GUDHI Rips complex from `points` or from `distance_matrix`."""
    tree = gudhi.RipsComplex(**cloud).create_simplex_tree(max_dimension=degree + 1)
    tree.persistence()
    return float(gudhi.bottleneck_distance(tree.persistence_intervals_in_dimension(degree), whole))


def naive_search(points: np.ndarray, whole: np.ndarray, population: int, generations: int, seed: int) -> float:
    """Search half the points whose H0 diagram is nearest to the whole cloud's; return the best distance."""
    rng = random.Random(seed)
    search = GeneticAlgorithm(
        list(range(len(points))), population_size=population, generations=generations, maximise_fitness=False
    )
    search.create_individual = _half(rng)
    search.crossover_function = _crossed(rng)
    search.mutate_function = _swapped(rng)

    def fitness(genes: Genes, data: Sequence[int]) -> float:
        kept = [index for index, gene in zip(data, genes, strict=True) if gene]
        return naive_fitness({"points": points[kept]}, whole, 0)

    search.fitness_function = fitness
    search.run()
    return float(search.best_individual()[0])


def _half(rng: random.Random) -> Callable[[Sequence[int]], Genes]:
    def create(data: Sequence[int]) -> Genes:
        kept = set(rng.sample(range(len(data)), len(data) // 2))
        return [int(index in kept) for index in range(len(data))]

    return create


def _crossed(rng: random.Random) -> Callable[[Genes, Genes], tuple[Genes, Genes]]:
    def cross(mother: Genes, father: Genes) -> tuple[Genes, Genes]:
        differing = [index for index, (one, other) in enumerate(zip(mother, father, strict=True)) if one != other]
        chosen = set(rng.sample(differing, len(differing) // 2))
        daughter, son = list(mother), list(father)
        for index in differing:
            daughter[index], son[index] = (1, 0) if index in chosen else (0, 1)
        return daughter, son

    return cross


def _swapped(rng: random.Random) -> Callable[[Genes], None]:
    def mutate(genes: Genes) -> None:
        removed = rng.choice([index for index, gene in enumerate(genes) if gene])
        added = rng.choice([index for index, gene in enumerate(genes) if not gene])
        genes[removed], genes[added] = 0, 1

    return mutate
