"""From masks to a smaller dense model: dependency groups, the dry run, the masked reference, ModelSpeedup."""

from nni_topo.network.speedup.analysis import Analysis, Findings
from nni_topo.network.speedup.dense import (
    DenseReport,
    LayerChannels,
    cut_alone,
    dense_of,
    dense_report_of,
    sizes_in_markdown,
    to_dense,
)
from nni_topo.network.speedup.dependency import (
    OUTPUT,
    DependencyGroups,
    by_reason,
    dependency_groups,
    groups_of,
    held_by_unselected,
    unprunable_layers,
    why_not_followed,
)
from nni_topo.network.speedup.equivalence import apply_masks, masked_model
from nni_topo.network.speedup.explain import Explanation, explain
from nni_topo.network.speedup.reconcile import FullMasks, MasksLike, check_masks, resolve_masks, union, widths_multiple
from nni_topo.network.speedup.width_attributes import register_width_attribute

__all__ = [
    "OUTPUT",
    "Analysis",
    "DenseReport",
    "DependencyGroups",
    "Explanation",
    "Findings",
    "FullMasks",
    "LayerChannels",
    "MasksLike",
    "apply_masks",
    "by_reason",
    "check_masks",
    "cut_alone",
    "dense_of",
    "dense_report_of",
    "dependency_groups",
    "explain",
    "groups_of",
    "held_by_unselected",
    "masked_model",
    "register_width_attribute",
    "resolve_masks",
    "sizes_in_markdown",
    "to_dense",
    "union",
    "unprunable_layers",
    "why_not_followed",
    "widths_multiple",
]
