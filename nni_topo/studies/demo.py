"""The demonstration: a small network on scikit-learn's digits, pruned to the same widths by several pruners."""

from __future__ import annotations

from nni_topo.runs.choices import CompensationChoice, DataChoice, ModelChoice, PrunerChoice, Target
from nni_topo.studies.plan import ComparisonPlan

DEMO = ComparisonPlan(
    models=(ModelChoice("small_cnn"),),
    data=(DataChoice("digits"),),
    pruners=(
        PrunerChoice("topological"),
        PrunerChoice("topological", "topological, functional", calibration=512),
        PrunerChoice("reconstruction", calibration=512),
        PrunerChoice("l1"),
        PrunerChoice("l2"),
        PrunerChoice("fpgm"),
        PrunerChoice("random"),
    ),
    targets=(Target("ratio", 0.5), Target("ratio", 0.75)),
    seeds=5,
    retrain={"epochs": 2},
    compensate=CompensationChoice(images=512),
)
