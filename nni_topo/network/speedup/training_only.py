"""Modules that run in training mode only, such as auxiliary heads: the layers that they read keep all channels.

A model is traced in evaluation mode. If some of its parameters aren't used there, it is traced a second time, with the
modules that hold these parameters in training mode, to see which layers' channels reach them.
"""

from __future__ import annotations

import logging
from operator import attrgetter

import numpy as np
from torch import nn
from torch.fx import Graph, Node

from nni_topo.errors import SpeedupError
from nni_topo.network.channels import reasons
from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.ids import FIXED
from nni_topo.network.channels.reasons import Reason
from nni_topo.network.graph.nodes import RANDOM
from nni_topo.network.graph.submodules import is_in_parts
from nni_topo.network.graph.tracing import trace
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.runtime.inputs import Call, tensors_of
from nni_topo.network.runtime.memory import out_of_memory

_logger = logging.getLogger(__name__)


def unused_tensors(model: nn.Module, graph: Graph) -> list[str]:
    """List the parameters and floating buffers of a model that no node of its graph uses, by name."""
    used = set[int]()
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        try:
            found = attrgetter(str(node.target))(model)
        except AttributeError:  # a constant that only the tracer knows
            continue
        if isinstance(found, nn.Module):
            used.update(id(tensor) for tensor in (*found.parameters(), *found.buffers()))
        else:
            used.add(id(found))
    # A number, and what counts or masks, has no channels.
    held = [(name, each) for name, each in model.named_buffers() if each.dim() and each.is_floating_point()]
    return [name for name, each in (*model.named_parameters(), *held) if id(each) not in used]


def read_in_training(model: nn.Module, unused: list[str], call: Call) -> dict[str, tuple[np.ndarray, Reason]]:
    """Find the channels of layers that modules read that run in training mode only; none where it can't be traced.

    ``model``: in evaluation mode. ``unused``: the parameters that its graph of evaluation mode doesn't use. Returns by
    layer which of its channels have to stay for what training mode runs, bool, (channels,), and why.
    """
    try:
        # The copy has weights of its own, because a forward may write into them in training mode.
        trained = detached_copy(model)
        for name in unused:
            owners = name.split(".")[:-1]
            for length in range(len(owners) + 1):
                # Only the modules that contain the parameter: dropout and batch norms beside it would compute something
                # else in training mode, and don't decide where data goes, and neither do layers of PyTorch's.
                owner = trained.get_submodule(".".join(owners[:length]))
                is_layer = type(owner).__module__.startswith("torch.nn.modules.") and not isinstance(
                    owner, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
                )
                owner.training = owner.training or not is_layer
        recording = trace(trained, call)
        graph = recording.graph_module.graph
        if is_in_parts(graph):
            raise SpeedupError("a model must be traced as a whole to follow training mode, got one traced in parts")
        for node in graph.nodes:
            node.meta.pop(RANDOM, None)  # dropout, in training mode; what is random in evaluation mode stays anyway
        flow = ChannelFlow(recording.graph_module, recording.args)
    except Exception as error:  # a user's forward may raise anything
        if out_of_memory(error):
            raise
        _logger.debug("%s can't be followed in training mode", type(model).__name__, exc_info=True)
        return {}
    readers, met = dict[int, str](), _met_by_inputs(graph)  # by group of channels, the module that reads them
    for node in graph.nodes:
        name = str(node.target)
        if node.op not in ("call_module", "get_attr") or node not in met:
            continue
        if not any(each == name or each.startswith(f"{name}.") for each in unused):
            continue
        for user in (node,) if node.op == "call_module" else node.users:
            for tensor in (*user.all_input_nodes, user):  # what is coupled with a module's output stays, too
                for ids in tensors_of(flow.ids[tensor.name]):
                    for group in np.unique(flow.group_ids(ids.numpy().ravel())).tolist():
                        readers.setdefault(group, name)
    readers.pop(FIXED, None)
    read = dict[str, tuple[np.ndarray, Reason]]()
    for layer in flow.layers:
        groups = flow.group_ids_of(layer)
        found = [readers[group] for group in groups.tolist() if group in readers]
        if found:
            read[layer] = np.isin(groups, list(readers)), reasons.training_reader(found[0])
        elif why := flow.why_pinned(layer):
            read[layer] = groups == FIXED, why[0]
    return read


def _met_by_inputs(graph: Graph) -> set[Node]:
    """Find the nodes of a graph that depend on an input, or whose values meet one or the output later."""
    entered = set[Node]()
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or not entered.isdisjoint(node.all_input_nodes):
            entered.add(node)
    met = set(entered)
    for node in reversed(graph.nodes):
        if not met.isdisjoint(node.users):
            met.add(node)
    return met
