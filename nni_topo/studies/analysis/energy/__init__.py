"""The energy study: filters removed at each threshold, the accuracy that costs, and alternatives."""

from nni_topo.studies.analysis.energy.study import AnalyzeEnergy

__all__ = ["AnalyzeEnergy"]
