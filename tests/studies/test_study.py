"""What runs and studies return is also a table, and shows itself as one."""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from dataclasses import dataclass

import pytest
from rich.console import Console

from nni_topo.runs.choices import Cell, DataChoice, ModelChoice, PrunerChoice, Target
from nni_topo.studies import analysis
from nni_topo.studies.analysis.sensitivity import Sensitivity, SensitivityCurve
from nni_topo.studies.compare import Comparison, RunFailure
from nni_topo.studies.study import Findings, Verb
from nni_topo.zoo import Recipe

FACTS = {
    "model": "net",
    "data": "digits",
    "target": "ratio 0.5",
    "pruner_name": "l1",
    "flops_before": 4e6,
    "flops": 1e6,
}
FACTS |= {"params_before": 8e3, "params": 2e3, "accuracy_before": 0.99, "accuracy_oneshot": 0.5, "prune_seconds": 0.1}
RECORDS = [{**FACTS, "pruner": "l1", "seed": seed, "versions": {"torch": "2.x"}} for seed in range(2)]


def test_a_comparison_is_still_a_pair_and_a_table():
    cell = Cell(ModelChoice("net"), DataChoice(), PrunerChoice("l2"), Target("ratio", 0.5), 7, Recipe(1), Recipe(1))
    found = Comparison(RECORDS, [RunFailure(cell, "out of memory")])
    records, failures = found
    assert (records, len(failures)) == (RECORDS, 1)
    frame = found.to_frame()
    assert list(frame["seed"]) == [0, 1]
    assert list(frame["versions.torch"]) == ["2.x", "2.x"]
    lines = repr(found).splitlines()
    assert lines[0] == "**net on digits, ratio 0.5 (2 seeds)**"
    assert lines[-1] == "failed: l2, seed 7"


def test_a_study_is_the_table_of_its_rows():
    curves = [SensitivityCurve(("a", "b"), {0.25: 0.9, 0.5: 0.8}), SensitivityCurve(("c",), {0.25: 0.7})]
    found = Sensitivity("l1", {}, 0.95, curves, 0.1, [], 0.95)
    frame = found.to_frame()
    assert list(frame["layers"]) == [["a", "b"], ["c"]]
    assert list(frame["accuracy.0.25"]) == [0.9, 0.7]
    assert repr(found) == f"Sensitivity\n{frame.to_string(index=False, max_colwidth=60)}"


@dataclass(frozen=True)
class Measured(Findings):
    """A study without a table of its own, or with one by name."""

    total: float
    layers: dict[str, object]


@pytest.mark.parametrize(
    ("layers", "rows"),
    [
        ({"a": {"width": 3}, "b": {"width": 5}}, [{"name": "a", "width": 3}, {"name": "b", "width": 5}]),
        ({"a": 3}, [{"total": 0.5, "layers.a": 3}]),
    ],
)
def test_rows_by_name_and_no_rows_at_all(layers, rows):
    assert Measured(0.5, layers).to_frame().to_dict("records") == rows


def test_every_study_shows_its_table():
    for info in pkgutil.iter_modules(analysis.__path__, "nni_topo.studies.analysis."):
        importlib.import_module(info.name)
    kinds = [kind for kind in Findings.__subclasses__() if kind.__module__.startswith("nni_topo.")]
    assert len(kinds) > 8
    assert all(kind.__repr__ is Findings.__repr__ for kind in kinds)


def test_a_document_has_no_numbers_that_json_lacks(capsys):
    document = {"is": [0.5, math.nan, -math.inf], "pair": ({"limit": math.inf}, 3), "name": "nan"}
    Verb(json=True).put_out(Console(), document, ())
    assert json.loads(capsys.readouterr().out) == {
        "is": [0.5, None, None], "pair": [{"limit": None}, 3], "name": "nan",
    }  # fmt: skip
