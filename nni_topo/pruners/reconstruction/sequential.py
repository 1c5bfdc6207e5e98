"""Sequential selection: each unit's channels are chosen on the activations of the network as pruned so far."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nni_topo.network.runtime.copies import evaluating, unwrapped_copy
from nni_topo.pruners.hooks import Masks, PruningContext
from nni_topo.pruners.reconstruction.problems import (
    BoolArray,
    ReconstructionProblem,
    ReconstructionProblems,
    linear_readers,
)
from nni_topo.pruners.units import PruningUnit
from nni_topo.recovery.compensating import compensate_up_to


class SequentialProblems(ReconstructionProblems):
    """Measures each unit's problem after the units chosen before it were compensated, in the order of the network.

    The targets are those of the unpruned network; the channels to keep come from the network in which the units
    before are pruned and the layers up to here are reconstructed.
    """

    def each(
        self, context: PruningContext, kept: dict[str, BoolArray]
    ) -> Iterator[tuple[PruningUnit, ReconstructionProblem]]:
        """Yield every unit and its problem; before the next one the caller puts what it keeps of a unit into `kept`."""
        original = evaluating(unwrapped_copy(context.model))
        analysis = self.analysis(original, context.facts)
        flow = analysis.flow
        modules = {module: name for name, module in original.named_modules()}
        own = PruningContext(original, context.target_spaces)
        readers = {unit.name: linear_readers(unit, flow, own) for unit in context.units}
        self.check_memory(readers, analysis)
        rank = {name: index for index, name in enumerate(flow.layers)}
        first = {
            name: min((modules[reader.module] for reader in found), key=rank.__getitem__)
            for name, found in readers.items()
        }
        for unit in sorted(context.units, key=lambda unit: rank[first[unit.name]]):
            masks = self._masks(context, kept)
            network: nn.Module = original
            if masks:
                last = first[unit.name]
                network = compensate_up_to(
                    original, masks, self.calibration, last, seed=self.seed, facts=analysis.facts
                )
            yield unit, self.measure({unit.name: readers[unit.name]}, original, network)[unit.name]

    @staticmethod
    def _masks(context: PruningContext, kept: dict[str, BoolArray]) -> Masks:
        """Masks of the units chosen so far."""
        masks: Masks = {}
        for unit in context.units:
            if unit.name not in kept or bool(kept[unit.name].all()):
                continue
            for module, target in unit.members:
                shape = context.metric_shape(module, target)
                masks.setdefault(module, {})[target] = torch.from_numpy(kept[unit.name]).float().reshape(shape)
        return masks
