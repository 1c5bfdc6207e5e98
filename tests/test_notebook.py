"""The notebook runs from top to bottom, shows what it says, and is stored with its outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nni_topo import zoo

NOTEBOOK = Path(__file__).parents[1] / "docs" / "two_minutes.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_it_is_stored_with_the_outputs_of_one_run():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert all(cell["outputs"] for cell in CODE)
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert all("/home/" not in text and "/root/" not in text for text in map(json.dumps, outputs))


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in CODE:
        lines = [line for line in "".join(cell["source"]).splitlines() if not line.startswith("%")]
        exec(compile("\n".join(lines), NOTEBOOK.name, "exec"), names)
    data = names["data"]
    assert zoo.evaluate(names["model"], data.test) > 0.96
    small = zoo.evaluate(names["dense"], data.test)
    assert small > 0.93
    said = capsys.readouterr().out
    without = float(said.split("L1 without recovery: ")[1].split("%")[0]) / 100
    assert without < small - 0.1
    assert names["found"].to_frame()["share"].tolist() == [1.0, 0.5, 0.25, 0.1, 0.05]
    assert {path.name for path in tmp_path.iterdir()} == {"small.safetensors", "small.pt2"}
