"""``nni-topo experiment run|status|best|export``: arguments and output."""

from __future__ import annotations

import argparse
import json
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nni.experiment import Experiment
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nni_topo.cli.arguments import add_out, add_verb
from nni_topo.errors import ConfigError, DataError
from nni_topo.runs.experiment.manager import (
    ENDED,
    follow,
    load_experiment,
    opened,
    optimize_mode,
    read_status,
    start_experiment,
)
from nni_topo.runs.experiment.results import export_trial, in_words, save_trials, trials_table
from nni_topo.runs.experiment.trials import FAILED, STOPPED, TrialRecord, best_trial, read_trials, stopped


def add_experiment(verbs: Any) -> None:
    """Add the verb ``experiment`` to the parsers of ``nni-topo``."""
    parts = verbs.add_parser("experiment", help="NNI experiments: run, status, best, export").add_subparsers(
        dest="part", required=True, metavar="PART"
    )
    run = add_verb(parts, "run", _run, "start NNI's manager, show progress, export the best trial, stop the manager")
    run.add_argument("config", type=Path, nargs="?", help="NNI's experiment file; see configs/experiments/")
    run.add_argument("--resume", metavar="ID", help="go on with an experiment that was stopped or killed")
    run.add_argument("--port", type=int, default=8080, help="of the web page and the REST API (default 8080)")
    run.add_argument(
        "--listen-everywhere",
        action="store_true",
        help="on all interfaces, without a password, which trials on other machines need (default: this machine only)",
    )
    add_out(run, None)
    for name, body, summary in (
        ("status", _status, "an experiment's trials, also of one that has ended"),
        ("best", _best, "the trial with the best score"),
        ("export", _export, "copy the best trial's dense model and config_list"),
    ):
        part = add_verb(parts, name, body, summary)
        part.add_argument("id", nargs="?", help="NNI's identifier (default: the experiment started last)")
        part.add_argument("--port", type=int, help="instead of an identifier: where the experiment runs")
        if name == "export":
            part.add_argument("--trial", metavar="ID", help="another trial than the best one")
            part.add_argument("--rerun", action="store_true", help="run it again here if its files aren't here")
            add_out(part, None)


def _run(options: argparse.Namespace, console: Console) -> int:
    if (options.config is None) == (options.resume is None):
        raise ConfigError("an experiment to run must be a file, or --resume ID, got both or neither (experiment run)")
    config = None if options.config is None else load_experiment(options.config)
    if threading.current_thread() is threading.main_thread():
        # a manager mustn't outlive a run that is told to end
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    experiment = start_experiment(config, options.port, resume=options.resume, everywhere=options.listen_everywhere)
    reach = "all interfaces, without a password" if options.listen_everywhere else "this machine only"
    console.print(f"experiment {experiment.id} at http://localhost:{options.port} ({reach})", highlight=False)
    way_on = f"`nni-topo experiment run --resume {experiment.id} --out {options.out}` goes on with it"
    try:
        trials, interrupted = _watched(experiment, console)
        status = _exported(experiment, trials, options, console, rerun=not interrupted)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(way_on) from None
    if interrupted:
        raise KeyboardInterrupt(way_on)
    return status


def _watched(experiment: Experiment, console: Console) -> tuple[list[TrialRecord], bool]:
    """Watch an experiment to its end, or until Ctrl-C, and stop it; return its trials and whether it was cut short."""
    try:
        return _followed(experiment, console), False
    except KeyboardInterrupt:
        console.print("interrupted: stopping the manager and its trials")
        trials = read_trials(experiment)
    finally:
        experiment.stop()
    return stopped(trials), True


def _exported(
    experiment: Experiment, trials: list[TrialRecord], options: argparse.Namespace, console: Console, *, rerun: bool
) -> int:
    """Write what an experiment found and say so; return the exit status."""
    save_trials(trials, options.out)
    if not rerun and not any(trial.is_candidate for trial in trials):
        console.print(f"no trial has succeeded yet · all trials: {options.out}", markup=False)
        return 1
    best = best_trial(trials, mode=optimize_mode(experiment.config))
    command = experiment.config.trial_command if rerun else None
    metrics = export_trial(best, options.out / "best", command=command)
    failed = [trial for trial in trials if trial.status in FAILED]
    if options.json:
        document = {"experiment": experiment.id, "best": {**best.to_dict(), "metrics": metrics}}
        print(json.dumps({**document, "trials": [trial.to_dict() for trial in trials]}, indent=1, sort_keys=True))
        return 1 if failed else 0
    _show_best(best, metrics, console)
    console.print(f"dense model and config_list: {options.out / 'best'} · all trials: {options.out}", markup=False)
    if failed:
        console.print(f"{len(failed)} of {len(trials)} trials failed", style="red")
    return 1 if failed else 0


def _followed(experiment: Experiment, console: Console) -> list[TrialRecord]:
    """Watch an experiment and print every trial that ends."""
    told: set[str] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("trials", total=experiment.config.max_trial_number)

        def tell(status: str, trials: Sequence[TrialRecord]) -> None:
            finished = [trial for trial in trials if trial.is_finished]
            for trial in finished:
                if trial.id not in told:
                    told.add(trial.id)
                    console.print(_line(trial), markup=False, highlight=False, soft_wrap=True)
            bar.update(task, completed=len(finished), description=status.lower().replace("_", " "))

        return follow(experiment, tell)


def _line(trial: TrialRecord) -> str:
    result = trial.error or "without a word" if trial.score is None else f"{trial.score:.4f}"
    return f"trial {trial.number} ({trial.id}) {trial.status.lower()}: {result} · {in_words(trial.parameters)}"


def _status(options: argparse.Namespace, console: Console) -> int:
    with opened(options.id, options.port) as experiment:
        (status, errors), trials = read_status(experiment), read_trials(experiment)
        if status in ENDED:
            trials = stopped(trials)
        if options.json:
            document = {"experiment": experiment.id, "status": status, "errors": errors}
            print(json.dumps({**document, "trials": [trial.to_dict() for trial in trials]}, indent=1, sort_keys=True))
            return 0
        console.print(trials_table(trials, f"experiment {experiment.id}: {status.lower()}"))
        cut_short = sum(trial.status == STOPPED for trial in trials)
        if cut_short:
            how = f"nni-topo experiment run --resume {experiment.id} --out FOLDER"
            console.print(f"{cut_short} stopped before their end; go on with: {how}", markup=False, soft_wrap=True)
        for error in errors:
            console.print(error, style="red", markup=False)
    return 0


def _best(options: argparse.Namespace, console: Console) -> int:
    best, _ = _chosen(options)
    if options.json:
        print(json.dumps(best.to_dict(), indent=1, sort_keys=True))
        return 0
    _show_best(best, {}, console)
    console.print(f"folder: {best.folder}", markup=False)
    return 0


def _export(options: argparse.Namespace, console: Console) -> int:
    chosen, command = _chosen(options)
    metrics = export_trial(chosen, options.out, command=command if options.rerun else None)
    if options.json:
        print(json.dumps({**chosen.to_dict(), "metrics": metrics}, indent=1, sort_keys=True))
        return 0
    _show_best(chosen, metrics, console)
    console.print(f"dense model and config_list: {options.out}", markup=False)
    return 0


def _chosen(options: argparse.Namespace) -> tuple[TrialRecord, str | None]:
    """Return the best trial, or the one asked for, and the experiment's trial command."""
    wanted = getattr(options, "trial", None)
    with opened(options.id, options.port) as experiment:
        trials = read_trials(experiment)
        profile = experiment.get_experiment_profile()["params"]
    mode = profile.get("tuner", {}).get("classArgs", {}).get("optimize_mode", "maximize")
    if wanted is None:
        return best_trial(trials, mode=mode), profile.get("trialCommand")
    found = next((trial for trial in trials if trial.id == wanted), None)
    if found is None:
        raise DataError(f"a trial must be one of the experiment, got {wanted!r} (trial)")
    return found, profile.get("trialCommand")


def _show_best(best: TrialRecord, metrics: dict[str, Any], console: Console) -> None:
    shown = {**best.result, **{name: metrics[name] for name in ("test_accuracy",) if name in metrics}}
    result = ", ".join(f"{'score' if name == 'default' else name} {value:.4f}" for name, value in shown.items())
    console.print(f"best trial {best.number} ({best.id}): {result}", markup=False, highlight=False, soft_wrap=True)
    console.print(in_words(best.parameters), markup=False, highlight=False, soft_wrap=True)
