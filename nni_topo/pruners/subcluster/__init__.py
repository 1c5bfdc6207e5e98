"""Sub-clustering: clusters of features that split while they vary, so that the number is found (Mitra, chapter 5)."""

from nni_topo.pruners.subcluster.pruner import SubclusterPruner

__all__ = ["SubclusterPruner"]
