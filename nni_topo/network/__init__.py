"""From NNI's masks to a smaller dense model: dependency groups, the masked reference, ModelSpeedup."""

from nni_topo.network.channels import Operation, register_operator
from nni_topo.network.cost import LatencyTable, LayerLatency, ModeCost, measure_latency, profile
from nni_topo.network.io import Exported, export, load, save, save_pretrained
from nni_topo.network.layers import as_torch_layers, register_module, zeros_held
from nni_topo.network.speedup import (
    DenseReport,
    DependencyGroups,
    Explanation,
    LayerChannels,
    dependency_groups,
    explain,
    masked_model,
    register_width_attribute,
    to_dense,
)

__all__ = [
    "DenseReport",
    "DependencyGroups",
    "Explanation",
    "Exported",
    "LatencyTable",
    "LayerChannels",
    "LayerLatency",
    "ModeCost",
    "Operation",
    "as_torch_layers",
    "dependency_groups",
    "explain",
    "export",
    "load",
    "masked_model",
    "measure_latency",
    "profile",
    "register_module",
    "register_operator",
    "register_width_attribute",
    "save",
    "save_pretrained",
    "to_dense",
    "zeros_held",
]
