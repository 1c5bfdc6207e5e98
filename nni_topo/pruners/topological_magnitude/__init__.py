"""T-IMP: magnitude pruning that keeps each layer's maximum spanning tree."""

from nni_topo.pruners.topological_magnitude.pruner import TopologicalMagnitudePruner

__all__ = ["TopologicalMagnitudePruner"]
