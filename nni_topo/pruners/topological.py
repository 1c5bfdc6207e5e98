"""Topological pruning: keep the filters that keep the shape of a layer's point cloud.

A layer is a cloud with one point per filter or neuron, plus the origin, where pruned filters lie. Its H0 death times
say how *many* points it can lose; a search over subsets of that size, greedy or genetic, chooses *which* are kept and
minimises a distance between the kept and the whole cloud.

Source: Perera, "Topological Pruner: a neural network pruner using topological data analysis", MSc thesis, University of
Moratuwa, 2022. Only its abstract and lists are public: criteria, clouds and allocations are this project's, and
``perera2022`` is our reconstruction.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.context import leaving_out
from nni_topo.maths import topology
from nni_topo.maths.search.subsets import BoolArray, FloatArray, Generation, GeneticSearch, SubsetGeneticAlgorithm
from nni_topo.network.runtime.hooks import pruner_batches
from nni_topo.network.runtime.progress import bar
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.budget import Budget
from nni_topo.pruners.checks import pruner_arguments
from nni_topo.pruners.clouds import CLOUDS, PointCloud, Preprocess
from nni_topo.pruners.hooks import Data, DataCollector, KeptSet, PruningContext
from nni_topo.pruners.selection import Cloud, Clouds, SelectionMetric
from nni_topo.pruners.units import KeptBlocks
from nni_topo.rules import NONE, Rule, all_of, as_settings, instance, one_of, settings, whole

_logger = logging.getLogger(__name__)
_DIMENSIONS = all_of(whole(0), Sequence, least=1)
_SOLVER = one_of(("auto", "greedy", "genetic"))
_JOBS = Rule("an integer other than 0, as joblib takes it", lambda jobs: whole(-1024).holds(jobs) and jobs != 0) | NONE
_COPIES = 3  # of a cloud, while its distances are computed


@dataclass(kw_only=True, eq=False)
class TopologicalMetric(SelectionMetric):
    """Keeps a subset of every cloud that is close to the whole; searches ``n_jobs`` clouds at a time, by joblib.

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
        """Check that distances fit into memory, then plan and choose."""
        # Matrices in memory: the distances and their check; a search also sorts neighbours, or edges.
        by_search = 4.0 if max(self.homology_dimensions) else 2.0
        width = max((points.shape[1] for targets in data.values() for points in targets.values()), default=0)
        cure = f"{leaving_out()}, or choose by norms; solver='greedy' takes less than a search"
        context.check_memory(1.5 if self.search is None else by_search, cure, _COPIES * width)
        return super().calculate(data, context)

    def choose(self, context: PruningContext, clouds: Clouds, rows: dict[str, int]) -> KeptBlocks:
        """Choose, in parallel if ``n_jobs`` says so; a registered joblib backend spreads the work over machines."""
        from joblib import Parallel, delayed
        from joblib.parallel import get_active_backend

        self.trace = {}
        tasks = [(index, unit, part) for index, unit in enumerate(context.units) for part in range(unit.parts)]
        choose = delayed(partial(_choose_blocks, self.criterion, self.homology_dimensions, self.search))
        # A cloud is popped, so that it and its distances are freed after its task.
        work = (
            choose(clouds(unit.name).pop(0), rows[unit.name], [self.seed, index, part]) for index, unit, part in tasks
        )
        # One by one, for the bar, if the backend supports it: Ray's doesn't.
        one_by_one = get_active_backend()[0].supports_return_generator
        results = Parallel(n_jobs=self.n_jobs, return_as="generator" if one_by_one else "list")(work)
        kept_parts: dict[str, list[BoolArray]] = {}
        flat: list[str] = []
        with bar("choosing filters", self.progress, total=len(tasks)) as shown:
            for (_, unit, part), (is_kept, trace, is_flat) in zip(tasks, results, strict=True):
                kept_parts.setdefault(unit.name, []).append(is_kept)
                if trace:
                    self.trace[unit.part_name(part)] = trace
                if is_flat:
                    flat.append(unit.part_name(part))
                shown.update()
        if flat:
            _logger.warning(
                "the criterion %r is equal for all individuals of every generation, so these channels are chosen at "
                "random (%s)",
                self.criterion,
                ", ".join(flat),
            )
        return {name: np.concatenate(parts) for name, parts in kept_parts.items()}


def _choose_blocks(
    criterion: str,
    homology_dimensions: tuple[int, ...],
    search: GeneticSearch | None,
    cloud: Cloud,
    keep: int,
    seed: list[int],
) -> tuple[BoolArray, list[Generation], bool]:
    """Return a cloud's kept blocks, boolean ``(size,)``, the search's progress, and whether all were equally fit."""
    cover = cloud.cover(keep)
    if search is None or keep == cloud.size:
        return cover, [], False
    fitness = topology.SubsetFitness(
        cloud.distances, criterion, homology_dimensions=homology_dimensions, base=cloud.base
    )

    def score(population: BoolArray) -> FloatArray:
        # The fitness keeps the origin in every subset.
        return fitness(np.pad(population, ((0, 0), (0, len(cloud.points) - cloud.size))))

    initial = cover[None] if search.greedy_start else None
    run = SubsetGeneticAlgorithm(cloud.size, keep, score, search, seed=seed, initial=initial)
    run.run()
    return run.best_individual()[1], run.trace, run.is_flat


class TopologicalPruner(StructuredPruner):
    """Prune the filters and neurons whose removal changes the shape of a layer's point cloud least.

    Parameters
    ----------
    model, evaluator, existed_wrappers, calibration, budget, example_inputs, round_to, seed, progress
        As for :class:`~nni_topo.StructuredPruner`.
    config_list : list of dict
        NNI's config_list; all its keys keep their meaning. The members of a ``dependency_group_id`` are one joint
        cloud, features side by side. ``sparse_threshold`` is a tolerance: blocks are pruned as long as half the longest
        H0 death time that the cloud loses stays below it, in units of the layer's mean death time; one block is kept.
    cloud : str, PointCloud, mapping or DataCollector, default="auto"
        :class:`~nni_topo.PointCloud`, its fields, or its kind alone: ``"weight"`` or ``"functional"``. ``"auto"`` is
        ``"functional"`` if ``calibration`` is given, else ``"weight"``, with a warning if there is an evaluator whose
        data could be used.
    criterion : {"auto", "hausdorff", "cover", "bottleneck", "bottleneck_sum", "wasserstein"}, default="auto"
        What is minimised: the largest or the mean distance from a pruned to the nearest kept point, or a distance
        between the persistence diagrams of the kept and the whole cloud; for several degrees ``"bottleneck"`` takes the
        largest distance, the other two add them up. ``"auto"`` is ``"hausdorff"``.
    homology_dimensions : sequence of int, default=(0,)
        Degrees whose diagrams are compared by ``"bottleneck"``, ``"bottleneck_sum"`` and ``"wasserstein"``.
    solver : {"auto", "greedy", "genetic"}, GeneticSearch or mapping, default="auto"
        The greedy solution, farthest points first, or a genetic algorithm with the settings of a
        :class:`~nni_topo.GeneticSearch`. ``"auto"`` is ``"greedy"`` for ``"hausdorff"`` and ``"cover"``, where a search
        gained nothing measurable, and ``"genetic"`` for distances of diagrams.
    n_jobs : int or None, default=1
        Layers searched at a time, as joblib's ``n_jobs``; ``joblib.parallel_config`` picks another backend, such as
        Dask's. The result doesn't depend on it.

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
    >>> pruner = TopologicalPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.75}])
    >>> _, masks = pruner.compress()
    >>> int(masks["0"]["bias"].sum())
    8
    """

    allocations = ("uniform", "topological")
    calculator: TopologicalMetric

    @pruner_arguments(
        cloud=one_of(CLOUDS) | settings(PointCloud) | instance(DataCollector),
        criterion=one_of(("auto", *topology.CRITERIA)),
        homology_dimensions=_DIMENSIONS,
        solver=_SOLVER | settings(GeneticSearch),
        n_jobs=_JOBS,
    )
    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        cloud: str | PointCloud | Mapping[str, Any] | DataCollector = "auto",
        calibration: Iterable[Any] | None = None,
        criterion: str = "auto",
        homology_dimensions: Sequence[int] = (0,),
        solver: str | GeneticSearch | Mapping[str, Any] = "auto",
        budget: Budget | Mapping[str, Any] | None = None,
        example_inputs: Any = None,
        round_to: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
        n_jobs: int | None = 1,
    ) -> None:
        self.homology_dimensions = tuple(homology_dimensions)
        named = PointCloud(cloud) if isinstance(cloud, (str, DataCollector)) else cloud
        points = as_settings(PointCloud, named, "cloud")
        if calibration is None and points.kind == "functional":
            calibration = evaluator
        self.calibration = pruner_batches(calibration, model)
        if points.kind == "auto" and self.calibration is None and evaluator is not None:
            _logger.warning(
                "channels are selected by the weights alone, because there are no calibration data: "
                "calibration=evaluator uses the evaluator's data; cloud='weight' uses the weights without this warning"
            )
        if criterion == "auto":
            criterion = "hausdorff"
        if not isinstance(solver, str):
            search = as_settings(GeneticSearch, solver, "solver")
        elif solver == "greedy" or (solver == "auto" and criterion in ("hausdorff", "cover")):
            search = None
        else:
            search = GeneticSearch()
        metric = TopologicalMetric(
            criterion=criterion,
            homology_dimensions=self.homology_dimensions,
            search=search,
            preprocess=points.preprocess,
            origin=points.origin,
            seed=seed,
            progress=progress,
            n_jobs=n_jobs,
        )
        collector = points.collector(self.calibration)
        super().__init__(model, config_list, evaluator, existed_wrappers, collector=collector, calculator=metric)

    @classmethod
    @pruner_arguments(homology_dimensions=_DIMENSIONS, search=settings(GeneticSearch) | NONE, n_jobs=_JOBS)
    def perera2022(
        cls,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        combine: Literal["max", "sum"] = "sum",
        homology_dimensions: Sequence[int] = (0, 1),
        preprocess: Preprocess = "none",
        search: GeneticSearch | Mapping[str, Any] | None = None,
        calibration: Iterable[Any] | None = None,
        budget: Budget | Mapping[str, Any] | None = None,
        example_inputs: Any = None,
        round_to: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
        n_jobs: int | None = 1,
    ) -> TopologicalPruner:
        """Return our reconstruction of a thesis's pruner from its abstract and lists; the rest isn't public.

        The cloud is made of the weights, without the origin; the criterion is the sum of the bottleneck distances in H0
        and H1, minimised by a genetic algorithm that starts from random individuals.

        Parameters
        ----------
        model, config_list, evaluator, existed_wrappers, budget, example_inputs, round_to, seed, progress, n_jobs
            As for the class.
        calibration : iterable or None, default=None
            The first batch is used for a ``budget`` without ``example_inputs``.
        combine : {"max", "sum"}, default="sum"
            Whether the degrees' distances are added, or the largest counts. At a fixed ratio the largest is H0's: it is
            the same for nearly all subsets, so that the search can't tell them apart (a warning says so).
        homology_dimensions : sequence of int, default=(0, 1)
            Degrees whose diagrams are compared.
        preprocess : {"none", "center", "standardize", "unit"}, default="none"
            Applied to the weights, see :class:`~nni_topo.PointCloud`.
        search : GeneticSearch, mapping or None, default=None
            None: ``GeneticSearch(greedy_start=False)``; a mapping has ``greedy_start=False`` unless it sets it.
        """
        if not isinstance(search, GeneticSearch):
            search = {"greedy_start": False, **(search or {})}
        return cls(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            cloud=PointCloud("weight", preprocess=preprocess, origin=False),
            calibration=calibration,
            criterion="bottleneck" if combine == "max" else "bottleneck_sum",
            homology_dimensions=homology_dimensions,
            solver=search,
            budget=budget,
            example_inputs=example_inputs,
            round_to=round_to,
            seed=seed,
            progress=progress,
            n_jobs=n_jobs,
        )

    @property
    def trace(self) -> dict[str, list[Generation]]:
        """Best and mean fitness per generation of the latest search, per layer or group."""
        return self.calculator.trace
