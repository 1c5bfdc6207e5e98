"""Clustered pruning: one filter of each cluster of features is kept (Mitra, chapter 4)."""

from nni_topo.pruners.cluster.pruner import ClusterPruner

__all__ = ["ClusterPruner"]
