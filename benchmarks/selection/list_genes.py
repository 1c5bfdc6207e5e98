"""The weight-pruning genetic algorithm as pyeasyga has it: genes in Python lists, one individual at a time."""

from __future__ import annotations

import random
from collections.abc import Callable

from pyeasyga.pyeasyga import GeneticAlgorithm


def list_based(
    magnitudes: list[float],
    fitness: Callable[[list[int]], float],
    *,
    population_size: int,
    generations: int,
    damage_rate: float,
    weakest_rate: float = 0.01,
    random_rate: float = 0.01,
) -> GeneticAlgorithm:
    """Return pyeasyga's loop with two-point crossover and both terminations on lists of genes."""
    size, span = len(magnitudes), max(magnitudes) - min(magnitudes)
    algorithm = GeneticAlgorithm(magnitudes, population_size, generations, 0.8, 0.5)

    def create(data: list[float]) -> list[int]:
        genes = [1] * size
        for index in random.sample(range(size), int(damage_rate * size)):
            genes[index] = 0
        return genes

    def crossover(one: list[int], other: list[int]) -> tuple[list[int], list[int]]:
        first, second = sorted(random.sample(range(size + 1), 2))
        return (
            one[:first] + other[first:second] + one[second:],
            other[:first] + one[first:second] + other[second:],
        )

    def mutate(genes: list[int]) -> None:
        alive = [index for index, gene in enumerate(genes) if gene]
        bound = min(magnitudes[index] for index in alive) + weakest_rate * span
        for index in alive:
            if magnitudes[index] < bound:
                genes[index] = 0
        alive = [index for index, gene in enumerate(genes) if gene]
        for index in random.sample(alive, max(1, int(random_rate * len(alive)))):
            genes[index] = 0

    algorithm.create_individual = create
    algorithm.crossover_function = crossover
    algorithm.mutate_function = mutate
    algorithm.fitness_function = lambda genes, data: fitness(genes)
    return algorithm
