"""What runs and studies return is also a table, and shows itself as one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
from rich.console import Console

from nni_topo.studies.analysis.sensitivity import Sensitivity, SensitivityCurve
from nni_topo.studies.study import Findings, Verb


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


def test_a_document_has_no_numbers_that_json_lacks(capsys):
    document = {"is": [0.5, math.nan, -math.inf], "pair": ({"limit": math.inf}, 3), "name": "nan"}
    Verb(json=True).put_out(Console(), document, ())
    assert json.loads(capsys.readouterr().out) == {
        "is": [0.5, None, None], "pair": [{"limit": None}, 3], "name": "nan",
    }  # fmt: skip
