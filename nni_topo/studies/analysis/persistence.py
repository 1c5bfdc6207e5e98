"""Neural persistence: the zeroth homology of a layer's weights as one number, also during training.

References
----------
.. [1] B. Rieck et al., "Neural Persistence: A Complexity Measure for Deep Neural Networks Using Algebraic
   Topology", ICLR 2019, https://arxiv.org/abs/1812.09764
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import RenderableType
from torch import nn

from nni_topo import zoo
from nni_topo.errors import ConfigError, DataError
from nni_topo.maths.topology.layer_trees import channel_tree, spanning_forest
from nni_topo.network.runtime.arguments import INPUTS, MODEL
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.rules import NONE, number
from nni_topo.runs.run import build_model, load_model_data, resolve_device
from nni_topo.studies.analysis.layers import weight_layers
from nni_topo.studies.study import Findings, Tell, TrainedStudy
from nni_topo.studies.tables import table_of

ConvGraph = Literal["channel", "toeplitz"]
Scale = Literal["layer", "model"]


@dataclass(frozen=True, eq=False)
class NeuralPersistence:
    """Neural persistence of a model."""

    layers: dict[str, float]  # neural persistence by layer, in the model's order
    deaths: dict[str, NDArray[np.float64]]  # by layer, w' in [0, 1], descending: each is a point (1, w') of the diagram
    normalized: bool  # whether the layers' values are divided by their upper bounds
    skipped: dict[str, str]  # skipped modules with weights, with the reason: type or "never run"

    @property
    def total(self) -> float:
        """Sum over the layers."""
        return sum(self.layers.values())

    @property
    def mean(self) -> float:
        """Mean over the layers."""
        return self.total / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        summary = {"total": self.total, "mean": self.mean, "normalized": self.normalized, "skipped": self.skipped}
        return {**summary, "layers": self.layers, "deaths": {name: d.tolist() for name, d in self.deaths.items()}}


@public(model=MODEL, example_inputs=INPUTS | NONE, p=number(1.0))
def neural_persistence(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    p: float = 2.0,
    normalized: bool = False,
    conv_graph: ConvGraph = "channel",
    scale: Scale = "layer",
) -> NeuralPersistence:
    """Compute the neural persistence of every layer of a model.

    Edges are added in descending order of ``w' = |w| / max |w|``. Every node is born at 1, and each edge of the maximum
    spanning tree merges two components, so that the diagram has a point ``(1, w')`` for each edge of the tree.

    Parameters
    ----------
    model : torch.nn.Module
        Any model; it isn't changed. If NNI has wrapped it, masked weights count as 0.
    example_inputs : Tensor, tuple, list, mapping of str to Any or None, default=None
        The model's inputs; needed for ``conv_graph="toeplitz"`` only.
    p : float, default=2.0
        Order of the norm of the persistences ``1 - w'``, at least 1.
    normalized : bool, default=False
        Divide each layer by its upper bound, so that it lies in [0, 1]; a layer whose ``w'`` are all 1 gets 0.
    conv_graph : {"channel", "toeplitz"}, default="channel"
        A convolution's graph. ``"channel"``: channels joined by the largest |w| of their kernel; ``"toeplitz"``:
        channels and positions joined as in the Toeplitz matrix.
    scale : {"layer", "model"}, default="layer"
        Divide by the largest |w| of each layer, or of the model as in [1]_.

    Returns
    -------
    NeuralPersistence
        ``.layers``, ``.total``, ``.mean``.

    Raises
    ------
    ConfigError
        If an argument is out of its range, or the model has no supported layer.
    DataError
        If the weights of a layer are all zero, NaN or infinite.

    Notes
    -----
    The upper bound of theorem 1 of [1]_ is ``(1 - min w') * edges ** (1 / p)``, because no persistence is larger than
    ``1 - min w'``; ``edges`` is the number of edges of the tree, ``m + n - 1`` for a linear layer.

    Examples
    --------
    >>> import torch
    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[4.0, 2.0], [1.0, 0.0]]))
    >>> found = neural_persistence(layer)
    >>> found.deaths[""].tolist(), round(found.total, 4)
    ([1.0, 0.5, 0.25], 0.9014)
    """
    if conv_graph == "toeplitz" and example_inputs is None:
        raise ConfigError("conv_graph 'toeplitz' needs example_inputs, got None (neural_persistence)")
    layers, skipped = weight_layers(model)
    sizes = Analysis.on(model, example_inputs).planes if conv_graph == "toeplitz" else {}
    largest: dict[str, float] = {}
    for layer in layers:
        bad = int((~np.isfinite(layer.weight)).sum())
        if bad:
            raise DataError(f"weights must be finite, got {bad} NaN or infinite values ({layer.name})")
        largest[layer.name] = float(np.abs(layer.weight).max())
        if largest[layer.name] == 0.0:
            raise DataError(f"a layer must have a weight other than 0, got {layer.weight.size} zeros ({layer.name})")
    values: dict[str, float] = {}
    deaths: dict[str, NDArray[np.float64]] = {}
    for layer in layers:
        magnitudes = np.abs(layer.weight)
        # |w| of the tree's edges, descending, and the smallest |w| of all edges
        if layer.kind == "conv" and conv_graph == "channel":
            lengths = np.sort(magnitudes[channel_tree(layer.weight, groups=layer.groups)])[::-1]
            least = float(magnitudes.max(axis=tuple(range(2, magnitudes.ndim))).min())
        elif layer.kind == "conv" and layer.name not in sizes:
            skipped[layer.name] = "never run"
            continue
        else:
            size = sizes[layer.name][0] if layer.kind == "conv" else None
            lengths = spanning_forest(layer.weight, layer.graph(size)).lengths
            least = float(magnitudes.min())
        top = largest[layer.name] if scale == "layer" else max(largest.values())
        deaths[layer.name] = lengths / top
        bound = 1.0
        if normalized:
            bound = (1.0 - least / top) * len(lengths) ** (1.0 / p)
        # the p-norm of the persistences, scaled so that a large p doesn't underflow
        persistences = 1.0 - deaths[layer.name]
        longest = float(persistences.max())
        norm = 0.0
        if longest > 0:
            norm = longest * float(np.linalg.norm(persistences / longest, ord=p))
        values[layer.name] = norm / bound if bound > 0 else 0.0
    if not values:
        listing = ", ".join(f"{name} ({why})" for name, why in skipped.items())
        raise ConfigError(f"a model must have a supported layer that is run, got only {listing} (neural_persistence)")
    return NeuralPersistence(values, deaths, normalized, skipped)


@dataclass(frozen=True)
class PersistenceStudy(Findings):
    """Neural persistence before training and after each epoch, or of one trained model."""

    stem = "persistence"
    history: list[NeuralPersistence]

    def to_dict(self) -> dict[str, Any]:
        return {
            "totals": [record.total for record in self.history],
            "layers": {name: [record.layers[name] for record in self.history] for name in self.history[-1].layers},
            "last": self.history[-1].to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class AnalyzePersistence(TrainedStudy[PersistenceStudy]):
    """Compute the neural persistence of a trained model, or, without a checkpoint, during its training."""

    p: float = 2.0  # order of the norm, at least 1
    normalized: bool = False  # divide each layer by its upper bound
    conv_graph: str = "channel"  # channel or toeplitz
    scale: str = "layer"  # divide by the largest weight of each layer or of the model: layer or model

    def find(self, tell: Tell) -> PersistenceStudy:
        place = resolve_device(self.device)
        bundle = load_model_data(self.model_choice, self.data_choice())
        net = build_model(self.model_choice, bundle, self.seed).to(place)
        example = bundle.test[:1][0].to(place)
        options: dict[str, Any] = {name: getattr(self, name) for name in ("p", "normalized", "conv_graph", "scale")}
        history: list[NeuralPersistence] = []

        def note(*_: zoo.EpochLog) -> None:
            history.append(neural_persistence(net, example, **options))

        if self.checkpoint is not None:
            zoo.load_checkpoint(self.checkpoint, net)
        note()
        if self.checkpoint is None:
            recipe = zoo.default_recipe(self.model, self.data)
            zoo.train(net, bundle, recipe, seed=self.seed, device=place, callback=note)
        return PersistenceStudy(history)

    def show(self, findings: PersistenceStudy) -> Iterator[RenderableType]:
        first, last = findings.history[0], findings.history[-1]
        rows = [
            {"name": name, "edges": len(last.deaths[name]), "first": first.layers[name], "last": value}
            for name, value in last.layers.items()
        ]
        total = {"name": "sum", "edges": "", "first": first.total, "last": last.total}
        columns = {"layer": "{name}", "tree edges": "{edges}", "first": "{first:.4f}", "last": "{last:.4f}"}
        yield table_of(f"neural persistence of {self.model}", rows, columns, [total])
        if last.skipped:
            yield "skipped: " + ", ".join(f"{name} ({why})" for name, why in last.skipped.items())
