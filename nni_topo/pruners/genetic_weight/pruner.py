"""Weight-pruning genetic algorithm: which single weights of a few layers a network can do without.

Individuals say of every weight of the target layers whether it is used. They are crossed, lose their weakest weights
and random ones, and replace their parents where accuracy and compression together get better. Nothing is retrained.

Source: Janjic, "Exploring Redundancy in Neural Networks: Pruning by Genetic Algorithm & Filter Energy", MSc thesis,
University of Manitoba, 2018, section 4.1, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from numpy.typing import NDArray
from torch import nn

from nni_topo.disk import check_output_file, path_of
from nni_topo.errors import ConfigError
from nni_topo.maths.search.weights import HistoryRow, WeightGeneticAlgorithm, WeightSearch
from nni_topo.network.runtime.arguments import BATCHES
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.checks import check_single_weights, of_single_weights, pruner_arguments
from nni_topo.pruners.genetic_weight.metric import GeneticMetric, OnGeneration
from nni_topo.pruners.topological_magnitude.trees import MagnitudeCollector
from nni_topo.pruners.units import in_network_order, is_active
from nni_topo.rules import NONE, as_settings, settings, whole

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
        Batches ``(inputs, labels)`` on which accuracy is measured. What enters the first target is computed once, and
        individuals run together. Don't give the test set: the search fits what it is given.
    evaluate : callable or None, default=None
        Instead: returns the score of a model, in [0, 1] for an accuracy. It runs the whole model for each individual.
    search : WeightSearch, mapping or None, default=None
        :class:`~nni_topo.WeightSearch`, or a mapping of its fields, such as ``population_size`` and
        ``generations``. None: ``WeightSearch()``.
    state : str, Path or None, default=None
        File that each generation is written to. If it exists, the search resumes from it.
    on_generation : callable or None, default=None
        Called with the :class:`~nni_topo.maths.search.weights.WeightGeneticAlgorithm` after each generation; a true
        value ends the search.
    max_bytes : int, default=2**28
        Memory for the individuals that run together, roughly.
    n_jobs : int, default=1
        Threads that evaluate, at least 1; the result doesn't depend on it.

    Raises
    ------
    ConfigError, DataError
        If a knob or the request is bad, before the model is wrapped: a layer that doesn't exist, something else than a
        weight, a group, empty validation data.

    See Also
    --------
    nni_topo.analysis.EvolutionStudy : the search in pictures.

    Notes
    -----
    Per generation and individual, breeding takes a few passes over the genes, evaluation one pass of the network from
    the first target on. ``to_dense`` leaves single weights in the layers as zeros. A neuron that lost all of its
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

    @pruner_arguments(
        validation=BATCHES | NONE,
        search=settings(WeightSearch) | NONE,
        max_bytes=whole(1, 2**63 - 1),
        n_jobs=whole(1),
    )
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
        state: str | Path | None = None,
        on_generation: OnGeneration | None = None,
        max_bytes: int = 2**28,
        n_jobs: int = 1,
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        self.search = as_settings(WeightSearch, search, "search")
        if validation is None and evaluate is None and evaluator is None:
            raise ConfigError("a genetic search needs validation, evaluate or an evaluator, got none (validation)")
        self.validation = None if validation is None else list(Calibration(validation, name="validation"))
        if state is not None:
            check_output_file(path_of(state, "state"), makes_folder=True)
        self._metric = GeneticMetric(
            settings=self.search,
            validation=self.validation,
            evaluate=evaluate,
            seed=seed,
            state=state,
            on_generation=on_generation,
            max_bytes=max_bytes,
            n_jobs=n_jobs,
            progress=progress,
        )
        super().__init__(
            model,
            of_single_weights(config_list),
            evaluator,
            existed_wrappers,
            collector=MagnitudeCollector(),
            calculator=self._metric,
        )

    @property
    def evolution(self) -> WeightGeneticAlgorithm:
        """The latest search: its individuals, settings and history.

        Raises
        ------
        ConfigError
            If there was none yet.
        """
        if self._metric.evolution is None:
            raise ConfigError("a search must have run, got none: call compress() first (GeneticWeightPruner)")
        return self._metric.evolution

    @property
    def start_weights(self) -> NDArray[np.float32]:
        """The targets' weights as the latest search found them, in a row: shape ``(genes,)``."""
        return self._metric.start_weights

    @property
    def history(self) -> pandas.DataFrame:
        """A row per generation and individual: fitness, accuracy, compression, generation of birth, last partner."""
        import pandas

        evolution = self._metric.evolution
        return pandas.DataFrame([] if evolution is None else evolution.history, columns=HistoryRow._fields)

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
