"""Energy-based pruning under study: what each threshold takes, what that costs, and what could stand in its place."""

from nni_topo.studies.analysis.energy.run import AnalyzeEnergy

__all__ = ["AnalyzeEnergy"]
