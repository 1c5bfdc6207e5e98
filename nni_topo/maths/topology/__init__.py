"""Topology of point clouds and of layers as pure functions on arrays: diagrams, distances, spanning trees, covers.

Arrays that aren't finite, or not of the documented shape, raise a DataError; other arguments out of their range, a
ConfigError.
"""

from nni_topo.maths.topology.clouds import pairwise_distances, with_origin
from nni_topo.maths.topology.comparison import bottleneck_distance, wasserstein_distance
from nni_topo.maths.topology.covering import farthest_point_order, hausdorff_to_subset
from nni_topo.maths.topology.diagrams import rips_diagram
from nni_topo.maths.topology.fitness import CRITERIA, SubsetFitness
from nni_topo.maths.topology.layer_graphs import LayerGraph, convolution_graph, linear_graph
from nni_topo.maths.topology.layer_trees import (
    Forest,
    channel_tree,
    maximum_spanning_tree,
    plane_trees,
    spanning_forest,
)
from nni_topo.maths.topology.spanning import distinct_points, h0_deaths

__all__ = [
    "CRITERIA",
    "Forest",
    "LayerGraph",
    "SubsetFitness",
    "bottleneck_distance",
    "channel_tree",
    "convolution_graph",
    "distinct_points",
    "farthest_point_order",
    "h0_deaths",
    "hausdorff_to_subset",
    "linear_graph",
    "maximum_spanning_tree",
    "pairwise_distances",
    "plane_trees",
    "rips_diagram",
    "spanning_forest",
    "wasserstein_distance",
    "with_origin",
]
