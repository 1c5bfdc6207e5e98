"""Pruners by name: the package's own and NNI's, in one table."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import nni.compression.pruning.tools
from nni.compression.base.compressor import Pruner
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.compat.wrapping import agreeing
from nni_topo.errors import ConfigError, unknown_name
from nni_topo.network.runtime.arguments import CONFIG_LIST, MODEL
from nni_topo.pruners.allocators import with_ties
from nni_topo.pruners.checks import check_request, of_single_weights
from nni_topo.pruners.heads import show_heads_to_nni
from nni_topo.pruners.hooks import DataCollector, MetricCalculator, SparsityAllocator
from nni_topo.registry import ClassInfo, Registry
from nni_topo.rules import check_knobs, checked, instance, is_class, rule_of

_NNI_ARGUMENTS = ("model", "config_list", "evaluator", "existed_wrappers")


@dataclass(frozen=True)
class PrunerInfo(ClassInfo[Pruner]):
    """A pruner in the table.

    Parameters
    ----------
    name : str
        Name to create it by.
    path : str
        ``"package.module:Class"``, or ``"package.module:Class.method"`` for a class method that takes a pruner's
        arguments; imported when needed.
    summary : str
        What it keeps, in one line.
    structured : bool, default=True
        Whether it removes whole filters and neurons at the default granularity.
    needs : tuple of str, default=()
        Knobs without which it can't work, e.g. ``"calibration or evaluator"``.
    """

    kind: ClassVar[str] = "pruner"
    base: ClassVar[type] = Pruner
    structured: bool = True
    needs: tuple[str, ...] = ()

    def knobs(self) -> tuple[str, ...]:
        """Return the names of the arguments beyond NNI's own four."""
        return tuple(name for name in super().knobs() if name not in (*_NNI_ARGUMENTS, "args", "kwargs"))

    def allocations(self) -> tuple[str, ...]:
        """Return the budget allocations that it supports; empty if it takes no budget."""
        kind = self.load()
        if "budget" not in self.knobs():
            return ()
        owner = getattr(kind, "__self__", kind)  # of a class method
        return getattr(owner, "allocations", ("uniform",))


PRUNERS = Registry(PrunerInfo, "nni_topo.pruners")


@checked()
def register_pruner(info: PrunerInfo) -> None:
    """Add a pruner to the table, for example a third party's; ConfigError if the name is taken by another class."""
    PRUNERS.register(info)


@checked()
def list_pruners(pattern: str = "*") -> list[str]:
    """Return the names of all registered pruners that match a shell pattern, sorted.

    Examples
    --------
    >>> list_pruners("l?")
    ['l1', 'l2']
    """
    return PRUNERS.names(pattern)


def pruner_info(name: str) -> PrunerInfo:
    """Return a pruner's record, by its name, or by ``package.module:Class`` for a third party's class."""
    return PRUNERS.info(name, "pruner_info")


def check_pruner_knobs(name: str, knobs: Iterable[str], place: str) -> None:
    """Raise ConfigError for an unknown pruner or knob, with the nearest names, and for a wrong value of a knob."""
    info = PRUNERS.info(name, place)
    allowed = info.knobs()
    (instance(Mapping) | rule_of(Iterable[str])).check("knobs", knobs, f"pruner {name!r}")
    for knob in map(str, knobs):
        if knob not in allowed:
            raise unknown_name(f"knob of pruner {name!r}", knob, allowed, place)
    if isinstance(knobs, Mapping):
        kind: Any = info.load()  # a class, or a class method that makes a pruner
        rules: Any = getattr(kind, "rules", None) or getattr(kind.__init__, "rules", dict)
        check_knobs(place, knobs, rules())


def needs_rule(name: str, knobs: Mapping[str, Any]) -> bool:
    """Say whether a pruner with these knobs needs ratios or thresholds in the config_list, as most do."""
    return getattr(pruner_info(name).load(), "needs_rule", True) and knobs.get("budget") is None


@checked(model=MODEL, config_list=CONFIG_LIST)
def create_pruner(
    name: str,
    model: nn.Module,
    config_list: list[dict[str, Any]],
    evaluator: Evaluator | None = None,
    **knobs: Any,
) -> Pruner:
    """Create a pruner by name; NNI wraps the model.

    Parameters
    ----------
    name : str
        See :func:`list_pruners`.
    model : torch.nn.Module
        Model to prune.
    config_list : list of dict
        NNI's config_list.
    evaluator : nni.compression.utils.Evaluator or None, default=None
        For pruners and schedules that train or evaluate.
    **knobs
        The pruner's own arguments.

    Returns
    -------
    nni.compression.base.compressor.Pruner
        The pruner.

    Raises
    ------
    ConfigError
        If the name or a knob is unknown, a needed knob is missing, or the request is invalid.
    """
    check_pruner_knobs(name, knobs, "create_pruner")
    info = pruner_info(name)
    arguments = {**knobs, "evaluator": evaluator}
    missing = [need for need in info.needs if all(arguments.get(knob) is None for knob in need.split(" or "))]
    if missing:
        raise ConfigError(f"pruner {name!r} needs {', '.join(missing)}, got none (create_pruner)")
    check_request(model, config_list, needs_rule=needs_rule(name, knobs))
    if not info.structured:
        config_list = of_single_weights(config_list)
    if evaluator is not None:
        knobs["evaluator"] = evaluator
    return info.load()(model, config_list, **knobs)


def expose_in_nni() -> None:
    """Make the package's classes attributes of NNI's modules, where NNI's users look for them; NNI has no registry.

    It also silences the schedulers' warning that these pruners weren't tested with them. All pruners, NNI's too, can
    then prune attention heads, prune transposed convolutions by output channels, and remove the same channels where
    layers share some of them.
    """
    pruners = [info.load() for info in PRUNERS.table.values() if info.origin == "nni_topo"]
    classes = [pruner for pruner in pruners if isinstance(pruner, type)]
    for cls in classes:
        setattr(nni.compression.pruning, cls.__name__, cls)
    hooks = importlib.import_module(_OWN)
    for name in hooks.__all__:
        part = getattr(hooks, name)
        if is_class(part) and issubclass(part, (DataCollector, MetricCalculator, SparsityAllocator)):
            setattr(nni.compression.pruning.tools, name, part)
    show_heads_to_nni()
    if with_ties not in agreeing:
        agreeing.append(with_ties)
    untested = {f"Compatibility not tested with pruner type {cls.__name__}." for cls in classes}
    logger = logging.getLogger(f"{_NNI}.scheduled_pruner")
    logger.addFilter(lambda record: record.getMessage() not in untested)


_OWN = "nni_topo.pruners"
_NNI = "nni.compression.pruning"
PRUNERS.register(
    PrunerInfo("topological", f"{_OWN}.topological:TopologicalPruner", "filters that cover the layer's point cloud"),
    PrunerInfo(
        "perera2022",
        f"{_OWN}.topological:TopologicalPruner.perera2022",
        "filters whose persistence diagrams are near the layer's: our reconstruction from a thesis' abstract and lists",
    ),
    PrunerInfo(
        "reconstruction",
        f"{_OWN}.reconstruction:ReconstructionPruner",
        "filters from which the next layers can best be solved anew",
        needs=("calibration or evaluator",),
    ),
    PrunerInfo("energy", f"{_OWN}.energy:EnergyFilterPruner", "filters that let most of a chirp through"),
    PrunerInfo(
        "cluster",
        f"{_OWN}.cluster:ClusterPruner",
        "one filter of each cluster of features",
        needs=("calibration or evaluator",),
    ),
    PrunerInfo(
        "subcluster",
        f"{_OWN}.subcluster:SubclusterPruner",
        "one filter of each cluster of features, split while it varies; finds the number itself",
        needs=("calibration or evaluator",),
    ),
    PrunerInfo(
        "topological_magnitude",
        f"{_OWN}.topological_magnitude:TopologicalMagnitudePruner",
        "weights of each layer's maximum spanning tree, then those with the largest magnitude",
        structured=False,
    ),
    PrunerInfo(
        "genetic_weight",
        f"{_OWN}.genetic_weight:GeneticWeightPruner",
        "weights that a genetic search can't do without; finds the number itself",
        structured=False,
        needs=("validation or evaluate or evaluator",),
    ),
    PrunerInfo("matrix", f"{_OWN}.matrix:MatrixPruner", "rows and columns of weight matrices with the largest norm"),
    PrunerInfo("random", f"{_OWN}.random:RandomPruner", "random filters (baseline)"),
    PrunerInfo("l1", f"{_NNI}:L1NormPruner", "filters with the largest L1 norm"),
    PrunerInfo("l2", f"{_NNI}:L2NormPruner", "filters with the largest L2 norm"),
    PrunerInfo("fpgm", f"{_NNI}:FPGMPruner", "filters far from the geometric median"),
    PrunerInfo("level", f"{_NNI}:LevelPruner", "weights with the largest magnitude", structured=False),
    PrunerInfo(
        "taylor",
        f"{_NNI}:TaylorPruner",
        "filters with the largest first-order effect on the loss",
        needs=("evaluator", "training_steps"),
    ),
    PrunerInfo(
        "slim",
        f"{_NNI}:SlimPruner",
        "channels with the largest batch-norm scale after sparse training",
        needs=("evaluator", "training_steps"),
    ),
)
