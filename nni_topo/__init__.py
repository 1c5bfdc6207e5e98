"""Structured and topological pruners for NNI. Importing the package patches NNI to run on the installed PyTorch."""

import importlib
import sys
from typing import Any

from nni_topo import compat as compat

compat.enable()

from nni_topo import errors, network, pruners  # noqa: E402
from nni_topo._version import __version__  # noqa: E402
from nni_topo.maths import clustering, signals, topology  # noqa: E402
from nni_topo.maths.clustering.subclustering import Growth  # noqa: E402
from nni_topo.maths.search.subsets import GeneticSearch  # noqa: E402
from nni_topo.maths.search.weights import WeightSearch  # noqa: E402
from nni_topo.maths.signals import Chirp  # noqa: E402
from nni_topo.network import (  # noqa: E402
    DependencyGroups,
    as_torch_layers,
    dependency_groups,
    explain,
    export,
    from_file,
    load,
    masked_model,
    register_module,
    register_operator,
    register_width_attribute,
    save,
    save_pretrained,
    trim_vocabulary,
    zeros_held,
)
from nni_topo.network.runtime.calibration import Calibration  # noqa: E402
from nni_topo.pruners import testing  # noqa: E402
from nni_topo.pruners.base import StructuredPruner  # noqa: E402
from nni_topo.pruners.budget import Budget  # noqa: E402
from nni_topo.pruners.clouds import PointCloud  # noqa: E402
from nni_topo.pruners.cluster import ClusterPruner  # noqa: E402
from nni_topo.pruners.energy import EnergyFilterPruner  # noqa: E402
from nni_topo.pruners.genetic_weight import GeneticWeightPruner  # noqa: E402
from nni_topo.pruners.matrix import MatrixPruner  # noqa: E402
from nni_topo.pruners.random import RandomPruner  # noqa: E402
from nni_topo.pruners.reconstruction import ReconstructionPruner  # noqa: E402
from nni_topo.pruners.registry import (  # noqa: E402
    PRUNERS,
    PrunerInfo,
    create_pruner,
    expose_in_nni,
    list_pruners,
    pruner_info,
    register_pruner,
)
from nni_topo.pruners.subcluster import SubclusterPruner  # noqa: E402
from nni_topo.pruners.topological import TopologicalPruner  # noqa: E402
from nni_topo.pruners.topological_magnitude import TopologicalMagnitudePruner  # noqa: E402
from nni_topo.recovery import (  # noqa: E402
    RecoveryInfo,
    RecoveryMethod,
    compensate,
    compensation,
    distill,
    distillation,
    list_recoveries,
    recalibrate_batch_norm,
    recovery_info,
    register_recovery,
    remove_blocks,
    synthetic_images,
    to_dense,
)
from nni_topo.recovery.registry import RECOVERIES  # noqa: E402

for _table in (PRUNERS, RECOVERIES):
    _table.register_entry_points()
expose_in_nni()

hooks = pruners
speedup = network
# Short module names, so that `from nni_topo.topology import ...` works too.
for _name in ("clustering", "hooks", "signals", "speedup", "testing", "topology"):
    sys.modules[f"{__name__}.{_name}"] = globals()[_name]

_PIPELINE = {"frontier": "frontier", "shrink": "shrink", "shrink_pretrained": "streaming"}  # function: its module
_LAZY = ("analysis", "studies", "zoo")  # they import matplotlib, pandas and torchvision, which pruning doesn't need


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _PIPELINE:
        return getattr(importlib.import_module(f"{__name__}.runs.{_PIPELINE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_PIPELINE})


__all__ = [
    "Budget",
    "Calibration",
    "Chirp",
    "ClusterPruner",
    "DependencyGroups",
    "EnergyFilterPruner",
    "GeneticSearch",
    "GeneticWeightPruner",
    "Growth",
    "MatrixPruner",
    "PointCloud",
    "PrunerInfo",
    "RandomPruner",
    "ReconstructionPruner",
    "RecoveryInfo",
    "RecoveryMethod",
    "StructuredPruner",
    "SubclusterPruner",
    "TopologicalMagnitudePruner",
    "TopologicalPruner",
    "WeightSearch",
    "__version__",
    "analysis",
    "as_torch_layers",
    "clustering",
    "compat",
    "compensate",
    "compensation",
    "create_pruner",
    "dependency_groups",
    "distill",
    "distillation",
    "errors",
    "explain",
    "export",
    "from_file",
    "frontier",
    "hooks",
    "list_pruners",
    "list_recoveries",
    "load",
    "masked_model",
    "pruner_info",
    "recalibrate_batch_norm",
    "recovery_info",
    "register_module",
    "register_operator",
    "register_pruner",
    "register_recovery",
    "register_width_attribute",
    "remove_blocks",
    "save",
    "save_pretrained",
    "shrink",
    "shrink_pretrained",
    "signals",
    "speedup",
    "studies",
    "synthetic_images",
    "testing",
    "to_dense",
    "topology",
    "trim_vocabulary",
    "zeros_held",
    "zoo",
]
