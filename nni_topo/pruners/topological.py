"""Topological pruning: keep the filters that keep the shape of a layer's point cloud.

A layer is a cloud with one point per filter or neuron, plus the origin, to which a pruned one falls. How *many* points
a cloud can spare is read off its H0 death times; *which* points stay is a search over subsets of that size, by a
genetic algorithm or greedily, that minimises a distance between the kept and the whole cloud.

References
----------
.. [1] Perera, "Topological Pruner: a neural network pruner using topological data analysis", MSc thesis, University of
   Moratuwa, 2022.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from joblib import Parallel, delayed
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from nni_topo import topology
from nni_topo.errors import ConfigError, unknown_name
from nni_topo.evolution import BoolArray, EvolutionSettings, FloatArray, Generation, SubsetGeneticAlgorithm
from nni_topo.hooks import (
    ActivationCollector,
    ConfigAllocator,
    Data,
    DataCollector,
    MetricCalculator,
    Metrics,
    PruningContext,
    PruningUnit,
    WeightCollector,
    profile,
)
from nni_topo.hooks.budget import Allocation, BudgetAllocator
from nni_topo.hooks.collectors import Preprocess
from nni_topo.hooks.coupled import CoupledWeightCollector
from nni_topo.hooks.functional import FunctionalCollector
from nni_topo.pruners.base import StructuredPruner

IntArray = NDArray[np.intp]
_RANK_STEP = 1e-12
_PRESETS: dict[str, dict[str, Any]] = {
    "perera2022": {
        "collector": "weight",
        "criterion": "bottleneck",
        "homology_dimensions": (0, 1),
        "solver": "genetic",
    }
}


@dataclass(frozen=True)
class SelectionSettings:
    """How a subset of a cloud is chosen; the knobs of :class:`TopologicalPruner` of the same names.

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
            ("criterion", topology.CRITERIA),
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
        The pruner's allocator: says how many blocks each unit keeps.
    seed : int
        Seed of the genetic algorithm.
    progress : bool
        Whether a progress bar over the units is shown.
    n_jobs : int or None
        Units ranked at a time; as joblib's.

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
    ) -> None:
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
        rows = self.allocator.kept_rows(context, profiles)
        tasks = [
            _Task(cloud, rows[unit.name], [self.seed, index, part], _label(unit, part))
            for index, unit in enumerate(context.units)
            for part, cloud in enumerate(clouds[unit.name])
        ]
        found = {task.label: ranking for task, ranking in zip(tasks, self._rankings(tasks), strict=True)}
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


class TopologicalPruner(StructuredPruner):
    """Prune the filters and neurons whose loss changes the shape of a layer's point cloud least.

    Parameters
    ----------
    model : torch.nn.Module
        Model to prune. NNI wraps it; ``unwrap_model()`` takes the wrappers off again.
    config_list : list of dict
        NNI's config_list; all its keys keep their meaning. The members of a ``dependency_group_id`` are one joint
        cloud, features side by side. ``sparse_threshold`` is a tolerance: blocks go as long as half the longest H0
        death time that the cloud loses stays below it, in units of the layer's mean death time; one block stays.
    evaluator : nni.compression.utils.Evaluator or None, default=None
        Needed for scheduled pruning; serves the activation cloud where there is no ``calibration``.
    existed_wrappers : dict or None, default=None
        Used by ``from_compressor``.
    collector : {"auto", "weight", "coupled", "activation", "functional"} or DataCollector, default="auto"
        The cloud: the filters' weights, the same scaled by batch norm and by the weights that read them (needs
        ``example_inputs``), their outputs over the calibration data, or what these outputs do in the layers that read
        them. ``"auto"`` is ``"functional"`` if ``calibration`` is given, else ``"weight"``.
    calibration : iterable or None, default=None
        Batches of inputs, or of ``(inputs, targets)``; labels aren't used. A list or DataLoader, not a generator.
    preprocess : {"none", "center", "standardize", "unit"}, default="none"
        Applied to each member's cloud before a group's are joined.
    criterion : {"hausdorff", "cover", "bottleneck", "wasserstein"}, default="hausdorff"
        What the search minimises: the largest or the mean distance from a pruned to the nearest kept point, or the
        distance between the persistence diagrams of the kept and the whole cloud.
    homology_dimensions : sequence of int, default=(0,)
        Degrees whose diagrams are compared by ``"bottleneck"`` (their maximum) and ``"wasserstein"`` (their sum).
    solver : {"genetic", "greedy"}, default="genetic"
        Genetic algorithm, started from the greedy solution, or the greedy solution (farthest points first) itself.
    population_size : int, default=50
        Individuals per generation, at least 2.
    generations : int, default=20
        Most generations, at least 1.
    mutation_probability, crossover_probability : float, default=0.2 and 0.8
        In [0, 1].
    elitism : bool, default=True
        Whether the best individual goes on unchanged.
    target : mapping or None, default=None
        A budget for the whole network instead of ratios: ``{"flops": 0.25}`` or ``{"params": 0.5}``, the share to be
        left. The config_list then says where only; its ``min_sparse_ratio`` and ``max_sparse_ratio`` hold. Scheduled
        pruners don't schedule it.
    allocation : {"topological", "uniform"}, default="topological"
        How the budget is dealt out: one tolerance on death times over the network, or the same share of every layer.
    example_inputs : Any, default=None
        Inputs of the model, which a ``target`` and the coupled cloud need; for a target the first ``calibration`` batch
        serves as well.
    patience : int or None, default=None
        Generations without improvement after which the search ends. None: never.
    engine : {"exact", "gudhi"}, default="exact"
        Closed forms on a cached distance matrix, or a simplex tree per individual: the slow reference.
    preset : {None, "perera2022"}, default=None
        ``"perera2022"`` is the thesis' setting: weight cloud without the origin, bottleneck distance in H0 and H1,
        genetic algorithm from random individuals. It fixes ``collector``, ``criterion``, ``homology_dimensions`` and
        ``solver``.
    seed : int, default=0
        Same seed, same masks.
    progress : bool, default=False
        Show a progress bar over the layers.
    n_jobs : int or None, default=1
        Layers searched at a time, as joblib's ``n_jobs``; ``joblib.parallel_config`` picks another backend, such as
        Dask's. The result doesn't depend on it.

    Raises
    ------
    ConfigError, DataError
        If a knob or the request is bad, before the model is wrapped.

    See Also
    --------
    nni_topo.to_dense : makes the masked model smaller.

    Notes
    -----
    With ``k`` points kept, the H0 bottleneck distance is at least half the ``(k+1)``-th death time and for almost all
    subsets equal to it: at a fixed ratio it can't tell subsets apart. The default criterion can, and bounds the
    bottleneck distance of every degree: by the stability theorem it is at most twice the Hausdorff distance.

    References
    ----------
    .. [1] Perera, "Topological Pruner", MSc thesis, University of Moratuwa, 2022.
    .. [2] Chazal, de Silva, Oudot, "Persistence stability for geometric complexes", Geometriae Dedicata, 2014.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> pruner = TopologicalPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.75}], generations=5)
    >>> _, masks = pruner.compress()
    >>> int(masks["0"]["bias"].sum())
    8
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        collector: str | DataCollector = "auto",
        calibration: Iterable[Any] | None = None,
        preprocess: Preprocess = "none",
        criterion: str = "hausdorff",
        homology_dimensions: Sequence[int] = (0,),
        solver: Literal["genetic", "greedy"] = "genetic",
        population_size: int = 50,
        generations: int = 20,
        mutation_probability: float = 0.2,
        crossover_probability: float = 0.8,
        elitism: bool = True,
        patience: int | None = None,
        target: Mapping[str, float] | None = None,
        allocation: Allocation = "topological",
        example_inputs: Any = None,
        engine: Literal["exact", "gudhi"] = "exact",
        preset: Literal["perera2022"] | None = None,
        seed: int = 0,
        progress: bool = False,
        n_jobs: int | None = 1,
    ) -> None:
        choice: dict[str, Any] = {
            "collector": collector,
            "criterion": criterion,
            "homology_dimensions": tuple(homology_dimensions),
            "solver": solver,
        }
        if preset is not None:
            choice = _preset(preset, choice)
        settings = SelectionSettings(
            criterion=choice["criterion"],
            homology_dimensions=choice["homology_dimensions"],
            solver=choice["solver"],
            engine=engine,
            evolution=EvolutionSettings(
                population_size=population_size,
                generations=generations,
                crossover_probability=crossover_probability,
                mutation_probability=mutation_probability,
                elitism=elitism,
                patience=patience,
            ),
            origin=preset is None,
            greedy_start=preset is None,
        )
        self.preset = preset
        self.seed = seed
        self.target = target
        allocator = _allocator(config_list, target, allocation, example_inputs, calibration)
        self._metric = TopologicalMetric(settings, allocator, seed=seed, progress=progress, n_jobs=n_jobs)
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            collector=_collector(choice["collector"], calibration, example_inputs, preprocess),
            calculator=self._metric,
            allocator=allocator,
        )
        if target is not None:
            self._activate_targets()

    @property
    def trace(self) -> dict[str, list[Generation]]:
        """Best and mean fitness per generation of the latest search, per layer or group."""
        return self._metric.trace


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
    start = int(cloud.distances.sum(1).argmax()) if cloud.base is None else cloud.base
    order, _ = topology.farthest_point_order(cloud.distances, start)
    return order if cloud.base is None else order[order != cloud.base]


def _allocator(
    config_list: list[dict[str, Any]],
    target: Mapping[str, float] | None,
    allocation: Allocation,
    example_inputs: Any,
    calibration: Iterable[Any] | None,
) -> ConfigAllocator:
    if target is None:
        return ConfigAllocator(on_empty="keep")
    for index, config in enumerate(config_list):
        settings = [config, *config.get("target_settings", {}).values()]
        for key in ("sparse_ratio", "sparse_threshold", "global_group_id"):
            if any(setting.get(key) is not None for setting in settings):
                raise ConfigError(f"a target replaces {key}, got both (config_list[{index}])")
    if example_inputs is None and calibration is not None:
        example_inputs = next((b[0] if isinstance(b, (tuple, list)) else b for b in calibration), None)
    if example_inputs is None:
        raise ConfigError("a target needs example_inputs or calibration data, got neither (target)")
    return BudgetAllocator(target, example_inputs, allocation=allocation)


def _collector(
    collector: str | DataCollector, calibration: Iterable[Any] | None, example_inputs: Any, preprocess: Preprocess
) -> DataCollector:
    if isinstance(collector, DataCollector):
        return collector
    if collector == "auto":
        collector = "weight" if calibration is None else "functional"
    if collector == "weight":
        return WeightCollector(preprocess=preprocess)
    if collector == "activation":
        return ActivationCollector(calibration, preprocess=preprocess)
    if collector == "functional":
        if calibration is None:
            raise ConfigError("collector 'functional' needs calibration data, got none (calibration)")
        return FunctionalCollector(calibration, preprocess=preprocess)
    if collector == "coupled":
        if example_inputs is None:
            raise ConfigError("collector 'coupled' needs example_inputs, got none (example_inputs)")
        return CoupledWeightCollector(example_inputs, preprocess=preprocess)
    raise unknown_name("collector", str(collector), ("auto", "weight", "coupled", "activation", "functional"))


def _preset(preset: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return a preset's choice; a knob that was set to something else is an error."""
    if preset not in _PRESETS:
        raise unknown_name("preset", str(preset), _PRESETS)
    fixed = _PRESETS[preset]
    defaults = {name: inspect.signature(TopologicalPruner).parameters[name].default for name in fixed}
    for knob, value in given.items():
        if value not in (defaults[knob], fixed[knob]):
            raise ConfigError(f"preset {preset!r} fixes {knob}={fixed[knob]!r}, got {value!r} (TopologicalPruner)")
    return fixed
