"""Reconstruction: how well the outputs of the layers after a unit can be predicted from some of its channels.

A layer's output is linear in its input. So for each layer that reads a unit, the Gram matrix of its inputs gives, for
every set of kept channels, how much of the layer's output is lost even if its weights are solved anew, as
:func:`nni_topo.compensate` does afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from nni.compression.pruning.tools.sparse_gen import _expand_masks
from numpy.typing import NDArray
from torch import nn

from nni_topo.context import leaving_out
from nni_topo.errors import DataError
from nni_topo.maths.least_squares.greedy import Products, SampleMatrix, forward_selection
from nni_topo.network.attention.unfused.multihead import mixing_called
from nni_topo.network.layers.kinds import WEIGHTED, output_channels
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import evaluating, evaluation_mode, unwrapped_copy
from nni_topo.network.runtime.fits import structure_of
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.inputs import calls, fitting, real_positions_of
from nni_topo.network.runtime.memory import check_memory
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.pruners.clouds.functional import ChannelReader, readers_of, unread_error
from nni_topo.pruners.hooks import Masks, PruningContext
from nni_topo.pruners.reconstruction.readings import Reading, column_count
from nni_topo.pruners.units import PruningUnit
from nni_topo.recovery.compensating import compensate_up_to
from nni_topo.recovery.samples import position_count

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

_COPIES = 3  # of products, or of samples, in memory at most
_MOST_BYTES = 2**30  # of the matrices of units that are measured together
_MANY = 2048  # columns: fewer take hardly any memory


@dataclass(frozen=True)
class ReconstructionProblem:
    """The least-squares problems of the layers that read a unit, to choose the unit's channels."""

    # Covariances, or samples, of each layer's inputs, channel by channel, with a ridge; targets are scaled to a total
    # variance of 1. Each channel has kernel elements times positions columns.
    layers: tuple[Products | SampleMatrix, ...]

    def choose(self, keep: int, parts: int = 1) -> IntArray:
        """Return ``keep`` channels by forward selection, in the order of choice, equally many from each part."""
        return forward_selection(self.layers, keep, parts)[0]

    def worth(self, parts: int = 1) -> FloatArray:
        """Return how much each channel reduces the error, summed over the layers, when all are chosen one by one."""
        channels = self.layers[0].channels
        order, reductions = forward_selection(self.layers, channels, parts)
        worth = np.zeros(channels)
        worth[order] = reductions.clip(min=0.0)
        return worth


class ReconstructionProblems:
    """Measures the reconstruction problems of a pruner's units on calibration batches.

    ``sequential``: units are measured in network order, each after the earlier ones were compensated. The targets come
    from the unpruned network, the inputs from the network in which earlier units are pruned and the layers up to here
    are reconstructed. ``seed`` draws the positions at which large feature maps are sampled.
    """

    def __init__(self, calibration: Iterable[Any], *, seed: int = 0, sequential: bool = False) -> None:
        self.calibration = Calibration.of(calibration)
        self.seed = seed
        self.sequential = sequential
        self.keeps = False  # whether problems that fit into memory together are measured only once
        self._measured: dict[str, ReconstructionProblem] = {}

    def unit_problems(
        self, context: PruningContext, kept_blocks: dict[str, BoolArray]
    ) -> Iterator[tuple[PruningUnit, ReconstructionProblem]]:
        """Yield every unit and its problem; before the next one the caller puts its blocks into `kept_blocks`."""
        if context.units and all(unit.name in self._measured for unit in context.units):
            for unit in context.units:
                yield unit, self._measured[unit.name]
            return
        original = evaluating(unwrapped_copy(context.model)) if self.sequential else context.model
        with evaluation_mode(original):
            analysis = Analysis(
                original, structure_of(original, next(calls(original, self.calibration))), context.facts
            )
            readers = {}
            for unit in context.units:
                unit_readers = readers_of(unit, analysis.flow, replace(context, model=original))
                readers[unit.name] = [reader for reader in unit_readers if isinstance(reader.module, WEIGHTED)]
                if not readers[unit.name]:
                    raise unread_error([unit.name], analysis.flow)
            self.check_memory(readers, analysis)
            if self.sequential:
                yield from self._one_after_the_other(context, kept_blocks, readers, analysis)
                return
            # In chunks whose matrices fit into memory together.
            chunks: list[list[PruningUnit]] = [[]]
            size = 0
            for unit in context.units:
                nbytes = sum(8 * column_count(reader) ** 2 for reader in readers[unit.name])
                if chunks[-1] and size + nbytes > _MOST_BYTES:
                    chunks.append([])
                    size = 0
                chunks[-1].append(unit)
                size += nbytes
            for units in chunks:
                measured = self.measure({unit.name: readers[unit.name] for unit in units}, original, original)
                if self.keeps and len(chunks) == 1:
                    self._measured = dict(measured)
                for unit in units:
                    yield unit, measured.pop(unit.name)

    def _one_after_the_other(
        self,
        context: PruningContext,
        kept_blocks: dict[str, BoolArray],
        readers: dict[str, list[ChannelReader]],
        analysis: Analysis,
    ) -> Iterator[tuple[PruningUnit, ReconstructionProblem]]:
        original = analysis.model
        modules = {module: name for name, module in original.named_modules()}
        rank = {name: index for index, name in enumerate(analysis.flow.layers)}
        first = {
            name: min((modules[reader.module] for reader in unit_readers), key=rank.__getitem__)
            for name, unit_readers in readers.items()
        }
        for unit in sorted(context.units, key=lambda unit: rank[first[unit.name]]):
            masks: Masks = {}
            for masked_unit in context.units:
                if masked_unit.name in kept_blocks and not kept_blocks[masked_unit.name].all():
                    for module, target in masked_unit.members:
                        shape = context.metric_shape(module, target)
                        mask = torch.from_numpy(kept_blocks[masked_unit.name]).float().reshape(shape)
                        masks.setdefault(module, {})[target] = mask
            network: nn.Module = original
            if masks:
                full_masks = dict(_expand_masks(masks, context.target_spaces))
                last = first[unit.name]
                network = compensate_up_to(
                    original, full_masks, self.calibration, last, seed=self.seed, facts=analysis.facts
                )
            yield unit, self.measure({unit.name: readers[unit.name]}, original, network)[unit.name]

    def check_memory(self, readers: dict[str, list[ChannelReader]], analysis: Analysis) -> None:
        """Raise DataError for a unit whose least squares don't fit into memory."""
        wide = [
            (name, reader)
            for name, unit_readers in readers.items()
            for reader in unit_readers
            if column_count(reader) > _MANY
        ]
        if not wide:
            return
        model, shapes = analysis.model, analysis.sizes
        images = self.calibration.samples
        names = {id(module): name for name, module in model.named_modules()}
        cure = f"fewer samples than columns (calibration) take less, or {leaving_out()}"
        for name, reader in wide:
            columns, outputs = column_count(reader), output_channels(reader.module) or 0
            # Few samples are stored themselves, instead of their products.
            samples = images * position_count(reader.module, shapes[names[id(reader.module)]][0][1])
            rows = min(samples, columns)
            purpose = f"least squares of {columns} columns from {samples} samples"
            check_memory(8 * _COPIES * columns * (rows + min(outputs, rows)), purpose, cure, name)

    def measure(
        self, readers: dict[str, list[ChannelReader]], original: nn.Module, network: nn.Module
    ) -> dict[str, ReconstructionProblem]:
        """Return the problems of some units, given the modules of ``original`` that read them; it gives the targets.

        ``network`` gives the inputs: the same model, or one with the same modules.
        """
        samples = self.calibration.samples
        names = {id(module): name for name, module in original.named_modules()}
        sums = {
            name: [
                Reading(reader, network.get_submodule(names[id(reader.module)]), samples, self.seed)
                for reader in unit_readers
            ]
            for name, unit_readers in readers.items()
        }
        flat = [reading for readings in sums.values() for reading in readings]
        hooks = watched(
            [(reading.twin, reading.record_twin_call) for reading in flat],
            [(reading.module, reading.record_call) for reading in flat],
        )
        with mixing_called(original, network), hooks, evaluation_mode(original, network), torch.no_grad():
            for index, (args, kwargs) in enumerate(calls(original, self.calibration)):
                with fitting(index, self.calibration):
                    original(*args, **kwargs)
                    if network is not original:
                        network(*args, **kwargs)
                real = real_positions_of(original, (args, kwargs))
                for reading in flat:
                    reading.add(real)
        del flat, hooks
        problems = {}
        for name in list(sums):
            waiting = sums.pop(name)
            if not all(reading.equations.is_finite() for reading in waiting):
                raise DataError(f"activations must be finite, got NaN or infinity ({name})")
            # Each layer's sums are freed before the next layer's are used.
            waiting.reverse()
            layers = []
            while waiting:
                layers.append(waiting.pop().layer())
            problems[name] = ReconstructionProblem(tuple(layers))
        return problems
