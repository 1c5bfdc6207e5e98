"""The metric of reconstruction: channels by forward selection, the others as they cover the layer's point cloud."""

from __future__ import annotations

import numpy as np
from tqdm.auto import tqdm

from nni_topo.pruners.allocators import ConfigAllocator
from nni_topo.pruners.hooks import PruningContext
from nni_topo.pruners.ranking import Clouds, RankingMetric, Rankings, greedy_ranking
from nni_topo.pruners.reconstruction.problems import BoolArray, ReconstructionProblems


class ReconstructionMetric(RankingMetric):
    """Ranks every unit by what the layers behind can still put out, as far as blocks stay; then by the cloud."""

    def __init__(self, problems: ReconstructionProblems, allocator: ConfigAllocator, *, progress: bool = False) -> None:
        super().__init__(allocator, progress=progress)
        self.problems = problems

    def rankings(self, context: PruningContext, clouds: Clouds, rows: dict[str, int]) -> Rankings:
        """Choose unit by unit, in the order of the problems."""
        found: Rankings = {}
        kept: dict[str, BoolArray] = {}
        with tqdm(total=len(context.units), desc="choosing filters", disable=not self.progress) as bar:
            for unit, problem in self.problems.each(context, kept):
                chosen = problem.choose(rows[unit.name] * unit.parts, unit.parts)
                kept[unit.name] = np.isin(np.arange(unit.blocks), chosen)
                found[unit.name] = []
                for part, cloud in enumerate(clouds[unit.name]):
                    own = chosen[chosen // unit.rows == part] - part * unit.rows
                    rest = greedy_ranking(cloud)
                    found[unit.name].append(np.concatenate([own, rest[~np.isin(rest, own)]]))
                bar.update()
        return found
