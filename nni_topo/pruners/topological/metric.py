"""The metric of topological pruning: which blocks of a cloud to keep, found by covering it or by comparing diagrams."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from nni_topo.context import leaving_out
from nni_topo.maths import topology
from nni_topo.maths.search.subsets import BoolArray, EvolutionSettings, FloatArray, Generation, SubsetGeneticAlgorithm
from nni_topo.network.runtime.progress import bar
from nni_topo.pruners.hooks import Data, KeptSet, PruningContext
from nni_topo.pruners.selection import Cloud, Clouds, SelectionMetric
from nni_topo.pruners.units import KeptBlocks

_logger = logging.getLogger(__name__)

_COPIES = 3  # of a cloud, while its distances are computed
CRITERIA = ("hausdorff", "cover", "bottleneck", "bottleneck_sum", "wasserstein")
"""Distances between a kept and a whole cloud; ``"bottleneck_sum"`` adds those of several degrees."""


@dataclass(frozen=True)
class GeneticSearch(EvolutionSettings):
    """Settings of the genetic algorithm over subsets of a cloud.

    Parameters
    ----------
    population_size : int, default=50
        Individuals per generation, at least 2.
    generations : int, default=20
        Most generations, at least 1.
    crossover_probability, mutation_probability : float, default=0.8 and 0.2
        In [0, 1].
    elitism : bool, default=True
        Whether the best individual is carried over unchanged.
    patience : int or None, default=None
        Generations without improvement after which the search ends. None: never.
    greedy_start : bool, default=True
        Whether the first generation holds the greedy solution.
    engine : {"exact", "gudhi"}, default="exact"
        Closed forms on a cached distance matrix, or a simplex tree per individual: the slow reference.

    Examples
    --------
    >>> GeneticSearch(generations=5).population_size
    50
    """

    greedy_start: bool = True
    engine: Literal["exact", "gudhi"] = "exact"


@dataclass(kw_only=True, eq=False)
class TopologicalMetric(SelectionMetric):
    """Keeps of every cloud a subset that is close to the whole; ``n_jobs`` clouds at a time, as joblib's.

    ``trace`` holds, per unit (and part, ``name[part]``, where it has several), the genetic algorithm's progress of the
    latest call.
    """

    criterion: str
    homology_dimensions: tuple[int, ...]
    search: GeneticSearch | None  # None: the greedy cover
    seed: int
    n_jobs: int | None = 1
    trace: dict[str, list[Generation]] = field(default_factory=dict, init=False)

    def calculate(self, data: Data, context: PruningContext) -> KeptSet:
        """Look whether distances fit into memory, then plan and choose."""
        # Distances and what checks them; a search sorts neighbours, or edges.
        by_search = 4.0 if max(self.homology_dimensions) else 2.0
        width = max((points.shape[1] for targets in data.values() for points in targets.values()), default=0)
        cure = f"{leaving_out()}, or choose by norms; solver='greedy' takes less than a search"
        context.check_memory(1.5 if self.search is None else by_search, cure, _COPIES * width)
        return super().calculate(data, context)

    def choose(self, context: PruningContext, clouds: Clouds, rows: dict[str, int]) -> KeptBlocks:
        """Choose in parallel where asked; a registered joblib backend spreads the work over machines."""
        from joblib import Parallel, delayed
        from joblib.parallel import get_active_backend

        self.trace = {}
        tasks = [(index, unit, part) for index, unit in enumerate(context.units) for part in range(unit.parts)]
        chosen_by = self.criterion, self.homology_dimensions, self.search
        # A cloud is handed on, not held: its distances go with it.
        work = (
            delayed(_chosen)(clouds[unit.name].pop(0), rows[unit.name], [self.seed, index, part], *chosen_by)
            for index, unit, part in tasks
        )
        # One by one, for the bar, where the backend can: Ray's can't.
        one_by_one = get_active_backend()[0].supports_return_generator
        results = Parallel(n_jobs=self.n_jobs, return_as="generator" if one_by_one else "list")(work)
        found: dict[str, list[BoolArray]] = {}
        flat: list[str] = []
        with bar("choosing filters", self.progress, total=len(tasks)) as shown:
            for (_, unit, part), (kept, trace, is_flat) in zip(tasks, results, strict=True):
                found.setdefault(unit.name, []).append(kept)
                if trace:
                    self.trace[unit.part_name(part)] = trace
                if is_flat:
                    flat.append(unit.part_name(part))
                shown.update()
        if flat:
            _logger.warning(
                "the criterion %r tells no individual of any generation from another, so these channels are chosen at "
                "random (%s)",
                self.criterion,
                ", ".join(flat),
            )
        return {name: np.concatenate(parts) for name, parts in found.items()}


def _chosen(
    cloud: Cloud,
    keep: int,
    seed: list[int],
    criterion: str,
    homology_dimensions: tuple[int, ...],
    search: GeneticSearch | None,
) -> tuple[BoolArray, list[Generation], bool]:
    """Return the kept blocks of a cloud, boolean ``(size,)``, the search's progress, and whether it told none apart."""
    cover = cloud.cover(keep)
    if search is None or keep == cloud.size:
        return cover, [], False
    criterion, _, summed = criterion.partition("_")
    fitness = topology.SubsetFitness(
        cloud.distances,
        criterion,
        homology_dimensions=homology_dimensions,
        base=cloud.base,
        engine=search.engine,
        combine="sum" if summed else "max",
    )

    def score(population: BoolArray) -> FloatArray:
        return fitness(cloud.with_base(population))

    run = SubsetGeneticAlgorithm(
        cloud.size,
        keep,
        score,
        search,
        seed=seed,
        initial=cover[None] if search.greedy_start else None,
    )
    run.run()
    return run.best_individual()[1], run.trace, run.is_flat
