"""The metric of topological pruning: which blocks of a cloud stay, found by covering it or by comparing diagrams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from tqdm.auto import tqdm

from nni_topo.errors import ConfigError, unknown_name
from nni_topo.maths import topology
from nni_topo.maths.search.subsets import BoolArray, EvolutionSettings, FloatArray, Generation, SubsetGeneticAlgorithm
from nni_topo.maths.ties import first_largest
from nni_topo.pruners.allocators import ConfigAllocator, profile
from nni_topo.pruners.hooks import Data, MetricCalculator, Metrics, PruningContext
from nni_topo.pruners.reconstruction.problems import ReconstructionProblem, ReconstructionProblems
from nni_topo.pruners.units import PruningUnit

IntArray = NDArray[np.intp]
RECONSTRUCTION = "reconstruction"
_RANK_STEP = 1e-12


@dataclass(frozen=True)
class SelectionSettings:
    """How a subset of a cloud is chosen; the knobs of :class:`~nni_topo.TopologicalPruner` of the same names.

    ``origin`` says whether the zero vector belongs to the cloud, ``greedy_start`` whether the genetic algorithm's first
    generation holds the greedy solution.
    """

    criterion: str = "hausdorff"
    homology_dimensions: tuple[int, ...] = (0,)
    solver: Literal["genetic", "greedy"] = "genetic"
    engine: Literal["exact", "gudhi"] = "exact"
    evolution: EvolutionSettings = field(default_factory=EvolutionSettings)
    origin: bool = True
    greedy_start: bool = True

    def __post_init__(self) -> None:
        for name, known in (
            ("criterion", (*topology.CRITERIA, RECONSTRUCTION)),
            ("solver", ("genetic", "greedy")),
            ("engine", ("exact", "gudhi")),
        ):
            if getattr(self, name) not in known:
                raise unknown_name(name, str(getattr(self, name)), known)
        dimensions = self.homology_dimensions
        if not dimensions or any(isinstance(d, bool) or not isinstance(d, int) or d < 0 for d in dimensions):
            raise ConfigError(
                f"homology_dimensions must be one or more integers from 0, got {dimensions!r} (TopologicalPruner)"
            )


class TopologicalMetric(MetricCalculator):
    """Scores that rank a unit's blocks so that its kept ones come first.

    The j-th block of the ranking gets half the j-th longest H0 death time of the unit's cloud, in units of their mean:
    what the cloud's H0 diagram loses, in bottleneck distance, once this block and all after it are gone. So the scores
    serve ratios, thresholds and global ranking alike.

    Parameters
    ----------
    settings : SelectionSettings
        How subsets are chosen.
    allocator : ConfigAllocator
        The pruner's allocator: says how many blocks each unit keeps. ``exact``, since the scores hold a ranking.
    seed : int
        Seed of the genetic algorithm.
    progress : bool
        Whether a progress bar over the units is shown.
    n_jobs : int or None
        Units ranked at a time; as joblib's.
    problems : ReconstructionProblems or None
        What criterion ``"reconstruction"`` is measured by.

    Attributes
    ----------
    trace : dict of str to list of Generation
        Per unit (and part, ``name[part]``, where it has several) the genetic algorithm's progress of the latest call.
    """

    def __init__(
        self,
        settings: SelectionSettings,
        allocator: ConfigAllocator,
        *,
        seed: int,
        progress: bool = False,
        n_jobs: int | None = 1,
        problems: ReconstructionProblems | None = None,
    ) -> None:
        self.problems = problems
        self.settings = settings
        self.allocator = allocator
        self.seed = seed
        self.progress = progress
        self.n_jobs = n_jobs
        self.trace: dict[str, list[Generation]] = {}

    def calculate(self, data: Data, context: PruningContext) -> Metrics:
        """Choose the kept blocks of every unit and return scores that hold the choice."""
        self.trace = {}
        clouds = {unit.name: _clouds(unit, data, origin=self.settings.origin) for unit in context.units}
        losses = {name: np.stack([_death_profile(cloud) for cloud in parts]) for name, parts in clouds.items()}
        profiles = {unit.name: profile(unit, torch.from_numpy(losses[unit.name])) for unit in context.units}
        rows = self.allocator.rounded_rows(context, profiles)
        if self.problems is None:
            tasks = [
                _Task(cloud, rows[unit.name], [self.seed, index, part], _label(unit, part))
                for index, unit in enumerate(context.units)
                for part, cloud in enumerate(clouds[unit.name])
            ]
            found = {task.label: ranking for task, ranking in zip(tasks, self._rankings(tasks), strict=True)}
        else:
            found = self._reconstructed(self.problems, context, clouds, rows)
        metrics: Metrics = {}
        for unit in context.units:
            scores = np.empty((unit.parts, unit.rows))
            for part in range(unit.parts):
                ranking = found[_label(unit, part)]
                scores[part, ranking] = losses[unit.name][part] - _RANK_STEP * np.arange(unit.rows)
            for module_name, target_name in unit.members:
                shape = context.metric_shape(module_name, target_name)
                metrics.setdefault(module_name, {})[target_name] = torch.from_numpy(scores.copy()).reshape(shape)
        return metrics

    def _reconstructed(
        self,
        problems: ReconstructionProblems,
        context: PruningContext,
        clouds: dict[str, list[_Cloud]],
        rows: dict[str, int],
    ) -> dict[str, IntArray]:
        """Rank every cloud by what the layers behind can still put out, as far as blocks stay; then by the cloud."""
        found: dict[str, IntArray] = {}
        kept: dict[str, BoolArray] = {}
        places = {unit.name: index for index, unit in enumerate(context.units)}
        with tqdm(total=len(places), desc="choosing filters", disable=not self.progress) as bar:
            for unit, problem in problems.each(context, kept):
                chosen = problem.choose(rows[unit.name] * unit.parts, unit.parts)
                if self.settings.solver == "genetic" and unit.parts == 1 and len(chosen) < unit.rows:
                    chosen = self._evolved(problem, chosen, unit, [self.seed, places[unit.name]])
                kept[unit.name] = np.isin(np.arange(unit.blocks), chosen)
                for part, cloud in enumerate(clouds[unit.name]):
                    own = chosen[chosen // unit.rows == part] - part * unit.rows
                    rest = _greedy_ranking(cloud)
                    found[_label(unit, part)] = np.concatenate([own, rest[~np.isin(rest, own)]])
                bar.update()
        return found

    def _evolved(
        self, problem: ReconstructionProblem, greedy: IntArray, unit: PruningUnit, seed: list[int]
    ) -> IntArray:
        """Search on from the greedy solution; of the blocks found, those of the greedy solution come first."""
        start = np.isin(np.arange(unit.rows), greedy)
        search = SubsetGeneticAlgorithm(
            unit.rows,
            len(greedy),
            problem.error,
            self.settings.evolution,
            seed=seed,
            initial=start[None] if self.settings.greedy_start else None,
        )
        search.run()
        self.trace[unit.name] = search.trace
        _, best = search.best_individual()
        return np.concatenate([greedy[best[greedy]], np.flatnonzero(best & ~start)])

    def _rankings(self, tasks: list[_Task]) -> Iterator[IntArray]:
        """Rank every cloud, in parallel where asked; a registered joblib backend spreads the work over machines."""
        work = (delayed(_rank)(task, self.settings) for task in tasks)
        results = Parallel(n_jobs=self.n_jobs, return_as="generator")(work)
        with tqdm(total=len(tasks), desc="choosing filters", disable=not self.progress) as bar:
            for task, (ranking, trace) in zip(tasks, results, strict=True):
                if trace:
                    self.trace[task.label] = trace
                bar.update()
                yield ranking


@dataclass(frozen=True)
class _Task:
    """One cloud to rank: how many of its blocks stay, the seed, and its name in the trace."""

    cloud: _Cloud
    keep: int
    seed: list[int]
    label: str


def _label(unit: PruningUnit, part: int) -> str:
    return unit.name if unit.parts == 1 else f"{unit.name}[{part}]"


def _rank(task: _Task, settings: SelectionSettings) -> tuple[IntArray, list[Generation]]:
    """Return all blocks of a cloud, the chosen ones first, and the genetic algorithm's progress."""
    cloud, keep = task.cloud, task.keep
    greedy = _greedy_ranking(cloud)
    if settings.solver == "greedy" or keep == cloud.size:
        return greedy, []
    fitness = topology.SubsetFitness(
        cloud.distances,
        settings.criterion,
        homology_dimensions=settings.homology_dimensions,
        base=cloud.base,
        engine=settings.engine,
    )
    search = SubsetGeneticAlgorithm(
        cloud.size,
        keep,
        lambda population: fitness(cloud.with_base(population)),
        settings.evolution,
        seed=task.seed,
        initial=np.isin(np.arange(cloud.size), greedy[:keep])[None] if settings.greedy_start else None,
    )
    search.run()
    _, kept = search.best_individual()
    place = np.empty(cloud.size, dtype=np.intp)
    place[greedy] = np.arange(cloud.size)
    return np.lexsort((place, -search.frequency(), ~kept)), search.trace


@dataclass(frozen=True)
class _Cloud:
    """Distances of ``size`` blocks, and of the origin behind them if it belongs to the cloud."""

    distances: FloatArray
    size: int
    base: int | None

    def with_base(self, population: BoolArray) -> BoolArray:
        if self.base is None:
            return population
        return np.pad(population, ((0, 0), (0, 1)), constant_values=True)


def _clouds(unit: PruningUnit, data: Data, *, origin: bool) -> list[_Cloud]:
    """Join the members' clouds and cut them into the unit's parts."""
    joined = np.concatenate([data[module][target].numpy() for module, target in unit.members], axis=1)
    return list(_each_part(joined.reshape(unit.parts, unit.rows, -1), origin=origin))


def _each_part(parts: FloatArray, *, origin: bool) -> Iterator[_Cloud]:
    for points in parts:
        cloud = topology.with_origin(points) if origin else points
        yield _Cloud(topology.pairwise_distances(cloud), len(points), len(points) if origin else None)


def _death_profile(cloud: _Cloud) -> FloatArray:
    """Half the H0 death times, descending, in units of their mean; one per block.

    Without the origin there is one death less than there are blocks: the component that lives forever counts as much as
    the longest finite one.
    """
    deaths = topology.h0_deaths(cloud.distances)
    if len(deaths) < cloud.size:
        deaths = np.concatenate([deaths[:1] if len(deaths) else np.zeros(1), deaths])
    mean = deaths.mean()
    return deaths / (2.0 * mean) if mean > 0 else deaths


def _greedy_ranking(cloud: _Cloud) -> IntArray:
    """Farthest points first, from the origin or, without it, from the most remote point."""
    start = first_largest(cloud.distances.sum(1)) if cloud.base is None else cloud.base
    order, _ = topology.farthest_point_order(cloud.distances, start)
    return order if cloud.base is None else order[order != cloud.base]
