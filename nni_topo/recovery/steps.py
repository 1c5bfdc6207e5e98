"""From a plan to the tasks of a method."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nni_topo.errors import ConfigError, unknown_name
from nni_topo.network.layers import by_output, kept_channels, weight_of
from nni_topo.recovery.mixing import ChannelTask, PairTask
from nni_topo.recovery.networks import Networks
from nni_topo.recovery.plan import Plan, Solvable, pruned_roots
from nni_topo.recovery.reconstruct import ReconstructTask
from nni_topo.recovery.rules import LayerTask, MeanTask, MergeTask, ScalarTask, merged_channels, own_equations
from nni_topo.recovery.samples import Task

Pairs = Mapping[str, Mapping[int, int]]


def tasks_of(
    method: str, plan: Plan, networks: Networks, *, refine: int, pairs: Pairs | None, as_printed: bool
) -> list[Task]:
    """List a method's tasks in the order in which they are to be done; ConfigError if ``pairs`` can't be used."""
    if method in ("reconstruct", "ahead"):
        return [
            ReconstructTask(equation, networks.pruned, networks.result, refines=step > 0)
            for equation in plan.equations
            for step in range(1 + refine * equation.rectified)
        ]
    if method in ("scalar", "head"):
        sizes = {name: each.size for name, each in networks.flow.mixers().items()} if method == "head" else {}
        return [
            ScalarTask(each, networks.pruned, networks.result, sizes.get(each.layer.name, 1)) for each in plan.equations
        ]
    kinds = {"layer": LayerTask, "mean": MeanTask, "sequential": ReconstructTask}
    if method in kinds:
        order = {node: rank for rank, node in enumerate(networks.original.graph.nodes)}
        return [kinds[method](each, networks.pruned, networks.result) for each in own_equations(plan, order)]
    if method == "recalibrate":
        return []
    readers = {
        equation.layer.name: equation.layer for equation in plan.equations if _reads_removed(equation.layer, networks)
    }
    roots = {name: networks.flow.entering_roots(name) for name in networks.flow.layers if name in readers}
    if method == "channel":
        return [ChannelTask(readers[name], roots[name], networks.pruned) for name in roots]
    if method == "merge":
        merged = merged_channels(networks)
        return [MergeTask(readers[name], roots[name], networks.pruned, merged) for name in roots]
    survivors = _survivors(networks, pairs or {})
    biases = _biases(networks) if as_printed else None
    return [PairTask(readers[name], roots[name], networks.pruned, survivors, biases) for name in roots]


def _reads_removed(layer: Solvable, networks: Networks) -> bool:
    module = networks.pruned.get_submodule(layer.name)
    return layer.columns.shape[1] < by_output(weight_of(module), module).shape[1]


def _survivors(networks: Networks, pairs: Pairs) -> dict[int, int]:
    """Translate channels of layers into the numbers of the channel flow."""
    removed = pruned_roots(networks.original, networks.flow, networks.masks)
    survivors = {}
    if not isinstance(pairs, Mapping):
        raise ConfigError(f"pairs must be a mapping of layers to mappings of channels, got {pairs!r} (pairs)")
    for name, chosen in pairs.items():
        if name not in networks.flow.layers:
            raise unknown_name("a layer of pairs", name, networks.flow.layers)
        if not isinstance(chosen, Mapping):
            raise ConfigError(f"pairs must map channels to channels, got {chosen!r} ({name})")
        roots = networks.flow.layer_roots(name).tolist()
        asked = kept_channels(networks.original.get_submodule(name), networks.asked.get(name, {}))
        for gone, kept in chosen.items():
            inside = all(each in range(len(roots)) for each in (gone, kept))
            if inside and roots[gone] in removed and roots[kept] not in removed:
                survivors[roots[gone]] = roots[kept]
            # A channel that is masked stays where another layer needs it, and then needs no survivor.
            elif not inside or asked is None or bool(asked[gone]) or not bool(asked[kept]):
                raise ConfigError(
                    f"pairs must map channels that are removed to channels that are kept, got {gone}: {kept} ({name})"
                )
    return survivors


def _biases(networks: Networks) -> dict[int, float]:
    """Return the bias of every channel's first layer, 0 if it has none."""
    biases: dict[int, float] = {}
    for name in networks.flow.layers:
        roots = networks.flow.layer_roots(name)
        bias = getattr(networks.original.get_submodule(name), "bias", None)
        values = np.zeros(len(roots)) if bias is None else bias.detach().double().cpu().numpy()
        for root, value in zip(roots.tolist(), values.tolist(), strict=True):
            biases.setdefault(root, value)
    return biases
