"""Rounds of pruning and fine-tuning: T-IMP and magnitude pruning compared."""

from nni_topo.studies.analysis.rounds.study import AnalyzeRounds

__all__ = ["AnalyzeRounds"]
