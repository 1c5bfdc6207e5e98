"""The experiment files for this machine run as they are, up to their number of trials."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "configs" / "experiments"
LOCAL = ["assessor_curvefitting", "assessor_medianstop", "grid", "multi_objective", "topological_knobs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LOCAL, "tpe_ratios"])
def test_three_trials(name, home):
    text = re.sub(r"maxTrialNumber: \d+", "maxTrialNumber: 3", (FOLDER / f"{name}.yml").read_text())
    path = home.write(f"{name}.yml", text)
    done = home.topo("experiment", "run", str(path), "--port", str(home.port), "--out", "out", "--json")
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout)["trials"]
    assert len(trials) == 3
    # an assessor may end one before its time
    assert {trial["status"] for trial in trials} <= {"SUCCEEDED", "EARLY_STOPPED"}
    metrics = json.loads((home.folder / "out" / "best" / "metrics.json").read_text())
    assert metrics["test_accuracy"] > 0.15
    assert metrics["flops"] < metrics["flops_before"]
