"""The retraining study: epochs of fine-tuning compared with their lower bound."""

from nni_topo.studies.analysis.retraining.bound import RetrainingBound, retraining_bound
from nni_topo.studies.analysis.retraining.study import AnalyzeRetraining

__all__ = ["AnalyzeRetraining", "RetrainingBound", "retraining_bound"]
