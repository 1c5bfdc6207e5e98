"""Clusters of points as plain functions on arrays: partitions, and sub-clustering with its threshold.

Arrays that aren't finite, or not of the documented shape, raise a DataError; other arguments out of their range, a
ConfigError.
"""

from nni_topo.maths.clustering.partition import ALGORITHMS, GRAPHS, Algorithm, NeighbourGraph, partition
from nni_topo.maths.clustering.subclustering import Cluster, Growth, SplitTree, grow, hoh_threshold, initial_clusters

__all__ = [
    "ALGORITHMS",
    "GRAPHS",
    "Algorithm",
    "Cluster",
    "Growth",
    "NeighbourGraph",
    "SplitTree",
    "grow",
    "hoh_threshold",
    "initial_clusters",
    "partition",
]
