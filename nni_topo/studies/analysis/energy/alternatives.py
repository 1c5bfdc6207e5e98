"""Alternatives to removing a layer's filters of low energy: replace them, or select filters by other criteria.

Energy is a sum over filters, so sorting finds the best subset of a given size and a search can't find a better one. The
joint effect of several filters on the loss isn't such a sum, so a search may find a better subset than sorting.

References
----------
.. [1] Janjic, MSc thesis, University of Manitoba, 2018, section 6.2 and chapter 8.
.. [2] Molchanov et al., "Pruning convolutional neural networks for resource efficient inference", ICLR 2017,
   https://arxiv.org/abs/1611.06440
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nni_topo.errors import ConfigError
from nni_topo.maths.search.subsets import BoolArray, FloatArray, GeneticSearch, SubsetGeneticAlgorithm
from nni_topo.maths.signals import Chirp
from nni_topo.maths.ties import descending, first_smallest
from nni_topo.network.channels.flow import norms_after
from nni_topo.network.layers.derived import weight_used
from nni_topo.network.layers.kinds import spread
from nni_topo.network.runtime.arguments import BATCHES, INPUTS, MODEL
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import detached_copy, evaluation_mode
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.inputs import fitting
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.pruners.energy import EnergyFilterPruner, chirp_response_energy, input_sizes
from nni_topo.studies.analysis.energy.study import EvaluateQuality, Quality, quality_of

_logger = logging.getLogger(__name__)

_TOURNAMENT, _POPULATION, _GENERATIONS = 3, 12, 8
_MUTATION = 0.2  # standard deviation of mutations, as a share of the standard deviation of the layer's weights


@dataclass(frozen=True)
class Replacement:
    """A network whose low-energy filters were replaced."""

    quality: Quality
    repaired: Quality | None  # after ``repair``; None without it
    energy: float  # share of the layer's energy in the replaced filters after replacement, in [0, 1]
    similarity: float  # mean absolute cosine between a filter and its replacement, in [0, 1]


@public(model=MODEL, example_inputs=INPUTS)
def study_replacement(
    model: nn.Module,
    layer: str,
    example_inputs: Any,
    evaluate: EvaluateQuality,
    *,
    threshold: float = 0.1,
    fitness: EvaluateQuality | None = None,
    repair: Callable[[nn.Module], nn.Module] | None = None,
    seed: int = 0,
    **knobs: Any,
) -> dict[str, Replacement]:
    """Replace a convolution's filters below an energy threshold, in several ways.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model; it isn't changed.
    layer : str
        A convolution without groups.
    example_inputs : Any
        Inputs of the model.
    evaluate : callable
        Maps a model to its :class:`~nni_topo.analysis.Quality`.
    threshold : float, default=0.1
        Energy share of the replaced filters, in (0, 1).
    fitness : callable or None, default=None
        Like ``evaluate``; evolution minimises the loss that it returns. Usually it uses fewer and other images. None:
        ``evaluate``.
    repair : callable or None, default=None
        Maps every network to a repaired network for a second evaluation, e.g. by recalibrating batch norms, whose
        statistics don't fit new filters. Evolution doesn't use it.
    seed : int, default=0
        Seed of all random draws.
    **knobs
        Arguments of :class:`~nni_topo.EnergyFilterPruner`.

    Returns
    -------
    dict of str to Replacement
        By kind of replacement: ``"kept"``, filters unchanged; ``"removed"``, set to zero, batch norm included;
        ``"random"``, drawn from a normal distribution with the standard deviation of the layer's weights;
        ``"copied"``, copies of random other filters of the layer, with their biases; ``"evolved"``, found by evolution
        from random filters.

    Raises
    ------
    ConfigError
        If the layer isn't a convolution without groups, or no filter lies below the threshold.
    """
    config = {"op_names": [layer], "sparse_threshold": threshold}
    pruner = EnergyFilterPruner(detached_copy(model), [config], example_inputs=example_inputs, **knobs)
    _, masks = pruner.compress()
    weak = ~masks[layer]["weight"].flatten(1).any(1)
    module: Any = model.get_submodule(layer)
    if not bool(weak.any()) or getattr(module, "groups", 1) != 1:
        raise ConfigError(
            "replacement needs a convolution without groups that has filters below the threshold, got "
            f"{int(weak.sum())} ({layer})"
        )
    generator = torch.Generator().manual_seed(seed)
    weight: Tensor = module.weight.detach()
    plane = torch.from_numpy(Chirp().planes(input_sizes(model, [layer], example_inputs)[layer]))

    def draw() -> Tensor:
        noise = torch.randn(weight[weak].shape, generator=generator, dtype=weight.dtype)
        return weight.std(correction=0) * noise.to(weight.device)

    def replaced_by(filters: Tensor, donors: Tensor | None = None) -> nn.Module:
        changed: nn.Module = detached_copy(model)
        conv: Any = changed.get_submodule(layer)
        with torch.no_grad():
            conv.weight[weak] = filters
            if conv.bias is not None:
                conv.bias[weak] = 0.0 if donors is None else conv.bias[donors]
        return changed

    def loss_of(filters: Tensor) -> float:
        return quality_of(fitness or evaluate, replaced_by(filters)).loss

    networks = {"kept": detached_copy(model), "removed": masked_model(model, example_inputs, masks)}
    networks["random"] = replaced_by(draw())
    strong = (~weak).nonzero().flatten()
    donors = strong[torch.randint(len(strong), (int(weak.sum()),), generator=generator)]
    networks["copied"] = replaced_by(weight[donors], donors)
    networks["evolved"] = replaced_by(_evolve(draw, loss_of, generator))
    replacements = {}
    for kind, changed in networks.items():
        quality, repaired = quality_of(evaluate, changed), None
        if repair is not None:
            after_repair = repair(changed)
            MODEL.check("what repair returns", after_repair, "repair")
            repaired = quality_of(evaluate, after_repair)
        replaced: Any = changed.get_submodule(layer)
        bias = None if replaced.bias is None else replaced.bias.detach().double()
        energy = chirp_response_energy(replaced, weight_used(replaced).detach().double(), bias, plane)
        old, new = (conv.weight.detach()[weak].flatten(1).double() for conv in (module, replaced))
        similarity = float(torch.cosine_similarity(old, new, dim=1).abs().mean())
        replacements[kind] = Replacement(quality, repaired, float(energy[weak].sum() / energy.sum()), similarity)
    return replacements


def _evolve(drawn: Callable[[], Tensor], loss_of: Callable[[Tensor], float], generator: torch.Generator) -> Tensor:
    """Return the fittest filters found by tournaments, uniform crossover and normal mutation."""

    def winner() -> int:
        drawn_ones = torch.randint(len(losses), (_TOURNAMENT,), generator=generator).tolist()
        return int(drawn_ones[first_smallest([losses[individual] for individual in drawn_ones])])

    population = [drawn() for _ in range(_POPULATION)]
    losses = [loss_of(filters) for filters in population]
    for _ in range(_GENERATIONS - 1):
        best = first_smallest(losses)
        children = [population[best]]
        while len(children) < _POPULATION:
            mother, father = population[winner()], population[winner()]
            from_mother = torch.rand(len(mother), generator=generator) < 0.5
            from_mother = from_mother.to(mother.device).view(-1, *[1] * (mother.dim() - 1))
            child = torch.where(from_mother, mother, father)
            children.append(child + _MUTATION * drawn())
        population = children
        losses = [losses[best], *(loss_of(filters) for filters in population[1:])]
    return population[first_smallest(losses)]


@dataclass(frozen=True)
class Selection:
    """The filters that a method keeps, and the quality of the network with the others removed."""

    kept: tuple[int, ...]  # indices of the kept filters, ascending
    energy: float  # share of the layer's energy that is removed, in [0, 1]
    # Mean over images of the absolute first-order change of the loss, in nats, by removing the filters together.
    taylor: float
    quality: Quality
    seconds: float  # duration of the selection


@public(model=MODEL, example_inputs=INPUTS, batches=BATCHES)
def study_selection(
    model: nn.Module,
    layer: str,
    example_inputs: Any,
    batches: Sequence[tuple[Tensor, Tensor]],
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
        Seed of random selection and search.
    **knobs
        Arguments of :class:`~nni_topo.EnergyFilterPruner`.

    Returns
    -------
    dict of str to Selection
        By method. ``"random"``; ``"energy"`` and ``"taylor"`` sort the filters by energy or by mean absolute
        first-order effect; the genetic methods search for a subset: with the least energy lost, the least first-order
        effect of all removed filters together, or the least loss.

    Raises
    ------
    ConfigError
        If ``keep`` is out of its range.
    """
    with evaluation_mode(model):
        labelled: Any = Calibration.of(batches, "batches")
        config = {"op_names": [layer], "sparse_ratio": 0.0}
        pruner = EnergyFilterPruner(detached_copy(model), [config], example_inputs=example_inputs, **knobs)
        energies = pruner.collect_data()[layer]["weight"][:, 0]
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
            """Return the mean loss of each subset, with the output channels of all other filters set to zero."""
            means = []
            for mask in torch.from_numpy(population):

                def silence(_: Tensor, outputs: Tensor, mask: Tensor = mask) -> Tensor:
                    return outputs * mask.to(outputs).view(-1, *[1] * (outputs.dim() - 2))

                with watched(leaving=[(place, silence)]), torch.no_grad():
                    losses = [cross_entropy(model(images), labels, reduction="sum") for images, labels in labelled]
                means.append(float(torch.stack(losses).sum()) / sum(len(labels) for _, labels in labelled))
            return np.array(means)

        # by method, a score per filter, or the function that a search minimises
        methods: dict[str, FloatArray | Callable[[BoolArray], FloatArray]] = {
            "random": np.random.default_rng(seed).random(filters),
            "energy": shares,
            "energy, genetic": energy_lost,
            "taylor": np.abs(terms).mean(0),
            "taylor, genetic": joint_taylor,
            "loss, genetic": loss,
        }
        module: Any = model.get_submodule(layer)
        selections = {}
        for method, how in methods.items():
            began = time.perf_counter()
            if callable(how):
                search = SubsetGeneticAlgorithm(filters, keep, how, evolution or GeneticSearch(), seed=seed)
                search.run()
                if search.is_flat:
                    _logger.warning(
                        "%r gives all subsets the same score, so the filters are chosen at random (%s)", method, layer
                    )
                is_kept: BoolArray = search.current_generation[0].genes
            else:
                is_kept = np.zeros(filters, dtype=np.bool_)
                is_kept[descending(how)[:keep]] = True
            seconds = time.perf_counter() - began
            masks = {"weight": spread(module, torch.from_numpy(is_kept))}
            if module.bias is not None:
                masks["bias"] = torch.from_numpy(is_kept).to(module.bias)
            quality = quality_of(evaluate, masked_model(model, example_inputs, {layer: masks}))
            energy, taylor = (float(fitness(is_kept[None])[0]) for fitness in (energy_lost, joint_taylor))
            selections[method] = Selection(tuple(np.flatnonzero(is_kept).tolist()), energy, taylor, quality, seconds)
    return selections


def taylor_terms(model: nn.Module, place: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the first-order change, up to its sign, of each image's loss by removing a channel: (images, channels)."""
    outputs: list[Tensor] = []

    def watch(_: Tensor, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1] * 1.0  # the next module may write in place

    terms = []
    with watched(leaving=[(place, watch)]), torch.enable_grad():
        for index, (images, labels) in enumerate(batches):
            outputs.clear()
            # a sum, so that each image's gradient is the gradient of its own loss
            with fitting(index, "batches"):
                loss = cross_entropy(model(images), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, outputs[-1])
            # output times gradient, summed over all positions [2]
            terms.append((outputs[-1].detach() * gradient).flatten(2).sum(2).double())
    return torch.cat(terms)
