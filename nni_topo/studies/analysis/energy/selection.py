"""Select the filters of one layer by energy, by first-order effect on the loss, and by genetic search for either.

Energy is a sum over filters: sorting finds the best subset of a size, and a search can only find it again. The joint
effect of several filters on the loss isn't such a sum, so a search may find a better subset than sorting.

References
----------
.. [1] Janjic, MSc thesis, University of Manitoba, 2018, chapter 8.
.. [2] Molchanov et al., "Pruning convolutional neural networks for resource efficient inference", ICLR 2017,
   https://arxiv.org/abs/1611.06440
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nni_topo.errors import ConfigError
from nni_topo.maths.search.subsets import BoolArray, EvolutionSettings, FloatArray, SubsetGeneticAlgorithm
from nni_topo.maths.ties import descending
from nni_topo.network.channels.flow import norms_after
from nni_topo.network.layers.kinds import spread
from nni_topo.network.runtime.arguments import BATCHES, INPUTS, MODEL
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import detached_copy, evaluation_mode
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.inputs import fitting
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.pruners.energy.pruner import EnergyFilterPruner
from nni_topo.rules import all_of, one_of
from nni_topo.studies.analysis.energy.study import EvaluateQuality, Quality, quality_of

_logger = logging.getLogger(__name__)

METHODS = ("random", "energy", "energy, genetic", "taylor", "taylor, genetic", "loss, genetic")
LabelledBatches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Selection:
    """The filters that a method keeps, ascending, and the quality of the network with the others removed."""

    kept: tuple[int, ...]
    energy: float  # share of the layer's energy that is removed, in [0, 1]
    taylor: float  # mean over images of the first-order change of the loss by removing the filters together, in nats
    quality: Quality
    seconds: float  # that the selection took


@public(model=MODEL, example_inputs=INPUTS, batches=BATCHES, methods=all_of(one_of(METHODS), Sequence))
def study_selection(
    model: nn.Module,
    layer: str,
    example_inputs: Any,
    batches: LabelledBatches,
    evaluate: EvaluateQuality,
    *,
    keep: int,
    methods: Sequence[str] = METHODS,
    evolution: EvolutionSettings | None = None,
    seed: int = 0,
    **knobs: Any,
) -> dict[str, Selection]:
    """Select the filters of one layer by several methods and compare the pruned networks.

    Parameters
    ----------
    model : torch.nn.Module
        The trained classifier; it isn't changed.
    layer : str
        A convolution.
    example_inputs : Any
        Inputs of the model.
    batches : sequence of (Tensor, Tensor)
        Images and labels for the Taylor estimate and the loss: a subset of the training images.
    evaluate : callable
        Maps a model to its :class:`~nni_topo.analysis.Quality`.
    keep : int
        Number of kept filters, in [1, filters - 1].
    methods : sequence of str, default=METHODS
        ``"random"``; ``"energy"`` and ``"taylor"`` sort the filters, each by its own energy or mean absolute
        first-order effect; the genetic ones search for a subset: least energy lost, least first-order effect of all
        removed filters together, least loss.
    evolution : EvolutionSettings or None, default=None
        Settings of the search. None: the defaults.
    seed : int, default=0
        Of random selection and search.
    **knobs
        Of :class:`~nni_topo.EnergyFilterPruner`.

    Returns
    -------
    dict of str to Selection
        By method.

    Raises
    ------
    ConfigError
        If a method is unknown or ``keep`` is out of its range.
    """
    with evaluation_mode(model):
        labelled: Any = Calibration.of(batches, "batches")
        search = _Search(model, layer, example_inputs, labelled, seed, knobs)
        if not 1 <= keep < search.filters:
            raise ConfigError(f"keep must be in [1, {search.filters - 1}], got {keep} ({layer})")
        found = {}
        for method in methods:
            began = time.perf_counter()
            kept = search.select(method, keep, evolution or EvolutionSettings())
            found[method] = search.evaluated(kept, time.perf_counter() - began, evaluate)
    return found


class _Search:
    """What all methods share: energies, Taylor terms, and the module whose output channels are set to zero."""

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        example_inputs: Any,
        batches: LabelledBatches,
        seed: int,
        knobs: dict[str, Any],
    ) -> None:
        self.model, self.layer, self.example_inputs, self.batches = model, layer, example_inputs, batches
        self.seed = seed
        entry = {"op_names": [layer], "sparse_ratio": 0.0}
        pruner = EnergyFilterPruner(detached_copy(model), [entry], example_inputs=example_inputs, **knobs)
        energies = pruner._collect_data()[layer]["weight"][:, 0]
        self.energies: FloatArray = (energies / energies.sum()).numpy()
        self.filters = len(self.energies)
        flow = Analysis.on(model, example_inputs).flow
        self.place = model.get_submodule(norms_after(model, flow).get(layer, layer))
        self.terms = taylor_terms(model, self.place, batches).cpu().numpy()

    def select(self, method: str, keep: int, evolution: EvolutionSettings) -> BoolArray:
        """Return the kept filters, boolean ``(filters,)``."""
        if method == "random":
            return _largest(np.random.default_rng(self.seed).random(self.filters), keep)
        if method == "energy":
            return _largest(self.energies, keep)
        if method == "taylor":
            return _largest(np.abs(self.terms).mean(0), keep)
        searched = {"energy": self._energy_lost, "taylor": self._joint_taylor, "loss": self._loss}
        fitness = searched[method.removesuffix(", genetic")]
        search = SubsetGeneticAlgorithm(self.filters, keep, fitness, evolution, seed=self.seed)
        search.run()
        if search.is_flat:
            _logger.warning(
                "%r tells no individual from another, so the filters are chosen at random (%s)", method, self.layer
            )
        best: BoolArray = search.current_generation[0].genes
        return best

    def evaluated(self, kept: BoolArray, seconds: float, evaluate: EvaluateQuality) -> Selection:
        """Evaluate the network without the removed filters."""
        module: Any = self.model.get_submodule(self.layer)
        masks = {"weight": spread(module, torch.from_numpy(kept))}
        if module.bias is not None:
            masks["bias"] = torch.from_numpy(kept).to(module.bias)
        quality = quality_of(evaluate, masked_model(self.model, self.example_inputs, {self.layer: masks}))
        energy, taylor = (float(fitness(kept[None])[0]) for fitness in (self._energy_lost, self._joint_taylor))
        return Selection(tuple(np.flatnonzero(kept).tolist()), energy, taylor, quality, seconds)

    def _energy_lost(self, population: BoolArray) -> FloatArray:
        lost: FloatArray = ~population @ self.energies
        return lost

    def _joint_taylor(self, population: BoolArray) -> FloatArray:
        joint: FloatArray = np.abs(self.terms @ (~population).T.astype(np.float64)).mean(0)
        return joint

    def _loss(self, population: BoolArray) -> FloatArray:
        return np.array([self._loss_without(torch.from_numpy(kept)) for kept in population])

    def _loss_without(self, kept: Tensor) -> float:
        def silence(_: Tensor, outputs: Tensor) -> Tensor:
            return outputs * kept.to(outputs).view(-1, *[1] * (outputs.dim() - 2))

        with watched(leaving=[(self.place, silence)]), torch.no_grad():
            losses = [cross_entropy(self.model(images), labels, reduction="sum") for images, labels in self.batches]
        return float(torch.stack(losses).sum()) / sum(len(labels) for _, labels in self.batches)


def taylor_terms(model: nn.Module, place: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the first-order change of each image's loss by removing a channel, up to its sign: (images, channels)."""
    outputs: list[Tensor] = []

    def watch(_: Tensor, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1] * 1.0  # the next module may write in place

    terms = []
    with watched(leaving=[(place, watch)]), torch.enable_grad():
        for index, (images, labels) in enumerate(batches):
            outputs.clear()
            # a sum: each image's gradient is then the gradient of its own loss
            with fitting(index, "batches"):
                loss = cross_entropy(model(images), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, outputs[-1])
            # the output times the gradient by it, over all positions [2]
            terms.append((outputs[-1].detach() * gradient).flatten(2).sum(2).double())
    return torch.cat(terms)


def _largest(values: FloatArray, keep: int) -> BoolArray:
    kept = np.zeros(len(values), dtype=np.bool_)
    kept[descending(values)[:keep]] = True
    return kept
