"""From NNI's masks to a smaller dense model: dependency groups, the masked reference, ModelSpeedup."""

from nni_topo.network.dense import to_dense
from nni_topo.network.dependency import DependencyGroups, dependency_groups
from nni_topo.network.exporting import Exported, export
from nni_topo.network.files import load, save
from nni_topo.network.latency import LatencyTable, LayerLatency
from nni_topo.network.layers import as_torch_layers, register_module
from nni_topo.network.masked import masked_model
from nni_topo.network.pretrained import save_pretrained
from nni_topo.network.profiling import ModeCost, profile
from nni_topo.network.report import DenseReport, LayerReport
from nni_topo.network.timing import measure_latency
from nni_topo.network.zeros import zeros_held

__all__ = [
    "DenseReport",
    "DependencyGroups",
    "Exported",
    "LatencyTable",
    "LayerLatency",
    "LayerReport",
    "ModeCost",
    "as_torch_layers",
    "dependency_groups",
    "export",
    "load",
    "masked_model",
    "measure_latency",
    "profile",
    "register_module",
    "save",
    "save_pretrained",
    "to_dense",
    "zeros_held",
]
