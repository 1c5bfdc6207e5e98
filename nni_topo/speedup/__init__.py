"""From NNI's masks to a smaller dense model: dependency groups, the masked reference, ModelSpeedup."""

from nni_topo.speedup.dense import to_dense
from nni_topo.speedup.dependency import dependency_groups
from nni_topo.speedup.latency import LatencyTable, LayerLatency
from nni_topo.speedup.reference import masked_model
from nni_topo.speedup.report import DenseReport, LayerReport
from nni_topo.speedup.timing import measure_latency
from nni_topo.speedup.zeros import zeros_held

__all__ = [
    "DenseReport",
    "LatencyTable",
    "LayerLatency",
    "LayerReport",
    "dependency_groups",
    "masked_model",
    "measure_latency",
    "to_dense",
    "zeros_held",
]
