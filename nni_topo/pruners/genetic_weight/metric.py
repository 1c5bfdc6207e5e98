"""Hooks that let a genetic algorithm say which single weights stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.maths.search.gene_layers import BoolArray, FloatArray, Layer
from nni_topo.maths.search.state import load_state, save_state
from nni_topo.maths.search.weights import WeightEvolutionSettings, WeightGeneticAlgorithm
from nni_topo.pruners.allocators import ConfigAllocator
from nni_topo.pruners.genetic_weight.masked import MaskedScores, split_genes
from nni_topo.pruners.genetic_weight.population import PopulationAccuracy
from nni_topo.pruners.hooks import Data, MetricCalculator, Metrics, PruningContext
from nni_topo.pruners.units import PruningUnit

OnGeneration = Callable[[WeightGeneticAlgorithm], bool | None]
Accuracies = Callable[[Iterator[BoolArray]], FloatArray]


class GeneticMetric(MetricCalculator):
    """1 for the weights that the fittest individual of a search uses, else 0; knobs of the pruner."""

    def __init__(
        self,
        settings: WeightEvolutionSettings,
        validation: list[Any] | None,
        evaluate: Callable[[nn.Module], float] | None,
        *,
        seed: int,
        state: str | Path | None,
        on_generation: OnGeneration | None,
        max_bytes: int,
        workers: int,
    ) -> None:
        self.settings = settings
        self.validation = validation
        self.evaluate = evaluate
        self.seed = seed
        self.state = state
        self.on_generation = on_generation
        self.max_bytes = max_bytes
        self.workers = workers
        self.search: WeightGeneticAlgorithm | None = None
        self.start_weights = np.zeros(0, dtype=np.float32)

    def calculate(self, data: Data, context: PruningContext) -> Metrics:
        """Search, from the file of an earlier search on where there is one."""
        names = [unit.members[0][0] for unit in context.units]
        weights = [context.target_spaces[name]["weight"].target for name in names]
        flat = [weight.detach().cpu().float().flatten() for weight in weights]
        self.start_weights = torch.cat(flat).numpy()
        layers = [
            Layer(data[name]["weight"].numpy().ravel().astype(np.float32), largest_share(unit))
            for name, unit in zip(names, context.units, strict=True)
        ]
        search = WeightGeneticAlgorithm(
            layers, self._accuracies(context, names, weights), self.settings, seed=self.seed
        )
        if self.state is not None and Path(self.state).exists():
            load_state(search, self.state)
        self.search = search
        search.run(self._after)
        masks = split_genes(search.genes(search.best()), weights)
        return {name: {"weight": mask.double()} for name, mask in zip(names, masks, strict=True)}

    def _after(self, search: WeightGeneticAlgorithm) -> bool:
        if self.state is not None:
            save_state(search, self.state)
        return self.on_generation is not None and bool(self.on_generation(search))

    def _accuracies(self, context: PruningContext, names: list[str], weights: list[Tensor]) -> Accuracies:
        if self.validation is not None:
            return PopulationAccuracy(
                context.model, names, self.validation, max_bytes=self.max_bytes, workers=self.workers
            )
        if self.evaluate is not None:
            evaluate, model = self.evaluate, context.model
            return MaskedScores(weights, lambda: evaluate(model))
        return MaskedScores(weights, lambda: _evaluated(context))


class GeneAllocator(ConfigAllocator):
    """Keep what the search kept: its metric is 1 there."""

    def kept_rows(self, context: PruningContext, profiles: dict[str, Tensor]) -> dict[str, int]:
        """Return how many weights each layer keeps."""
        return {unit.name: int((profiles[unit.name] > 0).sum()) for unit in context.units}


def largest_share(unit: PruningUnit) -> float:
    """Return the share of a layer's weights that may go: the smaller of its ``sparse_ratio`` and its maximum."""
    ratio = 1.0 if unit.sparse_ratio is None else unit.sparse_ratio
    return min(ratio, unit.max_sparse_ratio)


def checked_validation(validation: Iterable[Any] | None) -> list[Any] | None:
    """Return labelled batches as a list, or raise a ConfigError where there is none."""
    if validation is None:
        return None
    batches = list(validation)
    if not batches:
        raise ConfigError("validation must hold at least one batch, got none (validation)")
    return batches


def _evaluated(context: PruningContext) -> float:
    """Return what the evaluator says about the wrapped model."""
    evaluator = context.evaluator
    if evaluator is None:
        raise ConfigError("a genetic search needs validation, evaluate or an evaluator, got none (validation)")
    bound = getattr(evaluator, "model", None) is not None
    if not bound:
        evaluator.bind_model(context.model, dict(context.parameter_names))
    try:
        with torch.no_grad():
            metric = evaluator.evaluate()
    finally:
        if not bound:
            evaluator.unbind_model()
    if isinstance(metric, tuple):
        metric = metric[0]
    if metric is None:
        raise ConfigError("an evaluator must have an evaluating function that returns a number, got None (evaluator)")
    return float(metric)
