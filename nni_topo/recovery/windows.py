"""Stretches of a network's graph as functions of how the weights of some of its layers change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate, map_arg

from nni_topo.network.layers import by_output, is_plain_norm, of_output, safely_laid_out, through_norms
from nni_topo.network.runtime import detached_copy, evaluating, tensors_of
from nni_topo.recovery.reconstruct import ReconstructTask, add_constant
from nni_topo.recovery.replay import Values

_LEAST_LAYERS = 2  # in a block
TOGETHER = 2
"""Blocks that `Ahead` solves at once."""


@dataclass(frozen=True)
class Segment:
    """Some layers, and a place after them; nodes before `first` don't belong to it."""

    first: int  # rank of the first node that is run
    last: int  # rank of the last node of the blocks whose layers these are, at most that of the place
    place: Node
    layers: tuple[Node, ...]  # where the graph calls them


def segments(
    nodes: Sequence[Node], touched: Collection[Node], layers: Iterable[Node], ahead: int, together: int = TOGETHER
) -> list[Segment]:
    """Return so many neighbouring blocks, from each block on, with a place `ahead` layers after them.

    Everything flows through the ends of blocks alone, and they hold two layers at least, but for the last one.
    ``touched``: nodes that depend on what is pruned. The place is the end of the first block with so many layers
    between the two, or what the network puts out.
    """
    ranks = {node: rank for rank, node in enumerate(nodes)}
    ordered = sorted(layers, key=ranks.__getitem__)
    at = [ranks[layer] for layer in ordered]
    last = len(nodes) - 1  # the output
    borders = [*_borders(_ends(nodes, touched, ranks), at), last]
    found = []
    for index, begin in enumerate(borders[:-1]):
        end = borders[min(index + together, len(borders) - 1)]
        mine = tuple(layer for layer, rank in zip(ordered, at, strict=True) if begin < rank <= end)
        far = (each for each in borders if each >= end and sum(end < rank <= each for rank in at) >= ahead)
        found.append(Segment(begin + 1, end, nodes[next(far, last)], mine))
    return found


def _borders(ends: Sequence[int], at: Sequence[int]) -> list[int]:
    """Return the ranks after which blocks begin, from those where one may, and those of the layers."""
    borders: list[int] = []
    for rank in at:
        # The end right before a layer leaves norms and activations to the layer in front of them.
        border = max((end for end in ends if end < rank), default=-1)
        if not borders or sum(borders[-1] < other <= border for other in at) >= _LEAST_LAYERS:
            borders.append(border)
    return borders


def _ends(nodes: Sequence[Node], touched: Collection[Node], ranks: dict[Node, int]) -> list[int]:
    """Return the ranks of nodes whose value is all that later nodes read of what is touched."""
    found, live = [], set()
    for rank, node in enumerate(nodes):
        if node in touched:
            live.add(node)
        live = {each for each in live if any(ranks[user] > rank for user in each.users)}
        if live <= {node}:
            found.append(rank)
    return found


def entering(segment: Segment, nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes in front of a stretch whose values it reads; parameters of the graph's own aren't among them."""
    program = nodes[segment.first : nodes.index(segment.place) + 1]
    read = {parent for node in program for parent in node.all_input_nodes} - set(program)
    return [node for node in nodes if node in read and node.op != "get_attr"]


def floats(value: Any) -> list[Tensor]:
    """List the floating tensors of what a network has at a place."""
    return [each for each in tensors_of(value) if each.is_floating_point()]


def alive(reached: Iterable[list[Tensor]]) -> list[Tensor | None]:
    """Tell which values at a place differ between images in the pruned network; None where batches differ in shape."""
    found: list[tuple[Tensor, Tensor] | None] = []
    for index, batch in enumerate(reached):
        bounds = [(each.amin(0), each.amax(0)) for each in batch]
        found = [
            None if known is None or known[0].shape != low.shape else (known[0].minimum(low), known[1].maximum(high))
            for known, (low, high) in zip(found if index else bounds, bounds, strict=True)
        ]
    return [None if each is None else each[1] > each[0] for each in found]


def moments(values: Tensor) -> Tensor:
    """Return the number of values, their sum and that of their squares."""
    wide = values.double()
    return torch.stack([wide.new_tensor(wide.numel()), wide.sum(), wide.square().sum()]).cpu()


class Stretch(nn.Module):
    """A copy of a stretch of a network, in single precision at least: from what enters it to the value at its place."""

    def __init__(self, network: GraphModule, segment: Segment) -> None:
        super().__init__()
        # Of the network's own graph, whose nodes have the names of the unpruned one's.
        nodes: list[Node] = list(network.graph.nodes)
        end = next(rank for rank, node in enumerate(nodes) if node.name == segment.place.name)
        program = nodes[segment.first : end + 1]
        read = {parent for node in program for parent in node.all_input_nodes} - set(program)
        graph, copies = Graph(), dict[Node, Node]()
        for node in nodes:
            if node in read:
                copies[node] = graph.node_copy(node) if node.op == "get_attr" else graph.placeholder(node.name)
        for node in program:
            if node.op == "output":
                copies[node] = graph.output(map_arg(node.args[0], copies.__getitem__))
                continue
            copied = copies[node] = graph.node_copy(node, copies.__getitem__)
            copied.args = tuple(map_aggregate(each, _in_single) for each in copied.args)
            copied.kwargs = {key: map_aggregate(each, _in_single) for key, each in copied.kwargs.items()}
        if program[-1].op != "output":
            graph.output(copies[program[-1]])
        self.body: GraphModule = evaluating(detached_copy(GraphModule(network, graph)))
        if any(each.dtype in _HALF for each in self.body.parameters()):
            self.body.float()

    def forward(self, *entering: Any) -> Any:
        """Return the value at the place, from those that `entering` lists the nodes of."""
        return self.body(*entering)


_HALF = (torch.float16, torch.bfloat16)


def _in_single(value: Any) -> Any:
    return torch.float32 if value in _HALF else value


class Window:
    """What a network puts out at the end of a stretch, as a function of changes of weights and constants."""

    # Unknowns are two tensors a layer: of the weights between kept channels, (groups, rows, columns, kernel), and of
    # the constants of its outputs, (groups, rows), which stay 0 where nobody can take them.

    def __init__(self, segment: Segment, network: GraphModule, tasks: dict[Node, ReconstructTask]) -> None:
        # Of the network's own graph, whose nodes have the names of the unpruned one's.
        nodes: list[Node] = list(network.graph.nodes)
        end = next(rank for rank, node in enumerate(nodes) if node.name == segment.place.name)
        program = nodes[segment.first : end + 1]
        read = {parent for node in program for parent in node.all_input_nodes} - set(program)
        self._program = [node for node in nodes if node in read and node.op == "get_attr"] + program
        self._runner = Interpreter(network)
        self._network = network
        by_name = {tasks[node].layer.name: tasks[node] for node in segment.layers}
        self._layers = {name: task.layer for name, task in by_name.items()}
        norms = {str(node.target) for node in program if node.op == "call_module"}
        self._norms = {name: _affine(network.get_submodule(name)) for name in norms if _is_affine(network, name)}
        self._blocks = {name: task.block(self._weight(name)) for name, task in by_name.items()}

    def start(self) -> list[Tensor]:
        """Return unknowns that change nothing."""
        found = []
        for name, place in self._blocks.items():
            weight = self._weight(name)
            wide = torch.promote_types(weight.dtype, torch.float32)
            found += [torch.zeros_like(weight[place], dtype=wide), weight.new_zeros(place[0].shape[:2], dtype=wide)]
        return found

    def __call__(self, entering: dict[str, Any], unknowns: Sequence[Tensor]) -> Any:
        """Return the value at the place, from the values of the nodes that enter."""
        changes = dict(zip(self._layers, zip(unknowns[::2], unknowns[1::2], strict=True), strict=True))
        values: Values = {node: entering[node.name] for node in self._network.graph.nodes if node.name in entering}
        self._runner.env = values
        for node in self._program:
            name = str(node.target)
            if node.op == "call_module" and name in changes:
                values[node] = self._changed(name, values[node.all_input_nodes[0]], *changes[name])
            elif node.op == "call_module" and name in self._norms:
                # PyTorch takes three times as long for the forward derivative of a batch norm.
                values[node] = _per_channel(self._norms[name], values[node.all_input_nodes[0]])
            else:
                values[node] = self._runner.run_node(node)
        return values[self._program[-1]]

    def put(self, nets: Iterable[nn.Module], unknowns: Sequence[Tensor]) -> None:
        """Write changes into networks."""
        for (name, layer), weight, constant in zip(self._layers.items(), unknowns[::2], unknowns[1::2], strict=True):
            for net in nets:
                module: Any = net.get_submodule(name)
                with torch.no_grad():
                    rows = by_output(module.weight, module)
                    old = rows[self._blocks[name]]
                    rows[self._blocks[name]] = (old + weight).to(old.dtype)
                    module.weight.copy_(of_output(rows, module))
                    if layer.intercept is not None:
                        add_constant(net, layer.intercept, self._blocks[name][0][..., 0], constant.double())

    def _changed(self, name: str, value: Tensor, change: Tensor, constant: Tensor) -> Tensor:
        """Call a layer with changed weights."""
        module: Any = self._network.get_submodule(name)
        weight, place = self._weight(name), self._blocks[name]
        moved = of_output(weight.index_put(place, change.to(weight.dtype), accumulate=True), module)
        moved, value = safely_laid_out(module, moved, value)
        found: Tensor = functional_call(module, {"weight": moved}, (value,))
        if self._layers[name].intercept is None:
            return found
        rows = weight.new_zeros(len(weight)).index_put((place[0][..., 0],), constant.to(weight.dtype))
        shape = () if isinstance(module, nn.Linear) else [1] * len(module.kernel_size)
        return found + rows.reshape(-1, *shape)

    def _weight(self, name: str) -> Tensor:
        module: Any = self._network.get_submodule(name)
        return by_output(module.weight.detach(), module)


def _is_affine(network: GraphModule, name: str) -> bool:
    """Say whether a module is a batch norm that doesn't look at the batch."""
    module = network.get_submodule(name)
    return is_plain_norm(module) and module.running_var is not None


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a batch norm's factors and constants, both (channels,)."""
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    scale, shift = through_norms([norm], torch.zeros_like(mean))
    return scale.to(mean), shift.to(mean)


def _per_channel(factors: tuple[Tensor, Tensor], value: Tensor) -> Tensor:
    scale, shift = (each.reshape(-1, *[1] * (value.dim() - 2)) for each in factors)
    plain, move = forward_ad.unpack_dual(value)
    if move is None:
        return value * scale + shift
    # What a constant adds to a derivative PyTorch works out in Python: 0.9 ms here, a small product takes 0.02.
    moved: Tensor = forward_ad.make_dual(plain * scale + shift, move * scale)
    return moved
