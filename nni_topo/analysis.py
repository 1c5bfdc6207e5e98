"""Functions that study a model without changing it; ``nni-topo analyze`` runs them from the command line."""

from nni_topo.maths.topology.overlap import overlap_bound, tree_overlap
from nni_topo.studies.analysis.bounds.propagation import error_bound
from nni_topo.studies.analysis.compression import critical_compression_ratio, critical_config_list
from nni_topo.studies.analysis.connectivity import connectivity
from nni_topo.studies.analysis.deviation import NetDeviation, net_deviation
from nni_topo.studies.analysis.energy.alternatives import study_replacement, study_selection
from nni_topo.studies.analysis.energy.dropout import study_dropout
from nni_topo.studies.analysis.energy.study import Quality, accumulate_energy, study_energy
from nni_topo.studies.analysis.evolution import EvolutionStudy, EvolutionTrial
from nni_topo.studies.analysis.persistence import neural_persistence
from nni_topo.studies.analysis.retraining import retraining_bound
from nni_topo.studies.analysis.sensitivity import sensitivity
from nni_topo.studies.analysis.splits import draw_splits
from nni_topo.studies.analysis.topology import study_topology

__all__ = [
    "EvolutionStudy",
    "EvolutionTrial",
    "NetDeviation",
    "Quality",
    "accumulate_energy",
    "connectivity",
    "critical_compression_ratio",
    "critical_config_list",
    "draw_splits",
    "error_bound",
    "net_deviation",
    "neural_persistence",
    "overlap_bound",
    "retraining_bound",
    "sensitivity",
    "study_dropout",
    "study_energy",
    "study_replacement",
    "study_selection",
    "study_topology",
    "tree_overlap",
]
