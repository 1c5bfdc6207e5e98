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
from nni_topo.hooks.collectors import ActivationCollector, WeightCollector
from nni_topo.hooks.units import PruningUnit, TargetSpaces, pruning_units

__all__ = [
    "ActivationCollector",
    "ConfigAllocator",
    "Data",
    "DataCollector",
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
    "profile",
    "pruning_units",
    "unit_scores",
]
