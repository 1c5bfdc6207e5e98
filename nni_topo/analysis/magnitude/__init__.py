"""The magnitude study: iterative against direct pruning, sizes and times of sparse and dense networks."""

from nni_topo.analysis.magnitude.study import AnalyzeMagnitude

__all__ = ["AnalyzeMagnitude"]
