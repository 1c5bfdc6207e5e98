"""Replace low-energy filters instead of removing them: by random, copied or evolved ones.

Source: Janjic, MSc thesis, University of Manitoba, 2018, section 6.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.maths.signals import Chirp
from nni_topo.maths.ties import first_smallest
from nni_topo.network.layers.derived import weight_used
from nni_topo.network.runtime.arguments import INPUTS, MODEL
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.pruners.energy import EnergyFilterPruner, chirp_response_energy, input_sizes
from nni_topo.studies.analysis.energy.study import EvaluateQuality, Quality, quality_of

KINDS = ("kept", "removed", "random", "copied", "evolved")
_TOURNAMENT, _POPULATION, _GENERATIONS = 3, 12, 8
_MUTATION = 0.2  # standard deviation, as a share of that of the layer's weights


@dataclass(frozen=True)
class Replacement:
    """A network whose low-energy filters were replaced."""

    quality: Quality
    repaired: Quality | None  # after ``repair``; None without it
    energy: float  # share of the layer's energy that the replaced filters have now, in [0, 1]
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
        Evolution minimises its loss; usually ``evaluate`` on a subset of other images. None: ``evaluate``.
    repair : callable or None, default=None
        Applied to every network before a second evaluation, such as a re-calibration of batch norms, whose statistics
        don't fit new filters. Evolution doesn't use it.
    seed : int, default=0
        Of all random draws.
    **knobs
        Of :class:`~nni_topo.EnergyFilterPruner`.

    Returns
    -------
    dict of str to Replacement
        By kind: ``"kept"``, unchanged; ``"removed"``, set to zero, batch norm included; ``"random"``, drawn from a
        normal distribution with the standard deviation of the layer's weights; ``"copied"`` from random other filters
        of the layer, with their biases; ``"evolved"`` from random ones.

    Raises
    ------
    ConfigError
        If the layer isn't a convolution without groups, or no filter lies below the threshold.
    """
    entry = {"op_names": [layer], "sparse_threshold": threshold}
    pruner = EnergyFilterPruner(detached_copy(model), [entry], example_inputs=example_inputs, **knobs)
    _, masks = pruner.compress()
    weak = ~masks[layer]["weight"].flatten(1).any(1)
    module: Any = model.get_submodule(layer)
    if not bool(weak.any()) or getattr(module, "groups", 1) != 1:
        raise ConfigError(f"a layer without groups must have filters to replace, got {int(weak.sum())} ({layer})")
    generator = torch.Generator().manual_seed(seed)
    weight: Tensor = module.weight.detach()
    plane = torch.from_numpy(Chirp().planes(input_sizes(model, [layer], example_inputs)[layer]))

    def drawn() -> Tensor:
        noise = torch.randn(weight[weak].shape, generator=generator, dtype=weight.dtype)
        return weight.std(correction=0) * noise.to(weight.device)

    def replaced_by(filters: Tensor, donors: Tensor | None = None) -> nn.Module:
        changed: nn.Module = detached_copy(model)
        own: Any = changed.get_submodule(layer)
        with torch.no_grad():
            own.weight[weak] = filters
            if own.bias is not None:
                own.bias[weak] = 0.0 if donors is None else own.bias[donors]
        return changed

    def loss_of(filters: Tensor) -> float:
        return quality_of(fitness or evaluate, replaced_by(filters)).loss

    found = {}
    for kind in KINDS:
        changed: nn.Module
        if kind == "kept":
            changed = detached_copy(model)
        elif kind == "removed":
            changed = masked_model(model, example_inputs, masks)
        elif kind == "random":
            changed = replaced_by(drawn())
        elif kind == "copied":
            others = (~weak).nonzero().flatten()
            donors = others[torch.randint(len(others), (int(weak.sum()),), generator=generator)]
            changed = replaced_by(weight[donors], donors)
        else:
            changed = replaced_by(_evolved(drawn, loss_of, generator))
        repaired = None
        if repair is not None:
            after_repair = repair(changed)
            MODEL.check("what repair returns", after_repair, "repair")
            repaired = quality_of(evaluate, after_repair)
        replaced: Any = changed.get_submodule(layer)
        bias = None if replaced.bias is None else replaced.bias.detach().double()
        energy = chirp_response_energy(replaced, weight_used(replaced).detach().double(), bias, plane)
        share = float(energy[weak].sum() / energy.sum())
        old, new = (each.weight.detach()[weak].flatten(1).double() for each in (module, replaced))
        similarity = float(torch.cosine_similarity(old, new, dim=1).abs().mean())
        found[kind] = Replacement(quality_of(evaluate, changed), repaired, share, similarity)
    return found


def _evolved(drawn: Callable[[], Tensor], loss_of: Callable[[Tensor], float], generator: torch.Generator) -> Tensor:
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
