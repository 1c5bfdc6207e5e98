"""Prune layer after layer by energy, to see how small losses add up and what fine-tuning in between does.

Source: Janjic, MSc thesis, University of Manitoba, 2018, section 6.1 and the chapter on future work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nni_topo.network.layers.kinds import output_channels
from nni_topo.network.runtime.arguments import INPUTS, MODEL
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.dense import to_dense
from nni_topo.network.speedup.dependency import dependency_groups
from nni_topo.pruners.energy import EnergyFilterPruner
from nni_topo.studies.analysis.energy.study import EvaluateQuality, Quality, quality_of


@dataclass(frozen=True)
class Step:
    """One step: the layers pruned in it, the number of filters removed, and the network's quality after it."""

    layers: tuple[str, ...]
    removed: int
    quality: Quality


@public(model=MODEL, example_inputs=INPUTS)
def accumulate_energy(
    model: nn.Module,
    layers: Sequence[tuple[str, ...]],
    example_inputs: Any,
    evaluate: EvaluateQuality,
    *,
    threshold: float = 0.01,
    retrain: Callable[[nn.Module], object] | None = None,
    **knobs: Any,
) -> list[Step]:
    """Prune one layer after the other and measure the network after each.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model; it isn't changed.
    layers : sequence of tuple of str
        Layers in the order of pruning; the layers of one tuple are pruned together.
    example_inputs : Any
        Inputs of the model.
    evaluate : callable
        Maps a model to its :class:`~nni_topo.analysis.Quality`.
    threshold : float, default=0.01
        Energy share, in (0, 1).
    retrain : callable or None, default=None
        Trains the dense network in place after each layer, before it is measured and its next layer pruned. None:
        nothing is trained.
    **knobs
        Of :class:`~nni_topo.EnergyFilterPruner`.

    Returns
    -------
    list of Step
        One per tuple.
    """
    steps, dense = [], model
    for names in layers:
        entry = {"op_names": list(names), "sparse_threshold": threshold}
        config_list = dependency_groups(dense, example_inputs, [entry])
        pruner = EnergyFilterPruner(detached_copy(dense), config_list, example_inputs=example_inputs, **knobs)
        _, masks = pruner.compress()
        before = _channels(dense, names[0])
        dense = to_dense(dense, example_inputs, masks)
        if retrain is not None:
            retrain(dense)
        steps.append(Step(names, before - _channels(dense, names[0]), quality_of(evaluate, dense)))
    return steps


def _channels(model: nn.Module, name: str) -> int:
    return output_channels(model.get_submodule(name)) or 0
