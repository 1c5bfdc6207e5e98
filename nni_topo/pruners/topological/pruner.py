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

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.maths.search.subsets import EvolutionSettings, Generation
from nni_topo.maths.topology.fitness import Combination
from nni_topo.network.inputs import checked_calibration
from nni_topo.network.latency import LatencyTable
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.budget import Allocation, make_planner
from nni_topo.pruners.clouds import make_collector
from nni_topo.pruners.clouds.weight import Preprocess
from nni_topo.pruners.hooks import DataCollector
from nni_topo.pruners.topological.metric import SelectionSettings, TopologicalMetric
from nni_topo.recovery.compensation import Method


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
        Needed for scheduled pruning; serves the activation and gradient clouds where there is no ``calibration``.
    existed_wrappers : dict or None, default=None
        Used by ``from_compressor``.
    collector : {"auto", "weight", "folded", "coupled", "activation", "functional", "gradient"} or DataCollector
        The cloud: the filters' weights; the same with bias and batch norm folded in, or scaled by batch norm and by
        the weights that read them (both need ``example_inputs``); the filters' outputs over the calibration data; what
        these outputs do in the layers that read them; or what removing a filter does to each labelled sample's loss.
        Default ``"auto"``: ``"functional"`` if ``calibration`` is given, else ``"weight"``.
    origin : bool, default=True
        Whether the origin, to which a pruned filter falls, belongs to the cloud.
    calibration : iterable or None, default=None
        Batches of inputs, or of ``(inputs, targets)``, which the gradient cloud needs and all others ignore the targets
        of. A list or DataLoader, not a generator.
    preprocess : {"none", "center", "standardize", "unit"}, default="none"
        Applied to each member's cloud before a group's are joined.
    criterion : {"auto", "hausdorff", "cover", "bottleneck", "wasserstein"}, default="auto"
        What the search minimises: the largest or the mean distance from a pruned to the nearest kept point, or the
        distance between the persistence diagrams of the kept and the whole cloud. ``"auto"`` is ``"hausdorff"``.
    homology_dimensions : sequence of int, default=(0,)
        Degrees whose diagrams are compared by ``"bottleneck"`` and ``"wasserstein"``.
    combine : {"max", "sum"}, default="max"
        Whether ``"bottleneck"`` takes the largest of the degrees' distances or adds them; ``"wasserstein"`` adds.
    solver : {"auto", "genetic", "greedy"}, default="auto"
        Genetic algorithm, or the greedy solution: farthest points first. ``"auto"`` is ``"greedy"`` for covers, where
        the search gained nothing measurable, and ``"genetic"`` for distances of diagrams.
    greedy_start : bool, default=True
        Whether the genetic algorithm's first generation holds the greedy solution.
    population_size : int, default=50
        Individuals per generation, at least 2.
    generations : int, default=20
        Most generations, at least 1.
    mutation_probability, crossover_probability : float, default=0.2 and 0.8
        In [0, 1].
    elitism : bool, default=True
        Whether the best individual goes on unchanged.
    target : mapping or None, default=None
        A budget for the whole network instead of ratios: ``{"flops": 0.25}``, ``{"params": 0.5}`` or ``{"latency":
        0.5}``, the share to be left. The config_list then says where only; its ``min_sparse_ratio`` and
        ``max_sparse_ratio`` hold. Scheduled pruners don't schedule it.
    allocation : {"uniform", "topological"}, default="uniform"
        How the budget is dealt out: the same share of every layer, or one tolerance on death times over the network.
    latency_table : LatencyTable, str, Path or None, default=None
        Seconds of the layers over their widths, or a JSON file of them, for a latency target. None: measured once, on
        one thread with the batch of ``example_inputs``; then ``pruner.planner.latency_table`` holds it.
    example_inputs : Any, default=None
        Inputs of the model, which a ``target`` and the folded and coupled clouds need; for a target the first
        ``calibration`` batch serves as well.
    patience : int or None, default=None
        Generations without improvement after which the search ends. None: never.
    engine : {"exact", "gudhi"}, default="exact"
        Closed forms on a cached distance matrix, or a simplex tree per individual: the slow reference.
    compensate : {None, "reconstruct", "channel", "pair"}, default=None
        Let ``compress()`` also change the weights that stay, so that they make up for those that go, as
        :func:`nni_topo.compensate` does with this method; needs ``calibration``.
    round_to : int or None, default=None
        Every layer keeps a multiple of so many channels, or all; more than asked for stay.
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
    nni_topo.ReconstructionPruner : chooses by least squares in the layers behind.
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
    >>> pruner = TopologicalPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.75}])
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
        origin: bool = True,
        calibration: Iterable[Any] | None = None,
        preprocess: Preprocess = "none",
        criterion: str = "auto",
        homology_dimensions: Sequence[int] = (0,),
        combine: Combination = "max",
        solver: Literal["auto", "genetic", "greedy"] = "auto",
        greedy_start: bool = True,
        population_size: int = 50,
        generations: int = 20,
        mutation_probability: float = 0.2,
        crossover_probability: float = 0.8,
        elitism: bool = True,
        patience: int | None = None,
        target: Mapping[str, float] | None = None,
        allocation: Allocation = "uniform",
        latency_table: LatencyTable | str | Path | None = None,
        example_inputs: Any = None,
        engine: Literal["exact", "gudhi"] = "exact",
        compensate: Method | None = None,
        round_to: int | None = None,
        seed: int = 0,
        progress: bool = False,
        n_jobs: int | None = 1,
    ) -> None:
        calibration = checked_calibration(calibration)
        criterion = "hausdorff" if criterion == "auto" else criterion
        if solver == "auto":
            solver = "greedy" if criterion in ("hausdorff", "cover") else "genetic"
        settings = SelectionSettings(
            criterion=criterion,
            homology_dimensions=tuple(homology_dimensions),
            solver=solver,
            engine=engine,
            combine=combine,
            evolution=EvolutionSettings(
                population_size=population_size,
                generations=generations,
                crossover_probability=crossover_probability,
                mutation_probability=mutation_probability,
                elitism=elitism,
                patience=patience,
            ),
            greedy_start=greedy_start,
        )
        self.seed = seed
        self.target = target
        self.needs_rule = target is None
        planner = make_planner(config_list, target, allocation, latency_table, example_inputs, calibration)
        self._metric = TopologicalMetric(settings=settings, origin=origin, seed=seed, progress=progress, n_jobs=n_jobs)
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            collector=make_collector(
                collector,
                calibration=calibration,
                example_inputs=example_inputs,
                evaluator=evaluator,
                preprocess=preprocess,
            ),
            calculator=self._metric,
            planner=planner,
            compensate=compensate,
            calibration=calibration,
            round_to=round_to,
        )
        if target is not None:
            self._activate_targets()

    @classmethod
    def perera2022(
        cls,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        combine: Combination = "max",
        homology_dimensions: Sequence[int] = (0, 1),
        preprocess: Preprocess = "none",
        population_size: int = 50,
        generations: int = 20,
        mutation_probability: float = 0.2,
        crossover_probability: float = 0.8,
        elitism: bool = True,
        patience: int | None = None,
        calibration: Iterable[Any] | None = None,
        target: Mapping[str, float] | None = None,
        allocation: Allocation = "uniform",
        latency_table: LatencyTable | str | Path | None = None,
        example_inputs: Any = None,
        engine: Literal["exact", "gudhi"] = "exact",
        compensate: Method | None = None,
        round_to: int | None = None,
        seed: int = 0,
        progress: bool = False,
        n_jobs: int | None = 1,
    ) -> TopologicalPruner:
        """Return a pruner in the thesis' setting.

        The cloud is that of the weights, without the origin; the criterion is the bottleneck distance of the diagrams
        in H0 and H1, minimised by a genetic algorithm that starts from random individuals.

        Parameters
        ----------
        model, config_list, evaluator, existed_wrappers
            As for the class.
        combine : {"max", "sum"}, default="max"
            Whether the degrees' distances are compared or added.
        homology_dimensions : sequence of int, default=(0, 1)
            Degrees whose diagrams are compared.
        calibration : iterable or None, default=None
            Batches for ``compensate``, and for a ``target`` without ``example_inputs``.
        preprocess, population_size, generations, mutation_probability, crossover_probability, elitism, patience, \
        target, allocation, latency_table, example_inputs, engine, compensate, round_to, seed, progress, n_jobs
            As for the class.

        Returns
        -------
        TopologicalPruner

        Raises
        ------
        ConfigError, DataError
            If a knob or the request is bad, before the model is wrapped.
        """
        return cls(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            collector="weight",
            origin=False,
            preprocess=preprocess,
            criterion="bottleneck",
            homology_dimensions=homology_dimensions,
            combine=combine,
            solver="genetic",
            greedy_start=False,
            population_size=population_size,
            generations=generations,
            mutation_probability=mutation_probability,
            crossover_probability=crossover_probability,
            elitism=elitism,
            patience=patience,
            calibration=calibration,
            target=target,
            allocation=allocation,
            latency_table=latency_table,
            example_inputs=example_inputs,
            engine=engine,
            compensate=compensate,
            round_to=round_to,
            seed=seed,
            progress=progress,
            n_jobs=n_jobs,
        )

    @property
    def trace(self) -> dict[str, list[Generation]]:
        """Best and mean fitness per generation of the latest search, per layer or group."""
        return self._metric.trace
