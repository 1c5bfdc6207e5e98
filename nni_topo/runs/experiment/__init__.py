"""NNI experiments with pruning as the trial: what a trial does, and experiments from start to export."""

from nni_topo.runs.experiment.manager import follow, load_experiment, opened, start_experiment
from nni_topo.runs.experiment.pairing import next_parameters
from nni_topo.runs.experiment.pipeline import reported, run_trial
from nni_topo.runs.experiment.results import export_trial
from nni_topo.runs.experiment.settings import TrialSettings, read_parameters, with_parameters
from nni_topo.runs.experiment.trials import TrialRecord, best_trial, read_trials

__all__ = [
    "TrialRecord",
    "TrialSettings",
    "best_trial",
    "export_trial",
    "follow",
    "load_experiment",
    "next_parameters",
    "opened",
    "read_parameters",
    "read_trials",
    "reported",
    "run_trial",
    "start_experiment",
    "with_parameters",
]
