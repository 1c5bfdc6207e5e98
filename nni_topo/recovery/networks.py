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
from nni_topo.recovery.frozen import frozen_parameters
from nni_topo.recovery.plan import Plan, make_plan
from nni_topo.recovery.replay import without_side_effects
from nni_topo.sharing import find_ties, untie


@dataclass(frozen=True)
class Networks:
    """The unpruned, the pruned and the result network of one model, with its masks."""

    # Graphs with the same node names, in evaluation mode, on copies of the model's modules.
    unpruned: GraphModule  # shares the model's parameters, which mustn't be changed
    pruned: GraphModule
    result: nn.Module  # a copy of the model, of full size, to be returned
    flow: ChannelFlow  # how channels go through the model
    is_kept: np.ndarray  # which channels stay, by group id: bool
    masks: FullMasks  # completed: the same in layers that share channels
    requested_masks: FullMasks  # of the caller
    folded: set[str]  # layers with a computed weight; in the graphs and, if solved, in the result they are plain


def build_networks(analysis: Analysis, masks: MasksLike) -> Networks:
    """Trace a model, complete its masks and build the networks; ConfigError or SpeedupError if that fails."""
    model = analysis.model
    checked = check_masks(model, masks)
    base = evaluating(detached_copy(model, light=True))
    # Parameters from which a forward computes its weight can't be solved; a plain layer with that weight can.
    folded = {name for name, module in base.named_modules() if fold(module)}
    resolved = resolve_masks(base, analysis.flow, checked)
    full = resolved.masks
    unpruned = without_side_effects(analysis.graph(base)[0], light=True)
    # Solving a layer mustn't change another module that holds the same tensor.
    pruned = without_side_effects(analysis.trace.assembled(apply_masks(base, full)), light=True)
    untie(pruned, find_ties(pruned))
    leave_out(pruned, analysis.flow, resolved.is_kept)
    return Networks(unpruned, pruned, detached_copy(model), analysis.flow, resolved.is_kept, full, checked, folded)


def plan_of(networks: Networks, touched: set[Node]) -> Plan:
    """Plan the equations; in the result, plain layers replace the solved layers that compute their weight."""
    frozen = frozen_parameters(networks.result)
    plan = make_plan(networks.unpruned, networks.flow, networks.masks, touched, frozen)
    for name in {equation.layer.name for equation in plan.equations} & networks.folded:
        fold(networks.result.get_submodule(name))
    return plan
