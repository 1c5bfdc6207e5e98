"""The way forward where a dense model can't equal the masked one: why not, and what can be done about it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nni_topo.errors import NniTopoError
from nni_topo.network.channels import ChannelFlow
from nni_topo.network.layers import feature_dimension, output_channels
from nni_topo.network.speedup.network import Network

Kept = dict[str, list[Tensor]]

_MIXING = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.LocalResponseNorm)
_LAST = "check=False gives the dense model all the same, which computes something else by that and has to be fine-tuned"


def way_forward(network: Network, reference: nn.Module, kept: Kept, place: str | None) -> str:
    """Say why outputs differ from ``place`` on (None: behind the last module), and what can be done about it."""
    try:
        flow = network.flow
    except NniTopoError:
        return _LAST
    pruned = {name for name in flow.layers if name in kept and _removed(flow, name, kept).any()}
    before = ", ".join(_layers_before(flow, place, pruned)) or "the layers before it"
    leave_out = f"exclude {before} from the config_list (exclude_op_names)"
    module = None if place is None else reference.get_submodule(place)
    if isinstance(module, _MIXING):
        statistics = f"{type(module).__name__} takes its statistics over removed channels too"
        return f"{statistics}: {leave_out}; {_LAST}"
    if place is None or module is None or output_channels(module) is None:
        return f"removed channels of {before} aren't zero there: {leave_out}; {_LAST}"
    arrive = f"removed channels of {before} arrive at {place} as values that aren't zero"
    return f'{arrive}: {leave_out}; constants="keep" takes over what is constant, but for borders; {_LAST}'


def _removed(flow: ChannelFlow, name: str, kept: Kept) -> Tensor:
    """Tell which output channels of a layer are removed: bool, shape (channels,)."""
    removed = torch.ones(flow.layers[name].channels, dtype=torch.bool)
    removed[kept[name][feature_dimension(flow.fetch_attr(name))].cpu()] = False
    return removed


def _layers_before(flow: ChannelFlow, place: str | None, pruned: set[str]) -> list[str]:
    """List the pruned layers from which a place can be reached without another layer between, in network order."""
    at_place = [node for node in flow.graph.nodes if node.target == (place or "output")]
    nodes = list(at_place)
    found, seen = set[str](), set(at_place)
    while nodes:
        for parent in nodes.pop().all_input_nodes:
            if str(parent.target) in flow.layers:
                found.add(str(parent.target))
            elif parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    return [name for name in flow.layers if name in found & pruned]
