"""Bringing a pruned network back without labels."""

from nni_topo.maths.least_squares.greedy import greedy_least_squares
from nni_topo.recovery.batchnorm import recalibrate_batch_norm
from nni_topo.recovery.blocks import remove_blocks
from nni_topo.recovery.compensating import Compensation, compensate, compensation
from nni_topo.recovery.distilling import Distillation, distill, distillation
from nni_topo.recovery.mixing import pair_coefficients
from nni_topo.recovery.narrowing import narrow_heads
from nni_topo.recovery.report import CompensationReport, LayerReport
from nni_topo.recovery.synthetic import synthetic_images

__all__ = [
    "Compensation",
    "CompensationReport",
    "Distillation",
    "LayerReport",
    "compensate",
    "compensation",
    "distill",
    "distillation",
    "greedy_least_squares",
    "narrow_heads",
    "pair_coefficients",
    "recalibrate_batch_norm",
    "remove_blocks",
    "synthetic_images",
]
