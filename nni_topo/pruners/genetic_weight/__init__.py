"""Pruning of single weights by a genetic search."""

from nni_topo.pruners.genetic_weight.pruner import GeneticWeightPruner

__all__ = ["GeneticWeightPruner"]
