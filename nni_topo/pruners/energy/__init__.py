"""Energy-based filter pruning: what stays lets most of a signal through."""

from nni_topo.pruners.energy.pruner import EnergyFilterPruner

__all__ = ["EnergyFilterPruner"]
