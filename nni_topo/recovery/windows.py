"""Stretches of a network's graph as functions of how the weights of some of its layers change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx import GraphModule, Interpreter, Node

from nni_topo.network.layers import by_output, is_plain_norm, of_output, safely_laid_out, through_norms
from nni_topo.recovery.plan import Solvable
from nni_topo.recovery.reconstruct import ReconstructTask, add_constant
from nni_topo.recovery.replay import Values

_LEAST_LAYERS = 2  # in a block
_TOGETHER = 2  # blocks that are solved at once


@dataclass(frozen=True)
class Segment:
    """Some layers, and a place after them; nodes before `first` don't belong to it."""

    first: int  # rank of the first node that is run
    place: Node
    layers: tuple[Solvable, ...]


def segments(nodes: Sequence[Node], touched: Collection[Node], layers: Iterable[Solvable], ahead: int) -> list[Segment]:
    """Return two neighbouring blocks after the other, each with a place `ahead` layers after it.

    Everything flows through the ends of blocks alone, and they hold two layers at least, but for the last one.
    ``touched``: nodes that depend on what is pruned. The place is the end of the first block with so many layers
    between the two, or what the network puts out.
    """
    ranks = {node: rank for rank, node in enumerate(nodes)}
    ordered = sorted(layers, key=lambda layer: ranks[layer.node])
    at = [ranks[layer.node] for layer in ordered]
    last = len(nodes) - 1  # the output
    borders = [*_borders(_ends(nodes, touched, ranks), at), last]
    found = []
    for index, begin in enumerate(borders[:-1]):
        end = borders[min(index + _TOGETHER, len(borders) - 1)]
        mine = tuple(layer for layer, rank in zip(ordered, at, strict=True) if begin < rank <= end)
        far = (border for border in borders if sum(end < rank <= border for rank in at) >= ahead)
        found.append(Segment(begin + 1, nodes[next(far, last)], mine))
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


class Window:
    """What a network puts out at the end of a stretch, as a function of changes of weights and constants."""

    # Unknowns are two tensors a layer: of the weights between kept channels, (groups, rows, columns, kernel), and of
    # the constants of its outputs, (groups, rows), which stay 0 where nobody can take them.

    def __init__(self, segment: Segment, network: GraphModule, tasks: dict[str, ReconstructTask]) -> None:
        # Of the network's own graph, whose nodes have the names of the unpruned one's.
        nodes: list[Node] = list(network.graph.nodes)
        end = next(rank for rank, node in enumerate(nodes) if node.name == segment.place.name)
        program = nodes[segment.first : end + 1]
        read = {parent for node in program for parent in node.all_input_nodes} - set(program)
        self._program = [node for node in nodes if node in read and node.op == "get_attr"] + program
        self._runner = Interpreter(network)
        self._network = network
        self._layers = {layer.name: layer for layer in segment.layers}
        norms = {str(node.target) for node in program if node.op == "call_module"}
        self._norms = {name: _affine(network.get_submodule(name)) for name in norms if _is_affine(network, name)}
        self._blocks = {name: tasks[name].block(self._weight(name)) for name in self._layers}

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
