"""What the published pruners share: the maps that each channel of a layer puts out, and one score for each channel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from nni.compression.utils import Evaluator
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.attention.heads import find_heads
from nni_topo.network.layers.kinds import feature_dimension
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.fits import first_call, run
from nni_topo.network.runtime.hooks import pruner_batches, watched
from nni_topo.network.runtime.inputs import bind_arguments, calls
from nni_topo.pruners.clouds.features import TracedNetwork, tapped_network
from nni_topo.pruners.clouds.moments import check_finite, check_reached
from nni_topo.pruners.hooks import Data, DataCollector, MetricCalculator, Metrics, PruningContext
from nni_topo.pruners.units import output_blocks


class Measure(ABC):
    """Looks at the maps of one layer, batch by batch, and then scores its channels."""

    @abstractmethod
    def add(self, maps: Tensor) -> None:
        """Look at maps ``(channels, samples, *positions)``."""

    @abstractmethod
    def scores(self) -> Tensor:
        """Return a score per channel, float64 ``(channels,)`` on the CPU; larger = keep."""


class FirstMaps(Measure):
    """Keeps the maps of the first inputs, for what compares all inputs with each other.

    Parameters
    ----------
    layer : str
        Name of the layer, for messages.
    images : int
        How many inputs are kept.
    score : callable
        Maps the cloud of a channel, float64 ``(inputs, positions)`` with a point per input, to its score.
    """

    def __init__(self, layer: str, images: int, score: Callable[[Any], float]) -> None:
        self._layer, self._images, self._score = layer, images, score
        self._kept: list[Tensor] = []
        self._count = 0

    def add(self, maps: Tensor) -> None:
        """Keep maps ``(channels, samples, *positions)`` until there are enough."""
        some = maps[:, : self._images - self._count]
        if some.shape[1]:
            self._count += some.shape[1]
            self._kept.append(some.reshape(*some.shape[:2], -1).double().cpu())

    def scores(self) -> Tensor:
        """Return the score of each channel's cloud; DataError if it has fewer than two points."""
        if self._count < 2:
            raise DataError(f"calibration must hold at least two samples, got {self._count} ({self._layer})")
        clouds = torch.cat(self._kept, 1)
        check_finite(clouds, self._layer)
        return torch.tensor([self._score(cloud.numpy()) for cloud in clouds], dtype=torch.float64)


class MapCollector(DataCollector):
    """Collects one score per block, from what its channels put out.

    A layer's maps are taken after the batch norms and the activation that follow it directly; those of a layer within
    attention as it puts them out. A block of several channels, such as those of an attention head, gets the mean of
    their scores.

    Parameters
    ----------
    calibration : Calibration
        Batches of inputs.
    measure : callable
        Makes the measure of a layer, by its name.
    """

    def __init__(self, calibration: Calibration, measure: Callable[[str], Measure]) -> None:
        self.calibration = calibration
        self.measure = measure

    def collect(self, context: PruningContext) -> Data:
        """Return scores ``(blocks, 1)``, float64 on the CPU."""
        scores = {layer: measure.scores() for layer, measure in self.measured(context).items()}
        return context.collected(lambda _, module, target: self.by_block(scores[module], context, module, target))

    @staticmethod
    def by_block(scores: Tensor, context: PruningContext, module: str, target: str) -> Tensor:
        """Return the mean score of each block's channels, ``(blocks, 1)``, from those of a layer's channels."""
        channels = output_blocks(context.target_spaces[module][target], "the maps of channels")
        return scores[channels].mean(1, keepdim=True)

    def measured(self, context: PruningContext) -> dict[str, Any]:
        """Run the network over the calibration data; return what was measured at each layer."""
        batches = self.calibration
        layers = [module for unit in context.units for module, _ in unit.members]
        measures = {layer: self.measure(layer) for layer in layers}
        seen: set[str] = set()

        def see(layer: str, outputs: Tensor) -> None:
            dimension = feature_dimension(context.model.get_submodule(layer))
            measures[layer].add(outputs.detach().movedim(dimension, 0))
            seen.add(layer)

        # What is traced doesn't show the layers within attention; no activation follows them.
        hidden = {name for heads in find_heads(context.model).values() for name in heads.channels}
        hooks = [
            (context.model.get_submodule(layer), partial(lambda name, _, outputs: see(name, outputs), layer))
            for layer in layers
            if layer in hidden
        ]
        shown = [layer for layer in layers if layer not in hidden]
        network = tapped_network(context.model, first_call(context.model, batches), shown)
        runner = _Runner(network, see)
        with torch.no_grad():
            for call in calls(context.model, batches):
                runner.run(*bind_arguments(context.model, call).values())
        if hooks:
            with watched(leaving=hooks):
                run(context.model, batches)
        for layer in layers:
            check_reached(int(layer in seen), layer)
        return measures


class ScoreMetric(MetricCalculator):
    """Hands the collected scores on."""

    def calculate(self, data: Data, context: PruningContext) -> Metrics:
        """Return the scores in the blocked shapes."""
        metrics: Metrics = {}
        for module, targets in data.items():
            for target, scores in targets.items():
                metrics.setdefault(module, {})[target] = scores.reshape(context.metric_shape(module, target))
        return metrics


def calibration_of_pruner(
    calibration: Iterable[Any] | Evaluator | None, model: nn.Module, evaluator: Evaluator | None, name: str
) -> Calibration:
    """Return a pruner's calibration data, or what its evaluator evaluates on; ConfigError if it has neither."""
    found = pruner_batches(evaluator if calibration is None else calibration, model)
    if found is None:
        raise ConfigError(f"{name} needs calibration data or an evaluator, got neither (calibration)")
    return found


class _Runner(Interpreter):
    """Runs a traced network and shows what its taps put out, with the name of their layer."""

    def __init__(self, network: TracedNetwork, see: Callable[[str, Tensor], None]) -> None:
        super().__init__(network.graph)
        self._see = see
        self._layers: dict[Node, list[str]] = {}
        for tap in network.taps.values():
            for node in tap.nodes:
                self._layers.setdefault(node, []).append(tap.layer)

    def run_node(self, n: Node) -> Any:
        """Run a node as usual and show what it puts out."""
        value = super().run_node(n)
        for layer in self._layers.get(n, ()):
            self._see(layer, value)
        return value
