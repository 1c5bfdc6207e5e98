"""``nni-topo experiment run|status|best|export``."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from nni.experiment import Experiment
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from nni_topo.disk import check_free_disk
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
from nni_topo.runs.experiment.results import (
    export_trial,
    in_words,
    save_best,
    save_trials,
    trial_sentence,
    trials_table,
)
from nni_topo.runs.experiment.trials import FAILED, STOPPED, TrialRecord, best_trial, read_trials, stopped
from nni_topo.studies.report import write_report
from nni_topo.studies.study import Verb


@dataclass(frozen=True, kw_only=True)
class Run(Verb):
    """Start NNI's manager, show progress, export the best trial, stop the manager."""

    config: tyro.conf.Positional[Path | None] = None  # NNI's experiment file; see configs/experiments/
    resume: str | None = None  # identifier of an experiment that was stopped or killed, to continue it
    port: int = 8080  # port of the web page and the REST API
    listen_everywhere: bool = False  # listen on all interfaces, without a password, for trials on other machines
    out: Path  # output folder

    def run(self, console: Console) -> int:
        """Run the experiment to its end or to Ctrl-C."""
        if (self.config is None) == (self.resume is None):
            raise ConfigError("give either an experiment file or --resume ID, got both or neither (experiment run)")
        check_free_disk(self.out)
        config = None if self.config is None else load_experiment(self.config)
        # on SIGTERM the manager must be stopped too
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        experiment = start_experiment(config, self.port, resume=self.resume, everywhere=self.listen_everywhere)
        reach = "all interfaces, without a password" if self.listen_everywhere else "this machine only"
        console.print(f"experiment {experiment.id} at http://localhost:{self.port} ({reach})", highlight=False)
        how_to_resume = f"`nni-topo experiment run --resume {experiment.id} --out {self.out}` resumes it"
        try:
            trials, interrupted = _follow(experiment, console)
            status = self._export(experiment, trials, console, rerun=not interrupted)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(how_to_resume) from None
        if interrupted:
            raise KeyboardInterrupt(how_to_resume)
        return status

    def _export(self, experiment: Experiment, trials: list[TrialRecord], console: Console, *, rerun: bool) -> int:
        """Write and print an experiment's results; return the exit status. ``rerun``: whether a trial may run again."""
        save_trials(trials, self.out)
        if not rerun and not any(trial.is_candidate for trial in trials):
            console.print(f"no trial has succeeded yet · all trials: {self.out}", markup=False)
            return 1
        best = best_trial(trials, mode=optimize_mode(experiment.config))
        command = experiment.config.trial_command if rerun else None
        metrics = export_trial(best, self.out / "best", command=command)
        failed = [trial for trial in trials if trial.status in FAILED]
        document = {"experiment": experiment.id, "best": {**best.to_dict(), "metrics": metrics}}
        save_best(best, metrics, self.out)
        report = write_report(self.out)
        where = f"dense model and config_list: {self.out / 'best'} · all trials: {self.out} · report: {report}"
        lines: list[Any] = [*_in_lines(best, metrics), where]
        if failed:
            lines.append(Text(f"{len(failed)} of {len(trials)} trials failed", "red"))
        everything = {**document, "trials": [trial.to_dict() for trial in trials]}
        self.put_out(console, everything, lines)
        return 1 if failed else 0


@dataclass(frozen=True, kw_only=True)
class _Shown(Verb):
    """Base of the verbs that show an experiment."""

    id: tyro.conf.Positional[str | None] = None  # NNI's identifier; None: the experiment started last
    port: int | None = None  # port of the running experiment, instead of an identifier

    def chosen(self, trial: str | None = None) -> tuple[TrialRecord, str | None]:
        """Return the best trial, or the trial with the given identifier, and the experiment's trial command."""
        with opened(self.id, self.port) as experiment:
            trials = read_trials(experiment)
            profile = experiment.get_experiment_profile()["params"]
        mode = profile.get("tuner", {}).get("classArgs", {}).get("optimize_mode", "maximize")
        if trial is None:
            return best_trial(trials, mode=mode), profile.get("trialCommand")
        chosen_trial = next((record for record in trials if record.id == trial), None)
        if chosen_trial is None:
            raise DataError(f"a trial must be one of the experiment, got {trial!r} (trial)")
        return chosen_trial, profile.get("trialCommand")


@dataclass(frozen=True, kw_only=True)
class Status(_Shown):
    """Show the trials of a running or finished experiment."""

    def run(self, console: Console) -> int:
        """Print a table of the trials."""
        with opened(self.id, self.port) as experiment:
            (status, errors), trials = read_status(experiment), read_trials(experiment)
            if status in ENDED:
                trials = stopped(trials)
            document = {"experiment": experiment.id, "status": status, "errors": errors}
            parts: list[RenderableType] = [trials_table(trials, f"experiment {experiment.id}: {status.lower()}")]
            cut_short = sum(trial.status == STOPPED for trial in trials)
            if cut_short:
                how = f"nni-topo experiment run --resume {experiment.id} --out FOLDER"
                parts.append(f"{cut_short} stopped before their end; resume with: {how}")
            parts += [Text(error, "red") for error in errors]
            self.put_out(console, {**document, "trials": [trial.to_dict() for trial in trials]}, parts)
        return 0


@dataclass(frozen=True, kw_only=True)
class Best(_Shown):
    """Show the trial with the best score."""

    def run(self, console: Console) -> int:
        """Print the trial."""
        best, _ = self.chosen()
        self.put_out(console, best.to_dict(), [*_in_lines(best, {}), f"folder: {best.folder}"])
        return 0


@dataclass(frozen=True, kw_only=True)
class Export(_Shown):
    """Copy the best trial's dense model and config_list."""

    trial: str | None = None  # identifier of the trial to export; None: the best trial
    rerun: bool = False  # run the trial again on this machine if its files aren't here
    out: Path  # output folder

    def run(self, console: Console) -> int:
        """Copy the files and print the trial."""
        check_free_disk(self.out)
        chosen, command = self.chosen(self.trial)
        metrics = export_trial(chosen, self.out, command=command if self.rerun else None)
        lines = [*_in_lines(chosen, metrics), f"dense model and config_list: {self.out}"]
        self.put_out(console, {**chosen.to_dict(), "metrics": metrics}, lines)
        return 0


def _follow(experiment: Experiment, console: Console) -> tuple[list[TrialRecord], bool]:
    """Follow an experiment until its end or Ctrl-C, then stop it; return its trials and whether it was interrupted."""
    announced: set[str] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console)
    task = bar.add_task("trials", total=experiment.config.max_trial_number)

    def tell(status: str, trials: Sequence[TrialRecord]) -> None:
        finished = [trial for trial in trials if trial.is_finished]
        for trial in finished:
            if trial.id not in announced:
                announced.add(trial.id)
                if trial.score is None:
                    outcome = trial.error or "no error message"
                elif trial_sentence(trial):
                    outcome = f"{trial_sentence(trial)}, score {trial.score:.4f}"
                else:
                    outcome = f"{trial.score:.4f}"
                line = f"trial {trial.number} ({trial.id}) {trial.status.lower()}: {outcome}"
                console.print(f"{line} · {in_words(trial.parameters)}", markup=False, highlight=False, soft_wrap=True)
        bar.update(task, completed=len(finished), description=status.lower().replace("_", " "))

    try:
        with bar if console.is_terminal else nullcontext():
            return follow(experiment, tell), False
    except KeyboardInterrupt:
        console.print("interrupted: stopping the manager and its trials")
        trials = read_trials(experiment)
    finally:
        experiment.stop()
    return stopped(trials), True


def _in_lines(best: TrialRecord, metrics: dict[str, Any]) -> list[str]:
    """Return a trial's sentence, if it reports a cost, its scores and its parameters as lines."""
    shown = {**best.result, **{name: metrics[name] for name in ("test_accuracy",) if name in metrics}}
    named_scores = []
    for name, value in shown.items():
        label = "score" if name == "default" else name
        named_scores.append(f"{label} {value:.4f}")
    scores = ", ".join(named_scores)
    sentence = trial_sentence(best, metrics)
    lines = [f"best trial {best.number} ({best.id}): {scores}", in_words(best.parameters)]
    if sentence:
        lines.insert(0, sentence)
    return lines
