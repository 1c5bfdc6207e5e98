"""Checks and toys for the tests of pruners and recovery methods, the package's own and third parties'."""

from nni_topo.pruners.testing.checks import SINGLE_WEIGHT_CHECKS, STRUCTURED_CHECKS
from nni_topo.pruners.testing.recoveries import RECOVERY_CHECKS
from nni_topo.pruners.testing.snapshots import require_unchanged, snapshot
from nni_topo.pruners.testing.toys import toy_evaluator, toy_images, toy_knobs, toy_model

__all__ = [
    "RECOVERY_CHECKS",
    "SINGLE_WEIGHT_CHECKS",
    "STRUCTURED_CHECKS",
    "require_unchanged",
    "snapshot",
    "toy_evaluator",
    "toy_images",
    "toy_knobs",
    "toy_model",
]
