"""NNI experiments with pruning as the trial: what a trial does, and experiments from start to export."""
