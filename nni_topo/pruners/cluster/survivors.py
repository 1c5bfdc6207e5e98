"""Survivors: the neuron of each cluster that is kept.

Source: S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
Technology, 2019, sections 4.3.1 and 5.3.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from nni_topo.errors import ConfigError, LayerError
from nni_topo.maths.clustering.partition import FloatArray, IntArray
from nni_topo.maths.ties import first_largest, leveled
from nni_topo.network.layers.kinds import by_output, through_norms
from nni_topo.pruners.clouds.features import TracedNetwork
from nni_topo.pruners.clouds.functional import read_strength, readers_of
from nni_topo.pruners.hooks import PruningContext
from nni_topo.pruners.units import PruningUnit
from nni_topo.rules import all_of, one_of

RULES = ("random", "center", "weight", "bias", "bias_norm")
AUTO = ("auto",)

Survivor = str | Sequence[str]


SURVIVOR = one_of((*AUTO, *RULES)) | all_of(one_of(RULES), Sequence, least=1)


def rules_of(survivor: Survivor) -> tuple[str, ...]:
    """Return one or several names of rules as a tuple."""
    return (survivor,) if isinstance(survivor, str) else tuple(survivor)


def survivor_scores(
    rules: tuple[str, ...],
    unit: PruningUnit,
    context: PruningContext,
    network: TracedNetwork,
    closeness: FloatArray,
    generator: np.random.Generator,
) -> FloatArray:
    """Score the neurons of a unit, ``(blocks,)`` float64, by a rule or the mean rank of several; highest = kept."""
    if rules == AUTO:
        has_bias = is_convolution(unit, context) and offsets(unit, context, network) is not None
        rules = ("bias_norm",) if has_bias else ("weight",)
    scores = []
    for rule in rules:
        if rule == "random":
            scores.append(generator.random(unit.blocks))
        elif rule == "center":
            scores.append(closeness)
        elif rule == "weight":
            scores.append(_connections(unit, context, network))
        else:
            biases = offsets(unit, context, network)
            if biases is None:
                raise ConfigError(f"survivor {rule!r} needs a bias or a batch norm, got neither ({unit.name})")
            scores.append(biases if rule == "bias" else np.abs(biases))
    # Rules have units of their own (distances, sums of weights, biases): several are comparable by ranks alone.
    return scores[0] if len(scores) == 1 else np.mean([rankdata(leveled(each)) for each in scores], axis=0)


def is_convolution(unit: PruningUnit, context: PruningContext) -> bool:
    """Say whether a unit's first layer is a convolution."""
    return isinstance(context.model.get_submodule(unit.members[0][0]), nn.modules.conv._ConvNd)


def offsets(unit: PruningUnit, context: PruningContext, network: TracedNetwork) -> FloatArray | None:
    """Return a unit's constants ``(blocks,)``, of biases and batch norms, summed over members; None: it has none."""
    found: list[FloatArray] = []
    modules = dict(context.model.named_modules())
    for name in dict.fromkeys(module_name for module_name, _ in unit.members):
        norms = [modules[norm] for norm in network.taps[name].norms]
        bias = getattr(modules[name], "bias", None)
        if bias is not None or norms:
            constant = torch.zeros(network.flow.layers[name].channels) if bias is None else bias
            # What counts is what arrives at the activation: the bias as the batch norms on the way change it.
            found.append(through_norms(norms, constant)[1].cpu().numpy().reshape(unit.blocks, -1).sum(1))
    return np.sum(found, axis=0) if found else None


def best_of(labels: IntArray, scores: FloatArray) -> IntArray:
    """Return the kept node for each node, ``(n,)``: the one with its cluster's highest score; -1 for nodes in none."""
    best = np.full(len(labels), -1, dtype=np.intp)
    for label in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == label)
        best[members] = members[first_largest(scores[members])]
    return best


def _connections(unit: PruningUnit, context: PruningContext, network: TracedNetwork) -> FloatArray:
    """Sum the absolute weights into and out of each neuron, equation (4.12)."""
    total = np.zeros(unit.blocks)
    for module_name, target_name in unit.members:
        space = context.target_spaces[module_name][target_name]
        weight = by_output(space.target, space._wrapper.module).detach().double().cpu().numpy()
        total += np.abs(weight).reshape(unit.blocks, -1).sum(1)
    with suppress(LayerError):  # no layer reads the channels: they are the model's output, say
        for reader in readers_of(unit, network.flow, context):
            total += read_strength(reader.module, reader.places, 1.0).sum(1).numpy()
    return total
