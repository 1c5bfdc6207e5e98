"""The networks of a compensation: the unpruned one, the pruned one that is changed step by step, and the result."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn
from torch.fx import GraphModule, Node

from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.layers.derived import fold
from nni_topo.network.runtime.copies import detached_copy, evaluating
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.equivalence import apply_masks
from nni_topo.network.speedup.leaving_out import leave_out
from nni_topo.network.speedup.reconcile import FullMasks, MasksLike, check_masks, resolve_masks
from nni_topo.recovery.plan import Plan, make_plan
from nni_topo.recovery.replay import without_side_effects
from nni_topo.sharing import find_ties, untie


@dataclass(frozen=True)
class Networks:
    """All forms of one model."""

    # Graphs with the same node names, in evaluation mode, on copies of the model's modules.
    unpruned: GraphModule  # holds the model's own parameters, which mustn't be written to
    pruned: GraphModule
    result: nn.Module  # a copy of the model, of full size, to be returned
    flow: ChannelFlow  # how channels go through the model
    is_kept: np.ndarray  # which channels stay, by group id: bool
    masks: FullMasks  # agree where layers share channels
    asked: FullMasks  # as they were given
    folded: set[str]  # layers that compute their weight: plain ones in the graphs, and where solved in the result


def build_networks(analysis: Analysis, masks: MasksLike) -> Networks:
    """Trace a model, complete its masks and make the networks; ConfigError or SpeedupError where that can't be."""
    model = analysis.model
    checked = check_masks(model, masks)
    base = evaluating(detached_copy(model, light=True))
    # A weight that a forward computes from all others can't be solved anew one by one; what it computes can.
    folded = {name for name, module in base.named_modules() if fold(module)}
    resolved = resolve_masks(base, analysis.flow, checked)
    full = resolved.masks
    unpruned = without_side_effects(analysis.graph(base)[0], light=True)
    # A layer that is solved mustn't change another place that holds the same tensor.
    pruned = without_side_effects(analysis.trace.assembled(apply_masks(base, full)), light=True)
    untie(pruned, find_ties(pruned))
    leave_out(pruned, analysis.flow, resolved.is_kept)
    return Networks(unpruned, pruned, detached_copy(model), analysis.flow, resolved.is_kept, full, checked, folded)


def plan_of(networks: Networks, touched: set[Node]) -> Plan:
    """Plan what is solved; in the result, layers that are and compute their weight become plain ones that have it."""
    plan = make_plan(networks.unpruned, networks.flow, networks.masks, touched)
    for name in {equation.layer.name for equation in plan.equations} & networks.folded:
        fold(networks.result.get_submodule(name))
    return plan
