"""NNI experiments with pruning as the trial: what a trial does, and experiments from start to export."""

from nni_topo.runs.experiment.pairing import next_parameters

__all__ = ["next_parameters"]
