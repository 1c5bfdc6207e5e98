"""The metric of reconstruction: channels by forward selection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from nni_topo.pruners.hooks import PruningContext
from nni_topo.pruners.reconstruction.problems import ReconstructionProblems
from nni_topo.pruners.selection import Clouds, Kept, SelectionMetric


@dataclass(kw_only=True, eq=False)
class ReconstructionMetric(SelectionMetric):
    """Keeps of every unit the channels from which the layers behind can best be solved anew."""

    problems: ReconstructionProblems

    def choose(self, context: PruningContext, clouds: Clouds, rows: dict[str, int]) -> Kept:
        """Choose unit by unit, in the order of the problems."""
        kept: Kept = {}
        with tqdm(total=len(context.units), desc="choosing filters", disable=not self.progress) as bar:
            for unit, problem in self.problems.each(context, kept):
                chosen = problem.choose(rows[unit.name] * unit.parts, unit.parts)
                kept[unit.name] = np.isin(np.arange(unit.blocks), chosen)
                bar.update()
        return kept
