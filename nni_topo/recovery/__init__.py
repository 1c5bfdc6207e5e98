"""Bringing a pruned network back without labels."""

from nni_topo.recovery.batchnorm import recalibrate_batch_norm

__all__ = ["recalibrate_batch_norm"]
