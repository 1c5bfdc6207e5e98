"""What follows a layer: the norm that takes its channels, and the nodes that its output goes through alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional

from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.graph import tensor_shape
from nni_topo.network.layers import NORMS, is_plain_norm

_PASSING = (nn.Identity, nn.modules.dropout._DropoutNd)


def norms_after(model: nn.Module, flow: ChannelFlow) -> dict[str, str]:
    """Return, by layer, the name of the batch norm that takes all of its channels and no others; not all have one."""
    first = {layer.first: name for name, layer in flow.layers.items()}
    found = {}
    for name, module in model.named_modules():
        entering = flow.entering_channel_ids(name)
        if not isinstance(module, NORMS) or not is_plain_norm(module) or not len(entering):
            continue
        layer = first.get(int(entering[0]))
        # Behind a concatenation the numbers of several layers follow each other.
        own = np.arange(0 if layer is None else flow.layers[layer].channels)
        if layer is not None and np.array_equal(entering, own + entering[0]):
            found[layer] = name
    return found


def only_norm_after(model: nn.Module, flow: ChannelFlow, name: str) -> nn.Module | None:
    """Return the batch norm with statistics that alone reads a layer, and reads nothing else; None without one."""
    calls = [node for node in flow.traced.graph.nodes if node.op == "call_module" and node.target == name]
    readers = {user for node in calls for user in node.users}
    targets = {str(user.target) if user.op == "call_module" else "" for user in readers}
    behind = targets.pop() if len(targets) == 1 else ""
    norm = model.get_submodule(behind) if behind else None
    of_norm = {node for node in flow.traced.graph.nodes if node.op == "call_module" and node.target == behind}
    is_norm = norm is not None and is_plain_norm(norm) and isinstance(norm.running_mean, Tensor)
    return norm if is_norm and of_norm == readers else None


def followers(node: Node) -> Iterator[Node]:
    """Yield the nodes behind one, as long as each is read by one other alone and keeps its shape."""
    shape = tensor_shape(node)
    # With a second reader the value also counts as it is here, so nothing behind speaks for it alone.
    while len(node.users) == 1:
        node = next(iter(node.users))
        if tensor_shape(node) != shape:
            return
        yield node


def passes(graph_module: GraphModule, node: Node) -> bool:
    """Say whether a node hands on what it gets, in evaluation mode."""
    if node.op == "call_module":
        return isinstance(graph_module.get_submodule(str(node.target)), _PASSING)
    if node.op == "call_method":
        return node.target in ("contiguous", "clone")
    return node.target is functional.dropout and node.kwargs.get("training") is False
