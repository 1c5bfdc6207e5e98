"""Topology of point clouds as pure functions on arrays: diagrams, their distances, spanning trees, covers."""

from nni_topo.topology.comparison import bottleneck_distance, wasserstein_distance
from nni_topo.topology.covering import farthest_point_order, hausdorff_to_subset, mean_cover
from nni_topo.topology.diagrams import rips_diagram
from nni_topo.topology.distances import pairwise_distances, with_origin
from nni_topo.topology.matching import h0_bottleneck, h0_wasserstein
from nni_topo.topology.selection import CRITERIA, SubsetFitness
from nni_topo.topology.spanning import h0_deaths, maximum_spanning_tree

__all__ = [
    "CRITERIA",
    "SubsetFitness",
    "bottleneck_distance",
    "farthest_point_order",
    "h0_bottleneck",
    "h0_deaths",
    "h0_wasserstein",
    "hausdorff_to_subset",
    "maximum_spanning_tree",
    "mean_cover",
    "pairwise_distances",
    "rips_diagram",
    "wasserstein_distance",
    "with_origin",
]
