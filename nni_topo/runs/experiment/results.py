"""The results of an experiment: a table of all trials, and the best one's dense model and config_list."""

from __future__ import annotations

import math
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
from nni_topo.runs.headline import headline, headline_of_records
from nni_topo.runs.provenance import Record
from nni_topo.runs.trial import CONFIG_LIST, DENSE, MASKS, METRICS, SETTINGS

PARAMETERS, TRIALS, BEST = "parameters.json", "trials.json", "best.json"
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
    write_json(path, list(map(_for_a_file, trials)))
    return path


def save_best(trial: TrialRecord, metrics: Record, out: str | Path) -> Path:
    """Write the best trial with its metrics and a sentence about it as JSON, and return the file."""
    path = Path(out) / BEST
    sentence = f"best trial {trial.number}: {trial_sentence(trial, metrics) or f'a score of {trial.score:.4g}'}"
    write_json(path, {"sentence": sentence, **_for_a_file(trial), "metrics": metrics}, sort=False)
    return path


def trial_sentence(trial: TrialRecord, metrics: Record | None = None) -> str:
    """Return what is left of the cost and how good the network is, by the metrics or else by what the trial reported.

    The text is empty if the trial is one of another program, which reports no share of a cost.
    """
    if metrics and "flops_share" in metrics:
        return headline_of_records([metrics])
    if "flops_share" not in trial.result:
        return ""
    return headline(
        time=trial.result.get("latency_share", math.nan),
        macs=trial.result["flops_share"],
        accuracy=trial.result.get("accuracy", math.nan),
        measured_on="the validation images",
    )


def _for_a_file(trial: TrialRecord) -> Record:
    """Return a trial without its folder on this machine."""
    values = {**trial.to_dict(), "error": without_folders(trial.error)}
    del values["folder"]
    return values


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
