"""Energy-based filter pruning: keeps the filters with the largest response to a signal."""

from nni_topo.pruners.energy.pruner import EnergyFilterPruner

__all__ = ["EnergyFilterPruner"]
