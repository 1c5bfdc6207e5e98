"""NNI pruners, each under its registry name, and the parts that they are made of: collectors, metrics, allocators."""

from nni_topo.pruners.allocators import ConfigAllocator, keep_highest
from nni_topo.pruners.clouds import CLOUDS
from nni_topo.pruners.clouds.features import FeatureCollector
from nni_topo.pruners.clouds.functional import FunctionalCollector
from nni_topo.pruners.clouds.weight import WeightCollector
from nni_topo.pruners.hooks import (
    Data,
    DataCollector,
    KeptSet,
    Masks,
    MetricCalculator,
    Metrics,
    PruningContext,
    SparsityAllocator,
    unit_scores,
)
from nni_topo.pruners.planner import Planner
from nni_topo.pruners.units import PruningUnit, TargetSpaces, pruning_units

__all__ = [
    "CLOUDS",
    "ConfigAllocator",
    "Data",
    "DataCollector",
    "FeatureCollector",
    "FunctionalCollector",
    "KeptSet",
    "Masks",
    "MetricCalculator",
    "Metrics",
    "Planner",
    "PruningContext",
    "PruningUnit",
    "SparsityAllocator",
    "TargetSpaces",
    "WeightCollector",
    "keep_highest",
    "pruning_units",
    "unit_scores",
]
