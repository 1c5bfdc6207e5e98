"""What is copied or run again of a trial, and how trials are listed."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nni_topo.errors import DataError
from nni_topo.runs.experiment.results import export_trial, in_words, save_trials, trials_table
from nni_topo.runs.experiment.trials import TrialRecord

FILES = ["config_list.json", "dense.safetensors", "masks.pt", "metrics.json", "settings.json"]


def trial(number, status="SUCCEEDED", score=None, error="", folder=""):
    result = {} if score is None else {"default": score}
    parameters = {"ratio": 0.123456, "pruner": "l1", "seed": 1000000}
    return TrialRecord(f"t{number}", number, status, parameters, result, folder, error)


def test_a_trials_files_are_copied_with_its_parameters(tmp_path):
    folder, out = tmp_path / "trial", tmp_path / "new" / "out"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(json.dumps({"of": name}))
    assert export_trial(trial(0, folder=str(folder)), out, command="never run") == {"of": "metrics.json"}
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, "parameters.json"])
    assert json.loads((out / "masks.pt").read_text()) == {"of": "masks.pt"}
    assert json.loads((out / "parameters.json").read_text())["ratio"] == 0.123456
    (folder / "settings.json").unlink()
    with pytest.raises(DataError, match=rf"must be on this machine, or run again here, got none \({folder}\)"):
        export_trial(trial(0, folder=str(folder)), tmp_path / "other")
    with pytest.raises(DataError, match=r"got none \(nowhere\)"):
        export_trial(trial(0), tmp_path / "other")


# In place of the program: the words that come behind the command are arguments of a function.
AGAIN = """  run() {
  echo noise; [ "$1 $2 $4" = "nni_topo.runs.trial --params --out" ] || exit 9
  echo "{\\"python\\": \\"$(command -v python)\\", \\"asked\\": $(cat "$3")}" > "$5/metrics.json"
}; run nni_topo.runs.trial
"""


def test_a_trial_is_run_again_with_its_parameters_by_this_python(tmp_path, capfd):
    out = tmp_path / "a folder"
    metrics = export_trial(trial(0, folder=str(tmp_path)), out, command=AGAIN)
    assert Path(metrics["python"]).parent == Path(sys.executable).parent
    assert metrics["asked"] == {"ratio": 0.123456, "pruner": "l1", "seed": 1000000}
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", ['it\'s "out"', "two words; exit 3", "$HOME of `id`"])
def test_a_folder_of_any_name_takes_what_is_run_again(name, tmp_path):
    # A shell would take quotes apart, split words and put in the variable.
    out = tmp_path / name
    assert export_trial(trial(0), out, command=AGAIN)["asked"] == trial(0).parameters
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo one >&2; echo two >&2; echo >&2; exit 3", "two"),
        ("printf '╭ title\\n│ what is │\\n│ wrong │\\n│ ─────\\n│ help │\\n╰' >&2; exit 2", "what is wrong"),
    ],
)
def test_a_trial_that_fails_again_says_why(command, said, tmp_path):
    with pytest.raises(DataError) as found:
        export_trial(trial(0), tmp_path, command=f"{command} # nni_topo.runs.trial")
    assert str(found.value) == f"a trial must run again here, got: {said} (t0)"


def test_trials_are_listed_with_their_scores_and_errors(tmp_path):
    trials = [trial(0, score=0.25), trial(1, "FAILED", error="it was wrong"), trial(2, "WAITING")]
    said = io.StringIO()
    Console(file=said, width=120).print(trials_table(trials, "experiment abc"))
    title, *lines = said.getvalue().splitlines()
    assert title.startswith("experiment abc")  # on the left
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [
        ["0", "t0", "SUCCEEDED", "0.2500", "ratio=0.123, pruner=l1, seed=1000000"],
        ["1", "t1", "FAILED", "", "it was wrong"],
        ["2", "t2", "WAITING", "", "ratio=0.123, pruner=l1, seed=1000000"],
    ]
    assert in_words({}) == ""
    path = save_trials(trials, tmp_path / "new" / "out")
    assert path == tmp_path / "new" / "out" / "trials.json"
    assert [each["id"] for each in json.loads(path.read_text())] == ["t0", "t1", "t2"]
    assert not any("folder" in each for each in json.loads(path.read_text()))
