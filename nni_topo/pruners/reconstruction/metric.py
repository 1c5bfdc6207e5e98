"""The metric of reconstruction: channels by forward selection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nni_topo.network.runtime.progress import bar
from nni_topo.pruners.hooks import PruningContext
from nni_topo.pruners.planner import Losses
from nni_topo.pruners.reconstruction.problems import IntArray, ReconstructionProblem, ReconstructionProblems
from nni_topo.pruners.selection import Clouds, SelectionMetric
from nni_topo.pruners.units import KeptBlocks


@dataclass(kw_only=True, eq=False)
class ReconstructionMetric(SelectionMetric):
    """Keeps in every unit the channels from which the next layers' outputs can best be reconstructed."""

    problems: ReconstructionProblems
    by_error: ReconstructionProblems | None = None
    """Where blocks of all units are compared by what they take off the readers' errors; None: by death times."""

    def losses(self, context: PruningContext, clouds: Clouds) -> Losses:
        """Return what says how much of its readers' errors each block of a unit takes off."""
        if self.by_error is None:
            return super().losses(context, clouds)
        # A row loses a block of every part.
        worth = {u.name: u.parts * found.worth(u.parts) for u, found in self.by_error.each(context, {})}
        return lambda unit: worth[unit.name]

    def chosen(self, problem: ReconstructionProblem, keep: int, parts: int) -> IntArray:
        """Return the kept channels of one unit, ``(keep,)``."""
        return problem.choose(keep, parts)

    def choose(self, context: PruningContext, clouds: Clouds, rows: dict[str, int]) -> KeptBlocks:
        """Choose unit by unit, in the order of the problems."""
        kept: KeptBlocks = {}
        processes = self.problems.calibration.processes
        if processes is not None:
            # Equal sums can lead to other choices between near ties on processors of another kind.
            rows = processes.gather(rows, "how many channels are kept")[0]
        with bar("choosing filters", self.progress, total=len(context.units)) as shown:
            for unit, problem in self.problems.each(context, kept):
                chosen = self.chosen(problem, rows[unit.name] * unit.parts, unit.parts)
                if processes is not None:
                    chosen = processes.gather(chosen, f"the channels of {unit.name}")[0]
                kept[unit.name] = np.isin(np.arange(unit.blocks), chosen)
                shown.update()
        return kept
