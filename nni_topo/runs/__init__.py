"""Single runs: pruning, `shrink`, trials of NNI experiments, and pruning block by block."""
