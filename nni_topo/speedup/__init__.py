"""From NNI's masks to a smaller dense model: dependency groups, the masked reference, ModelSpeedup."""

from nni_topo.speedup.dense import to_dense
from nni_topo.speedup.dependency import dependency_groups
from nni_topo.speedup.reference import masked_model

__all__ = ["dependency_groups", "masked_model", "to_dense"]
