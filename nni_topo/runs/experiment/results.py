"""The results of an experiment: a table of all trials, and the best one's dense model and config_list."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from rich.table import Table

from nni_topo.disk import check_free_disk, output_folder, read_json, whole_file, without_folders, write_json
from nni_topo.errors import DataError
from nni_topo.runs.experiment.trials import TrialRecord
from nni_topo.runs.provenance import Record
from nni_topo.runs.trial import CONFIG_LIST, DENSE, MASKS, METRICS, SETTINGS

PARAMETERS, TRIALS = "parameters.json", "trials.json"
_FILES = (DENSE, CONFIG_LIST, MASKS, SETTINGS, METRICS)
_PROGRAM = "nni_topo.runs.trial"


def export_trial(trial: TrialRecord, out: str | Path, *, command: str | None = None) -> Record:
    """Copy a succeeded trial's dense model, masks, config_list, settings and metrics; return the metrics.

    If its files aren't on this machine, the experiment's trial ``command`` is run here with its parameters. DataError
    without a command, if it doesn't run ``nni_topo.runs.trial`` or fails, or if the disk is full.
    """
    out, folder = Path(out), Path(trial.folder or "nowhere")
    check_free_disk(out)
    output_folder(out)
    write_json(out / PARAMETERS, trial.parameters)
    if all((folder / name).is_file() for name in _FILES):
        for name in _FILES:
            with whole_file(out / name) as part:
                shutil.copyfile(folder / name, part)
    elif command is None:
        raise DataError(f"a trial's files must be on this machine, or run again here, got none ({folder})")
    elif _PROGRAM not in command:
        raise DataError(f"a trial can be run again if its command is that of {_PROGRAM}, got {command!r} ({trial.id})")
    else:
        words = f"{command.strip()} --params {shlex.quote(str(out / PARAMETERS))} --out {shlex.quote(str(out))}"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        done = subprocess.run(
            ["bash", "-c", words], env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
            # Errors of the command line are in a box, above a rule and a hint where to find help.
            boxed = [line.strip("│ ") for line in lines if line.startswith("│")]
            box = list(takewhile(lambda text: not text.startswith("─"), boxed))
            raise DataError(f"a trial must run again here, got: {' '.join(box) or lines[-1]} ({trial.id})")
    metrics: Record = read_json(out / METRICS)
    return metrics


def save_trials(trials: Sequence[TrialRecord], out: str | Path) -> Path:
    """Write all trials as JSON, without their folders on this machine, and return the file."""
    path = Path(out) / TRIALS
    output_folder(path.parent)
    found = [{**trial.to_dict(), "error": without_folders(trial.error)} for trial in trials]
    write_json(path, [{key: value for key, value in each.items() if key != "folder"} for each in found])
    return path


def trials_table(trials: Sequence[TrialRecord], title: str) -> Table:
    """Return a table of trials with parameters, scores and reasons of failures."""
    table = Table("trial", "id", "status", "score", "parameters", title=title, title_justify="left")
    for trial in trials:
        score = "" if trial.score is None else f"{trial.score:.4f}"
        table.add_row(str(trial.number), trial.id, trial.status, score, trial.error or in_words(trial.parameters))
    return table


def in_words(parameters: Record) -> str:
    """Return parameters as one line of text."""
    return ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in parameters.items())
