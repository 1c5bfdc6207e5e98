"""Filters whose loss changes the topology of the layer's point cloud least."""

from nni_topo.pruners.topological.metric import GeneticSearch
from nni_topo.pruners.topological.pruner import TopologicalPruner

__all__ = ["GeneticSearch", "TopologicalPruner"]
