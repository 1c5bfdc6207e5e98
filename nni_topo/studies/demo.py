"""The demonstration: a small network on scikit-learn's digits, shrunk, and pruned by several pruners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nni_topo.disk import finite, only_process, plain, write_figure, write_json
from nni_topo.runs.choices import CompensationChoice, DataChoice, ModelChoice, PrunerChoice, Target
from nni_topo.runs.report import ShrinkReport
from nni_topo.runs.shrink import shrink
from nni_topo.studies.cells import start_of
from nni_topo.studies.pictures import plot_gain
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


def show_gain(plan: ComparisonPlan, out: Path) -> ShrinkReport:
    """Make a plan's first network smaller by :func:`nni_topo.shrink`, to a quarter of its MACs, and return the report.

    The folder gets ``shrink.json`` and a picture, ``gain.png``.
    """
    cell = next(iter(plan.cells()))
    with only_process(out, wait=False):
        start = start_of(cell, out)
        images = start.images(len(start.data.train))
        dense = shrink(start.net, images, {"flops": 0.25}, time=True, evaluate=start.tested, seed=start.seed)
        report: Any = dense.report
        settings = {"model": cell.model.label, "data": cell.data.name}
        write_json(out / "shrink.json", finite(plain({**settings, **report.to_dict()})), sort=False)
        write_figure(out / "gain.png", plot_gain(report), 130)
    found: ShrinkReport = report
    return found
