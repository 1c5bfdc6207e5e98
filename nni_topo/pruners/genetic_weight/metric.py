"""Hooks that let a genetic algorithm choose the single weights to keep."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nni_topo.maths.search.weights import BoolArray, FloatArray, GeneLayer, WeightGeneticAlgorithm, WeightSearch
from nni_topo.network.runtime.copies import evaluation_mode
from nni_topo.network.runtime.memory import check_memory
from nni_topo.network.runtime.progress import bar
from nni_topo.pruners.genetic_weight.population import MaskedScores, PopulationAccuracy
from nni_topo.pruners.genetic_weight.state import load_state, save_state
from nni_topo.pruners.hooks import Data, KeptSet, MetricCalculator, PruningContext
from nni_topo.rules import check_answer, check_result

_logger = logging.getLogger(__name__)

OnGeneration = Callable[[WeightGeneticAlgorithm], bool | None]
Accuracies = Callable[[Iterator[BoolArray]], FloatArray]


@dataclass(kw_only=True, eq=False)
class GeneticMetric(MetricCalculator):
    """Keeps the weights that the fittest individual of a search uses; knobs of the pruner."""

    settings: WeightSearch
    validation: list[Any] | None
    evaluate: Callable[[nn.Module], float] | None
    seed: int
    state: str | Path | None
    on_generation: OnGeneration | None
    max_bytes: int
    n_jobs: int
    progress: bool | None
    evolution: WeightGeneticAlgorithm | None = field(default=None, init=False)
    start_weights: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32), init=False)

    def calculate(self, data: Data, context: PruningContext) -> KeptSet:
        """Search, from the file of an earlier search on where there is one."""
        names = [unit.members[0][0] for unit in context.units]
        weights = [context.target_spaces[name]["weight"].target for name in names]
        flat = [weight.detach().cpu().float().flatten() for weight in weights]
        self.start_weights = torch.cat(flat).numpy()
        layers = []
        for name, unit in zip(names, context.units, strict=True):
            most = min(1.0 if unit.sparse_ratio is None else unit.sparse_ratio, unit.max_sparse_ratio)
            layers.append(GeneLayer(data[name]["weight"].numpy().ravel().astype(np.float32), most))
        # Magnitudes and a child that is bred, parents and children in bits, and those that run together.
        needed = (20 + self.settings.population_size / 4) * len(self.start_weights) + self.max_bytes
        cure = "fewer layers (op_names), a smaller population_size (search) or max_bytes take less"
        check_memory(needed, f"a population on {len(self.start_weights)} weights", cure, "+".join(names))
        search = WeightGeneticAlgorithm(
            layers, self._accuracies(context, names, weights), self.settings, seed=self.seed
        )
        if self.state is not None and Path(self.state).exists():
            load_state(search, self.state)
        self.evolution, is_judged = search, False
        done = search.generation + 1
        with bar("searching weights", self.progress, total=self.settings.generations + 1, done=done) as shown:

            def after(current: WeightGeneticAlgorithm) -> bool:
                nonlocal is_judged
                shown.update()
                is_judged = is_judged or self._tell_if_constant(current)
                if self.state is not None:
                    save_state(current, self.state)
                if self.on_generation is None:
                    return False
                return check_answer("on_generation", self.on_generation(current), "genetic_weight")

            search.run(after)
        genes = search.genes(search.best())
        kept = np.split(genes, np.cumsum([unit.blocks for unit in context.units])[:-1])
        return context.keep({unit.name: own for unit, own in zip(context.units, kept, strict=True)})

    def _tell_if_constant(self, search: WeightGeneticAlgorithm) -> bool:
        """Warn where all individuals of a generation are equally accurate; say whether any of them lost a weight."""
        rows = [row for row in search.history if row.generation == search.generation]
        if all(row.compression == 0.0 for row in rows):
            return False  # with a damage_rate of 0 there is nothing to compare yet
        if len({row.accuracy for row in rows}) == 1:
            _logger.warning(
                "the accuracy must differ between individuals for the search to look at it, got %g for all %d of "
                "generation %d (genetic_weight)",
                rows[0].accuracy,
                len(rows),
                search.generation,
            )
        return True

    def _accuracies(self, context: PruningContext, names: list[str], weights: list[Tensor]) -> Accuracies:
        if self.validation is not None:
            return PopulationAccuracy(
                context.model, names, self.validation, max_bytes=self.max_bytes, n_jobs=self.n_jobs
            )

        def score() -> float:
            # In evaluation mode: or each individual's batch norms would have seen those before it.
            with evaluation_mode(context.model):
                if self.evaluate is not None:
                    return check_result("evaluate", self.evaluate(context.model), "genetic_weight")
                with torch.no_grad():
                    metric = context.evaluate()
                if isinstance(metric, tuple):
                    metric = metric[0]
                return check_result("an evaluator's evaluating function", metric, "evaluator")

        spaces = [context.target_spaces[name] for name in names]
        biases = [each["bias"].target if "bias" in each else None for each in spaces]
        return MaskedScores(weights, biases, score)
