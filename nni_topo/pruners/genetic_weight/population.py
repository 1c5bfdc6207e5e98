"""Accuracy of many masks of the same layers at once.

The input of the first masked layer doesn't depend on the masks, so it is computed once. Then only the rest of the
network runs, for as many masks at a time as fit into memory, like a larger batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.fx import Interpreter, Node

from nni_topo.errors import DataError, SpeedupError
from nni_topo.maths.search.weights import BoolArray, FloatArray
from nni_topo.network.graph.tracing import trace
from nni_topo.network.layers.derived import has_own_forward
from nni_topo.network.runtime.comparison import SAME_CHANNELS, agree
from nni_topo.network.runtime.copies import evaluating, unwrapped_copy
from nni_topo.network.runtime.inputs import arguments_of, fitting
from nni_topo.recovery.replay import without_side_effects

_logger = logging.getLogger(__name__)

_LARGEST_CHUNK = 256
TOGETHER = 2**28
"""Approximate bytes of the individuals that run together."""


class MaskedScores:
    """Scores masks one by one: mask, call ``score()``, unmask; it works for every network.

    ``biases``: each weight's bias, or None. An output that loses all of its weights loses its bias, too.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], score: Callable[[], float]) -> None:
        self.weights, self.biases = list(weights), list(biases)
        self.score = score

    def __call__(self, population: Iterable[BoolArray]) -> FloatArray:
        """Return the scores, shape ``(individuals,)``; DataError if one isn't a finite number."""
        changed = [parameter for parameter in (*self.weights, *self.biases) if parameter is not None]
        before = [parameter.detach().clone() for parameter in changed]
        scores = []
        try:
            for genes in population:
                for parameter, value in zip(changed, before, strict=True):
                    parameter.data.copy_(value)
                for weight, bias, mask in zip(self.weights, self.biases, split_genes(genes, self.weights), strict=True):
                    weight.data.mul_(mask)
                    if bias is not None:
                        bias.data.mul_(mask.flatten(1).any(1))
                scores.append(self.score())
                if not np.isfinite(scores[-1]):
                    raise DataError(f"an evaluation must return a finite number, got {scores[-1]} (genetic search)")
        finally:
            for parameter, value in zip(changed, before, strict=True):
                parameter.data.copy_(value)
        return np.array(scores)


def split_genes(genes: BoolArray, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return a boolean mask per weight tensor, on its device."""
    masks, start = [], 0
    for weight in weights:
        part = torch.from_numpy(genes[start : start + weight.numel()])
        masks.append(part.reshape(weight.shape).to(weight.device))
        start += weight.numel()
    return masks


class PopulationAccuracy:
    """Accuracies of masked networks on batches ``(inputs, labels)``; genes are the layers' weights, concatenated."""

    def __init__(
        self, model: nn.Module, layers: Sequence[str], batches: Iterable[Any], *, max_bytes: int = TOGETHER
    ) -> None:
        self._model = evaluating(unwrapped_copy(model))
        self._names = list(layers)
        self._layers: list[Any] = [self._model.get_submodule(name) for name in layers]
        device = next(self._model.parameters()).device
        self._batches: list[tuple[Tensor, Tensor]] = []
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2 or len(batch[0]) != len(batch[1]):
                got = type(batch).__name__
                raise DataError(f"validation must hold pairs (inputs, labels) of one length, got {got}")
            inputs, labels = batch
            self._batches.append((inputs.to(device), labels.to(device)))
        self.samples = sum(len(labels) for _, labels in self._batches)
        if not self.samples:
            raise DataError("validation must hold at least one labelled image, got none (validation)")
        self._max_bytes = max_bytes
        self._tails = self._cut_graph()  # empty: masks are run one by one

    def __call__(self, population: Iterable[BoolArray]) -> FloatArray:
        """Return the accuracies, shape ``(individuals,)``, in [0, 1]."""
        layer_weights = [layer.weight for layer in self._layers]
        if not self._tails:
            return MaskedScores(layer_weights, [layer.bias for layer in self._layers], self._accuracy)(population)
        # Bytes per individual, roughly, in float32: three times the largest activation; masks and masked weights.
        genes = sum(int(weight.numel()) for weight in layer_weights)
        individual_bytes = 4 * (3 * max(tail.elements for tail in self._tails) + 2 * genes)
        # The population may be a generator: taking it in chunks bounds memory.
        size = max(1, min(_LARGEST_CHUNK, self._max_bytes // individual_bytes))
        source, hits = iter(population), []
        while chunk := list(islice(source, size)):
            masks_by_layer = zip(*(split_genes(genes, layer_weights) for genes in chunk), strict=True)
            total = torch.zeros(len(chunk), dtype=torch.int64, device=layer_weights[0].device)
            with torch.no_grad():
                weights = []
                for weight, masks in zip(layer_weights, masks_by_layer, strict=True):
                    weights.append(torch.stack(masks) * weight)
                for tail in self._tails:
                    total += (tail.logits(weights).argmax(2) == tail.labels).sum(1)
            hits.append(total.cpu().numpy())
        return np.concatenate(hits) / self.samples

    def _accuracy(self) -> float:
        """Return the accuracy of the model as it is."""
        hits = 0
        for index, (inputs, labels) in enumerate(self._batches):
            with torch.no_grad(), fitting(index, "validation"):
                hits += int((_logits(self._model(inputs), labels).argmax(1) == labels).sum())
        return hits / self.samples

    @torch.no_grad()
    def _cut_graph(self) -> list[_Tail]:
        """Cut the graph at the masked layers, unless the parts don't compute what the model does; then nothing."""
        inputs, labels = self._batches[0]
        with fitting(0, "validation"):
            expected = _logits(self._model(inputs), labels)
        try:
            graph = without_side_effects(trace(self._model, arguments_of(inputs[:2])).graph_module)
            tails = [_Tail(graph, self._names, *batch) for batch in self._batches]
            logits = tails[0].logits([layer.weight[None] for layer in self._layers])[0]
            # The graph has only the branches that the traced batch took, and batched products are rounded differently.
            if agree([expected], [logits], SAME_CHANNELS):
                return tails
        # A model's own code may raise any of these when run in pieces; running masks one by one always works.
        except (SpeedupError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError):
            _logger.debug("the graph of %s can't be cut", type(self._model).__name__, exc_info=True)
        _logger.warning("the graph can't be cut at %s: masks are run one by one", ", ".join(self._names))
        return []


class _Tail:
    """The part of a network that depends on masked layers, with the other activations of one batch that it reads."""

    def __init__(self, graph: torch.fx.GraphModule, names: Sequence[str], inputs: Tensor, labels: Tensor) -> None:
        self.labels = labels
        self._names = list(names)
        # Garbage collection works in run() only, and nodes are run one by one here.
        self._run = Interpreter(graph, garbage_collect_values=False)
        nodes: list[Node] = list(graph.graph.nodes)
        missing = set(names) - {str(node.target) for node in nodes if node.op == "call_module"}
        if missing:
            raise KeyError(f"layers that the graph doesn't call: {missing}")
        dependent: set[Node] = set()
        constants: dict[Node, Any] = {}
        for node in nodes:
            if self._is_masked(node) or any(operand in dependent for operand in node.all_input_nodes):
                dependent.add(node)
            elif node.op == "placeholder":
                constants[node] = inputs
            else:
                constants[node] = self._compute(node, constants)
        self._nodes = [node for node in nodes if node in dependent]
        # Of the activations that no mask changes, keep only those that the masked part reads.
        used = {operand for node in self._nodes for operand in node.all_input_nodes}
        self._known = {node: value for node, value in constants.items() if node in used}
        self.elements = 0  # of an individual's largest activation, once it has run

    def logits(self, weights: Sequence[Tensor]) -> Tensor:
        """Return the outputs ``(individuals, samples, classes)`` for weights ``(individuals, ...)``."""
        outputs: Tensor = vmap(self._outputs)(*weights)
        return outputs

    def _outputs(self, *weights: Tensor) -> Tensor:
        """Run one individual; under vmap it runs all of them, and their shared computations once."""
        values, masked = dict(self._known), dict(zip(self._names, weights, strict=True))
        for node in self._nodes:
            if self._is_masked(node):
                values[node] = self._masked_output(node, values[node.all_input_nodes[0]], masked[str(node.target)])
            else:
                values[node] = self._compute(node, values)
        sizes = (values[node].numel() for node in self._nodes if isinstance(values[node], Tensor))
        self.elements = max(self.elements, *sizes)
        return _logits(values[self._nodes[-1]], None)

    def _masked_output(self, node: Node, entering: Tensor, weight: Tensor) -> Tensor:
        """Return the output of a layer with a masked weight."""
        layer: Any = self._run.fetch_attr(str(node.target))
        # An output that lost all of its weights loses its bias, as in NNI's masks.
        bias: dict[str, Tensor] = {}
        if layer.bias is not None:
            bias["bias"] = layer.bias * weight.flatten(1).any(1)
        if isinstance(layer, nn.Linear) and not has_own_forward(layer) and node.all_input_nodes[0] in self._known:
            # With the weight on the left, vmap multiplies the weights of all individuals at once; linear() would
            # multiply the weights of each individual separately.
            product: Tensor = (weight @ entering.flatten(0, -2).mT).mT.contiguous().unflatten(0, entering.shape[:-1])
            return product + bias.get("bias", 0.0)
        outputs: Tensor = functional_call(layer, {"weight": weight, **bias}, (entering,))
        return outputs

    def _is_masked(self, node: Node) -> bool:
        return node.op == "call_module" and node.target in self._names

    def _compute(self, node: Node, values: Mapping[Node, Any]) -> Any:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda operand: values[operand])
        return getattr(self._run, node.op)(node.target, args, kwargs)


def _logits(outputs: Any, labels: Tensor | None) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise DataError(f"a classifier's output must be (samples, classes), got {got} (validation)")
    if labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < outputs.shape[1]:
        raise DataError(f"labels must be below the {outputs.shape[1]} outputs, got {int(labels.max())} (validation)")
    return outputs
