"""The metric of topological pruning: which blocks of a cloud stay, found by covering it or by comparing diagrams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from tqdm.auto import tqdm

from nni_topo.errors import ConfigError, unknown_name
from nni_topo.maths import topology
from nni_topo.maths.search.subsets import BoolArray, EvolutionSettings, Generation, SubsetGeneticAlgorithm
from nni_topo.maths.topology.fitness import COMBINATIONS, Combination
from nni_topo.pruners.hooks import PruningContext
from nni_topo.pruners.selection import Cloud, Clouds, Kept, SelectionMetric


@dataclass(frozen=True)
class SelectionSettings:
    """How a subset of a cloud is chosen; the knobs of :class:`~nni_topo.TopologicalPruner` of the same names.

    ``greedy_start`` says whether the genetic algorithm's first generation holds the greedy solution, ``combine`` how
    the bottleneck distances of several degrees become one.
    """

    criterion: str = "hausdorff"
    homology_dimensions: tuple[int, ...] = (0,)
    solver: Literal["genetic", "greedy"] = "genetic"
    engine: Literal["exact", "gudhi"] = "exact"
    combine: Combination = "max"
    evolution: EvolutionSettings = field(default_factory=EvolutionSettings)
    greedy_start: bool = True

    def __post_init__(self) -> None:
        for name, known in (
            ("criterion", topology.CRITERIA),
            ("solver", ("genetic", "greedy")),
            ("engine", ("exact", "gudhi")),
            ("combine", COMBINATIONS),
        ):
            if getattr(self, name) not in known:
                raise unknown_name(name, str(getattr(self, name)), known)
        dimensions = self.homology_dimensions
        if not dimensions or any(isinstance(d, bool) or not isinstance(d, int) or d < 0 for d in dimensions):
            raise ConfigError(
                f"homology_dimensions must be one or more integers from 0, got {dimensions!r} (TopologicalPruner)"
            )


@dataclass(kw_only=True, eq=False)
class TopologicalMetric(SelectionMetric):
    """Keeps of every cloud a subset that is close to the whole; ``n_jobs`` clouds at a time, as joblib's.

    ``trace`` holds, per unit (and part, ``name[part]``, where it has several), the genetic algorithm's progress of the
    latest call.
    """

    settings: SelectionSettings
    seed: int
    n_jobs: int | None = 1
    trace: dict[str, list[Generation]] = field(default_factory=dict, init=False)

    def choose(self, context: PruningContext, clouds: Clouds, rows: dict[str, int]) -> Kept:
        """Choose in parallel where asked; a registered joblib backend spreads the work over machines."""
        from joblib import Parallel, delayed

        self.trace = {}
        tasks = [
            (unit, part, (cloud, rows[unit.name], [self.seed, index, part]))
            for index, unit in enumerate(context.units)
            for part, cloud in enumerate(clouds[unit.name])
        ]
        work = (delayed(_chosen)(*task, self.settings) for *_, task in tasks)
        results = Parallel(n_jobs=self.n_jobs, return_as="generator")(work)
        found: dict[str, list[BoolArray]] = {}
        with tqdm(total=len(tasks), desc="choosing filters", disable=not self.progress) as bar:
            for (unit, part, _), (kept, trace) in zip(tasks, results, strict=True):
                found.setdefault(unit.name, []).append(kept)
                if trace:
                    self.trace[unit.part_name(part)] = trace
                bar.update()
        return {name: np.concatenate(parts) for name, parts in found.items()}


def _chosen(
    cloud: Cloud, keep: int, seed: list[int], settings: SelectionSettings
) -> tuple[BoolArray, list[Generation]]:
    """Return what stays of a cloud, ``(size,)``, and the genetic algorithm's progress."""
    cover = cloud.cover(keep)
    if settings.solver == "greedy" or keep == cloud.size:
        return cover, []
    fitness = topology.SubsetFitness(
        cloud.distances,
        settings.criterion,
        homology_dimensions=settings.homology_dimensions,
        base=cloud.base,
        engine=settings.engine,
        combine=settings.combine,
    )
    search = SubsetGeneticAlgorithm(
        cloud.size,
        keep,
        lambda population: fitness(cloud.with_base(population)),
        settings.evolution,
        seed=seed,
        initial=cover[None] if settings.greedy_start else None,
    )
    search.run()
    return search.best_individual()[1], search.trace
