"""Rounds of pruning and retraining: T-IMP against magnitude pruning."""

from nni_topo.studies.analysis.rounds.study import AnalyzeRounds

__all__ = ["AnalyzeRounds"]
