"""Bounds on the error of a pruned network's output, as sums over its layers.

Theorem 2 of [1]_ bounds the error by a sum over layers: how much a layer's weights changed, times how strongly its
output depends on them, times how strongly the network's output depends on the layer's output. As printed it holds to
first order only: its derivatives are taken at the unpruned weights, and miss ReLUs that become active by the pruning.
This module has two forms: the printed one, and one with Lipschitz constants that holds for changes of any size.

References
----------
.. [1] S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
   Technology, 2019, section 3.3 and appendix B.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.fx import Graph, GraphModule, Node

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.graph.tracing import trace
from nni_topo.network.layers.kinds import WEIGHTED
from nni_topo.network.runtime.arguments import INPUTS, MODEL, check_model
from nni_topo.network.runtime.copies import evaluating, unwrapped_copy
from nni_topo.network.runtime.fits import call_arguments
from nni_topo.network.runtime.public import public
from nni_topo.rules import is_finite, whole
from nni_topo.studies.analysis.bounds.lipschitz import largest_changes, norm

_CONVERGED = 1e-5


@dataclass(frozen=True)
class LayerErrorBound:
    """The error due to one segment of the network: a layer, or a block with a branch around it.

    All norms are Euclidean, over the whole batch.
    """

    name: str  # its layers, joined by "+"
    change: float  # ||delta W||, biases and batch norms of the segment included
    weight_jacobian: float  # ||dY(l) / dW(l-1)||, the largest singular value
    downstream: float  # product of the ||dY(i) / dY(i-1)|| of all later segments
    first_order: float  # the segment's term of (3.9): the product of the three
    directional: float  # downstream * ||dY(l) / dW(l-1) delta W||, before norms are separated (B.5)
    lipschitz: float  # the segment's term of the Lipschitz bound


@dataclass(frozen=True)
class ErrorBound:
    """The error of a pruned network's output, and bounds on it."""

    layers: tuple[LayerErrorBound, ...]  # in network order
    error: float  # ||delta Y|| over the batch

    @property
    def first_order(self) -> float:
        """The sum of (3.9), a bound on the error only in the limit of small changes."""
        return sum(layer.first_order for layer in self.layers)

    @property
    def directional(self) -> float:
        """The sum of (B.5), tighter than (3.9); also a bound only in the limit of small changes."""
        return sum(layer.directional for layer in self.layers)

    @property
    def lipschitz(self) -> float:
        """The Lipschitz bound on the error, which holds for changes of any size."""
        return sum(layer.lipschitz for layer in self.layers)

    def to_frame(self) -> pd.DataFrame:
        """Return the layers as a table, a column per attribute."""
        return pd.DataFrame([asdict(layer) for layer in self.layers])

    def budgets(self, total: float | None = None) -> pd.DataFrame:
        """Split an allowed error ``total``, at least 0, over the layers by equation (3.10); None: the sum of (3.9).

        The columns are ``layer``; ``share``, the layer's share of the sum of (3.9), equal if nothing changed;
        ``epsilon``, the error that the layer may add; ``largest_change``, the ``||delta W||`` that (3.9) allows for
        ``epsilon``; ``change``, the layer's ``||delta W||``.
        """
        if total is None:
            total = self.first_order
        if not is_finite(total) or total < 0.0:
            raise ConfigError(f"an allowed error must be finite and at least 0, got {total!r} (total)")
        rows = []
        for layer in self.layers:
            share = layer.first_order / self.first_order if self.first_order > 0 else 1.0 / len(self.layers)
            reach = layer.downstream * layer.weight_jacobian
            largest = share * total / reach if reach > 0 else math.inf
            rows.append((layer.name, share, share * total, largest, layer.change))
        return pd.DataFrame(rows, columns=["layer", "share", "epsilon", "largest_change", "change"])


@public(original=MODEL, pruned=MODEL, inputs=INPUTS)
def error_bound(original: nn.Module, pruned: nn.Module, inputs: Tensor, *, iterations: int = 100) -> ErrorBound:
    """Bound the error of a pruned network's output, layer by layer.

    Parameters
    ----------
    original : torch.nn.Module
        The unpruned network.
    pruned : torch.nn.Module
        The same network with changed parameters, e.g. :func:`nni_topo.masked_model`; not made dense.
    inputs : torch.Tensor
        A batch, shape ``(n, ...)``.
    iterations : int, default=100
        Maximum number of steps of each power iteration for a Jacobian's norm, at least 1; it ends at convergence.

    Returns
    -------
    ErrorBound

    Raises
    ------
    ConfigError
        If the networks differ in more than the values of parameters, have several inputs or outputs, or contain an
        operation without a known Lipschitz constant.
    DataError
        If the inputs aren't a finite batch.
    SpeedupError
        If the network can't be traced.

    Notes
    -----
    Norms of Jacobians are largest singular values, approached from below by power iteration with forward and reverse
    derivatives; no Jacobian is stored. Jacobians are taken by a segment's changed parameters, or by all its parameters
    if none changed. Samples don't mix in evaluation mode, so the norm of ``dY(i) / dY(i-1)`` over a batch is the
    largest norm of a sample.

    The Lipschitz bound sums over layers the exact change of the layer's output at the unpruned network's activations,
    times the Lipschitz constants, with pruned weights, of all later operations.
    """
    whole(1).check("iterations", iterations, "error_bound")
    graph, pruned_graph = traced(original, inputs), traced(pruned, inputs)
    changes = _changes(graph, pruned_graph)
    segments = chain(graph)
    always = largest_changes(graph, pruned_graph, inputs)
    values = [inputs]  # input of each segment, then the output
    with torch.no_grad():
        error = norm(pruned_graph(inputs) - graph(inputs))
        for segment in segments:
            values.append(segment(values[-1], {}))
    # Norms dY(i) / dY(i-1) of all segments except the first: the largest norm of a sample, because samples don't mix.
    forwards = [
        jacobian_norm(partial(segment, parameters={}), value, per_sample=True, iterations=iterations)
        for segment, value in list(zip(segments, values, strict=False))[1:]
    ]
    layers = []
    for index, (segment, value) in enumerate(zip(segments, values, strict=False)):
        parameters = {name: p.detach() for name, p in segment.module.named_parameters()}
        changed = {name: changes[name] for name in parameters if bool(changes[name].any())}
        change = math.sqrt(sum(norm(difference) ** 2 for difference in changed.values()))
        # changed parameters, or all if none changed
        at = {name: parameters[name] for name in changed or parameters}
        forward = partial(segment, value)
        jacobian = jacobian_norm(forward, at, per_sample=False, iterations=iterations)
        step = norm(_tangent(forward, at, changed)) if changed else 0.0
        downstream = math.prod(forwards[index:])
        bound = sum(always.pop(name, 0.0) for name, _ in segment.module.named_modules())
        terms = (change * jacobian * downstream, step * downstream, bound)
        layers.append(LayerErrorBound("+".join(segment.layers), change, jacobian, downstream, *terms))
    return ErrorBound(tuple(layers), error)


def traced(model: nn.Module, inputs: Tensor) -> GraphModule:
    """Trace a copy of a model with one input in evaluation mode; DataError unless ``inputs`` are a finite batch."""
    if not isinstance(inputs, Tensor) or not inputs.numel():
        shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise DataError(f"inputs must be a batch of at least one sample, got {shape} (inputs)")
    if not bool(torch.isfinite(inputs).all()):
        raise DataError("inputs must be finite, got NaN or infinity (inputs)")
    check_model(model)
    net = evaluating(unwrapped_copy(model))
    net.requires_grad_(False)
    graph_module = trace(net, call_arguments(inputs, model)).graph_module
    count = sum(node.op == "placeholder" for node in graph_module.graph.nodes)
    if count != 1:
        raise ConfigError(f"the propagation of errors needs a model of one input, got {count} (model)")
    return graph_module


@dataclass(frozen=True)
class ChainSegment:
    """A part of a network with one input and one output; its module's parameters are named as in the network."""

    # names of convolutions and linear layers; several if a branch goes around them, as in a residual block
    layers: tuple[str, ...]
    module: GraphModule

    def __call__(self, value: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Run the segment with some of its parameters replaced."""
        output: Tensor = functional_call(self.module, parameters, (value,))
        return output


def chain(graph_module: GraphModule) -> list[ChainSegment]:
    """Cut a traced network with one output before each layer on whose input alone the rest of the network depends."""
    order = {node: rank for rank, node in enumerate(graph_module.graph.nodes)}
    alive: set[Node] = set()  # nodes that depend on the input and that later nodes use
    dependent: set[Node] = set()  # nodes that depend on the input
    starts: list[Node] = []  # input of each segment
    parts: list[list[Node]] = []
    named: list[list[str]] = []
    for node in graph_module.graph.nodes:
        entering = node.all_input_nodes
        if node.op == "placeholder":
            alive, dependent = {node}, {node}
        elif node.op == "output" and not isinstance(node.args[0], Node):
            kind = type(node.args[0]).__name__
            raise ConfigError(f"the propagation of errors needs a tensor as output, got a {kind} (model)")
        elif node.op != "output" and not dependent.isdisjoint(entering):
            is_layer = node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), WEIGHTED)
            # cut only where later nodes use a single value, so that a block with a branch isn't cut
            if not parts or (is_layer and named[-1] and len(alive) == 1 and entering == [*alive]):
                starts.append(entering[0])
                parts.append([])
                named.append([])
            parts[-1].append(node)
            if is_layer:
                named[-1].append(str(node.target))
            dependent.add(node)
            alive.add(node)
            alive = {source for source in alive if any(order[user] > order[node] for user in source.users)}
    if not parts or not named[0]:
        raise ConfigError("the propagation of errors needs a convolution or linear layer, got none (model)")
    segments = []
    for start, nodes, layers in zip(starts, parts, named, strict=True):
        graph = Graph()
        copies = {start: graph.placeholder("value")}

        def copy_node(node: Node, graph: Graph = graph, copies: dict[Node, Node] = copies) -> Node:
            if node not in copies:
                copies[node] = graph.node_copy(node, copy_node)
            return copies[node]

        graph.output([copy_node(node) for node in nodes][-1])
        segments.append(ChainSegment(tuple(dict.fromkeys(layers)), GraphModule(graph_module, graph)))
    return segments


def jacobian_norm(
    forward: Callable[[Any], Tensor], at: Any, *, per_sample: bool, iterations: int = 100, seed: int = 0
) -> float:
    """Approach a Jacobian's largest singular value from below by power iteration; 0 for a constant function."""
    # With per_sample the function maps each entry of the first dimension separately: each entry gets its own vector,
    # and the largest of the entries' singular values is returned.
    value, pull = vjp(forward, at)[:2]
    vector = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value)
    singular_value = 0.0
    for _ in range(iterations):
        vector, _ = _unit(vector, per_sample)
        (tangent,) = pull(vector)
        vector = _tangent(forward, at, tangent)
        # vector is J J^T times a unit vector: its length tends to the square of the singular value.
        _, lengths = _unit(vector, per_sample)
        last, singular_value = singular_value, math.sqrt(float(lengths.max()))
        if singular_value == 0.0 or abs(singular_value - last) <= _CONVERGED * singular_value:
            break
    return singular_value


def _unit(vector: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    """Return vectors scaled to length 1, and their original lengths; zero vectors stay zero."""
    rows = vector.reshape(len(vector), -1) if per_sample else vector.reshape(1, -1)
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return (rows / lengths.clamp(min=torch.finfo(rows.dtype).tiny)).reshape(vector.shape), lengths


def _changes(graph: GraphModule, pruned: GraphModule) -> dict[str, Tensor]:
    """Return the change of each parameter; ConfigError if anything else differs."""
    weights = dict(graph.named_parameters(remove_duplicate=False))
    pruned_weights = dict(pruned.named_parameters(remove_duplicate=False))
    shapes = {name: value.shape for name, value in weights.items()}
    pruned_shapes = {name: value.shape for name, value in pruned_weights.items()}
    unlike = sorted(
        name for name in shapes.keys() | pruned_shapes.keys() if shapes.get(name) != pruned_shapes.get(name)
    )
    if unlike:
        raise ConfigError(
            f"original and pruned must have parameters of the same shapes, got others ({', '.join(unlike[:3])})"
        )
    buffers, pruned_buffers = dict(graph.named_buffers()), dict(pruned.named_buffers())
    differing = []
    for name, buffer in buffers.items():
        if name not in pruned_buffers or not torch.equal(buffer, pruned_buffers[name]):
            differing.append(name)
    differing += [name for name in pruned_buffers if name not in buffers]
    if differing:
        raise ConfigError(f"original and pruned must share their buffers, got others ({', '.join(differing[:3])})")
    # the text of a traced network lists its modules with their settings, then its code
    steps, pruned_steps = str(graph).splitlines(), str(pruned).splitlines()
    if steps != pruned_steps:
        step = next((step for step, same in zip(steps, pruned_steps, strict=False) if step != same), steps[-1])
        raise ConfigError(
            f"original and pruned must differ in the values of parameters only, got another step for {step} (model)"
        )
    return {name: pruned_weights[name].detach() - weights[name].detach() for name in weights}


def _tangent(forward: Callable[[Any], Tensor], at: Any, direction: Any) -> Tensor:
    """Return the derivative of a function in a direction."""
    with warnings.catch_warnings():
        # PyTorch uses torch.jit.script for its own rules of forward derivatives.
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
        tangent: Tensor = jvp(forward, (at,), (direction,))[1]
    return tangent
