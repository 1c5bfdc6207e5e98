"""NNI experiments whose trials prune: starting them, reading their trials, and exporting the results."""
