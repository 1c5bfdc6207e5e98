"""Channels from which the next layers' outputs can best be reconstructed: least squares, not topology."""

from nni_topo.pruners.reconstruction.pruner import ReconstructionPruner

__all__ = ["ReconstructionPruner"]
