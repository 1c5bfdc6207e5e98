"""The parts a structured pruner is made of: data collector, metric calculator, sparsity allocator."""

from nni_topo.hooks.allocators import ConfigAllocator, NNIAllocator, keep_highest, profile
from nni_topo.hooks.base import (
    Data,
    DataCollector,
    Masks,
    MetricCalculator,
    Metrics,
    PruningContext,
    SparsityAllocator,
    unit_scores,
)
from nni_topo.hooks.clouds import CLOUDS, make_collector
from nni_topo.hooks.collectors import ActivationCollector, WeightCollector
from nni_topo.hooks.coupled import CoupledWeightCollector
from nni_topo.hooks.features import FeatureCollector
from nni_topo.hooks.folded import FoldedWeightCollector
from nni_topo.hooks.functional import FunctionalCollector
from nni_topo.hooks.gradient import GradientCollector
from nni_topo.hooks.units import PruningUnit, TargetSpaces, pruning_units

__all__ = [
    "CLOUDS",
    "ActivationCollector",
    "ConfigAllocator",
    "CoupledWeightCollector",
    "Data",
    "DataCollector",
    "FeatureCollector",
    "FoldedWeightCollector",
    "FunctionalCollector",
    "GradientCollector",
    "Masks",
    "MetricCalculator",
    "Metrics",
    "NNIAllocator",
    "PruningContext",
    "PruningUnit",
    "SparsityAllocator",
    "TargetSpaces",
    "WeightCollector",
    "keep_highest",
    "make_collector",
    "profile",
    "pruning_units",
    "unit_scores",
]
