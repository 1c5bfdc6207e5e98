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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.errors import ConfigError, unknown_name
from nni_topo.maths.search.subsets import EvolutionSettings, Generation
from nni_topo.network.inputs import checked_calibration
from nni_topo.network.latency import LatencyTable
from nni_topo.pruners.allocators import ConfigAllocator
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.budget import Allocation, BudgetAllocator
from nni_topo.pruners.clouds import make_collector
from nni_topo.pruners.clouds.weight import Preprocess
from nni_topo.pruners.hooks import DataCollector
from nni_topo.pruners.reconstruction.problems import ReconstructionProblems
from nni_topo.pruners.reconstruction.sequential import SequentialProblems
from nni_topo.pruners.topological.metric import RECONSTRUCTION, SelectionSettings, TopologicalMetric
from nni_topo.recovery.compensation import Method

_PRESETS: dict[str, dict[str, Any]] = {
    "perera2022": {
        "collector": "weight",
        "criterion": "bottleneck",
        "homology_dimensions": (0, 1),
        "solver": "genetic",
    }
}


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
    calibration : iterable or None, default=None
        Batches of inputs, or of ``(inputs, targets)``, which the gradient cloud needs and all others ignore the targets
        of. A list or DataLoader, not a generator.
    preprocess : {"none", "center", "standardize", "unit"}, default="none"
        Applied to each member's cloud before a group's are joined.
    criterion : {"auto", "hausdorff", "cover", "bottleneck", "wasserstein", "reconstruction"}, default="auto"
        What the search minimises: the largest or the mean distance from a pruned to the nearest kept point, the
        distance between the persistence diagrams of the kept and the whole cloud, or the share of the next layers'
        outputs that no choice of their weights could bring back (needs ``calibration``). ``"auto"`` is
        ``"reconstruction"`` if ``calibration`` is given and the collector is left to the pruner, else ``"hausdorff"``.
    homology_dimensions : sequence of int, default=(0,)
        Degrees whose diagrams are compared by ``"bottleneck"`` (their maximum) and ``"wasserstein"`` (their sum).
    solver : {"auto", "genetic", "greedy"}, default="auto"
        Genetic algorithm, started from the greedy solution, or the greedy solution itself: farthest points first; for
        ``"reconstruction"`` forward selection. ``"auto"`` is greedy for ``"reconstruction"``, where evolving on costs
        minutes and gained nothing measurable, and genetic for the others.
    order : {"parallel", "sequential"}, default="parallel"
        Whether all layers are looked at in the network as it is, or each one in the network as pruned so far, the
        layers before it reconstructed. ``"sequential"`` goes with criterion ``"reconstruction"``.
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
        one thread with the batch of ``example_inputs``; then ``pruner.allocator.latency_table`` holds it.
    example_inputs : Any, default=None
        Inputs of the model, which a ``target`` and the folded and coupled clouds need; for a target the first
        ``calibration`` batch serves as well.
    patience : int or None, default=None
        Generations without improvement after which the search ends. None: never.
    engine : {"exact", "gudhi"}, default="exact"
        Closed forms on a cached distance matrix, or a simplex tree per individual: the slow reference.
    preset : {None, "perera2022"}, default=None
        ``"perera2022"`` is the thesis' setting: weight cloud without the origin, bottleneck distance in H0 and H1,
        genetic algorithm from random individuals. It fixes ``collector``, ``criterion``, ``homology_dimensions`` and
        ``solver``.
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
        criterion: str = "auto",
        homology_dimensions: Sequence[int] = (0,),
        solver: Literal["auto", "genetic", "greedy"] = "auto",
        order: Literal["parallel", "sequential"] = "parallel",
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
        preset: Literal["perera2022"] | None = None,
        compensate: Method | None = None,
        round_to: int | None = None,
        seed: int = 0,
        progress: bool = False,
        n_jobs: int | None = 1,
    ) -> None:
        calibration = checked_calibration(calibration)
        choice: dict[str, Any] = {
            "collector": collector,
            "criterion": criterion,
            "homology_dimensions": tuple(homology_dimensions),
            "solver": solver,
        }
        choice = _chosen(choice, calibration, order) if preset is None else _preset(preset, choice)
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
        self.needs_rule = target is None
        allocator = _allocator(config_list, target, allocation, latency_table, example_inputs, calibration)
        problems = _problems(settings.criterion, order, calibration, seed)
        self._metric = TopologicalMetric(
            settings, allocator, seed=seed, progress=progress, n_jobs=n_jobs, problems=problems
        )
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            collector=make_collector(
                choice["collector"],
                calibration=calibration,
                example_inputs=example_inputs,
                evaluator=evaluator,
                preprocess=preprocess,
            ),
            calculator=self._metric,
            allocator=allocator,
            compensate=compensate,
            calibration=calibration,
            round_to=round_to,
        )
        if target is not None:
            self._activate_targets()

    def _check_layers(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        if self._metric.problems is None:
            super()._check_layers(model, modules)
        else:
            self._metric.problems.check(model, modules)

    @property
    def trace(self) -> dict[str, list[Generation]]:
        """Best and mean fitness per generation of the latest search, per layer or group."""
        return self._metric.trace


def _allocator(
    config_list: list[dict[str, Any]],
    target: Mapping[str, float] | None,
    allocation: Allocation,
    latency_table: LatencyTable | str | Path | None,
    example_inputs: Any,
    calibration: Iterable[Any] | None,
) -> ConfigAllocator:
    if target is None:
        if latency_table is not None:
            raise ConfigError("a latency table needs a target of 'latency', got no target (latency_table)")
        return ConfigAllocator(on_empty="keep", exact=True)
    for index, config in enumerate(config_list):
        settings = [config, *config.get("target_settings", {}).values()]
        for key in ("sparse_ratio", "sparse_threshold", "global_group_id"):
            if any(setting.get(key) is not None for setting in settings):
                raise ConfigError(f"a target replaces {key}, got both (config_list[{index}])")
    if example_inputs is None and calibration is not None:
        example_inputs = next((b[0] if isinstance(b, (tuple, list)) else b for b in calibration), None)
    if example_inputs is None:
        raise ConfigError("a target needs example_inputs or calibration data, got neither (target)")
    return BudgetAllocator(target, example_inputs, allocation=allocation, latency_table=latency_table)


def _problems(
    criterion: str, order: str, calibration: Iterable[Any] | None, seed: int
) -> ReconstructionProblems | None:
    """Return what criterion "reconstruction" is measured by; None for the others."""
    if order not in ("parallel", "sequential"):
        raise unknown_name("order", str(order), ("parallel", "sequential"))
    if criterion != RECONSTRUCTION:
        if order == "sequential":
            raise ConfigError(f"order 'sequential' needs criterion 'reconstruction', got {criterion!r} (order)")
        return None
    if calibration is None:
        raise ConfigError("criterion 'reconstruction' needs calibration data, got none (calibration)")
    kind = ReconstructionProblems if order == "parallel" else SequentialProblems
    return kind(calibration, seed=seed)


def _chosen(choice: dict[str, Any], calibration: Iterable[Any] | None, order: str) -> dict[str, Any]:
    """Return a choice in which ``"auto"`` is decided."""
    criterion, solver = choice["criterion"], choice["solver"]
    if criterion == "auto":
        informed = calibration is not None and choice["collector"] == "auto"
        criterion = RECONSTRUCTION if informed or order == "sequential" else "hausdorff"
    if solver == "auto":
        solver = "greedy" if criterion == RECONSTRUCTION else "genetic"
    return {**choice, "criterion": criterion, "solver": solver}


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
