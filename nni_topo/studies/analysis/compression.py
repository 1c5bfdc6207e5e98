"""The topologically critical compression ratio: how far a layer can be pruned if its spanning tree is kept.

Source: Zeroth-Order Topological Insights into Iterative Magnitude Pruning, definition 3.1, theorem 3.2, appendices E
and F.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from nni.compression.base.setting import PruningSetting
from rich.console import RenderableType
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.network.layers.derived import padded_size
from nni_topo.network.runtime.arguments import INPUTS, MODEL
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.rules import checked, number
from nni_topo.studies.analysis.layers import weight_layers
from nni_topo.studies.study import Findings, ModelVerb, Study, Tell
from nni_topo.studies.tables import table_of
from nni_topo.zoo import create_model, list_models

Convention = Literal["theorem", "tables"]


@dataclass(frozen=True)
class LayerCount:
    """The numbers that give a layer's critical ratio."""

    kind: str  # dense, recurrent or conv
    edges: int  # edges of the layer's graph; for a convolution, between one input plane and one output plane
    tree_edges: int  # number of nodes of this graph minus one
    weights: int
    channel_tree: int  # number of weights that connect all channels, see `nni_topo.topology.channel_tree`

    @property
    def ratio(self) -> float:
        """Edges over tree edges; below 1 if a convolution's planes aren't connected, as with a 1x1 kernel."""
        return self.edges / self.tree_edges

    @property
    def weight_ratio(self) -> float:
        """Weights over weights of the channel tree: the largest compression of a mask that keeps the tree."""
        return self.weights / self.channel_tree

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "ratio": self.ratio, "weight_ratio": self.weight_ratio}


@dataclass(frozen=True)
class CriticalCompression(Findings):
    """Critical compression ratios of a model."""

    stem = "compression"
    convention: Convention  # how edges of convolutions were counted
    counts: dict[str, LayerCount]  # by layer, in the model's order
    skipped: dict[str, str]  # modules whose weights aren't counted, with the reason: type, "1x1" or "never run"

    @property
    def layers(self) -> dict[str, float]:
        """Critical ratio by layer."""
        return {name: count.ratio for name, count in self.counts.items()}

    @property
    def final(self) -> float:
        """Critical ratio of the model: all edges over all tree edges."""
        return _pooled_ratio(self.counts.values())

    def by_kind(self) -> dict[str, float]:
        """Return the ratio of all layers of each kind together, ``"dense"``, ``"conv"``, ``"recurrent"``."""
        kinds = dict.fromkeys(count.kind for count in self.counts.values())
        return {kind: _pooled_ratio(c for c in self.counts.values() if c.kind == kind) for kind in kinds}

    def to_dict(self) -> dict[str, Any]:
        layers = {name: count.to_dict() for name, count in self.counts.items()}
        summary = {"final": self.final, "by_kind": self.by_kind(), "skipped": self.skipped}
        return {"convention": self.convention, "layers": layers, **summary}


@dataclass(frozen=True, kw_only=True)
class AnalyzeCompression(ModelVerb, Study[CriticalCompression]):
    """Compute how far layers can be pruned if their spanning trees are kept."""

    input_size: tuple[int, ...]  # shape of one input without the batch; for images channels, height and width in pixels
    classes: int = 10  # number of outputs
    convention: str = "theorem"  # theorem or tables

    def find(self, tell: Tell) -> CriticalCompression:
        size = self.input_size
        if not size or min(size) < 1:
            raise ConfigError(f"input_size must be one or more numbers of at least 1, got {size}")
        # models that aren't in the list may take inputs of any shape
        if self.model in list_models() and (len(size) != 3 or size[1] != size[2]):
            raise ConfigError(f"input_size must be channels, height and width of a square, got {size}")
        shape = {"num_classes": self.classes, "in_channels": size[0], "image_size": size[-1]}
        net = create_model(self.model, width=self.width, seed=self.seed, **shape)
        return critical_compression_ratio(net, torch.zeros(1, *size), cast(Convention, self.convention))

    def show(self, findings: CriticalCompression) -> Iterator[RenderableType]:
        counts = findings.counts.values()
        sums = [sum(getattr(c, name) for c in counts) for name in ("edges", "tree_edges", "weights", "channel_tree")]
        columns = {
            "layer": "{name}",
            "kind": "{kind}",
            "edges": "{edges}",
            "tree edges": "{tree_edges}",
            "critical ratio": "{ratio:.5f}",
            "weights": "{weights}",
            "channel tree": "{channel_tree}",
            "ratio of weights": "{weight_ratio:.5f}",
        }
        rows = [{"name": name, **count.to_dict()} for name, count in findings.counts.items()]
        total = {"name": "all", **LayerCount("", *sums).to_dict()}
        title = f"{self.model_choice.label}, {'x'.join(map(str, self.input_size))}, as in the {self.convention}"
        yield table_of(title, rows, columns, [total], text_columns=2)
        yield "by kind: " + ", ".join(f"{kind} {ratio:.4f}" for kind, ratio in findings.by_kind().items())
        if findings.skipped:
            yield "skipped: " + ", ".join(f"{name} ({why})" for name, why in findings.skipped.items())


@public(model=MODEL, example_inputs=INPUTS)
def critical_compression_ratio(
    model: nn.Module, example_inputs: Any, convention: Convention = "theorem"
) -> CriticalCompression:
    """Compute how far each layer, and the model, can be pruned if maximum spanning trees are kept.

    Parameters
    ----------
    model : torch.nn.Module
        Any model; its weights' values don't matter. It isn't changed.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Its inputs; the first dimension is the batch.
    convention : {"theorem", "tables"}, default="theorem"
        How edges of a convolution are counted, between one input plane and one output plane.
        ``"theorem"``: at the true input size with padding, stride and dilation. ``"tables"``: as in the paper's tables,
        at stride 1 on an input of the output's size; 1x1 convolutions aren't counted.

    Returns
    -------
    CriticalCompression
        ``.layers`` (name to ratio), ``.final``, ``.counts``, ``.skipped``.

    Raises
    ------
    ConfigError
        If the convention is unknown, or the model has no linear, convolutional or recurrent layer that is run.

    Notes
    -----
    A linear layer, and each gate of a recurrent layer, has ``out * in`` edges and a tree of ``out + in - 1`` edges. A
    convolution has ``kernel * positions`` edges and, by the theorem, a tree with one edge less than padded input
    positions plus output positions. The ratios are ratios of *edges*: the positions of a convolution share weights, so
    the ratio of weights differs, see :attr:`LayerCount.weight_ratio`.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    >>> found = critical_compression_ratio(model, torch.ones(1, 784))
    >>> {name: round(ratio, 5) for name, ratio in found.layers.items()}
    {'0': 88.78822, '2': 9.17431}
    """
    layers, skipped = weight_layers(model)
    sizes = Analysis.on(model, example_inputs).planes
    counts: dict[str, LayerCount] = {}
    for layer in layers:
        kernel = layer.weight.shape[2:]
        if layer.kind != "conv":
            edges, tree = layer.weight.size, sum(layer.weight.shape) - 1
        elif layer.name not in sizes:
            skipped[layer.name] = "never run"
            continue
        elif convention == "tables" and math.prod(kernel) == 1:
            skipped[layer.name] = "1x1"
            continue
        else:
            # between one input plane and one output plane
            entering, leaving = sizes[layer.name]
            padded = padded_size(layer.module, entering)
            if convention == "tables":
                padded = padded_size(layer.module, leaving)
                leaving = tuple(max(1, size - width + 1) for size, width in zip(padded, kernel, strict=True))
            positions = math.prod(leaving)
            edges, tree = math.prod(kernel) * positions, math.prod(padded) + positions - 1
        counts[layer.name] = LayerCount(layer.kind, edges, tree, layer.weight.size, layer.channel_tree)
    if not counts:
        listing = ", ".join(f"{name} ({why})" for name, why in skipped.items())
        raise ConfigError(f"a model must have a layer that can be counted, got only {listing} ({convention})")
    return CriticalCompression(convention, counts, skipped)


@checked(model=MODEL)
def critical_config_list(model: nn.Module, sparse_ratio: float) -> list[dict[str, Any]]:
    """Return a config_list by which every layer keeps at least as many weights as its spanning tree has.

    For pruners of single weights, such as NNI's ``LevelPruner``. Only the number of kept weights is ensured, not that
    they connect all channels; :class:`~nni_topo.TopologicalMagnitudePruner` keeps weights that do.

    Parameters
    ----------
    model : torch.nn.Module
        The model; its linear layers and convolutions are pruned, except types that NNI doesn't know.
    sparse_ratio : float
        Share of each layer's weights to remove, in (0, 1); smaller if fewer weights would remain than the tree has.

    Returns
    -------
    list of dict
        An entry per layer, with ``sparse_ratio`` and ``max_sparse_ratio``.

    Raises
    ------
    ConfigError
        If the ratio isn't in (0, 1), or the model has no such layer.

    Examples
    --------
    >>> critical_config_list(nn.Sequential(nn.Linear(10, 10)), 0.9)
    [{'op_names': ['0'], 'sparse_ratio': 0.9, 'max_sparse_ratio': 0.815}]
    """
    number(0, 1, "neither").check("sparse_ratio", sparse_ratio, "critical_config_list")
    # Types that NNI doesn't know, such as unregistered subclasses, can't be in a config_list.
    prunable = [layer for layer in weight_layers(model)[0] if layer.kind != "recurrent"]
    layers = [layer for layer in prunable if type(layer.module).__name__ in PruningSetting.registry]
    if not layers:
        raise ConfigError("a config_list of critical ratios needs linear layers or convolutions, got none (model)")
    # Half a weight is added, because rounding could make int(weights * ratio) too small by one.
    return [
        {
            "op_names": [layer.name],
            "sparse_ratio": sparse_ratio,
            "max_sparse_ratio": (layer.weight.size - layer.channel_tree + 0.5) / layer.weight.size,
        }
        for layer in layers
    ]


def _pooled_ratio(counts: Iterable[LayerCount]) -> float:
    layer_counts = list(counts)
    return sum(count.edges for count in layer_counts) / sum(count.tree_edges for count in layer_counts)
