"""From NNI's masks to a smaller dense model: dependency groups, the masked and the dense model."""

from nni_topo.network.channels.rules import Operation, register_operator
from nni_topo.network.cost.latency import LatencyTable, LayerLatency, measure_latency
from nni_topo.network.cost.measure import Profiled, profile
from nni_topo.network.io.checkpoint import load, save, save_pretrained
from nni_topo.network.io.exporting import Exported, export
from nni_topo.network.io.importing.files import from_file
from nni_topo.network.io.vocabulary import TrimmedVocabulary, VocabularyReport, trim_vocabulary
from nni_topo.network.layers.kinds import as_torch_layers, register_module, zeros_held
from nni_topo.network.speedup.dense_report import DenseReport, LayerChannels
from nni_topo.network.speedup.dependency import DependencyGroups, dependency_groups
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.network.speedup.explain import Explanation, explain
from nni_topo.network.speedup.width_attributes import register_width_attribute

__all__ = [
    "DenseReport",
    "DependencyGroups",
    "Explanation",
    "Exported",
    "LatencyTable",
    "LayerChannels",
    "LayerLatency",
    "Operation",
    "Profiled",
    "TrimmedVocabulary",
    "VocabularyReport",
    "as_torch_layers",
    "dependency_groups",
    "explain",
    "export",
    "from_file",
    "load",
    "masked_model",
    "measure_latency",
    "profile",
    "register_module",
    "register_operator",
    "register_width_attribute",
    "save",
    "save_pretrained",
    "trim_vocabulary",
    "zeros_held",
]
