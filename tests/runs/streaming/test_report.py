"""What a report of a model that was pruned block by block says, and what a file holds of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from nni_topo.pruners.budget import BudgetOutcome
from nni_topo.recovery.likeness import Estimate, Likeness
from nni_topo.runs.streaming.report import BlockRow, StreamingReport, as_report

ROWS = (
    BlockRow("model.layers.0", 1000, 600, 0.125, 0.0625, is_distilled=True, seconds=2.0),
    BlockRow("model.layers.2", 1000, 600, 0.25, 0.1, is_distilled=False, seconds=3.0),
)
REPORT = StreamingReport(
    blocks=ROWS,
    params_before=5000,
    params=3200,
    widths={"mlp.up": (8, 4), "attention.q": (4, 4), "mlp.gate": (8, 4)},
    budget=BudgetOutcome("params", 0.6, 0.64, False, "blocks are equally wide"),
    likeness=Likeness(distance=Estimate(0.25, 0.125, 0.5), agreement=Estimate(0.75, 0.5, 0.875)),
    samples=14,
    held_out=2,
    pruner="l1",
    recovery="reconstruct",
)


def test_the_frame_has_a_row_for_each_block():
    assert list(REPORT.to_frame().block) == ["model.layers.0", "model.layers.2"]


def test_a_file_holds_all_of_a_report():
    full = replace(REPORT, warnings=("few samples",), read_as="outputs: scores of 9 classes by place")
    assert full.read_as in repr(full)
    for report in (REPORT, full):
        again = as_report(json.loads(json.dumps(asdict(report))))
        assert again == report
