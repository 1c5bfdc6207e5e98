"""Weight-pruning genetic algorithm: find single weights of a few layers that a network doesn't need.

An individual says for every weight of the target layers whether it is kept. Individuals are crossed, lose their weakest
and some random weights, and replace their parents if accuracy and compression together improve. Nothing is retrained.

Source: Janjic, "Exploring Redundancy in Neural Networks: Pruning by Genetic Algorithm & Filter Energy", MSc thesis,
University of Manitoba, 2018, section 4.1, Algorithm 2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from numpy.typing import NDArray
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.maths.search.weights import (
    BoolArray,
    FloatArray,
    GeneLayer,
    HistoryRow,
    WeightGeneticAlgorithm,
    WeightSearch,
)
from nni_topo.network.runtime.arguments import BATCHES
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import evaluation_mode
from nni_topo.network.runtime.memory import check_memory
from nni_topo.network.runtime.progress import bar
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.checks import check_single_weights, of_single_weights, pruner_arguments
from nni_topo.pruners.genetic_weight.population import TOGETHER, MaskedScores, PopulationAccuracy
from nni_topo.pruners.hooks import Data, KeptSet, MetricCalculator, PruningContext
from nni_topo.pruners.topological_magnitude import MagnitudeCollector
from nni_topo.pruners.units import in_network_order, is_active
from nni_topo.rules import NONE, as_settings, check_result, settings

_logger = logging.getLogger(__name__)

Accuracies = Callable[[Iterator[BoolArray]], FloatArray]


@dataclass(kw_only=True, eq=False)
class GeneticMetric(MetricCalculator):
    """Keeps the weights of the fittest individual of a search; the fields are knobs of the pruner."""

    settings: WeightSearch
    validation: list[Any] | None
    evaluate: Callable[[nn.Module], float] | None
    seed: int
    progress: bool | None
    evolution: WeightGeneticAlgorithm | None = field(default=None, init=False)
    start_weights: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32), init=False)

    def calculate(self, data: Data, context: PruningContext) -> KeptSet:
        """Run the search and keep the weights of its fittest individual."""
        names = [unit.members[0][0] for unit in context.units]
        weights = [context.target_spaces[name]["weight"].target for name in names]
        flat = [weight.detach().cpu().float().flatten() for weight in weights]
        self.start_weights = torch.cat(flat).numpy()
        layers = []
        for name, unit in zip(names, context.units, strict=True):
            most = min(1.0 if unit.sparse_ratio is None else unit.sparse_ratio, unit.max_sparse_ratio)
            layers.append(GeneLayer(data[name]["weight"].numpy().ravel().astype(np.float32), most))
        # Bytes: magnitudes and the child being bred, parents and children as bits, individuals that run together.
        needed = (20 + self.settings.population_size / 4) * len(self.start_weights) + TOGETHER
        cure = "fewer layers (op_names) or a smaller population_size (search) take less"
        check_memory(needed, f"a population on {len(self.start_weights)} weights", cure, "+".join(names))
        search = WeightGeneticAlgorithm(
            layers, self._accuracies(context, names, weights), self.settings, seed=self.seed
        )
        self.evolution, is_judged = search, False
        with bar("searching weights", self.progress, total=self.settings.generations + 1) as shown:
            for _ in search.evolve():
                shown.update()
                is_judged = is_judged or self._tell_if_constant(search)
        genes = search.genes(search.best())
        genes_by_unit = np.split(genes, np.cumsum([unit.blocks for unit in context.units])[:-1])
        unit_names = [unit.name for unit in context.units]
        return context.keep(dict(zip(unit_names, genes_by_unit, strict=True)))

    def _tell_if_constant(self, search: WeightGeneticAlgorithm) -> bool:
        """Warn if all individuals of a generation are equally accurate; say whether any of them lost a weight."""
        rows = [row for row in search.history if row.generation == search.generation]
        if all(row.compression == 0.0 for row in rows):
            return False  # with a damage_rate of 0 there is nothing to compare yet
        if len({row.accuracy for row in rows}) == 1:
            _logger.warning(
                "the accuracy must differ between individuals for the search to use it, got %g for all %d of "
                "generation %d (genetic_weight)",
                rows[0].accuracy,
                len(rows),
                search.generation,
            )
        return True

    def _accuracies(self, context: PruningContext, names: list[str], weights: list[Tensor]) -> Accuracies:
        if self.validation is not None:
            return PopulationAccuracy(context.model, names, self.validation)

        def score() -> float:
            # In training mode the batch norms' statistics would depend on the individuals evaluated before.
            with evaluation_mode(context.model):
                if self.evaluate is not None:
                    return check_result("evaluate", self.evaluate(context.model), "genetic_weight")
                with torch.no_grad():
                    metric = context.evaluate()
                if isinstance(metric, tuple):
                    metric = metric[0]
                return check_result("an evaluator's evaluating function", metric, "evaluator")

        biases = []
        for name in names:
            bias = context.target_spaces[name].get("bias")
            biases.append(None if bias is None else bias.target)
        return MaskedScores(weights, biases, score)


if TYPE_CHECKING:
    import pandas


_REFUSED = ("global_group_id", "sparse_threshold", "min_sparse_ratio")


class GeneticWeightPruner(StructuredPruner):
    """Prune the single weights that a genetic algorithm finds dispensable.

    Parameters
    ----------
    model : torch.nn.Module
        Trained model; linear layers and convolutions of one to three dimensions can be targets.
    config_list : list of dict
        NNI's config_list, which names the layers. No ratio is needed; ``max_sparse_ratio`` is a cap, and so is a
        ``sparse_ratio`` where one is given.
    evaluator : nni.compression.utils.Evaluator or None, default=None
        Its evaluation is the accuracy where there is neither ``validation`` nor ``evaluate``.
    existed_wrappers, seed, progress
        As for :class:`~nni_topo.StructuredPruner`.
    validation : iterable or None, default=None
        Batches ``(inputs, labels)`` on which accuracy is measured. The input of the first target is computed once, and
        individuals run together. Don't give the test set, because the search fits these data.
    evaluate : callable or None, default=None
        Used without ``validation``: returns the score of a model, in [0, 1] for an accuracy. It is called for each
        individual.
    search : WeightSearch, mapping or None, default=None
        :class:`~nni_topo.WeightSearch`, or a mapping of its fields, such as ``population_size`` and
        ``generations``. None: ``WeightSearch()``.

    See Also
    --------
    nni_topo.analysis.EvolutionStudy : plots of the search.

    Notes
    -----
    Per generation and individual, breeding takes a few passes over the genes, evaluation one pass of the network from
    the first target on. ``to_dense`` leaves pruned weights in the layers as zeros. A neuron that lost all of its
    weights loses its bias too, in the search as in NNI's masks.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> batches = [(torch.randn(32, 4), torch.zeros(32, dtype=torch.long))]
    >>> pruner = GeneticWeightPruner(model, [{"op_names": ["2"], "max_sparse_ratio": 0.5}], validation=batches)
    >>> _, masks = pruner.compress()
    >>> int(masks["2"]["weight"].sum()) >= 8
    True
    """

    needs_rule = False
    calculator: GeneticMetric

    @pruner_arguments(validation=BATCHES | NONE, search=settings(WeightSearch) | NONE)
    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        validation: Iterable[Any] | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        search: WeightSearch | Mapping[str, Any] | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        self.search = as_settings(WeightSearch, search, "search")
        if validation is None and evaluate is None and evaluator is None:
            raise ConfigError("a genetic search needs validation, evaluate or an evaluator, got none (validation)")
        self.validation = None if validation is None else list(Calibration.of(validation, "validation"))
        metric = GeneticMetric(
            settings=self.search, validation=self.validation, evaluate=evaluate, seed=seed, progress=progress
        )
        entries = of_single_weights(config_list)
        super().__init__(model, entries, evaluator, existed_wrappers, collector=MagnitudeCollector(), calculator=metric)

    @property
    def evolution(self) -> WeightGeneticAlgorithm:
        """The latest search: its individuals, settings and history; ConfigError if there was none yet."""
        if self.calculator.evolution is None:
            raise ConfigError("a search must have run, got none: call compress() first (GeneticWeightPruner)")
        return self.calculator.evolution

    @property
    def start_weights(self) -> NDArray[np.float32]:
        """The targets' weights at the start of the latest search, concatenated, shape ``(genes,)``."""
        return self.calculator.start_weights

    @property
    def history(self) -> pandas.DataFrame:
        """A row per generation and individual: fitness, accuracy, compression, generation of birth, last partner."""
        import pandas

        evolution = self.calculator.evolution
        rows = [] if evolution is None else evolution.history
        return pandas.DataFrame(rows, columns=HistoryRow._fields)

    def wrap_model(self) -> None:
        """Check the targets and make them active, then wrap the model."""
        for name, spaces in in_network_order(self.bound_model, self._target_spaces).items():
            for target, space in spaces.items():
                if space.align is None or is_active(space) or "weight" not in spaces:
                    check_single_weights(name, target, space, "genes are the weights", _REFUSED)
        self._activate_targets(cap=1.0)
        super().wrap_model()

    def _set_default_sparse_granularity(self, target_space: PruningTargetSpace) -> list[int] | str | None:
        return None
