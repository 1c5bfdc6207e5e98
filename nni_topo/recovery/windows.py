"""Stretches of a network's graph: the blocks that learn at once, and the modules that compute them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from nni_topo.network.runtime.copies import detached_copy, evaluating
from nni_topo.network.runtime.inputs import tensors_of

_LEAST_LAYERS = 2  # in a block


@dataclass(frozen=True)
class Segment:
    """Some layers, and a place at their end or after it; nodes before `first` don't belong to it."""

    first: int  # rank of the first node that is run
    last: int  # rank of the last node of the blocks with these layers; it isn't after the place
    place: Node
    layers: tuple[Node, ...]  # where the graph calls them


def segments(nodes: Sequence[Node], touched: Collection[Node], layers: Iterable[Node], together: int) -> list[Segment]:
    """Return, from each block on, that block and its next ones, ``together`` in all, with the end of the last as place.

    Everything flows through the ends of blocks alone, and each block but the last holds at least two layers.
    ``touched``: nodes that depend on what is pruned.
    """
    ranks = {node: rank for rank, node in enumerate(nodes)}
    ordered = sorted(layers, key=ranks.__getitem__)
    at = [ranks[layer] for layer in ordered]
    # The ranks of nodes whose value is all that later nodes read of what is touched.
    ends, live = [], set[Node]()
    for rank, node in enumerate(nodes):
        if node in touched:
            live.add(node)
        live = {each for each in live if any(ranks[user] > rank for user in each.users)}
        if live <= {node}:
            ends.append(rank)
    # The ranks after which blocks begin.
    borders: list[int] = []
    for rank in at:
        # The end right before a layer leaves norms and activations to the layer in front of them.
        border = max((end for end in ends if end < rank), default=-1)
        if not borders or sum(borders[-1] < other <= border for other in at) >= _LEAST_LAYERS:
            borders.append(border)
    borders.append(len(nodes) - 1)  # the output
    found = []
    for index, begin in enumerate(borders[:-1]):
        end = borders[min(index + together, len(borders) - 1)]
        mine = tuple(layer for layer, rank in zip(ordered, at, strict=True) if begin < rank <= end)
        found.append(Segment(begin + 1, end, nodes[end], mine))
    return found


def entering(segment: Segment, nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes in front of a stretch whose values it reads; parameters of the graph's own aren't among them."""
    program = nodes[segment.first : nodes.index(segment.place) + 1]
    read = {parent for node in program for parent in node.all_input_nodes} - set(program)
    return [node for node in nodes if node in read and node.op != "get_attr"]


def floats(value: Any) -> list[Tensor]:
    """List the floating tensors of a value."""
    return [each for each in tensors_of(value) if each.is_floating_point()]


def alive(reached: Iterable[list[Tensor]]) -> list[Tensor | None]:
    """Return which values at a place differ between images in the pruned network; None where shapes differ."""
    found: list[tuple[Tensor, Tensor] | None] = []
    for index, batch in enumerate(reached):
        bounds = [(each.amin(0), each.amax(0)) for each in batch]
        found = [
            None if known is None or known[0].shape != low.shape else (known[0].minimum(low), known[1].maximum(high))
            for known, (low, high) in zip(found if index else bounds, bounds, strict=True)
        ]
    return [None if each is None else each[1] > each[0] for each in found]


def moments(values: Tensor) -> Tensor:
    """Return the number of values, their sum and the sum of their squares."""
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
