"""The magnitude study: iterative and direct pruning, sizes and times of sparse and dense networks."""

from nni_topo.studies.analysis.magnitude.study import AnalyzeMagnitude

__all__ = ["AnalyzeMagnitude"]
