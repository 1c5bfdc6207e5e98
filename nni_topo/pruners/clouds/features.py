"""The feature cloud: the outputs of each neuron or filter on calibration data, after its activation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.modules.batchnorm import _BatchNorm

from nni_topo.context import in_context
from nni_topo.errors import ConfigError, DataError, LayerError
from nni_topo.network.attention.heads import find_heads
from nni_topo.network.channels.flow import ChannelFlow, followers, passes
from nni_topo.network.graph.tracing import trace
from nni_topo.network.layers.kinds import WEIGHTED, by_channel
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import detached_copy, evaluating
from nni_topo.network.runtime.fits import first_call
from nni_topo.network.runtime.inputs import Call, batch_size, bind_arguments, calls, fitting, real_positions
from nni_topo.pruners.clouds.moments import ChannelMoments, check_finite, check_reached, embedding
from nni_topo.pruners.hooks import Data, DataCollector, PruningContext
from nni_topo.pruners.units import PruningUnit, output_blocks
from nni_topo.rules import checked

_ACTIVATIONS = {"relu", "relu6", "leakyrelu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh"}
_ACTIVATIONS |= {"sigmoid", "hardsigmoid", "hardswish", "hardtanh", "softplus", "softsign", "logsigmoid"}


@dataclass(frozen=True)
class Tap:
    """Where a layer's features are taken, one node per call of it, and the names of the batch norms on the way."""

    layer: str
    nodes: tuple[Node, ...]
    norms: tuple[str, ...]


@dataclass(frozen=True)
class TracedNetwork:
    """A traced copy of a network: its graph, how channels flow through it, and where features are taken."""

    graph: GraphModule
    flow: ChannelFlow
    taps: dict[str, Tap]


class FeatureCollector(DataCollector):
    """The feature cloud: a neuron's outputs over the calibration samples are its coordinates.

    A layer's output is taken after the batch norms and the activation that follow it directly, so that a neuron
    which never fires is a point at zero. If the model calls a layer more than once, every call counts.

    Parameters
    ----------
    calibration : iterable
        Batches of inputs, or of ``(inputs, ...)``; a list or DataLoader, not a generator. At least two samples.

    Notes
    -----
    The first column of the collected rows is each neuron's mean output, the others are coordinates of its deviations
    from the mean. If a block has several channels, their columns stand side by side, channel by channel. All values are
    per sample and position, so they don't grow with the calibration set. Distances between rows are the distances
    between features; inner products without the first columns are covariances. Features wider than the layer are
    projected onto as many dimensions as there are neurons: exactly, by a pivoted Cholesky decomposition of their
    covariances, summed up batch by batch.
    """

    network: TracedNetwork
    """The network as the latest collection traced it."""

    @checked()
    def __init__(self, calibration: Iterable[Any]) -> None:
        self.calibration = Calibration.of(calibration)

    def check(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        """Raise ConfigError for layers that aren't linear layers or convolutions, or that belong to attention."""
        heads = {name for attention in find_heads(model).values() for name in attention.channels}
        for name, module in modules.items():
            if not isinstance(module, WEIGHTED) or name in heads:
                within = " within attention" if isinstance(module, WEIGHTED) else ""
                raise LayerError(
                    "features must be those of a linear layer or a convolution that the model itself calls, got "
                    f"{type(module).__name__}{within} ({name})",
                    [name],
                )

    def collect(self, context: PruningContext) -> Data:
        """Return float64 clouds ``(blocks, 1 + d)`` on the CPU, ``d`` at most the number of blocks or of samples."""
        batches = self.calibration
        layers = [module for unit in context.units for module, _ in unit.members]
        self.network = tapped_network(context.model, first_call(context.model, batches), layers)
        rows = {name: _Rows(name) for name in self.network.taps}
        runner = _Recorder(self.network, rows)
        samples = 0
        with torch.no_grad():
            for number, call in enumerate(calls(context.model, batches)):
                samples += batch_size(call)
                named = bind_arguments(context.model, call)
                with fitting(number, batches), in_context(real=real_positions(named)):
                    runner.run(*named.values())
        if samples < 2:
            raise DataError(f"calibration must hold at least two samples to be clustered by, got {samples}")

        def points(_: PruningUnit, module: str, target: str) -> Tensor:
            return rows[module].points()[output_blocks(context.target_spaces[module][target], "features")].flatten(1)

        return context.collected(points)


class _Rows:
    """Features of one layer: stored while they are few, else summed up as means and products."""

    def __init__(self, name: str) -> None:
        self._moments = ChannelMoments(name)
        self._few: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Add features ``(blocks, samples)``."""
        # A copy: in-place operations after the layer would change the rows.
        self._few.append(rows.clone())
        # Up to as many samples as neurons, the features take less memory than their products.
        if self._moments.samples or sum(batch.shape[1] for batch in self._few) > len(rows):
            for batch in self._few:
                self._moments.add(batch)
            self._few = []

    def points(self) -> Tensor:
        """Return means and deviations, shape ``(blocks, 1 + d)``, float64."""
        if self._moments.samples:
            # Points whose inner products are the covariances.
            deviations = embedding(self._moments.gram())
            return torch.cat([self._moments.mean(), deviations], 1)
        check_reached(len(self._few), self._moments.name)
        features = torch.cat(self._few, 1).double().cpu()
        check_finite(features, self._moments.name)
        mean = features.mean(1, keepdim=True)
        return torch.cat([mean, (features - mean) / math.sqrt(features.shape[1])], 1)


class _Recorder(Interpreter):
    """Runs a traced network and records the outputs of its taps."""

    def __init__(self, network: TracedNetwork, rows: dict[str, _Rows]) -> None:
        super().__init__(network.graph)
        self._rows = rows
        self._taps: dict[Node, list[Tap]] = {}
        for tap in network.taps.values():
            for node in tap.nodes:
                self._taps.setdefault(node, []).append(tap)

    def run_node(self, n: Node) -> Any:
        """Run a node, and record its output if it is a tap."""
        value = super().run_node(n)
        for tap in self._taps.get(n, ()):
            self._rows[tap.layer].add(by_channel(self.module.get_submodule(tap.layer), value))
        return value


def tapped_network(model: nn.Module, call: Call, layers: Iterable[str]) -> TracedNetwork:
    """Trace a copy of a network, with a tap for each of some layers."""
    recording = trace(evaluating(detached_copy(model)), call)
    graph = recording.graph_module
    flow = ChannelFlow(graph, recording.args)
    names = set(layers)
    occurrences: dict[str, list[tuple[Node, tuple[str, ...]]]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.target in names:
            occurrences.setdefault(str(node.target), []).append(_follow(graph, node))
    taps = {name: Tap(name, tuple(node for node, _ in places), places[0][1]) for name, places in occurrences.items()}
    missing = sorted(names - taps.keys())
    if missing:
        raise ConfigError(f"features need layers that the model calls, got none of {', '.join(missing)} (features)")
    return TracedNetwork(graph, flow, taps)


def _follow(graph: GraphModule, node: Node) -> tuple[Node, tuple[str, ...]]:
    """Follow a layer's output through batch norms up to its activation; stop where anything else happens to it."""
    norms: list[str] = []
    for follower in followers(node):
        if len(follower.all_input_nodes) != 1:
            break
        module = None
        name = getattr(follower.target, "__name__", follower.target)
        if follower.op == "call_module":
            module = graph.get_submodule(str(follower.target))
            name = type(module).__name__
        if str(name).replace("_", "").lower() in _ACTIVATIONS:
            return follower, tuple(norms)
        if isinstance(module, _BatchNorm):
            norms.append(str(follower.target))
        elif not passes(graph, follower):
            break
        node = follower
    return node, tuple(norms)
