"""The energy study: filters removed at each energy threshold, the accuracy lost, and alternatives to removal."""

from nni_topo.studies.analysis.energy.study import AnalyzeEnergy

__all__ = ["AnalyzeEnergy"]
