"""What the benchmarks of HYPOTHESES.md share: the networks' seeds, and the paired differences that decide."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import stats

from nni_topo.studies.tables import interval

EXPLORATION, CONFIRMATION = range(300, 305), range(310, 325)  # seeds of the networks

Figures = Mapping[str, Mapping[int, float]]
"""A figure by method, then by seed."""


def best_of(names: tuple[str, ...], explored: Figures) -> str:
    """Return the method with the highest mean figure over the networks of exploration; of equal ones the first."""
    return max(names, key=lambda name: float(np.mean(list(explored[name].values()))))


def difference_row(
    ours: Mapping[int, float], theirs: Mapping[int, float], *, scale: float = 100.0, digits: int = 1
) -> list[str]:
    """Return the mean paired difference with its 95 % interval, and the p-value of the paired t-test, as text."""
    gains = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    p = float(stats.ttest_1samp(gains, 0.0).pvalue)
    return [interval(gains).show(scale, digits, sign=True), f"{p:.2g}"]
