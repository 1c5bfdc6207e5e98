"""From masks to a smaller dense model: dependency groups, the dry run, the masked reference, ModelSpeedup."""

from nni_topo.network.speedup.dense import to_dense
from nni_topo.network.speedup.dependency import OUTPUT, DependencyGroups, by_reason, dependency_groups, whole_layers
from nni_topo.network.speedup.equivalence import apply_masks, masked_model
from nni_topo.network.speedup.explain import Explanation, explain
from nni_topo.network.speedup.network import Network, share_answers
from nni_topo.network.speedup.reconcile import FullMasks, Masks, check_masks, resolve_masks, union, widths_multiple
from nni_topo.network.speedup.report import DenseReport, LayerReport, why_not_followed

__all__ = [
    "OUTPUT",
    "DenseReport",
    "DependencyGroups",
    "Explanation",
    "FullMasks",
    "LayerReport",
    "Masks",
    "Network",
    "apply_masks",
    "by_reason",
    "check_masks",
    "dependency_groups",
    "explain",
    "masked_model",
    "resolve_masks",
    "share_answers",
    "to_dense",
    "union",
    "whole_layers",
    "why_not_followed",
    "widths_multiple",
]
