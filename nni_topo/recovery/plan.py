"""Which layers of a pruned network can be solved anew, and which values of the unpruned network they match."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional

from nni_topo.network.attention.heads import is_attention
from nni_topo.network.channels.flow import ChannelFlow, followers, passes
from nni_topo.network.channels.ids import FIXED
from nni_topo.network.graph.nodes import tensor_shape
from nni_topo.network.layers.derived import has_own_forward, inner_of
from nni_topo.network.layers.kinds import PER_CHANNEL, TRANSPOSED, WEIGHTED, by_output, is_plain_norm, kept_channels
from nni_topo.network.speedup.reconcile import FullMasks
from nni_topo.recovery.frozen import FROZEN


@dataclass(frozen=True)
class Solvable:
    """A layer that can be solved anew."""

    name: str  # the layer's name in the model
    node: Node  # where the graph calls it
    columns: Tensor  # (groups, d): kept input channels, of groups that keep inputs and outputs
    rows: Tensor  # (groups, o): kept output channels of these groups
    intercept: str | None  # module that takes a constant: the layer (bias) or the batch norm after it (running mean)

    @property
    def source(self) -> Node:
        """The node whose value is the layer's input."""
        return self.node.all_input_nodes[0]


@dataclass(frozen=True)
class Equation:
    """A layer is to be solved such that the pruned network reproduces the unpruned one at a place after it."""

    layer: Solvable
    place: Node  # whose values are compared; only batch norms and additions lie between the layer and it
    norms: tuple[str, ...]  # the batch norms in between
    rectified: bool = False  # only a ReLU reads the place, so that all negative values are equivalent


ATTENTION = "attention, whose queries, keys and values stay as they are"
"""Reason why attention isn't solved anew; the report gives it, the warning doesn't."""


@dataclass
class Plan:
    """All equations in the order in which they are solved, and the layers that can't be solved, with the reasons."""

    equations: list[Equation] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)


def make_plan(
    graph_module: GraphModule, flow: ChannelFlow, masks: FullMasks, touched: set[Node], frozen: frozenset[str]
) -> Plan:
    """List the equations of a pruned network, in network order.

    ``touched`` are the nodes after pruned channels, ``frozen`` the names of the parameters that must stay.
    """
    plan = Plan()
    pruned = pruned_group_ids(graph_module, flow, masks)
    order = {node: rank for rank, node in enumerate(graph_module.graph.nodes)}
    # By place, the layers added there: unknowns, equation for the own output, equation for the sum.
    at_place: dict[Node, list[tuple[int, Equation, Equation]]] = {}
    for node in graph_module.graph.nodes:
        # Without pruned inputs the kept outputs don't change.
        if node.op != "call_module" or not any(parent in touched for parent in node.all_input_nodes):
            continue
        module: Any = graph_module.get_submodule(str(node.target))
        # None: the layer can be solved. Empty: it has nothing to solve, and the report doesn't mention it.
        reason = _why_not(graph_module, node, module, flow, masks)
        if reason is None and f"{node.target}.weight" in frozen:
            reason = FROZEN
        layer = _solvable(graph_module, node, flow, masks, pruned, frozen) if reason is None else None
        if layer is not None:
            near, far = _ways(graph_module, layer)
            unknowns = int(layer.columns.shape[1] * module.weight[0, 0].numel())
            at_place.setdefault(far.place, []).append((unknowns, near, far))
        elif reason != "":
            plan.left_alone[str(node.target)] = reason or "its groups keep different numbers of channels"
    for ways in at_place.values():
        # Layers with fewer unknowns are solved first for their own outputs, which reduces the error of the sum; the
        # layer with the most then makes up for that error, and the others for the rest of it.
        *smaller, (_, _, last) = sorted(ways, key=lambda way: way[0])
        plan.equations += [*(near for _, near, _ in smaller), last, *(far for _, _, far in smaller)]
    # An equation needs the values at its place, so all layers in front of that have to be solved before. The sort is
    # stable, so that the order at one place stays.
    plan.equations.sort(key=lambda equation: order[equation.place])
    return plan


def pruned_group_ids(graph_module: GraphModule, flow: ChannelFlow, masks: FullMasks) -> set[int]:
    """Return the group ids of all pruned channels."""
    pruned: set[int] = set()
    for name in flow.layers:
        kept_mask = kept_channels(graph_module.get_submodule(name), masks.get(name, {}))
        if kept_mask is not None:
            group_ids, is_kept = flow.group_ids_of(name), kept_mask.cpu().numpy()
            # The group id of a head stands for several channels; it is kept if any of them is.
            pruned |= set(group_ids[~is_kept].tolist()) - set(group_ids[is_kept].tolist())
    # FIXED stands for channels that can't be pruned; a mask of a channel coupled to them removes nothing.
    return pruned - {FIXED}


def _why_not(
    graph_module: GraphModule, node: Node, module: nn.Module, flow: ChannelFlow, masks: FullMasks
) -> str | None:
    """Return why a module can't be solved anew; an empty text if there is nothing to solve."""
    if isinstance(module, PER_CHANNEL) or not any(p.dim() > 1 for p in module.parameters()):
        return ""
    if is_attention(module):
        return ATTENTION
    name = str(node.target)
    if not isinstance(module, WEIGHTED) or name not in flow.layers:
        return f"of type {type(module).__name__}"
    if has_own_forward(module):
        # A subclass may compute something else from the same weights.
        inner = inner_of(module)
        if inner is None or not inner.is_bare:
            return f"of type {type(module).__name__}, which does more than a convolution or a product"
        if not inner.is_own:
            return "its weight is computed"
    if sum(peer.op == "call_module" and peer.target == node.target for peer in graph_module.graph.nodes) > 1:
        return "called more than once"
    # A parametrized weight isn't a parameter: the next forward overwrites it.
    if "weight" not in module._parameters:
        return "its weight is computed"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which may change what it computes"
    if sum(p is module.weight for m in graph_module.modules() for p in m._parameters.values()) > 1:
        return "its weight belongs to another module too"
    # Patches can be sampled only if one tensor enters and one leaves.
    sized = isinstance(module, TRANSPOSED) and (len(node.args) > 1 or "output_size" in node.kwargs)
    if tensor_shape(node) is None or len(node.all_input_nodes) != 1 or sized:
        return "called in an unusual way"
    mask = masks.get(name, {}).get("weight")
    return None if mask is None or _goes_by_channel(module, mask) else "masked weight by weight"


def _goes_by_channel(module: Any, mask: Tensor) -> bool:
    """Say whether a weight mask removes whole input and output channels and nothing else."""
    # (groups, rows, columns, kernel elements); a linear layer's one element is the dimension added at the end.
    blocks = by_output(mask, module).unsqueeze(-1).unflatten(0, (getattr(module, "groups", 1), -1)).flatten(3)
    rows = blocks.amax((2, 3), keepdim=True)
    columns = blocks.amax((1, 3), keepdim=True)
    # Whole channels are pruned if, in each group, the mask is the product of a mask of rows and one of columns.
    return bool((blocks == rows * columns).all())


def _solvable(
    graph_module: GraphModule,
    node: Node,
    flow: ChannelFlow,
    masks: FullMasks,
    pruned: set[int],
    frozen: frozenset[str] = frozenset(),
) -> Solvable | None:
    name = str(node.target)
    module: Any = graph_module.get_submodule(name)
    # The flow says which inputs are removed: the layer's own mask needn't list channels that earlier layers lost.
    kept_in = ~np.isin(flow.entering_group_ids(name), list(pruned))
    kept_out = ~np.isin(flow.group_ids_of(name), list(pruned))
    mask = masks.get(name, {}).get("weight")
    groups = getattr(module, "groups", 1)
    if mask is not None:
        mask = by_output(mask, module)
        # A channel may be kept for another layer although all its weights in this layer are pruned.
        kept_out &= _any(mask.flatten(1), 1)
        kept_in &= _any(mask.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2), 2).reshape(-1)
    columns, rows = _split(kept_in, groups), _split(kept_out, groups)
    # A group without inputs or outputs has nothing to solve; its bias stays.
    solved = [pair for pair in zip(columns, rows, strict=True) if len(pair[0]) and len(pair[1])]
    # All groups are solved in one batch of equal sizes.
    if not solved or len({(len(inputs), len(outputs)) for inputs, outputs in solved}) > 1:
        return None
    inputs = torch.from_numpy(np.stack([pair[0] for pair in solved]))
    outputs = torch.from_numpy(np.stack([pair[1] for pair in solved]))
    return Solvable(name, node, inputs, outputs, _intercept(graph_module, node, outputs, masks, frozen))


def _any(values: Tensor, dim: int) -> np.ndarray:
    is_nonzero: np.ndarray = values.ne(0).any(dim).cpu().numpy()
    return is_nonzero


def _split(is_kept: np.ndarray, groups: int) -> list[np.ndarray]:
    """Return the kept indices in each of some equal groups."""
    step = len(is_kept) // groups
    return [group * step + np.flatnonzero(is_kept[group * step : (group + 1) * step]) for group in range(groups)]


def _intercept(
    graph_module: GraphModule, node: Node, rows: Tensor, masks: FullMasks, frozen: frozenset[str]
) -> str | None:
    """Return the name of the module that can take a constant added to a layer's output, or None."""
    name = str(node.target)
    if graph_module.get_submodule(name).bias is not None:
        if f"{name}.bias" in frozen:
            return None
        mask = masks.get(name, {}).get("bias")
        # A constant added to a masked bias would be masked, too.
        return name if mask is None or bool(mask[rows.to(mask.device)].all()) else None
    user = next(iter(node.users)) if len(node.users) == 1 else None
    # A batch norm subtracts its running mean, which can hold the constant if no other node reads this output.
    if user is None or not _is_affine(graph_module, user) or f"{user.target}.weight" in frozen:
        return None
    return str(user.target)


def _is_affine(graph_module: GraphModule, node: Node) -> bool:
    """Say whether a node is a batch norm with running statistics that no other place uses."""
    if node.op != "call_module":
        return False
    module: Any = graph_module.get_submodule(str(node.target))
    # Called twice, it would subtract the constant in the other place too.
    calls = sum(peer.op == "call_module" and peer.target == node.target for peer in graph_module.graph.nodes)
    return is_plain_norm(module) and calls == 1 and module.running_var is not None


def _ways(graph_module: GraphModule, layer: Solvable) -> tuple[Equation, Equation]:
    """Return a layer's equation for its own output, and for the farthest place after norms and additions."""
    node, norms = layer.node, []
    near: Equation | None = None
    # Up to a value with several readers: the target is the value that all of them read.
    for user in followers(node):
        if _is_affine(graph_module, user):
            norms.append(str(user.target))
        elif _is_sum(user):
            # The place before the first sum: after it the value contains other layers' outputs.
            near = near or Equation(layer, node, tuple(norms))
        elif not passes(graph_module, user):
            break
        node = user
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is not None and reader.op == "call_module":
        # Exactly a ReLU: a subclass may let negative values through.
        rectified = type(graph_module.get_submodule(str(reader.target))) is nn.ReLU
    else:
        rectified = reader is not None and reader.target in (torch.relu, functional.relu, "relu")
    far = Equation(layer, node, tuple(norms), rectified)
    return near or far, far


def _is_sum(node: Node) -> bool:
    """Say whether a node adds two different values."""
    # An `alpha=` or `out=` would make it another operation, hence no keywords; a value added to itself only doubles.
    is_add = node.target in (operator.add, torch.add) if node.op == "call_function" else node.target == "add"
    called = node.op in ("call_function", "call_method")
    return called and is_add and len(node.all_input_nodes) == 2 and not node.kwargs
