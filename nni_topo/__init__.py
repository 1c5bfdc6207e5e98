"""Pruners for NNI that look at the shape of a layer. Importing the package makes NNI run on the installed PyTorch."""

from nni_topo import compat as compat

compat.enable()

from nni_topo import analysis, errors, hooks, signals, topology, zoo  # noqa: E402
from nni_topo._version import __version__  # noqa: E402
from nni_topo.pruners.base import StructuredPruner  # noqa: E402
from nni_topo.pruners.cluster import ClusterPruner  # noqa: E402
from nni_topo.pruners.energy import EnergyFilterPruner  # noqa: E402
from nni_topo.pruners.genetic_weight import GeneticWeightPruner  # noqa: E402
from nni_topo.pruners.matrix import MatrixPruner  # noqa: E402
from nni_topo.pruners.random import RandomPruner  # noqa: E402
from nni_topo.pruners.subcluster import SubclusterPruner  # noqa: E402
from nni_topo.pruners.topological import TopologicalPruner  # noqa: E402
from nni_topo.pruners.topological_magnitude import TopologicalMagnitudePruner  # noqa: E402
from nni_topo.recovery import compensate, recalibrate_batch_norm  # noqa: E402
from nni_topo.registry import (  # noqa: E402
    PrunerInfo,
    create_pruner,
    expose_in_nni,
    list_pruners,
    pruner_info,
    register_pruner,
)
from nni_topo.serialization import load, save  # noqa: E402
from nni_topo.speedup import dependency_groups, masked_model, to_dense, zeros_held  # noqa: E402

expose_in_nni()

__all__ = [
    "ClusterPruner",
    "EnergyFilterPruner",
    "GeneticWeightPruner",
    "MatrixPruner",
    "PrunerInfo",
    "RandomPruner",
    "StructuredPruner",
    "SubclusterPruner",
    "TopologicalMagnitudePruner",
    "TopologicalPruner",
    "__version__",
    "analysis",
    "compat",
    "compensate",
    "create_pruner",
    "dependency_groups",
    "errors",
    "hooks",
    "list_pruners",
    "load",
    "masked_model",
    "pruner_info",
    "recalibrate_batch_norm",
    "register_pruner",
    "save",
    "signals",
    "to_dense",
    "topology",
    "zeros_held",
    "zoo",
]
