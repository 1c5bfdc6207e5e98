"""Layers that a rehearsal runs in the small network alone, which tells all of what they give in the whole one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from nni_topo.network.attention import PrunedMultiheadAttention, attend
from nni_topo.network.channels import ChannelFlow
from nni_topo.network.speedup.replace import kept_slices

_ROWS = 64  # that a layer reads at once, from which on its weights take less long to compare than to use
_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
_MULTIHEAD = (nn.MultiheadAttention, PrunedMultiheadAttention)


def channels_alone(
    node: Node, whole: nn.Module, small: nn.Module, flow: ChannelFlow, left: np.ndarray, values: Mapping[Node, Any]
) -> Tensor | None:
    """Say which channels a linear layer or attention, entered by no removed channel, gives in the small network.

    ``values``: by node, what it gives in the whole network first. None, unless the weights are those of the channels
    left: then the layer gives in the small network what it gives there in the whole one; all else is masked.
    """
    read = _read(node)
    if read is None or read[0] not in flow.layers:
        return None
    name, parents, kinds, prefix = read
    layers: list[Any] = [network.get_submodule(name) for network in (whole, small)]
    if any(type(each) not in kinds or each._forward_pre_hooks or each._forward_hooks for each in layers):
        return None
    entering = [_entering(parent, flow, left, values) for parent in parents]
    ins = entering[0]
    if ins is None or any(each is None or not torch.equal(each, ins) for each in entering):
        return None
    weight, bias = ([getattr(layer, f"{prefix}{part}") for layer in layers] for part in ("weight", "bias"))
    outs = torch.from_numpy(np.flatnonzero(left[flow.layer_roots(name)])).to(weight[0].device)
    if not torch.equal(weight[0].index_select(0, outs).index_select(1, ins.to(outs.device)), weight[1]):
        return None
    if bias[0] is not None and not torch.equal(bias[0][outs], bias[1]):
        return None
    given = flow.numbers[node.name]
    numbers = (given[0] if isinstance(given, (tuple, list)) else given).flatten(0, -2)[0]
    return torch.from_numpy(left[flow.roots(numbers.numpy())])


def _read(node: Node) -> tuple[str, list[Node], tuple[type[nn.Module], ...], str] | None:
    """Return what a node calls, what that reads, of which classes it may be and how its weights' names begin."""
    if node.op == "call_module" and len(node.args) == 1 and isinstance(node.args[0], Node):
        return str(node.target), [node.args[0]], _LINEAR, ""
    if node.target is attend and len(node.args) == 5:
        module, _, *states = node.args
        others = set(node.all_input_nodes) - {module, *states}  # masks, which may be of all heads
        if isinstance(module, Node) and not others:
            parents = [each for each in states if isinstance(each, Node)]
            return str(module.target), parents, _MULTIHEAD, "in_proj_"
    return None


def _entering(parent: Node, flow: ChannelFlow, left: np.ndarray, values: Mapping[Node, Any]) -> Tensor | None:
    """List the channels left of what enters, in its last dimension; None if it lacks others, or has few rows."""
    # What a parameter holds isn't compared before it is used.
    value, numbers = values[parent][0], flow.numbers[parent.name]
    if parent.op == "get_attr" or not isinstance(value, Tensor) or not isinstance(numbers, Tensor):
        return None
    if numbers.dim() != value.dim() or value[..., 0].numel() < _ROWS:
        return None
    *others, ins = kept_slices(numbers, tuple(value.shape), flow, left)
    return ins if [len(each) for each in others] == list(value.shape[:-1]) else None
