"""Recovery of pruned networks without labels."""

from nni_topo.recovery.batchnorm import recalibrate_batch_norm
from nni_topo.recovery.blocks import remove_blocks
from nni_topo.recovery.compensating import Compensation, compensate, compensation
from nni_topo.recovery.dense import to_dense
from nni_topo.recovery.distilling import distill, distillation
from nni_topo.recovery.mixing import Pair, pair_coefficients
from nni_topo.recovery.reconstruct import Reconstruct
from nni_topo.recovery.registry import (
    Recalibrate,
    RecoveryInfo,
    RecoveryMethod,
    list_recoveries,
    recovery_info,
    register_recovery,
)
from nni_topo.recovery.report import CompensationReport, LayerReport
from nni_topo.recovery.synthetic import synthetic_images
from nni_topo.recovery.verdict import Distillation

__all__ = [
    "Compensation",
    "CompensationReport",
    "Distillation",
    "LayerReport",
    "Pair",
    "Recalibrate",
    "Reconstruct",
    "RecoveryInfo",
    "RecoveryMethod",
    "compensate",
    "compensation",
    "distill",
    "distillation",
    "list_recoveries",
    "pair_coefficients",
    "recalibrate_batch_norm",
    "recovery_info",
    "register_recovery",
    "remove_blocks",
    "synthetic_images",
    "to_dense",
]
