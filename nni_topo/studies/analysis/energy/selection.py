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
from nni_topo.maths.search.subsets import BoolArray, FloatArray, GeneticSearch, SubsetGeneticAlgorithm
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
from nni_topo.pruners.energy import EnergyFilterPruner
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


@public(model=MODEL, example_inputs=INPUTS, batches=BATCHES)
def study_selection(
    model: nn.Module,
    layer: str,
    example_inputs: Any,
    batches: LabelledBatches,
    evaluate: EvaluateQuality,
    *,
    keep: int,
    evolution: GeneticSearch | None = None,
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
    evolution : GeneticSearch or None, default=None
        Settings of the search. None: the defaults.
    seed : int, default=0
        Of random selection and search.
    **knobs
        Of :class:`~nni_topo.EnergyFilterPruner`.

    Returns
    -------
    dict of str to Selection
        By method. ``"random"``; ``"energy"`` and ``"taylor"`` sort the filters, each by its own energy or mean absolute
        first-order effect; the genetic ones search for a subset: least energy lost, least first-order effect of all
        removed filters together, least loss.

    Raises
    ------
    ConfigError
        If ``keep`` is out of its range.
    """
    with evaluation_mode(model):
        labelled: Any = Calibration.of(batches, "batches")
        entry = {"op_names": [layer], "sparse_ratio": 0.0}
        pruner = EnergyFilterPruner(detached_copy(model), [entry], example_inputs=example_inputs, **knobs)
        energies = pruner._collect_data()[layer]["weight"][:, 0]
        shares: FloatArray = (energies / energies.sum()).numpy()
        filters = len(shares)
        if not 1 <= keep < filters:
            raise ConfigError(f"keep must be in [1, {filters - 1}], got {keep} ({layer})")
        # the module whose output channels are set to zero
        flow = Analysis.on(model, example_inputs).flow
        place = model.get_submodule(norms_after(model, flow).get(layer, layer))
        terms: FloatArray = taylor_terms(model, place, labelled).cpu().numpy()

        def energy_lost(population: BoolArray) -> FloatArray:
            lost: FloatArray = ~population @ shares
            return lost

        def joint_taylor(population: BoolArray) -> FloatArray:
            joint: FloatArray = np.abs(terms @ (~population).T.astype(np.float64)).mean(0)
            return joint

        def loss(population: BoolArray) -> FloatArray:
            """Return the mean loss of each subset, with the output channels of all others set to zero."""
            means = []
            for kept in torch.from_numpy(population):

                def silence(_: Tensor, outputs: Tensor, kept: Tensor = kept) -> Tensor:
                    return outputs * kept.to(outputs).view(-1, *[1] * (outputs.dim() - 2))

                with watched(leaving=[(place, silence)]), torch.no_grad():
                    losses = [cross_entropy(model(images), labels, reduction="sum") for images, labels in labelled]
                means.append(float(torch.stack(losses).sum()) / sum(len(labels) for _, labels in labelled))
            return np.array(means)

        sorted_by: dict[str, FloatArray] = {
            "random": np.random.default_rng(seed).random(filters),
            "energy": shares,
            "taylor": np.abs(terms).mean(0),
        }
        searched = {"energy, genetic": energy_lost, "taylor, genetic": joint_taylor, "loss, genetic": loss}
        module: Any = model.get_submodule(layer)
        found = {}
        for method in METHODS:
            began = time.perf_counter()
            kept: BoolArray = np.zeros(filters, dtype=np.bool_)
            if method in sorted_by:
                kept[descending(sorted_by[method])[:keep]] = True
            else:
                settings = evolution or GeneticSearch()
                search = SubsetGeneticAlgorithm(filters, keep, searched[method], settings, seed=seed)
                search.run()
                if search.is_flat:
                    _logger.warning(
                        "%r tells no individual from another, so the filters are chosen at random (%s)", method, layer
                    )
                kept = search.current_generation[0].genes
            seconds = time.perf_counter() - began
            masks = {"weight": spread(module, torch.from_numpy(kept))}
            if module.bias is not None:
                masks["bias"] = torch.from_numpy(kept).to(module.bias)
            quality = quality_of(evaluate, masked_model(model, example_inputs, {layer: masks}))
            energy, taylor = (float(fitness(kept[None])[0]) for fitness in (energy_lost, joint_taylor))
            found[method] = Selection(tuple(np.flatnonzero(kept).tolist()), energy, taylor, quality, seconds)
    return found


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
