"""Cut a network into a chain of segments: a layer with weights and the operations up to the next such layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Graph, GraphModule, Node

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.graph.tracing import trace
from nni_topo.network.layers.kinds import WEIGHTED
from nni_topo.network.runtime.arguments import check_model
from nni_topo.network.runtime.copies import evaluating, unwrapped_copy
from nni_topo.network.runtime.fits import call_arguments


@dataclass(frozen=True)
class ChainSegment:
    """A part of a network with one input and one output; its module's parameters are named as in the network."""

    # convolutions and linear layers; several if a branch bypasses them, as in a residual block
    layers: tuple[str, ...]
    module: GraphModule

    @property
    def name(self) -> str:
        """Its layers, joined by ``+``."""
        return "+".join(self.layers)

    def __call__(self, value: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Run the segment with some of its parameters replaced."""
        result: Tensor = functional_call(self.module, parameters, (value,))
        return result


def traced(model: nn.Module, inputs: Tensor) -> GraphModule:
    """Trace a copy of a model of one input in evaluation mode; DataError unless ``inputs`` are a finite batch."""
    if not isinstance(inputs, Tensor) or not inputs.numel():
        shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise DataError(f"inputs must be a batch of at least one sample, got {shape} (inputs)")
    if not bool(torch.isfinite(inputs).all()):
        raise DataError("inputs must be finite, got NaN or infinity (inputs)")
    check_model(model)
    net = evaluating(unwrapped_copy(model))
    net.requires_grad_(False)
    recording = trace(net, call_arguments(inputs, model))
    graph_module = recording.graph_module
    count = sum(node.op == "placeholder" for node in graph_module.graph.nodes)
    if count != 1:
        raise ConfigError(f"the propagation of errors needs a model of one input, got {count} (model)")
    return graph_module


def chain(graph_module: GraphModule) -> list[ChainSegment]:
    """Cut a traced network with one output before each layer whose input is all that the rest depends on."""
    segments: list[list[Node]] = [[]]
    starts: list[Node] = []
    named: list[list[str]] = [[]]
    for node, entering in _steps(graph_module.graph):
        is_layer = node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), WEIGHTED)
        if not starts:
            starts.append(node.all_input_nodes[0])
        # only where all later nodes depend on a single value: a block with a branch isn't cut
        elif is_layer and named[-1] and entering is not None and node.all_input_nodes == [entering]:
            starts.append(entering)
            segments.append([])
            named.append([])
        segments[-1].append(node)
        if is_layer:
            named[-1].append(str(node.target))
    if not named[0]:
        raise ConfigError("the propagation of errors needs a convolution or linear layer, got none (model)")
    return [
        ChainSegment(tuple(dict.fromkeys(layers)), _segment(graph_module, start, nodes))
        for start, nodes, layers in zip(starts, segments, named, strict=True)
    ]


def _steps(graph: Graph) -> Iterator[tuple[Node, Node | None]]:
    """Yield the nodes that depend on the input, each with the single value that it and all later nodes depend on."""
    order = {node: rank for rank, node in enumerate(graph.nodes)}
    alive: set[Node] = set()
    dependent: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            alive, dependent = {node}, {node}
        elif node.op == "output":
            if not isinstance(node.args[0], Node):
                kind = type(node.args[0]).__name__
                raise ConfigError(f"the propagation of errors needs a tensor as output, got a {kind} (model)")
        elif any(parent in dependent for parent in node.all_input_nodes):
            yield node, next(iter(alive)) if len(alive) == 1 else None
            dependent.add(node)
            alive = {each for each in {*alive, node} if any(order[user] > order[node] for user in each.users)}


def _segment(graph_module: GraphModule, start: Node, nodes: list[Node]) -> GraphModule:
    graph = Graph()
    copies = {start: graph.placeholder("value")}

    def copied(node: Node) -> Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    for node in nodes:
        copied(node)
    graph.output(copies[nodes[-1]])
    return GraphModule(graph_module, graph)
