"""The choice from which the layers behind can be solved anew: least squares, not topology."""

from nni_topo.pruners.reconstruction.pruner import ReconstructionPruner

__all__ = ["ReconstructionPruner"]
