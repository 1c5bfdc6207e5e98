"""Studies that look at a model and change nothing."""

from nni_topo.analysis.topology import LayerTopology, TopologyStudy, study_topology

__all__ = ["LayerTopology", "TopologyStudy", "study_topology"]
